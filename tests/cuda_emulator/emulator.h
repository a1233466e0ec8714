// A host twin of csrc/cuda/ptx.cuh and of what the kernels use of CUDA itself: test equipment.
//
// A block's threads are fibers on one thread of the processor. They take turns in an order drawn
// from a seed, each until it meets a barrier or an instruction of its whole warp, so that a missing
// barrier shows as a result that depends on the seed, or as the poison that shared memory starts
// with. Blocks run one after the other, in an order drawn from the same seed. What is copied
// asynchronously is there once its group is waited for, no sooner.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "product.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Device {
  int multiprocessors = 2;  // few, so that small cases give each block several tiles
  int64_t most_shared_bytes = 163 * 1024;
  // Blocks of the kernel at a place that a multiprocessor has room for, or null: a rule of thumb.
  int64_t (*resident_blocks)(int64_t place, int threads, int64_t shared_bytes) = nullptr;
};

extern Index thread, block, block_size, grid_size;
extern Device device;
extern bool recording;  // launches are written down; their first block runs without its data, as
                        // the last one

// An access of this thread, seen by counters.cpp while it counts. The place in the code that it
// returns to is the program point; all helpers below are inlined, so that each use is one of its
// own. False: there is no data, leave it; what is read is then 1. So it is with all but shared
// memory while launches are recorded.
enum Access { kRead, kWritten, kCopied, kSharedRead, kSharedWritten, kMatrixRead };
bool count(Access access, const void* p, int bytes);
// How far from the library's beginning.
int64_t place_of(const void* code);
// Of this thread's warp: multiplications as large as m16n8k16, and the reads of 512 bytes of shared
// memory that a warpgroup's products make for each of its warps.
void count_multiplications(int m16n8k16);
void count_matrix_reads(int reads);

void seed(uint64_t value);  // of the orders of threads and blocks
void barrier();
unsigned char* shared();
void copy_later(void* shared, const void* global);
void end_group();                // of copies
void finish_copies(int newest);  // of all groups but these
void write_later(void* shared, const void* bytes16);
void finish_writes();
void multiply_later(std::function<void()> product);
void end_products();               // of a group
void finish_products(int newest);  // of all groups but these
void check_aligned(const void* p, const char* what);
void sleep(const void* barrier);  // until somebody calls wake(barrier)
void wake(const void* barrier);

// An instruction of a whole warp: `mine` are this lane's operands, all() runs once, with every
// lane's. Lanes that meet at different instructions are an error.
void together(void* mine, void (*all)(void* (&lanes)[32]));

void run(const char* name, const void* symbol, Index grid, int threads, int64_t shared_bytes,
         const std::function<void()>& kernel);

}  // namespace emulator

#define threadIdx (emulator::thread)
#define blockIdx (emulator::block)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() { emulator::barrier(); }
inline void __threadfence() {}
inline void __syncwarp() {
  emulator::together(nullptr, [](void*(&)[32]) {});
}
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
using std::sqrt;

struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace preact::cuda {

// --- numbers -------------------------------------------------------------------------------------

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float widen(f16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = (x.bits & 0x7fffu) << 13;
  const bool is_finite = rest < 0x0f800000;
  const float size = is_finite ? std::bit_cast<float>(rest) * 0x1p112f  // the exponent's other bias
                               : std::bit_cast<float>(rest | 0x7f800000);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(size) | sign);
}
inline float widen(tf32 x) { return x.value; }

inline uint32_t narrow_one(float x, bf16) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t narrow_one(float x, f16) {
  return std::bit_cast<uint16_t>(static_cast<_Float16>(x));
}
template <typename T>
uint32_t narrow_pair(float low, float high, T) {
  return narrow_one(low, T{}) | narrow_one(high, T{}) << 16;
}

inline void round_to_tf32(uint32_t& bits) {
  if (std::isfinite(std::bit_cast<float>(bits))) bits = (bits + 0x1000) & ~0x1fffu;
}

inline float not_negative(float x) { return x < 0.f ? 0.f : x; }
template <typename T>
uint32_t narrow_pair_not_negative(float low, float high, T) {
  return narrow_pair(not_negative(low), not_negative(high), T{});
}

// As far off as the instruction may be.
inline float reciprocal(float x) { return std::nextafter(1.f / x, 2.f); }

// --- memory --------------------------------------------------------------------------------------

inline int warp_number() { return static_cast<int>(threadIdx.x) / 32; }

inline unsigned char* shared_memory() { return emulator::shared(); }

template <typename T>
PREACT_DEVICE const T* behind(const T* p, uint32_t count, uint32_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(p) +
                                    uint64_t{count} * bytes);
}

template <typename T>
PREACT_DEVICE Bytes16 load16(const T* p) {
  emulator::check_aligned(p, "load16");
  if (!emulator::count(emulator::kRead, p, 16)) return {};
  Bytes16 v;
  std::memcpy(&v, p, 16);
  return v;
}
template <typename T>
PREACT_DEVICE T load(const T* p) {
  return emulator::count(emulator::kRead, p, sizeof(T)) ? *p : T{1};
}
PREACT_DEVICE float load_fresh(const float* p) { return load(p); }

template <typename T>
PREACT_DEVICE void store16(T* p, const Bytes16& v) {
  emulator::check_aligned(p, "store16");
  if (emulator::count(emulator::kWritten, p, 16)) std::memcpy(p, &v, 16);
}
template <typename T>
PREACT_DEVICE void store(T* p, T v) {
  if (emulator::count(emulator::kWritten, p, sizeof(T))) *p = v;
}

template <typename T>
PREACT_DEVICE T load_shared(const T* p) {
  if (sizeof(T) == 16) emulator::check_aligned(p, "load_shared");
  emulator::count(emulator::kSharedRead, p, sizeof(T));
  return *p;
}
template <typename T>
PREACT_DEVICE void store_shared(T* p, T v) {
  if (sizeof(T) == 16) emulator::check_aligned(p, "store_shared");
  emulator::count(emulator::kSharedWritten, p, sizeof(T));
  *p = v;
}

using SharedAddress = unsigned char*;
PREACT_DEVICE SharedAddress shared_address(void* shared) {
  return static_cast<unsigned char*>(shared);
}

PREACT_DEVICE void copy16(SharedAddress shared, const void* global, bool there) {
  static constexpr Bytes16 kZeros{};
  emulator::check_aligned(shared, "copy16");
  emulator::check_aligned(global, "copy16");
  asm("" : "+r"(there));  // or the compiler may have a place for each, of which lanes meet in none
  emulator::count(emulator::kSharedWritten, shared, 16);
  const bool data = !there || emulator::count(emulator::kCopied, global, 16);
  if (data) emulator::copy_later(shared, there ? global : &kZeros);
}
inline void copies_commit() { emulator::end_group(); }
inline void copies_wait(int newest) { emulator::finish_copies(newest); }

inline bool arrives_last(int* ticket, int calls) {
  return emulator::recording || (*ticket)++ == calls - 1;
}

// --- tensor cores --------------------------------------------------------------------------------

struct LoadMatrices {
  const void* row;
  uint32_t out[4];
};
template <bool kTransposed>
void load_all_matrices(void* (&lanes)[32]) {
  const auto lane = [&](int l) { return static_cast<LoadMatrices*>(lanes[l]); };
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t values[8][8];
    for (int row = 0; row < 8; ++row) {
      const void* const p = lane(8 * matrix + row)->row;
      emulator::check_aligned(p, "ldmatrix");
      std::memcpy(values[row], p, 16);
    }
    for (int l = 0; l < 32; ++l) {
      const int row = l / 4, column = l % 4 * 2;
      const uint32_t low = kTransposed ? values[column][row] : values[row][column];
      const uint32_t high = kTransposed ? values[column + 1][row] : values[row][column + 1];
      lane(l)->out[matrix] = low | high << 16;
    }
  }
}
PREACT_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  LoadMatrices mine{row, {}};
  if (!emulator::count(emulator::kMatrixRead, row, 16)) return;
  emulator::together(&mine, load_all_matrices<false>);
  std::memcpy(out, mine.out, sizeof(out));
}
PREACT_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  LoadMatrices mine{row, {}};
  if (!emulator::count(emulator::kMatrixRead, row, 16)) return;
  emulator::together(&mine, load_all_matrices<true>);
  std::memcpy(out, mine.out, sizeof(out));
}

struct MatrixMultiply {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};
// In product.cpp; of TF32 m16n8k8.
template <typename T>
void multiply_all_matrices(void* (&lanes)[32]);
template <>
void multiply_all_matrices<tf32>(void* (&lanes)[32]);
template <typename T>
void matrix_multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  emulator::count_multiplications(1);
  MatrixMultiply mine{c, a, {b0, b1}};
  emulator::together(&mine, multiply_all_matrices<T>);
}

// --- launches ------------------------------------------------------------------------------------

inline int multiprocessors(int) { return emulator::device.multiprocessors; }
// As shared memory has room, of which the system takes 1 KB for each block; a thread has as many
// registers as leave room for 256, or, of a block that has more, for 768.
template <typename Kernel>
int64_t resident_blocks(Kernel kernel, int threads, int64_t shared_bytes, int) {
  if (const auto known = emulator::device.resident_blocks)
    return known(emulator::place_of(reinterpret_cast<const void*>(kernel)), threads, shared_bytes);
  constexpr int64_t kSystem = 1024;
  const int64_t room = (emulator::device.most_shared_bytes + kSystem) / (shared_bytes + kSystem);
  return std::min<int64_t>(threads > 256 ? std::max(768 / threads, 1) : 256 / threads, room);
}
inline int64_t most_shared_bytes(int) { return emulator::device.most_shared_bytes; }

struct Grid {
  unsigned x, y = 1, z = 1;
};

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
            int64_t shared_bytes, int, void*, const Arguments&... arguments) {
  emulator::run(name, reinterpret_cast<const void*>(kernel), {grid.x, grid.y, grid.z}, threads,
                shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace preact::cuda
