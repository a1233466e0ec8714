// transpose and pair_rows: operands as the matrix tile takes them.
#include "rows.h"

namespace preact {
namespace {

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
    transpose_squares(in, rows, columns, ld_in, ld_out, out);                             \
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
