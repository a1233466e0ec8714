// The vector loops in front of a product, and of what takes the place of one: h = act(bn(u)), dy as
// the end of BatchNorm's backward pass, the gradient of a residual sum.
#include "activation.h"
#include "row_loops.h"

namespace preact {
namespace {

template <typename Act, typename S, typename A, typename O>
PREACT_INLINE void activate(const S* u, int64_t rows, int64_t columns, int64_t pitch,
                            const A* __restrict affine, O* h) {
  const A *mean = affine, *scale = affine + 2 * pitch, *shift = affine + 3 * pitch;
  rounded(
      rows, columns, pitch, h, PREACT_RESULTS(A) {
        for (int64_t i = 0; i < rows; ++i) {
          const S* const in = u + (row + i) * pitch;
          prefetch_row(in, columns, pitch);
#pragma omp simd
          for (int64_t c = 0; c < columns; ++c)
            to[i * to_pitch + c] =
                Act::value(preactivation(widen(in[c]), mean[c], scale[c], shift[c]));
        }
      });
}

template <typename S, typename O>
PREACT_INLINE void convert(const S* in, int64_t count, O* out) {
  if constexpr (std::is_same_v<S, O>) {
    std::memcpy(out, in, count * sizeof(S));
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) narrow(widen(in[i]), out[i]);
}

template <typename S, typename A, typename O>
PREACT_INLINE void output_grad(const S* g, const S* output, int64_t rows, int64_t columns,
                               int64_t pitch, const A* __restrict coefficients, O* dy) {
  const A *mean = coefficients, *a = mean + pitch, *b = a + pitch, *d = b + pitch;
  rounded(
      rows, columns, pitch, dy, PREACT_RESULTS(A) {
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t at = (row + i) * pitch;
          prefetch_row(g + at, columns, pitch);
          prefetch_row(output + at, columns, pitch);
#pragma omp simd
          for (int64_t c = 0; c < columns; ++c)
            to[i * to_pitch + c] =
                a[c] * widen(g[at + c]) + b[c] * (widen(output[at + c]) - mean[c]) + d[c];
        }
      });
}

template <bool kGrad, typename S, typename A>
PREACT_INLINE void residual_grad(const S* grad, const S* g, const S* u, int64_t rows,
                                 int64_t columns, int64_t pitch, const A* __restrict coefficients,
                                 S* du) {
  const A *mean = coefficients, *a = mean + pitch, *b = a + pitch, *d = b + pitch;
  rounded(
      rows, columns, pitch, du, PREACT_RESULTS(A) {
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t at = (row + i) * pitch;
          prefetch_row(g + at, columns, pitch);
          prefetch_row(u + at, columns, pitch);
          prefetch_row(du + at, columns, pitch);
          if constexpr (kGrad) prefetch_row(grad + at, columns, pitch);
#pragma omp simd
          for (int64_t c = 0; c < columns; ++c) {
            const A own = a[c] * widen(g[at + c]) + b[c] * (widen(u[at + c]) - mean[c]) + d[c];
            to[i * to_pitch + c] = kGrad ? own + widen(grad[at + c]) : own;
          }
        }
      });
}

}  // namespace

#define PREACT_PROLOGUES(S, A, O)                                                                  \
  PREACT_CLONES void activate_rows(const S* u, int64_t rows, int64_t channels, const A* affine,    \
                                   Activation activation, O* h) {                                  \
    if (std::is_same_v<S, bf16> && affine && go_two_by_two(rows, channels))                        \
      return activate_rows(u, rows / 2, 32, Twice<A>(affine).vectors, activation, h);              \
    if (!affine)                                                                                   \
      convert(u, rows * channels, h);                                                              \
    else if (activation == Activation::kRelu)                                                      \
      in_blocks<S>(                                                                                \
          rows, channels, PREACT_BLOCKS {                                                          \
            activate<Relu>(u + at, count, columns, pitch, affine + first, h + at);                 \
          });                                                                                      \
    else                                                                                           \
      in_plain_blocks(                                                                             \
          rows, channels, PREACT_BLOCKS {                                                          \
            activate<Silu>(u + at, count, columns, pitch, affine + first, h + at);                 \
          });                                                                                      \
  }                                                                                                \
  PREACT_CLONES void output_grad_rows(const S* g, const S* output, int64_t rows, int64_t channels, \
                                      const A* coefficients, O* dy) {                              \
    if (std::is_same_v<S, bf16> && output && go_two_by_two(rows, channels))                        \
      return output_grad_rows(g, output, rows / 2, 32, Twice<A>(coefficients).vectors, dy);        \
    if (output)                                                                                    \
      in_blocks<S>(                                                                                \
          rows, channels, PREACT_BLOCKS {                                                          \
            output_grad(g + at, output + at, count, columns, pitch, coefficients + first,          \
                        dy + at);                                                                  \
          });                                                                                      \
    else                                                                                           \
      convert(g, rows * channels, dy);                                                             \
  }

PREACT_PROLOGUES(float, float, float)
PREACT_PROLOGUES(bf16, float, float)
PREACT_PROLOGUES(bf16, float, bf16)
PREACT_PROLOGUES(double, double, double)

#define PREACT_RESIDUAL_GRAD(S, A)                                                           \
  PREACT_CLONES void residual_grad_rows(const S* grad, const S* g, const S* u, int64_t rows, \
                                        int64_t channels, const A* coefficients, S* du) {    \
    in_blocks<S>(                                                                            \
        rows, channels, PREACT_BLOCKS {                                                      \
          if (grad)                                                                          \
            residual_grad<true>(grad + at, g + at, u + at, count, columns, pitch,            \
                                coefficients + first, du + at);                              \
          else                                                                               \
            residual_grad<false>(grad, g + at, u + at, count, columns, pitch,                \
                                 coefficients + first, du + at);                             \
        });                                                                                  \
  }

PREACT_RESIDUAL_GRAD(float, float)
PREACT_RESIDUAL_GRAD(bf16, float)
PREACT_RESIDUAL_GRAD(double, double)

}  // namespace preact
