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
    using Bits = typename ExpConstants<A>::Bits;
    const Bits keep = z <= 0 ? Bits(0) : ~Bits(0);
    return std::bit_cast<A>(std::bit_cast<Bits>(dh) & keep);
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

constexpr int64_t kMostColumns = 64;  // of a block

// Calls f(at, first, rows, columns, pitch) for blocks of rows and channels: at is where a block
// starts in [rows, channels], first its first channel, pitch is channels. Where columns is a
// constant, mean, scale and the like stay in registers over all rows of a block, and so do sums.
template <int64_t kColumns = kMostColumns, typename F>
PREACT_INLINE void in_blocks(int64_t rows, int64_t channels, const F& f) {
  const int64_t together = channels <= kColumns ? rows : 16;
  for (int64_t row = 0; row < rows; row += together) {
    const int64_t count = std::min(together, rows - row);
    int64_t first = 0;
    for (; first + kColumns <= channels; first += kColumns)
      f(row * channels + first, first, count, kColumns, channels);
    const int64_t at = row * channels + first, rest = channels - first;
    if (kColumns > 32 && rest == 32)
      f(at, first, count, int64_t{32}, channels);
    else if (rest == 16)
      f(at, first, count, int64_t{16}, channels);
    else if (rest > 0)
      f(at, first, count, rest, channels);
  }
}

// The same without constants, for loops that have no use for them.
template <typename F>
PREACT_INLINE void in_plain_blocks(int64_t rows, int64_t channels, const F& f) {
  for (int64_t first = 0; first < channels; first += kMostColumns)
    f(first, first, rows, std::min(kMostColumns, channels - first), channels);
}

// Calls f(row, rows, to, pitch) for results that it writes in the accumulator's type: where they
// are to lie, or to be rounded from there while they are in cache.
template <typename A, typename F>
PREACT_INLINE void rounded(int64_t rows, int64_t /*columns*/, int64_t pitch, A* out, const F& f) {
  f(int64_t{0}, rows, out, pitch);
}
template <typename F>
PREACT_INLINE void rounded(int64_t rows, int64_t columns, int64_t pitch, bf16* out, const F& f) {
  constexpr int64_t kRows = 32;
  alignas(64) float values[kRows * kMostColumns];
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t count = std::min(kRows, rows - row);
    f(row, count, values, columns);
    round_rows(values, count, columns, columns, pitch, out + row * pitch);
  }
}

#define PREACT_RESULTS(A) \
  [&](int64_t row, int64_t rows, A* __restrict to, int64_t to_pitch) PREACT_INLINE_BODY

template <typename T>
PREACT_INLINE T* offset(T* values, int64_t count) {
  return values ? values + count : nullptr;
}

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

template <typename Act, typename S, typename A, typename O>
PREACT_INLINE void activate(const S* u, int64_t rows, int64_t columns, int64_t pitch,
                            const A* __restrict affine, O* h) {
  const A *mean = affine, *scale = affine + 2 * pitch, *shift = affine + 3 * pitch;
  rounded(
      rows, columns, pitch, h, PREACT_RESULTS(A) {
        for (int64_t i = 0; i < rows; ++i) {
          const S* const in = u + (row + i) * pitch;
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
#pragma omp simd
          for (int64_t c = 0; c < columns; ++c)
            to[i * to_pitch + c] =
                a[c] * widen(g[at + c]) + b[c] * (widen(output[at + c]) - mean[c]) + d[c];
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
  constexpr int64_t kInCache = 32;
  for (int64_t first = 0; first < rows; first += kInCache) {
    const int64_t count = std::min(kInCache, rows - first);
    float* const in = tile + first * pitch;
    const bf16* const to = out + first * pitch;
    for (int64_t row = 0; kAddend && row < count; ++row) {
      const bf16* const more = addend + (first + row) * pitch;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) in[row * pitch + c] += widen(more[c]);
    }
    round_rows(in, count, columns, pitch, pitch, out + first * pitch);
    in_groups(count, [&]<int64_t kRows>(int64_t row) PREACT_INLINE_BODY {
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) {
        float sum = 0;
#pragma GCC unroll 4
        for (int64_t i = row; i < row + kRows; ++i) {
          const float stored = widen(to[i * pitch + c]);
          in[i * pitch + c] = stored;
          if constexpr (kSum) sum += stored;
        }
        if constexpr (kSum) total[c] += sum;
      }
    });
  }
}

template <typename S, typename A>
PREACT_INLINE void store(A* tile, const S* addend, int64_t rows, int64_t columns, int64_t pitch,
                         S* out, A* sum) {
  if (addend && sum)
    store<true, true>(tile, addend, rows, columns, pitch, out, sum);
  else if (addend)
    store<true, false>(tile, addend, rows, columns, pitch, out, sum);
  else if (sum)
    store<false, true>(tile, addend, rows, columns, pitch, out, sum);
  else
    store<false, false>(tile, addend, rows, columns, pitch, out, sum);
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

template <typename Act, bool kAddend, bool kSums, typename S, typename A>
PREACT_INLINE void slope(const A* dh, const S* addend, const S* u, int64_t rows, int64_t columns,
                         int64_t pitch, const A* __restrict affine, S* g, A* __restrict s1,
                         A* __restrict s2) {
  // Of g as it is stored: what is left of it after BatchNorm's backward pass may be its rounding.
  if constexpr (kSums && !std::is_same_v<S, A>) {
    slope<Act, kAddend, false>(dh, addend, u, rows, columns, pitch, affine, g, s1, s2);
    return slope_sums(g, u, rows, columns, pitch, affine, s1, s2);
  }
  const A *mean = affine, *scale = affine + 2 * pitch, *shift = affine + 3 * pitch;
  rounded(
      rows, columns, pitch, g, PREACT_RESULTS(A) {
        in_groups(rows, [&]<int64_t kRows>(int64_t first) PREACT_INLINE_BODY {
#pragma omp simd
          for (int64_t c = 0; c < columns; ++c) {
            A sum1 = 0, sum2 = 0;
#pragma GCC unroll 4
            for (int64_t i = first; i < first + kRows; ++i) {
              const int64_t at = (row + i) * pitch + c;
              const A x = widen(u[at]);
              const A z = preactivation(x, mean[c], scale[c], shift[c]);
              const A slope = Act::gradient(kAddend ? dh[at] + widen(addend[at]) : dh[at], z);
              to[i * to_pitch + c] = slope;
              if constexpr (kSums) {
                sum1 += slope;
                sum2 += slope * (x - mean[c]);
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

template <typename Act, typename S, typename A>
PREACT_INLINE void slope(const A* dh, const S* addend, const S* u, int64_t rows, int64_t columns,
                         int64_t pitch, const A* affine, S* g, A* s1, A* s2) {
  if (addend && s1)
    slope<Act, true, true>(dh, addend, u, rows, columns, pitch, affine, g, s1, s2);
  else if (addend)
    slope<Act, true, false>(dh, addend, u, rows, columns, pitch, affine, g, s1, s2);
  else if (s1)
    slope<Act, false, true>(dh, addend, u, rows, columns, pitch, affine, g, s1, s2);
  else
    slope<Act, false, false>(dh, addend, u, rows, columns, pitch, affine, g, s1, s2);
}

template <typename Act, bool kResidual, bool kSums, typename S, typename A>
PREACT_INLINE void frozen_slope(const A* dh, const S* residual, const S* u, int64_t rows,
                                int64_t columns, int64_t pitch, const A* __restrict affine, S* du,
                                A* __restrict s1, A* __restrict s2) {
  const A *mean = affine, *scale = affine + 2 * pitch, *shift = affine + 3 * pitch;
  rounded(
      rows, columns, pitch, du, PREACT_RESULTS(A) {
        in_groups(rows, [&]<int64_t kRows>(int64_t first) PREACT_INLINE_BODY {
#pragma omp simd
          for (int64_t c = 0; c < columns; ++c) {
            A sum1 = 0, sum2 = 0;
#pragma GCC unroll 4
            for (int64_t i = first; i < first + kRows; ++i) {
              const int64_t at = (row + i) * pitch + c;
              const A x = widen(u[at]);
              const A g = Act::gradient(dh[at], preactivation(x, mean[c], scale[c], shift[c]));
              to[i * to_pitch + c] = kResidual ? widen(residual[at]) + scale[c] * g : scale[c] * g;
              sum1 += g;
              sum2 += g * (x - mean[c]);
            }
            if constexpr (kSums) {
              s1[c] += sum1;
              s2[c] += sum2;
            }
          }
        });
      });
}

template <typename Act, typename S, typename A>
PREACT_INLINE void frozen_slope(const A* dh, const S* residual, const S* u, int64_t rows,
                                int64_t columns, int64_t pitch, const A* affine, S* du, A* s1,
                                A* s2) {
  if (residual && s1)
    frozen_slope<Act, true, true>(dh, residual, u, rows, columns, pitch, affine, du, s1, s2);
  else if (residual)
    frozen_slope<Act, true, false>(dh, residual, u, rows, columns, pitch, affine, du, s1, s2);
  else if (s1)
    frozen_slope<Act, false, true>(dh, residual, u, rows, columns, pitch, affine, du, s1, s2);
  else
    frozen_slope<Act, false, false>(dh, residual, u, rows, columns, pitch, affine, du, s1, s2);
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

template <bool kGrad, typename S, typename A>
PREACT_INLINE void residual_grad(const S* grad, const S* g, const S* u, int64_t rows,
                                 int64_t columns, int64_t pitch, const A* __restrict coefficients,
                                 S* du) {
  const A *mean = coefficients, *a = mean + pitch, *b = a + pitch, *d = b + pitch;
  rounded(
      rows, columns, pitch, du, PREACT_RESULTS(A) {
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t at = (row + i) * pitch;
#pragma omp simd
          for (int64_t c = 0; c < columns; ++c) {
            const A own = a[c] * widen(g[at + c]) + b[c] * (widen(u[at + c]) - mean[c]) + d[c];
            to[i * to_pitch + c] = kGrad ? own + widen(grad[at + c]) : own;
          }
        }
      });
}

// Vectors of kSize elements, and two of them element by element: the first halves, the second.
template <typename T>
struct Square;
template <>
struct Square<float> {
  static constexpr int kSize = 4;
  typedef float Vector __attribute__((vector_size(16), aligned(4), may_alias));
  static PREACT_INLINE void interleave(Vector a, Vector b, Vector& low, Vector& high) {
    low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  }
};
template <>
struct Square<Pair> {
  static constexpr int kSize = 4;
  typedef uint32_t Vector __attribute__((vector_size(16), aligned(2), may_alias));
  static PREACT_INLINE void interleave(Vector a, Vector b, Vector& low, Vector& high) {
    low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  }
};
template <>
struct Square<double> {
  static constexpr int kSize = 2;
  typedef double Vector __attribute__((vector_size(16), aligned(8), may_alias));
  static PREACT_INLINE void interleave(Vector a, Vector b, Vector& low, Vector& high) {
    low = __builtin_shufflevector(a, b, 0, 2);
    high = __builtin_shufflevector(a, b, 1, 3);
  }
};
template <>
struct Square<bf16> {
  static constexpr int kSize = 8;
  typedef uint16_t Vector __attribute__((vector_size(16), aligned(2), may_alias));
  static PREACT_INLINE void interleave(Vector a, Vector b, Vector& low, Vector& high) {
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  }
};

// Interleaving row i with row i + size/2, log2(size) times over, is a transposition.
template <typename T>
PREACT_INLINE void transpose_square(const T* in, int64_t ld_in, int64_t ld_out, T* out) {
  using S = Square<T>;
  using Vector = typename S::Vector;
  Vector row[S::kSize], next[S::kSize];
#pragma GCC unroll 8
  for (int i = 0; i < S::kSize; ++i) row[i] = *reinterpret_cast<const Vector*>(in + i * ld_in);
#pragma GCC unroll 3
  for (int round = 1; round < S::kSize; round *= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < S::kSize / 2; ++i)
      S::interleave(row[i], row[i + S::kSize / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 8
    for (int i = 0; i < S::kSize; ++i) row[i] = next[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < S::kSize; ++i) *reinterpret_cast<Vector*>(out + i * ld_out) = row[i];
}

template <typename T>
PREACT_INLINE void transpose_squares(const T* in, int64_t rows, int64_t columns, int64_t ld_in,
                                     int64_t ld_out, T* out) {
  constexpr int64_t kSize = Square<T>::kSize;
  const int64_t whole_rows = rows / kSize * kSize, whole_columns = columns / kSize * kSize;
  for (int64_t column = 0; column < whole_columns; column += kSize)
    for (int64_t row = 0; row < whole_rows; row += kSize)
      transpose_square(in + row * ld_in + column, ld_in, ld_out, out + column * ld_out + row);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = row < whole_rows ? whole_columns : 0; column < columns; ++column)
      out[column * ld_out + row] = in[row * ld_in + column];
}

PREACT_INLINE void pair(const bf16* in, int64_t rows, int64_t columns, bf16* out) {
  int64_t row = 0;
  for (; row + 2 <= rows; row += 2, in += 2 * columns, out += 2 * columns) {
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      const uint32_t both = in[c].bits | uint32_t{in[columns + c].bits} << 16;
      std::memcpy(out + 2 * c, &both, sizeof both);
    }
  }
  if (row == rows) return;
  for (int64_t c = 0; c < columns; ++c) {
    out[2 * c] = in[c];
    out[2 * c + 1] = bf16{};
  }
}

}  // namespace

// A row of 16 channels fills half of a vector of bfloat16: even numbers of them go two by two, as
// rows of 32 channels.
PREACT_INLINE bool go_two_by_two(int64_t rows, int64_t channels) {
  return channels == 16 && rows % 2 == 0;
}

// Vectors [4, 16] as [4, 32].
template <typename A>
struct Twice {
  A vectors[4 * 32];

  explicit Twice(const A* once) {
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t c = 0; c < 32; ++c) vectors[32 * i + c] = once[16 * i + c % 16];
  }
};

// A sum over rows of 32 channels, which ends in one of 16, if any.
template <typename A>
class FoldedSum {
 public:
  explicit FoldedSum(A* total) : total_(total) {}
  ~FoldedSum() {
    for (int64_t c = 0; total_ && c < 16; ++c) total_[c] += sum_[c] + sum_[c + 16];
  }
  A* get() { return total_ ? sum_ : nullptr; }

 private:
  A* const total_;
  A sum_[32] = {};
};

#define PREACT_BLOCKS \
  [&](int64_t at, int64_t first, int64_t count, int64_t columns, int64_t pitch) PREACT_INLINE_BODY

#define PREACT_PROLOGUES(S, A, O)                                                                  \
  PREACT_CLONES void activate_rows(const S* u, int64_t rows, int64_t channels, const A* affine,    \
                                   Activation activation, O* h) {                                  \
    if (std::is_same_v<S, bf16> && affine && go_two_by_two(rows, channels))                        \
      return activate_rows(u, rows / 2, 32, Twice<A>(affine).vectors, activation, h);              \
    if (!affine)                                                                                   \
      convert(u, rows * channels, h);                                                              \
    else if (activation == Activation::kRelu)                                                      \
      in_blocks(                                                                                   \
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
      in_blocks(                                                                                   \
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
  }                                                                                               \
  PREACT_CLONES void residual_grad_rows(const S* grad, const S* g, const S* u, int64_t rows,      \
                                        int64_t channels, const A* coefficients, S* du) {         \
    in_blocks(                                                                                    \
        rows, channels, PREACT_BLOCKS {                                                           \
          if (grad)                                                                               \
            residual_grad<true>(grad + at, g + at, u + at, count, columns, pitch,                 \
                                coefficients + first, du + at);                                   \
          else                                                                                    \
            residual_grad<false>(grad, g + at, u + at, count, columns, pitch,                     \
                                 coefficients + first, du + at);                                  \
        });                                                                                       \
  }

PREACT_ROWS(float, float)
PREACT_ROWS(bf16, float)
PREACT_ROWS(double, double)

#define PREACT_TRANSPOSE(T)                                                               \
  PREACT_CLONES void transpose(const T* in, int64_t rows, int64_t columns, int64_t ld_in, \
                               int64_t ld_out, T* out) {                                  \
    transpose_squares(in, rows, columns, ld_in, ld_out, out);                             \
  }

PREACT_TRANSPOSE(float)
PREACT_TRANSPOSE(bf16)
PREACT_TRANSPOSE(double)
PREACT_TRANSPOSE(Pair)

PREACT_CLONES void pair_rows(const bf16* in, int64_t rows, int64_t columns, bf16* out) {
  pair(in, rows, columns, out);
}

}  // namespace preact
