// What the CPU kernels share: storage types, per-thread buffers, the split of work.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "../preact.h"

// One source, several instruction sets: the loader picks the clone that the processor runs. What
// picks for itself (the matrix tile) does so where there are PREACT_VERSIONS.
// Sanitizers start after the loader has chosen, so their builds have the default only.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define PREACT_VERSIONS
#define PREACT_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define PREACT_CLONES
#endif
#define PREACT_INLINE __attribute__((always_inline)) inline
#define PREACT_INLINE_BODY __attribute__((always_inline))

namespace preact {

PREACT_INLINE float widen(float x) { return x; }
PREACT_INLINE double widen(double x) { return x; }
PREACT_INLINE float widen(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

PREACT_INLINE void narrow(float x, float& out) { out = x; }
PREACT_INLINE void narrow(double x, double& out) { out = x; }
PREACT_INLINE void narrow(float x, bf16& out) {  // to nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

template <typename S>
using Accumulator = decltype(widen(S{}));

// Calls f(S{}) with the storage type S of dtype.
template <typename F>
void dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kBFloat16:
      return f(bf16{});
    case Dtype::kFloat64:
      return f(double{});
    case Dtype::kFloat16:
      break;  // CUDA only
  }
}

// The same with f(S{}, O{}), O the type of the matrix products' operands: bf16 where a tile takes
// it and the depth of the products is even, else the accumulator.
template <typename F>
void dispatch(const Runtime& runtime, Dtype dtype, int64_t depth, F&& f) {
  dispatch(dtype, [&]<typename S>(S) {
    if constexpr (std::is_same_v<S, bf16>)
      if (runtime.pairs_tile.multiply && depth % 2 == 0) return f(S{}, bf16{});
    f(S{}, Accumulator<S>{});
  });
}

inline Tile<float> tile_of(const Runtime& runtime, float) { return runtime.tile; }
inline Tile<double> tile_of(const Runtime&, double) { return portable_tile<double>(); }
inline Tile<bf16, float> tile_of(const Runtime& runtime, bf16) { return runtime.pairs_tile; }

// The tile takes rows 2i and 2i + 1 of its right operand interleaved.
template <typename O>
constexpr bool kPairs = std::is_same_v<O, bf16>;

// A product's depth, up to one more, which must be zeros, where the tile takes pairs.
template <typename O>
int64_t round_depth(int64_t depth) {
  return kPairs<O> ? depth + depth % 2 : depth;
}

template <typename F>
void parallel_for(const Runtime& runtime, int64_t count, const F& f) {
  runtime.parallel_for(
      count, [](int64_t i, void* context) { (*static_cast<const F*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Buffers that a thread keeps from call to call: a fresh one would cost a page fault every 4 KB.
enum class Buffer {
  kWeight,
  kPartial,
  kStatistics,
  kVectors,
  kSource,
  kGrad,
  kLeft,
  kRight,
  kTransformed,
  kProducts,
  kTile,
  kCount
};

template <typename T>
T* buffer(Buffer which, int64_t count) {
  struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  struct Block {
    std::unique_ptr<std::byte[], Free> data;
    size_t size = 0;
  };
  static thread_local Block blocks[static_cast<int>(Buffer::kCount)];
  Block& block = blocks[static_cast<int>(which)];
  const size_t size = static_cast<size_t>(count) * sizeof(T);
  if (block.size < size) {
    block.data.reset();
    block.data.reset(new (std::align_val_t{64}) std::byte[size]);
    block.size = size;
  }
  return reinterpret_cast<T*>(block.data.get());
}

// The split of `count` pieces of work into parts depends on nothing but count, never on the number
// of threads: each part is summed in order, the parts are merged in order.
struct Parts {
  int64_t count, parts;

  Parts(int64_t count, int64_t most) : count(count), parts(std::min(count, most)) {}
  int64_t begin(int64_t part) const { return part * count / parts; }
  int64_t end(int64_t part) const { return begin(part + 1); }
};

constexpr int64_t kMostParts = 128;
constexpr int64_t kCacheBytes = 128 * 1024;  // what a kernel keeps of one operand in L2
constexpr int64_t kLineBytes = 64;           // of a cache

// Rounded down and up, also below zero; b is positive.
inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace preact
