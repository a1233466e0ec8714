// How the vector loops go over rows of pixels: by blocks of rows and channels, and what of their
// results is rounded.
#pragma once

#include "rows.h"

namespace preact {

constexpr int64_t kMostColumns = 64;   // of a block
constexpr int64_t kRoundedRows = 32;   // at a time, so that they stay in the innermost cache
constexpr int64_t kBytesAhead = 4096;  // that are on their way while a row is worked on

// Calls f(at, first, rows, columns, pitch) for blocks of channels: at is where a block starts in
// [rows, channels], first its first channel, pitch is channels.
template <typename F>
PREACT_INLINE void in_plain_blocks(int64_t rows, int64_t channels, const F& f) {
  for (int64_t first = 0; first < channels; first += kMostColumns)
    f(first, first, rows, std::min(kMostColumns, channels - first), channels);
}

// The same for blocks of rows and channels. Where columns is a constant, mean, scale and the like
// stay in registers over all rows of a block, and so do sums. Loops over float64 have no constants:
// few train in it, and they would make the build longer.
template <typename S, int64_t kColumns = kMostColumns, typename F>
PREACT_INLINE void in_blocks(int64_t rows, int64_t channels, const F& f) {
  if constexpr (std::is_same_v<S, double>) {
    in_plain_blocks(rows, channels, f);
  } else {
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
}

// Calls f(row, rows, to, pitch) for results that it writes in the accumulator's type: where they
// are to lie, or to be rounded from there while they are in cache.
template <typename A, typename F>
PREACT_INLINE void rounded(int64_t rows, int64_t /*columns*/, int64_t pitch, A* out, const F& f) {
  f(int64_t{0}, rows, out, pitch);
}
template <typename F>
PREACT_INLINE void rounded(int64_t rows, int64_t columns, int64_t pitch, bf16* out, const F& f) {
  alignas(64) float values[kRoundedRows * kMostColumns];
  for (int64_t row = 0; row < rows; row += kRoundedRows) {
    const int64_t count = std::min(kRoundedRows, rows - row);
    f(row, count, values, columns);
    round_rows(values, count, columns, columns, pitch, out + row * pitch);
  }
}

// Prefetches the row that comes kBytesAhead of such rows after `row`, to be read or written.
// Processors do so themselves for one long loop; these are short, begin anew with every tile, and
// write at several places.
template <typename T>
PREACT_INLINE void prefetch_row(const T* row, int64_t columns, int64_t pitch) {
  constexpr int64_t kSize = sizeof(T), kLine = kLineBytes / kSize;
  const T* const later = row + kBytesAhead / (columns * kSize) * pitch;
  for (int64_t c = 0; c < columns; c += kLine) __builtin_prefetch(later + c);
}

#define PREACT_RESULTS(A) \
  [&](int64_t row, int64_t rows, A* __restrict to, int64_t to_pitch) PREACT_INLINE_BODY

template <typename T>
PREACT_INLINE T* offset(T* values, int64_t count) {
  return values ? values + count : nullptr;
}

// Calls f<kRows>(row) or f<1>(row) for all rows: sums over kRows of them stay in registers.
template <int64_t kRows = 4, typename F>
PREACT_INLINE void in_groups(int64_t rows, const F& f) {
  int64_t row = 0;
  if constexpr (kRows > 1)
    for (; row + kRows <= rows; row += kRows) f.template operator()<kRows>(row);
  for (; row < rows; ++row) f.template operator()<1>(row);
}

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

template <typename A>
PREACT_INLINE A preactivation(A u, A mean, A scale, A shift) {
  return scale * (u - mean) + shift;
}

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

}  // namespace preact
