// The instructions of compute capability 9.0a: barriers in shared memory, and products of a
// warpgroup, four warps, whose operands lie there. tests/cuda_emulator has a host twin.
#pragma once

#include "../ptx.cuh"

namespace preact::cuda {

constexpr int kWarpgroup = 128;      // threads
constexpr int kProductRows = 64;     // of a warpgroup's product
constexpr int kProductDepth = 16;    // numbers of 16 bits that one instruction sums over
constexpr int kCoreRow = 16;         // bytes: eight numbers
constexpr int kCore = 8 * kCoreRow;  // a core matrix: eight rows, one behind the other

// Registers of each thread at launch, with so many blocks of a multiprocessor. A block's threads
// may share them out anew, and wait for ever if they ask for more.
constexpr int launch_registers(int threads, int blocks) {
  return 65536 / (threads * blocks) / 8 * 8;
}
constexpr bool registers_suffice(int threads, int blocks, int taking, int registers, int others) {
  return taking * registers + (threads - taking) * others <=
         threads * launch_registers(threads, blocks);
}

}  // namespace preact::cuda

#ifndef __CUDACC__
#include "emulator_sm90.h"
#else

namespace preact::cuda {

// --- barriers ------------------------------------------------------------------------------------

// Counts arrivals; a phase ends with the last of them and the next begins. Phases are 0, 1, 0, ...
struct alignas(8) Barrier {
  uint64_t state;
};

// By one thread; a __syncthreads() has to follow.
PREACT_DEVICE void barrier_begin(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
PREACT_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Until the phase has ended; the one before phase 0 has.
PREACT_DEVICE void barrier_wait(Barrier* barrier, int phase) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(phase)
        : "memory");
  } while (ended == 0);
}

// --- roles ---------------------------------------------------------------------------------------

// The thread's number in its warp. What is made of it is made anew each time, and is in no register
// meanwhile.
PREACT_DEVICE int lane_number() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// What lane `lane` % 32 has; all lanes of the warp have to ask.
PREACT_DEVICE int of_lane(int value, int lane) { return __shfl_sync(0xffffffff, value, lane); }

// --- registers -----------------------------------------------------------------------------------

// How many registers each thread of this warpgroup has from here on, a multiple of 8.
template <int kRegisters>
PREACT_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
PREACT_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- operands ------------------------------------------------------------------------------------

// A piece of an operand; products see it once this thread has called operands_written().
PREACT_DEVICE void store_operand(Bytes16* shared, const Bytes16& v) { store_shared(shared, v); }
// What this thread has written, or its copies that it has waited for.
PREACT_DEVICE void operands_written() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// An operand in core matrices: one is eight pieces of eight numbers, 128 bytes in a row. `along`
// and `across` are the bytes from one to the next, along what is summed over and across it.
struct Operand {
  uint64_t bits;

  PREACT_DEVICE Operand(const void* shared, int along, int across)
      : bits(uint64_t{shared_address(shared) >> 4} | static_cast<uint64_t>(along >> 4) << 16 |
             static_cast<uint64_t>(across >> 4) << 32) {}
  PREACT_DEVICE Operand moved(int bytes) const {
    Operand other = *this;
    other.bits += static_cast<uint64_t>(bytes >> 4);
    return other;
  }
};

// --- products ------------------------------------------------------------------------------------

// Before the first product of a group: its sums are in their registers.
PREACT_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PREACT_DEVICE void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all groups are done but so many of the newest ones.
template <int kNewest>
PREACT_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewest) : "memory");
}
// The sums are read after the wait before, not sooner.
template <int kSums>
PREACT_DEVICE void products_done(float (&c)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// c[64, N] = a[64, 16] b[16, N], added to c if `add`, over a warpgroup: thread l of warp w has
// c[4 * j + 2 * h + e] at row 16 * w + l / 4 + 8 * h, column 8 * j + l % 4 * 2 + e. The eight
// numbers of a piece follow one another along what is summed over, or, with kA or kB, across it.
#define PREACT_PRODUCT_64(T, ptx)                                                                 \
  template <bool kA, bool kB>                                                                     \
  PREACT_DEVICE void warpgroup_multiply(float (&c)[32], const Operand& a, const Operand& b,       \
                                        bool add, T) {                                            \
    asm volatile(                                                                                 \
        "{\n"                                                                                     \
        ".reg .pred add;\n"                                                                       \
        "setp.ne.b32 add, %34, 0;\n"                                                              \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." ptx "." ptx                                 \
        " {"                                                                                      \
        "%0, %1, %2, %3, %4, %5, %6, %7, "                                                        \
        "%8, %9, %10, %11, %12, %13, %14, %15, "                                                  \
        "%16, %17, %18, %19, %20, %21, %22, %23, "                                                \
        "%24, %25, %26, %27, %28, %29, %30, %31"                                                  \
        "}, %32, %33, add, 1, 1, %35, %36;\n"                                                     \
        "}"                                                                                       \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),     \
          "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), \
          "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]),           \
          "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]),           \
          "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])            \
        : "l"(a.bits), "l"(b.bits), "r"(static_cast<int>(add)), "n"(static_cast<int>(kA)),        \
          "n"(static_cast<int>(kB)));                                                             \
  }
PREACT_PRODUCT_64(bf16, "bf16")
PREACT_PRODUCT_64(f16, "f16")
#undef PREACT_PRODUCT_64
#define PREACT_PRODUCT_128(T, ptx)                                                                \
  template <bool kA, bool kB>                                                                     \
  PREACT_DEVICE void warpgroup_multiply(float (&c)[64], const Operand& a, const Operand& b,       \
                                        bool add, T) {                                            \
    asm volatile(                                                                                 \
        "{\n"                                                                                     \
        ".reg .pred add;\n"                                                                       \
        "setp.ne.b32 add, %66, 0;\n"                                                              \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." ptx "." ptx                                \
        " {"                                                                                      \
        "%0, %1, %2, %3, %4, %5, %6, %7, "                                                        \
        "%8, %9, %10, %11, %12, %13, %14, %15, "                                                  \
        "%16, %17, %18, %19, %20, %21, %22, %23, "                                                \
        "%24, %25, %26, %27, %28, %29, %30, %31, "                                                \
        "%32, %33, %34, %35, %36, %37, %38, %39, "                                                \
        "%40, %41, %42, %43, %44, %45, %46, %47, "                                                \
        "%48, %49, %50, %51, %52, %53, %54, %55, "                                                \
        "%56, %57, %58, %59, %60, %61, %62, %63"                                                  \
        "}, %64, %65, add, 1, 1, %67, %68;\n"                                                     \
        "}"                                                                                       \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),     \
          "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), \
          "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]),           \
          "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]),           \
          "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),           \
          "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]),           \
          "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]),           \
          "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]), "+f"(c[49]),           \
          "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),           \
          "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]),           \
          "+f"(c[62]), "+f"(c[63])                                                                \
        : "l"(a.bits), "l"(b.bits), "r"(static_cast<int>(add)), "n"(static_cast<int>(kA)),        \
          "n"(static_cast<int>(kB)));                                                             \
  }
PREACT_PRODUCT_128(bf16, "bf16")
PREACT_PRODUCT_128(f16, "f16")
#undef PREACT_PRODUCT_128

// --- devices -------------------------------------------------------------------------------------

// Code for 9.0a runs on 9.0 alone.
inline bool has_warpgroups(int device) {
  return device_attribute(device, cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(device, cudaDevAttrComputeCapabilityMinor) == 0;
}

}  // namespace preact::cuda

#endif
