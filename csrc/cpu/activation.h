// The activations and their slopes, written so that they vectorise.
#pragma once

#include <limits>

#include "common.h"

namespace preact {

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
  static constexpr int64_t kRows = 4;  // in whose loops sums stay in registers
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
  static constexpr int64_t kRows = 1;  // sums are the least of its work
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

}  // namespace preact
