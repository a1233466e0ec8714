// The few instructions that C++ has no words for, and the CUDA runtime calls of a launch. Nothing
// else in this folder depends on the device: tests/cuda_emulator has a host twin of all below.
#pragma once

#include <cstdint>

#include "../preact.h"

#define PREACT_DEVICE __device__ __forceinline__

namespace preact::cuda {

struct f16 {
  uint16_t bits;
};
// float32 in memory, rounded to TF32 where it is multiplied.
struct tf32 {
  float value;
};
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

}  // namespace preact::cuda

#ifndef __CUDACC__
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "remembered.h"

namespace preact::cuda {

// --- numbers -------------------------------------------------------------------------------------

PREACT_DEVICE float widen(float x) { return x; }
PREACT_DEVICE float widen(bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
PREACT_DEVICE float widen(f16 x) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
}
PREACT_DEVICE float widen(tf32 x) { return x.value; }

// The bits of a float32, to the nearest of TF32's 11 significant bits, ties away from zero.
PREACT_DEVICE void round_to_tf32(uint32_t& bits) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(__uint_as_float(bits)));
}

// Two neighbours in memory, to nearest even; low comes first.
PREACT_DEVICE uint32_t narrow_pair(float low, float high, bf16) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
PREACT_DEVICE uint32_t narrow_pair(float low, float high, f16) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// Likewise, of what is not negative: else 0. NaN stays NaN.
PREACT_DEVICE uint32_t narrow_pair_not_negative(float low, float high, bf16) {
  uint32_t out;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
PREACT_DEVICE uint32_t narrow_pair_not_negative(float low, float high, f16) {
  uint32_t out;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// NaN stays NaN.
PREACT_DEVICE float not_negative(float x) {
  float out;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(out) : "f"(x));
  return out;
}

// 1 / x to the last bit but one, of a normal number
PREACT_DEVICE float reciprocal(float x) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// --- threads ------------------------------------------------------------------------------------

// The warp's number in its block, which the compiler knows to be the same in all lanes.
PREACT_DEVICE int warp_number() {
  return __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0);
}

// --- memory --------------------------------------------------------------------------------------

PREACT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// The address `count` times `bytes` behind p, in one instruction: of the same product of uint64_t
// nvcc makes up to five.
template <typename T>
PREACT_DEVICE const T* behind(const T* p, uint32_t count, uint32_t bytes) {
  const T* out;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(out) : "r"(count), "r"(bytes), "l"(p));
  return out;
}

// Of an operator's input, which no kernel writes meanwhile.
template <typename T>
PREACT_DEVICE Bytes16 load16(const T* p) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
PREACT_DEVICE float load(const float* p) { return __ldg(p); }
PREACT_DEVICE bf16 load(const bf16* p) { return {__ldg(&p->bits)}; }
PREACT_DEVICE f16 load(const f16* p) { return {__ldg(&p->bits)}; }
PREACT_DEVICE tf32 load(const tf32* p) { return {__ldg(&p->value)}; }

// Of what other blocks of this launch have written.
PREACT_DEVICE float load_fresh(const float* p) { return __ldcg(p); }

template <typename T>
PREACT_DEVICE void store16(T* p, const Bytes16& v) {
  // Of a uint4 whose words are used otherwise too, nvcc makes four stores.
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}
template <typename T>
PREACT_DEVICE void store(T* p, T v) {
  *p = v;
}

// Shared memory, each T in one instruction; the emulator counts what goes through here.
template <typename T>
PREACT_DEVICE T load_shared(const T* p) {
  return *p;
}
template <>
PREACT_DEVICE Bytes16 load_shared(const Bytes16* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
template <typename T>
PREACT_DEVICE void store_shared(T* p, T v) {
  *p = v;
}
template <>
PREACT_DEVICE void store_shared(Bytes16* p, Bytes16 v) {
  *reinterpret_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

// Where something lies in shared memory, counted in bytes.
using SharedAddress = uint32_t;
PREACT_DEVICE SharedAddress shared_address(const void* shared) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(shared));
}

// Copies 16 bytes from global into shared memory, or zeros if they are not there, which are not
// looked for then; done after copies_wait() by the same thread.
PREACT_DEVICE void copy16(SharedAddress shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(there ? 16 : 0)
               : "memory");
}
// Ends a group of copies, which may be empty.
PREACT_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all groups are there but the newest ones, at most two, that may still be under way.
PREACT_DEVICE void copies_wait(int newest) {
  if (newest == 0)
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  else if (newest == 1)
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  else
    asm volatile("cp.async.wait_group 2;" ::: "memory");
}

// Whether this is the last of so many calls with this ticket, 0 at launch.
PREACT_DEVICE bool arrives_last(int* ticket, int calls) {
  return atomicAdd(ticket, 1) == calls - 1;
}

// --- tensor cores --------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8, and
// gets of each matrix the numbers 2 * (l % 4) and the next of row l / 4. Or four 8x4 matrices of
// 32-bit numbers, of which it gets number l % 4 of row l / 4.
PREACT_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  const SharedAddress address = shared_address(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address));
}
PREACT_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  const SharedAddress address = shared_address(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address));
}

// c[16, 8] += a[16, 16] b[16, 8], spread over a warp as PTX has it for mma.m16n8k16.
PREACT_DEVICE void matrix_multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
PREACT_DEVICE void matrix_multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   f16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c[16, 8] += a[16, 8] b[8, 8] of rounded numbers, spread over a warp as in mma.m16n8k8.
PREACT_DEVICE void matrix_multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   tf32) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- launches ------------------------------------------------------------------------------------

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("fused_preact: ") + what + ": " + cudaGetErrorString(error));
}

inline int device_attribute(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}
inline int multiprocessors(int device) {
  return device_attribute(device, cudaDevAttrMultiProcessorCount);
}
inline int64_t most_shared_bytes(int device) {
  return device_attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Lets a kernel have so much shared memory. 48 KB it has without. Once for all that the device has:
// what another thread launches at the same time may take more.
template <typename... Parameters>
void allow_shared_bytes(void (*kernel)(Parameters...), int64_t bytes, int device) {
  if (bytes <= 48 * 1024) return;
  static Remembered<bool, 2> allowed;
  allowed.get({reinterpret_cast<int64_t>(kernel), device}, [&] {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(most_shared_bytes(device))),
          "cudaFuncSetAttribute");
    return true;
  });
}

// How many blocks of a kernel a multiprocessor has room for at once.
template <typename... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), int threads, int64_t shared_bytes,
                        int device) {
  static Remembered<int64_t, 4> known;  // the runtime takes microseconds to say it again
  return known.get({reinterpret_cast<int64_t>(kernel), threads, shared_bytes, device}, [&] {
    int blocks = 0;
    check(cudaSetDevice(device), "cudaSetDevice");
    allow_shared_bytes(kernel, shared_bytes, device);
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads,
                                                        static_cast<size_t>(shared_bytes)),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return int64_t{blocks};
  });
}

struct Grid {
  unsigned x, y = 1, z = 1;
};

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
            int64_t shared_bytes, int device, void* stream, const Arguments&... arguments) {
  check(cudaSetDevice(device), name);
  allow_shared_bytes(kernel, shared_bytes, device);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

}  // namespace preact::cuda

#endif
