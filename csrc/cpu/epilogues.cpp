// The vector loops behind a product: a result is stored and summed up, a gradient goes through the
// activation.
#include "activation.h"
#include "row_loops.h"

namespace preact {
namespace {

// Calls f<first, second>(), so that the loops inside know.
template <typename F>
PREACT_INLINE void with_constants(bool first, bool second, const F& f) {
  if (first && second)
    f.template operator()<true, true>();
  else if (first)
    f.template operator()<true, false>();
  else if (second)
    f.template operator()<false, true>();
  else
    f.template operator()<false, false>();
}

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
PREACT_INLINE void slope_sums(const S* g, const S* u, int64_t rows, int64_t columns, int64_t pitch,
                              const A* __restrict mean, A* __restrict s1, A* __restrict s2) {
  in_groups(rows, [&]<int64_t kRows>(int64_t row) PREACT_INLINE_BODY {
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      A sum1 = 0, sum2 = 0;
#pragma GCC unroll 4
      for (int64_t i = row; i < row + kRows; ++i) {
        const A slope = widen(g[i * pitch + c]);
        sum1 += slope;
        sum2 += slope * (widen(u[i * pitch + c]) - mean[c]);
      }
      s1[c] += sum1;
      s2[c] += sum2;
    }
  });
}

// g = act'(z) * dh_of(at) and its sums; what is stored is result_of(g, at, c).
template <typename Act, bool kSums, typename S, typename A, typename Dh, typename Result>
PREACT_INLINE void slopes(const S* u, int64_t rows, int64_t columns, int64_t pitch,
                          const A* __restrict affine, S* out, A* __restrict s1, A* __restrict s2,
                          const Dh& dh_of, const Result& result_of) {
  const A *mean = affine, *scale = affine + 2 * pitch, *shift = affine + 3 * pitch;
  rounded(
      rows, columns, pitch, out, PREACT_RESULTS(A) {
        in_groups(rows, [&]<int64_t kRows>(int64_t first) PREACT_INLINE_BODY {
          for (int64_t i = first; i < first + kRows; ++i) {
            prefetch_row(u + (row + i) * pitch, columns, pitch);
            prefetch_row(out + (row + i) * pitch, columns, pitch);
          }
#pragma omp simd
          for (int64_t c = 0; c < columns; ++c) {
            A sum1 = 0, sum2 = 0;
#pragma GCC unroll 4
            for (int64_t i = first; i < first + kRows; ++i) {
              const int64_t at = (row + i) * pitch + c;
              const A x = widen(u[at]);
              const A z = preactivation(x, mean[c], scale[c], shift[c]);
              const A g = Act::gradient(dh_of(at), z);
              to[i * to_pitch + c] = result_of(g, at, c);
              if constexpr (kSums) {
                sum1 += g;
                sum2 += g * (x - mean[c]);
              }
            }
            if constexpr (kSums) {
              s1[c] += sum1;
              s2[c] += sum2;
            }
          }
        });
      });
}

template <typename Act, bool kAddend, bool kSums, typename S, typename A>
PREACT_INLINE void slope(const A* dh, const S* addend, const S* u, int64_t rows, int64_t columns,
                         int64_t pitch, const A* affine, S* g, A* s1, A* s2) {
  const auto dh_of = [&](int64_t at) PREACT_INLINE_BODY {
    return kAddend ? dh[at] + widen(addend[at]) : dh[at];
  };
  const auto result_of = [](A g, int64_t, int64_t) PREACT_INLINE_BODY { return g; };
  slopes<Act, kSums>(u, rows, columns, pitch, affine, g, s1, s2, dh_of, result_of);
}

// The sums are those of g as it is stored: what is left of it after BatchNorm's backward pass may
// be its rounding.
template <typename Act, bool kAddend, bool kSums>
PREACT_INLINE void slope(const float* dh, const bf16* addend, const bf16* u, int64_t rows,
                         int64_t columns, int64_t pitch, const float* affine, bf16* g, float* s1,
                         float* s2) {
  for (int64_t row = 0; row < rows; row += kRoundedRows) {
    const int64_t count = std::min(kRoundedRows, rows - row), first = row * pitch;
    const auto dh_of = [&](int64_t at) PREACT_INLINE_BODY {
      return kAddend ? dh[first + at] + widen(addend[first + at]) : dh[first + at];
    };
    const auto result_of = [](float g, int64_t, int64_t) PREACT_INLINE_BODY { return g; };
    slopes<Act, false>(u + first, count, columns, pitch, affine, g + first, s1, s2, dh_of,
                       result_of);
    if constexpr (kSums) slope_sums(g + first, u + first, count, columns, pitch, affine, s1, s2);
  }
}

template <typename Act, typename S, typename A>
PREACT_INLINE void slope(const A* dh, const S* addend, const S* u, int64_t rows, int64_t columns,
                         int64_t pitch, const A* affine, S* g, A* s1, A* s2) {
  with_constants(addend, s1, [&]<bool kAddend, bool kSums>() PREACT_INLINE_BODY {
    slope<Act, kAddend, kSums>(dh, addend, u, rows, columns, pitch, affine, g, s1, s2);
  });
}

template <typename Act, bool kResidual, bool kSums, typename S, typename A>
PREACT_INLINE void frozen_slope(const A* dh, const S* residual, const S* u, int64_t rows,
                                int64_t columns, int64_t pitch, const A* __restrict affine, S* du,
                                A* s1, A* s2) {
  const A* const scale = affine + 2 * pitch;
  const auto dh_of = [&](int64_t at) PREACT_INLINE_BODY { return dh[at]; };
  const auto result_of = [&](A g, int64_t at, int64_t c) PREACT_INLINE_BODY {
    return kResidual ? widen(residual[at]) + scale[c] * g : scale[c] * g;
  };
  slopes<Act, kSums>(u, rows, columns, pitch, affine, du, s1, s2, dh_of, result_of);
}

template <typename Act, typename S, typename A>
PREACT_INLINE void frozen_slope(const A* dh, const S* residual, const S* u, int64_t rows,
                                int64_t columns, int64_t pitch, const A* affine, S* du, A* s1,
                                A* s2) {
  with_constants(residual, s1, [&]<bool kResidual, bool kSums>() PREACT_INLINE_BODY {
    frozen_slope<Act, kResidual, kSums>(dh, residual, u, rows, columns, pitch, affine, du, s1, s2);
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
    in_blocks(                                                                                    \
        rows, channels, PREACT_BLOCKS {                                                           \
          store(tile + at, offset(addend, at), count, columns, pitch, out + at,                   \
                offset(sum, first));                                                              \
        });                                                                                       \
  }                                                                                               \
  PREACT_CLONES void slope_rows(const A* dh, const S* addend, const S* u, int64_t rows,           \
                                int64_t channels, const A* affine, Activation activation, S* g,   \
                                A* s1, A* s2) {                                                   \
    if (go_two_by_two(rows, channels))                                                            \
      return slope_rows(dh, addend, u, rows / 2, 32, Twice<A>(affine).vectors, activation, g,     \
                        FoldedSum<A>(s1).get(), FoldedSum<A>(s2).get());                          \
    if (activation == Activation::kRelu)                                                          \
      in_blocks<32>(                                                                              \
          rows, channels, PREACT_BLOCKS {                                                         \
            slope<Relu>(dh + at, offset(addend, at), u + at, count, columns, pitch,               \
                        affine + first, g + at, offset(s1, first), offset(s2, first));            \
          });                                                                                     \
    else                                                                                          \
      in_plain_blocks(                                                                            \
          rows, channels, PREACT_BLOCKS {                                                         \
            slope<Silu>(dh + at, offset(addend, at), u + at, count, columns, pitch,               \
                        affine + first, g + at, offset(s1, first), offset(s2, first));            \
          });                                                                                     \
  }                                                                                               \
  PREACT_CLONES void frozen_slope_rows(const A* dh, const S* residual, const S* u, int64_t rows,  \
                                       int64_t channels, const A* affine, Activation activation,  \
                                       S* du, A* s1, A* s2) {                                     \
    if (go_two_by_two(rows, channels))                                                            \
      return frozen_slope_rows(dh, residual, u, rows / 2, 32, Twice<A>(affine).vectors,           \
                               activation, du, FoldedSum<A>(s1).get(), FoldedSum<A>(s2).get());   \
    if (activation == Activation::kRelu)                                                          \
      in_blocks<32>(                                                                              \
          rows, channels, PREACT_BLOCKS {                                                         \
            frozen_slope<Relu>(dh + at, offset(residual, at), u + at, count, columns, pitch,      \
                               affine + first, du + at, offset(s1, first), offset(s2, first));    \
          });                                                                                     \
    else                                                                                          \
      in_plain_blocks(                                                                            \
          rows, channels, PREACT_BLOCKS {                                                         \
            frozen_slope<Silu>(dh + at, offset(residual, at), u + at, count, columns, pitch,      \
                               affine + first, du + at, offset(s1, first), offset(s2, first));    \
          });                                                                                     \
  }                                                                                               \
  PREACT_CLONES void sum_rows(const S* x, int64_t rows, int64_t channels, A* total) {             \
    in_blocks(                                                                                    \
        rows, channels, PREACT_BLOCKS { sum(x + at, count, columns, pitch, total + first); });    \
  }                                                                                               \
  PREACT_CLONES void deviation_rows(const S* x, int64_t rows, int64_t channels, const A* shift,   \
                                    A* d1, A* d2) {                                               \
    in_blocks(                                                                                    \
        rows, channels, PREACT_BLOCKS {                                                           \
          deviation(x + at, count, columns, pitch, shift + first, d1 + first, d2 + first);        \
        });                                                                                       \
  }

PREACT_ROWS(float, float)
PREACT_ROWS(bf16, float)
PREACT_ROWS(double, double)

}  // namespace preact
