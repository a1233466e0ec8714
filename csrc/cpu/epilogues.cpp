// The vector loops behind a product: its result is stored and summed up.
#include "row_loops.h"

namespace preact {
namespace {

template <typename S, typename A>
PREACT_INLINE void sum(const S* x, int64_t rows, int64_t columns, int64_t pitch,
                       A* __restrict total) {
  in_groups(rows, [&]<int64_t kRows>(int64_t row) PREACT_INLINE_BODY {
    const S* const group = x + row * pitch;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      A sum = 0;
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRows; ++i) sum += widen(group[i * pitch + c]);
      total[c] += sum;
    }
  });
}

template <bool kAddend, bool kSum, typename A>
PREACT_INLINE void store(A* tile, const A* addend, int64_t rows, int64_t columns, int64_t pitch,
                         A* __restrict out, A* __restrict total) {
  in_groups(rows, [&]<int64_t kRows>(int64_t row) PREACT_INLINE_BODY {
    A* const in = tile + row * pitch;
    const A* const more = kAddend ? addend + row * pitch : nullptr;
    A* const to = out + row * pitch;
    for (int64_t i = 0; i < kRows; ++i) {
      prefetch_row(to + i * pitch, columns, pitch);
      if constexpr (kAddend) prefetch_row(more + i * pitch, columns, pitch);
    }
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      A sum = 0;
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t at = i * pitch + c;
        const A stored = kAddend ? in[at] + more[at] : in[at];
        to[at] = stored;
        if constexpr (kAddend) in[at] = stored;
        if constexpr (kSum) sum += stored;
      }
      if constexpr (kSum) total[c] += sum;
    }
  });
}

template <bool kAddend, bool kSum>
PREACT_INLINE void store(float* tile, const bf16* addend, int64_t rows, int64_t columns,
                         int64_t pitch, bf16* out, float* __restrict total) {
  for (int64_t first = 0; first < rows; first += kRoundedRows) {
    const int64_t count = std::min(kRoundedRows, rows - first);
    float* const in = tile + first * pitch;
    const bf16* const to = out + first * pitch;
    for (int64_t row = 0; row < count; ++row) {
      prefetch_row(to + row * pitch, columns, pitch);
      if constexpr (!kAddend) continue;
      const bf16* const more = addend + (first + row) * pitch;
      prefetch_row(more, columns, pitch);
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) in[row * pitch + c] += widen(more[c]);
    }
    round_rows(in, count, columns, pitch, pitch, out + first * pitch);
    if constexpr (kSum) sum(to, count, columns, pitch, total);
  }
}

template <typename S, typename A>
PREACT_INLINE void store(A* tile, const S* addend, int64_t rows, int64_t columns, int64_t pitch,
                         S* out, A* sum) {
  with_constants(addend, sum, [&]<bool kAddend, bool kSum>() PREACT_INLINE_BODY {
    store<kAddend, kSum>(tile, addend, rows, columns, pitch, out, sum);
  });
}

template <typename S, typename A>
PREACT_INLINE void deviation(const S* x, int64_t rows, int64_t columns, int64_t pitch,
                             const A* __restrict shift, A* __restrict d1, A* __restrict d2) {
  in_groups(rows, [&]<int64_t kRows>(int64_t row) PREACT_INLINE_BODY {
    const S* const group = x + row * pitch;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      A sum1 = 0, sum2 = 0;
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRows; ++i) {
        const A d = widen(group[i * pitch + c]) - shift[c];
        sum1 += d;
        sum2 += d * d;
      }
      d1[c] += sum1;
      d2[c] += sum2;
    }
  });
}

}  // namespace

#define PREACT_ROWS(S, A)                                                                         \
  PREACT_CLONES void store_rows(A* tile, const S* addend, int64_t rows, int64_t channels, S* out, \
                                A* sum) {                                                         \
    if (std::is_same_v<S, bf16> && go_two_by_two(rows, channels))                                 \
      return store_rows(tile, addend, rows / 2, 32, out, FoldedSum<A>(sum).get());                \
    in_blocks<S>(                                                                                 \
        rows, channels, PREACT_BLOCKS {                                                           \
          store(tile + at, offset(addend, at), count, columns, pitch, out + at,                   \
                offset(sum, first));                                                              \
        });                                                                                       \
  }                                                                                               \
  PREACT_CLONES void sum_rows(const S* x, int64_t rows, int64_t channels, A* total) {             \
    in_blocks<S>(                                                                                 \
        rows, channels, PREACT_BLOCKS { sum(x + at, count, columns, pitch, total + first); });    \
  }                                                                                               \
  PREACT_CLONES void deviation_rows(const S* x, int64_t rows, int64_t channels, const A* shift,   \
                                    A* d1, A* d2) {                                               \
    in_blocks<S>(                                                                                 \
        rows, channels, PREACT_BLOCKS {                                                           \
          deviation(x + at, count, columns, pitch, shift + first, d1 + first, d2 + first);        \
        });                                                                                       \
  }

PREACT_ROWS(float, float)
PREACT_ROWS(bf16, float)
PREACT_ROWS(double, double)

}  // namespace preact
