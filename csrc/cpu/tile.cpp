// The portable matrix tile: C[m, n] (+)= A[m, k] B[k, n] for any processor.
//
// A block of 6 rows by 64 bytes of columns stays in registers while k runs; the vectors are the
// compiler's own, wider or narrower than the processor's as it may be. Sums over k are taken 128 at
// a time, which keeps their rounding errors small.
#include "common.h"

namespace preact {
namespace {

constexpr int64_t kRows = 6;
constexpr int64_t kDepth = 128;
constexpr int64_t kVectorBytes = 64;

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <int64_t kM, typename T>
PREACT_INLINE void block(int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate,
                         const T* a, const T* b, T* c) {
  using Vector = typename VectorOf<T>::type;
  Vector sum[kM] = {};
  for (int64_t j = 0; j < k; ++j) {
    const Vector row = *reinterpret_cast<const Vector*>(b + j * ldb);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kM; ++i) sum[i] += a[i * lda + j] * row;
  }
  for (int64_t i = 0; i < kM; ++i) {
    Vector* const out = reinterpret_cast<Vector*>(c + i * ldc);
    *out = accumulate ? *out + sum[i] : sum[i];
  }
}

// The columns that do not fill a vector.
template <typename T>
PREACT_INLINE void edge(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc,
                        bool accumulate, const T* a, const T* b, T* c) {
  for (int64_t i = 0; i < m; ++i) {
    T sum[kVectorBytes / sizeof(T)] = {};
    for (int64_t j = 0; j < k; ++j) {
#pragma omp simd
      for (int64_t l = 0; l < n; ++l) sum[l] += a[i * lda + j] * b[j * ldb + l];
    }
    for (int64_t l = 0; l < n; ++l) c[i * ldc + l] = accumulate ? c[i * ldc + l] + sum[l] : sum[l];
  }
}

template <typename T>
PREACT_INLINE void tile(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc,
                        bool accumulate, const T* a, const T* b, T* c) {
  constexpr int64_t kColumns = kVectorBytes / sizeof(T);
  const int64_t full = n / kColumns * kColumns;
  for (int64_t j = 0; j < k; j += kDepth, a += kDepth, b += kDepth * ldb, accumulate = true) {
    const int64_t depth = std::min(kDepth, k - j);
    for (int64_t column = 0; column < full; column += kColumns) {
      const T* const b_column = b + column;
      T* const c_column = c + column;
      int64_t row = 0;
      for (; row + kRows <= m; row += kRows)
        block<kRows>(depth, lda, ldb, ldc, accumulate, a + row * lda, b_column,
                     c_column + row * ldc);
      for (; row < m; ++row)
        block<1>(depth, lda, ldb, ldc, accumulate, a + row * lda, b_column, c_column + row * ldc);
    }
    if (full < n) edge(m, n - full, depth, lda, ldb, ldc, accumulate, a, b + full, c + full);
  }
}

}  // namespace

PREACT_CLONES void portable_tile(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb,
                                 int64_t ldc, bool accumulate, const float* a, const float* b,
                                 float* c) {
  tile(m, n, k, lda, ldb, ldc, accumulate, a, b, c);
}

PREACT_CLONES void portable_tile(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb,
                                 int64_t ldc, bool accumulate, const double* a, const double* b,
                                 double* c) {
  tile(m, n, k, lda, ldb, ldc, accumulate, a, b, c);
}

}  // namespace preact
