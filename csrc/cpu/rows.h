// The vector loops: prologues and epilogues on rows of pixels, [rows, channels] contiguous.
#pragma once

#include "common.h"

namespace preact {

// For each storage type S with its accumulator A. Every z is computed by one expression, centred,
// so that forward, mask and wgrad agree on its sign.
#define PREACT_ROWS(S, A)                                                                        \
  /* tile += addend, out = rounded(tile), sum += out; addend or sum may be null */               \
  void store_rows(A* tile, const S* addend, int64_t rows, int64_t channels, S* out, A* sum);     \
  /* g = rounded((dh + addend) * act'(z)), s1 += g, s2 += g * (u - mean); addend, s1 or null */  \
  void slope_rows(const A* dh, const S* addend, const S* u, int64_t rows, int64_t channels,      \
                  const A* affine, Activation activation, S* g, A* s1, A* s2);                   \
  /* du = rounded(residual + scale * g), sums of g as above; residual or s1 null */              \
  void frozen_slope_rows(const A* dh, const S* residual, const S* u, int64_t rows,               \
                         int64_t channels, const A* affine, Activation activation, S* du, A* s1, \
                         A* s2);                                                                 \
  /* sum += x */                                                                                 \
  void sum_rows(const S* x, int64_t rows, int64_t channels, A* sum);                             \
  /* d1 += x - shift, d2 += (x - shift)^2 */                                                     \
  void deviation_rows(const S* x, int64_t rows, int64_t channels, const A* shift, A* d1, A* d2); \
  /* du = grad + a * g + b * (u - mean) + c; grad may be null */                                 \
  void residual_grad_rows(const S* grad, const S* g, const S* u, int64_t rows, int64_t channels, \
                          const A* coefficients, S* du);

PREACT_ROWS(float, float)
PREACT_ROWS(bf16, float)
PREACT_ROWS(double, double)
#undef PREACT_ROWS

// The same for each type O of the matrix products' operands.
#define PREACT_PROLOGUES(S, A, O)                                                      \
  /* h = act(scale * (u - mean) + shift), or h = u without affine [4, C] */            \
  void activate_rows(const S* u, int64_t rows, int64_t channels, const A* affine,      \
                     Activation activation, O* h);                                     \
  /* dy = a * g + b * (output - mean) + c with coefficients [4, K] = mean, a, b, c, or \
     dy = g without output */                                                          \
  void output_grad_rows(const S* g, const S* output, int64_t rows, int64_t channels,   \
                        const A* coefficients, O* dy);

PREACT_PROLOGUES(float, float, float)
PREACT_PROLOGUES(bf16, float, float)
PREACT_PROLOGUES(bf16, float, bf16)
PREACT_PROLOGUES(double, double, double)
#undef PREACT_PROLOGUES

// out[r, c] = in[r, c], to nearest, ties to even; pitches of rows in elements.
void round_rows(const float* in, int64_t rows, int64_t columns, int64_t in_pitch, int64_t out_pitch,
                bf16* out);

// out[c, r] = in[r, c]
void transpose(const float* in, int64_t rows, int64_t columns, int64_t ld_in, int64_t ld_out,
               float* out);
void transpose(const double* in, int64_t rows, int64_t columns, int64_t ld_in, int64_t ld_out,
               double* out);
void transpose(const bf16* in, int64_t rows, int64_t columns, int64_t ld_in, int64_t ld_out,
               bf16* out);

// The same of values that lie side by side.
struct Pair {
  bf16 first, second;
};
void transpose(const Pair* in, int64_t rows, int64_t columns, int64_t ld_in, int64_t ld_out,
               Pair* out);

// out[r / 2, c, r % 2] = in[r, c], rows of in `pitch` apart; an odd number of rows is followed by
// one of zeros.
void pair_rows(const bf16* in, int64_t rows, int64_t columns, int64_t pitch, bf16* out);

// [4, C] = mean, a = scale, b = -scale * rstd * S2 / M, c = -scale * S1 / M; M values a channel.
template <typename A>
void grad_coefficients(const A* affine, const A* sums, int64_t channels, int64_t values, A* out) {
  for (int64_t c = 0; c < channels; ++c) {
    const A rstd = affine[channels + c], scale = affine[2 * channels + c];
    out[c] = affine[c];
    out[channels + c] = scale;
    out[2 * channels + c] = -scale * rstd * (sums[channels + c] / values);
    out[3 * channels + c] = -scale * (sums[c] / values);
  }
}

}  // namespace preact
