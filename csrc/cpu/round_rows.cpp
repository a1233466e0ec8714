// round_rows: float32 to bfloat16, by the processor's own instruction where it has one.
//
// Compilers do not find that instruction: it takes subnormal numbers for zero, which no C++ does.
#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
#define PREACT_ROUNDS
#include <immintrin.h>
#endif

namespace preact {
namespace {

PREACT_CLONES void round_any(const float* in, int64_t rows, int64_t columns, int64_t in_pitch,
                             int64_t out_pitch, bf16* out) {
  for (int64_t row = 0; row < rows; ++row, in += in_pitch, out += out_pitch) {
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) narrow(in[c], out[c]);
  }
}

#ifdef PREACT_ROUNDS
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) void round_avx512_bf16(
    const float* in, int64_t rows, int64_t columns, int64_t in_pitch, int64_t out_pitch,
    bf16* out) {
  for (int64_t row = 0; row < rows; ++row, in += in_pitch, out += out_pitch) {
    int64_t c = 0;
    for (; c + 32 <= columns; c += 32) {
      const auto low = _mm512_loadu_ps(in + c), high = _mm512_loadu_ps(in + c + 16);
      _mm512_storeu_si512(out + c, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
    for (; c < columns; c += 16) {
      const auto some = static_cast<__mmask16>((1u << std::min<int64_t>(16, columns - c)) - 1);
      const auto halves = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, in + c));
      _mm256_mask_storeu_epi16(out + c, some, reinterpret_cast<__m256i>(halves));
    }
  }
}
#endif

auto* const best = [] {
#ifdef PREACT_ROUNDS
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return round_avx512_bf16;
#endif
  return static_cast<decltype(&round_any)>(round_any);
}();

}  // namespace

void round_rows(const float* in, int64_t rows, int64_t columns, int64_t in_pitch, int64_t out_pitch,
                bf16* out) {
  if (columns == in_pitch && columns == out_pitch)
    best(in, 1, rows * columns, rows * columns, rows * columns, out);
  else
    best(in, rows, columns, in_pitch, out_pitch, out);
}

}  // namespace preact
