// The vector loops: prologues and epilogues on rows of pixels, [rows, channels] contiguous.
#include "rows.h"

#include <limits>

namespace preact {
namespace {

template <typename A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr float kShift = 0x1.8p23f;  // adding it leaves a rounded integer in the low bits
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kLeast = -87.0f, kMost = 88.72f;  // e^x is a normal number in between
  static constexpr int kMantissa = 23, kTerms = 7;
};
template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr double kShift = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kLeast = -708.0, kMost = 709.78;
  static constexpr int kMantissa = 52, kTerms = 13;
};

// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln(2)/2 and e^r by its series; infinite above
// kMost, that of kLeast below it, and a NaN stays one.
template <typename A>
PREACT_INLINE A exponential(A x) {
  using K = ExpConstants<A>;
  const A most = x > K::kMost ? K::kMost : x;
  const A inside = most < K::kLeast ? K::kLeast : most;
  const A shifted = inside * A(0x1.71547652b82fep0) + K::kShift;
  const A n = shifted - K::kShift;
  const A r = (inside - n * K::kLn2High) - n * K::kLn2Low;
  A series = 1;
#pragma GCC unroll 16
  for (int i = K::kTerms; i > 0; --i) series = 1 + series * (r * (A(1) / i));
  const auto power = std::bit_cast<typename K::Bits>(shifted) << K::kMantissa;
  const A result = std::bit_cast<A>(std::bit_cast<typename K::Bits>(series) + power);
  return x > K::kMost ? std::numeric_limits<A>::infinity() : result;
}

struct Relu {
  template <typename A>
  static PREACT_INLINE A value(A z) {
    return z < 0 ? A(0) : z;
  }
  template <typename A>
  static PREACT_INLINE A gradient(A dh, A z) {
    return z <= 0 ? A(0) : dh;
  }
};

struct Silu {
  template <typename A>
  static PREACT_INLINE A value(A z) {
    return z / (1 + exponential(-z));
  }
  template <typename A>
  static PREACT_INLINE A gradient(A dh, A z) {
    const A s = 1 / (1 + exponential(-z));
    return dh * (s * (1 + z * (1 - s)));
  }
};

// Calls f<4>(row) or f<1>(row) for all rows: sums over four rows stay in registers.
template <typename F>
PREACT_INLINE void in_groups(int64_t rows, const F& f) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) f.template operator()<4>(row);
  for (; row < rows; ++row) f.template operator()<1>(row);
}

template <typename A>
PREACT_INLINE A preactivation(A u, A mean, A scale, A shift) {
  return scale * (u - mean) + shift;
}

template <typename Act, typename S, typename A>
PREACT_INLINE void activate(const S* u, int64_t rows, int64_t channels, const A* affine, A* h) {
  const A *mean = affine, *scale = affine + 2 * channels, *shift = affine + 3 * channels;
  for (int64_t row = 0; row < rows; ++row, u += channels, h += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c)
      h[c] = Act::value(preactivation(widen(u[c]), mean[c], scale[c], shift[c]));
  }
}

template <typename S, typename A>
PREACT_INLINE void convert(const S* in, int64_t count, A* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = widen(in[i]);
}

template <typename S, typename A>
PREACT_INLINE void output_grad(const S* g, const S* output, int64_t rows, int64_t channels,
                               const A* coefficients, A* dy) {
  const A *mean = coefficients, *a = mean + channels, *b = a + channels, *d = b + channels;
  for (int64_t row = 0; row < rows; ++row, g += channels, output += channels, dy += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c)
      dy[c] = a[c] * widen(g[c]) + b[c] * (widen(output[c]) - mean[c]) + d[c];
  }
}

template <typename S, typename A>
PREACT_INLINE void store(A* tile, const S* addend, int64_t count, S* out) {
  if (addend) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      narrow(tile[i] + widen(addend[i]), out[i]);
      tile[i] = widen(out[i]);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      narrow(tile[i], out[i]);
      tile[i] = widen(out[i]);
    }
  }
}

template <int64_t kRows, typename Act, bool kAddend, bool kSums, typename S, typename A>
PREACT_INLINE void slope_group(const A* dh, const S* addend, const S* u, int64_t channels,
                               const A* affine, S* g, A* s1, A* s2) {
  const A *mean = affine, *scale = affine + 2 * channels, *shift = affine + 3 * channels;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    A sum1 = 0, sum2 = 0;
#pragma GCC unroll 4
    for (int64_t row = 0; row < kRows; ++row) {
      const int64_t i = row * channels + c;
      const A x = widen(u[i]);
      const A z = preactivation(x, mean[c], scale[c], shift[c]);
      const A sum = kAddend ? dh[i] + widen(addend[i]) : dh[i];
      narrow(Act::gradient(sum, z), g[i]);
      if constexpr (kSums) {
        const A stored = widen(g[i]);
        sum1 += stored;
        sum2 += stored * (x - mean[c]);
      }
    }
    if constexpr (kSums) {
      s1[c] += sum1;
      s2[c] += sum2;
    }
  }
}

template <typename Act, bool kAddend, bool kSums, typename S, typename A>
PREACT_INLINE void slope(const A* dh, const S* addend, const S* u, int64_t rows, int64_t channels,
                         const A* affine, S* g, A* s1, A* s2) {
  in_groups(rows, [&]<int64_t kRows>(int64_t row) PREACT_INLINE_BODY {
    const int64_t i = row * channels;
    slope_group<kRows, Act, kAddend, kSums>(dh + i, kAddend ? addend + i : nullptr, u + i, channels,
                                            affine, g + i, s1, s2);
  });
}

template <typename Act, typename S, typename A>
PREACT_INLINE void slope(const A* dh, const S* addend, const S* u, int64_t rows, int64_t channels,
                         const A* affine, S* g, A* s1, A* s2) {
  if (addend && s1)
    slope<Act, true, true>(dh, addend, u, rows, channels, affine, g, s1, s2);
  else if (addend)
    slope<Act, true, false>(dh, addend, u, rows, channels, affine, g, s1, s2);
  else if (s1)
    slope<Act, false, true>(dh, addend, u, rows, channels, affine, g, s1, s2);
  else
    slope<Act, false, false>(dh, addend, u, rows, channels, affine, g, s1, s2);
}

template <typename S, typename A>
PREACT_INLINE void sum(const S* x, int64_t rows, int64_t channels, A* total) {
  in_groups(rows, [&]<int64_t kRows>(int64_t row) PREACT_INLINE_BODY {
    const S* const group = x + row * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      A sum = 0;
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRows; ++i) sum += widen(group[i * channels + c]);
      total[c] += sum;
    }
  });
}

template <typename S, typename A>
PREACT_INLINE void deviation(const S* x, int64_t rows, int64_t channels, const A* shift, A* d1,
                             A* d2) {
  in_groups(rows, [&]<int64_t kRows>(int64_t row) PREACT_INLINE_BODY {
    const S* const group = x + row * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      A sum1 = 0, sum2 = 0;
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRows; ++i) {
        const A d = widen(group[i * channels + c]) - shift[c];
        sum1 += d;
        sum2 += d * d;
      }
      d1[c] += sum1;
      d2[c] += sum2;
    }
  });
}

template <bool kGrad, typename S, typename A>
PREACT_INLINE void residual_grad(const S* grad, const S* g, const S* u, int64_t rows,
                                 int64_t channels, const A* coefficients, S* du) {
  const A *mean = coefficients, *a = mean + channels, *b = a + channels, *d = b + channels;
  for (int64_t row = 0; row < rows; ++row) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A own = a[c] * widen(g[c]) + b[c] * (widen(u[c]) - mean[c]) + d[c];
      narrow(kGrad ? own + widen(grad[c]) : own, du[c]);
    }
    g += channels, u += channels, du += channels;
    if constexpr (kGrad) grad += channels;
  }
}

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

PREACT_INLINE void transpose_square(const float* in, int64_t ld_in, int64_t ld_out, float* out) {
  Four row[4];
  for (int i = 0; i < 4; ++i) row[i] = *reinterpret_cast<const Four*>(in + i * ld_in);
  const Four low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Four high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Four low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Four high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const Four column[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                          __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                          __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                          __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) *reinterpret_cast<Four*>(out + i * ld_out) = column[i];
}

PREACT_INLINE void transpose_square(const double* in, int64_t ld_in, int64_t ld_out, double* out) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) out[j * ld_out + i] = in[i * ld_in + j];
}

template <typename A>
PREACT_INLINE void transpose_squares(const A* in, int64_t rows, int64_t columns, int64_t ld_out,
                                     A* out) {
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t column = 0; column < whole_columns; column += 4)
    for (int64_t row = 0; row < whole_rows; row += 4)
      transpose_square(in + row * columns + column, columns, ld_out, out + column * ld_out + row);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = row < whole_rows ? whole_columns : 0; column < columns; ++column)
      out[column * ld_out + row] = in[row * columns + column];
}

}  // namespace

#define PREACT_ROWS(S, A)                                                                          \
  PREACT_CLONES void activate_rows(const S* u, int64_t rows, int64_t channels, const A* affine,    \
                                   Activation activation, A* h) {                                  \
    if (!affine)                                                                                   \
      convert(u, rows * channels, h);                                                              \
    else if (activation == Activation::kRelu)                                                      \
      activate<Relu>(u, rows, channels, affine, h);                                                \
    else                                                                                           \
      activate<Silu>(u, rows, channels, affine, h);                                                \
  }                                                                                                \
  PREACT_CLONES void output_grad_rows(const S* g, const S* output, int64_t rows, int64_t channels, \
                                      const A* coefficients, A* dy) {                              \
    if (output)                                                                                    \
      output_grad(g, output, rows, channels, coefficients, dy);                                    \
    else                                                                                           \
      convert(g, rows * channels, dy);                                                             \
  }                                                                                                \
  PREACT_CLONES void store_rows(A* tile, const S* addend, int64_t rows, int64_t channels,          \
                                S* out) {                                                          \
    store(tile, addend, rows * channels, out);                                                     \
  }                                                                                                \
  PREACT_CLONES void slope_rows(const A* dh, const S* addend, const S* u, int64_t rows,            \
                                int64_t channels, const A* affine, Activation activation, S* g,    \
                                A* s1, A* s2) {                                                    \
    if (activation == Activation::kRelu)                                                           \
      slope<Relu>(dh, addend, u, rows, channels, affine, g, s1, s2);                               \
    else                                                                                           \
      slope<Silu>(dh, addend, u, rows, channels, affine, g, s1, s2);                               \
  }                                                                                                \
  PREACT_CLONES void sum_rows(const S* x, int64_t rows, int64_t channels, A* total) {              \
    sum(x, rows, channels, total);                                                                 \
  }                                                                                                \
  PREACT_CLONES void deviation_rows(const S* x, int64_t rows, int64_t channels, const A* shift,    \
                                    A* d1, A* d2) {                                                \
    deviation(x, rows, channels, shift, d1, d2);                                                   \
  }                                                                                                \
  PREACT_CLONES void residual_grad_rows(const S* grad, const S* g, const S* u, int64_t rows,       \
                                        int64_t channels, const A* coefficients, S* du) {          \
    if (grad)                                                                                      \
      residual_grad<true>(grad, g, u, rows, channels, coefficients, du);                           \
    else                                                                                           \
      residual_grad<false>(grad, g, u, rows, channels, coefficients, du);                          \
  }

PREACT_ROWS(float, float)
PREACT_ROWS(bf16, float)
PREACT_ROWS(double, double)

PREACT_CLONES void transpose(const float* in, int64_t rows, int64_t columns, int64_t ld_out,
                             float* out) {
  transpose_squares(in, rows, columns, ld_out, out);
}
PREACT_CLONES void transpose(const double* in, int64_t rows, int64_t columns, int64_t ld_out,
                             double* out) {
  transpose_squares(in, rows, columns, ld_out, out);
}

}  // namespace preact
