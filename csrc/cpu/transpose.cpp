// transpose and pair_rows: operands as the matrix tile takes them.
#include <utility>

#include "rows.h"

namespace preact {
namespace {

// A row of a square; values move as numbers of their size.
template <typename T, int kSize>
struct RowOf {
  using Value = std::conditional_t<sizeof(T) == 2, uint16_t,
                                   std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  typedef Value type
      __attribute__((vector_size(kSize * sizeof(T)), aligned(alignof(T)), may_alias));
};

// Two rows value by value: their first halves, their second.
template <typename Vector, int... kIndex>
PREACT_INLINE void interleave(const Vector& a, const Vector& b, Vector& low, Vector& high,
                              std::integer_sequence<int, kIndex...>) {
  constexpr int kSize = sizeof...(kIndex);
  low = __builtin_shufflevector(a, b, (kIndex / 2 + kIndex % 2 * kSize)...);
  high = __builtin_shufflevector(a, b, (kSize / 2 + kIndex / 2 + kIndex % 2 * kSize)...);
}

// Interleaving row i with row i + size/2, log2(size) times over, is a transposition.
template <int kSize, typename T>
PREACT_INLINE void transpose_square(const T* in, int64_t ld_in, int64_t ld_out, T* out) {
  using Vector = typename RowOf<T, kSize>::type;
  Vector row[kSize], next[kSize];
#pragma GCC unroll 8
  for (int i = 0; i < kSize; ++i) row[i] = *reinterpret_cast<const Vector*>(in + i * ld_in);
#pragma GCC unroll 3
  for (int round = 1; round < kSize; round *= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < kSize / 2; ++i)
      interleave(row[i], row[i + kSize / 2], next[2 * i], next[2 * i + 1],
                 std::make_integer_sequence<int, kSize>{});
#pragma GCC unroll 8
    for (int i = 0; i < kSize; ++i) row[i] = next[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSize; ++i) *reinterpret_cast<Vector*>(out + i * ld_out) = row[i];
}

// In squares, the last of which overlap those before; in smaller ones where there are not so many
// rows or columns.
template <int kSize, typename T>
PREACT_INLINE void transpose_squares(const T* in, int64_t rows, int64_t columns, int64_t ld_in,
                                     int64_t ld_out, T* out) {
  if constexpr (kSize == 1) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; ++column)
        out[column * ld_out + row] = in[row * ld_in + column];
  } else {
    if (rows < kSize || columns < kSize)
      return transpose_squares<kSize / 2>(in, rows, columns, ld_in, ld_out, out);
    for (int64_t column = 0; column < columns; column += kSize)
      for (int64_t row = 0; row < rows; row += kSize) {
        const int64_t r = std::min(row, rows - kSize), c = std::min(column, columns - kSize);
        transpose_square<kSize>(in + r * ld_in + c, ld_in, ld_out, out + c * ld_out + r);
      }
  }
}

PREACT_INLINE void pair(const bf16* in, int64_t rows, int64_t columns, int64_t pitch, bf16* out) {
  int64_t row = 0;
  for (; row + 2 <= rows; row += 2, in += 2 * pitch, out += 2 * columns) {
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      const uint32_t both = in[c].bits | uint32_t{in[pitch + c].bits} << 16;
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

#define PREACT_TRANSPOSE(T)                                                               \
  PREACT_CLONES void transpose(const T* in, int64_t rows, int64_t columns, int64_t ld_in, \
                               int64_t ld_out, T* out) {                                  \
    transpose_squares<16 / sizeof(T)>(in, rows, columns, ld_in, ld_out, out);             \
  }

PREACT_TRANSPOSE(float)
PREACT_TRANSPOSE(bf16)
PREACT_TRANSPOSE(double)
PREACT_TRANSPOSE(Pair)

PREACT_CLONES void pair_rows(const bf16* in, int64_t rows, int64_t columns, int64_t pitch,
                             bf16* out) {
  pair(in, rows, columns, pitch, out);
}

}  // namespace preact
