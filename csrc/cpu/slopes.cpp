// The vector loops in which a gradient goes through the activation, behind a product or by itself.
#include "activation.h"
#include "row_loops.h"

namespace preact {
namespace {

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
        in_groups<Act::kRows>(rows, [&]<int64_t kRows>(int64_t first) PREACT_INLINE_BODY {
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

}  // namespace

#define PREACT_SLOPES(S, A)                                                                      \
  PREACT_CLONES void slope_rows(const A* dh, const S* addend, const S* u, int64_t rows,          \
                                int64_t channels, const A* affine, Activation activation, S* g,  \
                                A* s1, A* s2) {                                                  \
    if (go_two_by_two(rows, channels))                                                           \
      return slope_rows(dh, addend, u, rows / 2, 32, Twice<A>(affine).vectors, activation, g,    \
                        FoldedSum<A>(s1).get(), FoldedSum<A>(s2).get());                         \
    if (activation == Activation::kRelu)                                                         \
      in_blocks<S, 32>(                                                                          \
          rows, channels, PREACT_BLOCKS {                                                        \
            slope<Relu>(dh + at, offset(addend, at), u + at, count, columns, pitch,              \
                        affine + first, g + at, offset(s1, first), offset(s2, first));           \
          });                                                                                    \
    else                                                                                         \
      in_plain_blocks(                                                                           \
          rows, channels, PREACT_BLOCKS {                                                        \
            slope<Silu>(dh + at, offset(addend, at), u + at, count, columns, pitch,              \
                        affine + first, g + at, offset(s1, first), offset(s2, first));           \
          });                                                                                    \
  }                                                                                              \
  PREACT_CLONES void frozen_slope_rows(const A* dh, const S* residual, const S* u, int64_t rows, \
                                       int64_t channels, const A* affine, Activation activation, \
                                       S* du, A* s1, A* s2) {                                    \
    if (go_two_by_two(rows, channels))                                                           \
      return frozen_slope_rows(dh, residual, u, rows / 2, 32, Twice<A>(affine).vectors,          \
                               activation, du, FoldedSum<A>(s1).get(), FoldedSum<A>(s2).get());  \
    if (activation == Activation::kRelu)                                                         \
      in_blocks<S, 32>(                                                                          \
          rows, channels, PREACT_BLOCKS {                                                        \
            frozen_slope<Relu>(dh + at, offset(residual, at), u + at, count, columns, pitch,     \
                               affine + first, du + at, offset(s1, first), offset(s2, first));   \
          });                                                                                    \
    else                                                                                         \
      in_plain_blocks(                                                                           \
          rows, channels, PREACT_BLOCKS {                                                        \
            frozen_slope<Silu>(dh + at, offset(residual, at), u + at, count, columns, pitch,     \
                               affine + first, du + at, offset(s1, first), offset(s2, first));   \
          });                                                                                    \
  }

PREACT_SLOPES(float, float)
PREACT_SLOPES(bf16, float)
PREACT_SLOPES(double, double)

}  // namespace preact
