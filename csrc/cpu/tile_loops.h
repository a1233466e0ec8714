// The loops of the portable matrix tile. Whoever includes them, once for each instruction set, does
// so in a namespace with the constants that they name, and with the attribute of their functions as
// PREACT_TARGET: a compiler divides vectors up for the processor before it makes a function's
// clones, and so would for the least of them.
//
// A block of up to kRows<kN> rows by kN vectors of C stays in registers while k runs, over rows of
// B that lie one after the other. Sums over k are taken kDepth at a time, which keeps their
// rounding errors small.

template <int kN>
constexpr int64_t kRows = kRowsOf[kN / 2];

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
template <typename T>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(T));

// What products of T are added up in, and how: sum += a * b.
template <typename T>
struct Products {
  using Sum = T;
  using Vector = typename VectorOf<T>::type;
  using SumVector = Vector;
  static PREACT_TARGET PREACT_INLINE void add(T a, const Vector& b, SumVector& sum) {
    sum += a * b;
  }
};
template <typename T>
using Sum = typename Products<T>::Sum;

// The left operand, [m, k] or its transpose [k, m].
template <bool kTransposed, typename T>
struct Left {
  const T* values;
  int64_t ld;
  PREACT_TARGET PREACT_INLINE const T* at(int64_t i, int64_t j) const {
    return kTransposed ? values + j * ld + i : values + i * ld + j;
  }
  PREACT_TARGET PREACT_INLINE Left from(int64_t i, int64_t j) const { return {at(i, j), ld}; }
};

// b: [k, kN vectors].
template <int kM, int kN, typename A, typename T>
PREACT_TARGET PREACT_INLINE void block(int64_t k, int64_t ldc, bool accumulate, A a, const T* b,
                                       Sum<T>* c) {
  using Vector = typename Products<T>::Vector;
  using SumVector = typename Products<T>::SumVector;
  SumVector sum[kM][kN] = {};
  // A processor that two threads share has few instructions to spare for counting.
#pragma GCC unroll kUnrolled
  for (int64_t j = 0; j < k; ++j) {
    Vector row[kN];
#pragma GCC unroll 4
    for (int v = 0; v < kN; ++v)
      row[v] = *reinterpret_cast<const Vector*>(b + (j * kN + v) * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kN; ++v) Products<T>::add(*a.at(i, j), row[v], sum[i][v]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kN; ++v) {
      SumVector* const out = reinterpret_cast<SumVector*>(c + i * ldc + v * kLanes<T>);
      *out = accumulate ? *out + sum[i][v] : sum[i][v];
    }
}

// block<rows, kN>
template <int kN, int kM = kRows<kN>, typename A, typename T>
PREACT_TARGET PREACT_INLINE void block_of(int64_t rows, int64_t k, int64_t ldc, bool accumulate,
                                          A a, const T* b, Sum<T>* c) {
  if (rows == kM) return block<kM, kN>(k, ldc, accumulate, a, b, c);
  if constexpr (kM > 1) block_of<kN, kM - 1>(rows, k, ldc, accumulate, a, b, c);
}

// All rows of kN vectors of columns, in blocks as even as may be: a short one waits for its sums.
template <int kN, typename A, typename T>
PREACT_TARGET void columns(int64_t m, int64_t k, int64_t ldb, int64_t ldc, bool accumulate, A a,
                           const T* b, Sum<T>* c) {
  constexpr int64_t kWidth = kN * kLanes<T>;
  alignas(64) T together[kDepth * kWidth];
  if (ldb != kWidth) {
    for (int64_t j = 0; j < k; ++j)
      std::memcpy(together + j * kWidth, b + j * ldb, kWidth * sizeof(T));
    b = together;
  }
  const int64_t blocks = ceil_div(m, kRows<kN>), fewest = m / blocks, longer = m % blocks;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t rows = fewest + (i < longer);
    block_of<kN>(rows, k, ldc, accumulate, a, b, c);
    a = a.from(rows, 0);
    c += rows * ldc;
  }
}

// All rows of the n columns that do not fill a vector.
template <typename A, typename T>
PREACT_TARGET void edge(int64_t m, int64_t n, int64_t k, int64_t ldb, int64_t ldc, bool accumulate,
                        A a, const T* b, Sum<T>* c) {
  alignas(64) T together[kDepth * kLanes<T>] = {};
  alignas(64) Sum<T> sum[kRows<1> * kLanes<T>];
  for (int64_t j = 0; j < k; ++j) std::copy_n(b + j * ldb, n, together + j * kLanes<T>);
  for (int64_t row = 0; row < m; row += kRows<1>) {
    const int64_t rows = std::min(kRows<1>, m - row);
    block_of<1>(rows, k, kLanes<T>, false, a.from(row, 0), together, sum);
    for (int64_t i = 0; i < rows; ++i) {
      Sum<T>* const out = c + (row + i) * ldc;
      for (int64_t l = 0; l < n; ++l) {
        const Sum<T> product = sum[i * kLanes<T> + l];
        out[l] = accumulate ? out[l] + product : product;
      }
    }
  }
}

// Columns from `column` on: as many as there are by kN vectors, the rest by half of them.
template <int kN, typename A, typename T>
PREACT_TARGET void columns_from(int64_t column, int64_t m, int64_t n, int64_t k, int64_t ldb,
                                int64_t ldc, bool accumulate, A a, const T* b, Sum<T>* c) {
  for (; column + kN * kLanes<T> <= n; column += kN * kLanes<T>)
    columns<kN>(m, k, ldb, ldc, accumulate, a, b + column, c + column);
  if (column == n) return;
  if constexpr (kN > 1)
    columns_from<kN / 2>(column, m, n, k, ldb, ldc, accumulate, a, b, c);
  else
    edge(m, n - column, k, ldb, ldc, accumulate, a, b + column, c + column);
}

template <bool kTransposed, typename T>
PREACT_TARGET void multiply(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc,
                            bool accumulate, const T* a, const T* b, Sum<T>* c) {
  const Left<kTransposed, T> left{a, lda};
  for (int64_t j = 0; j < k; j += kDepth, accumulate = true)
    columns_from<kVectors>(0, m, n, std::min(kDepth, k - j), ldb, ldc, accumulate, left.from(0, j),
                           b + j * ldb, c);
}

template <typename T>
constexpr Tile<T> kTile = {multiply<false, T>, kVectors * kLanes<T>, true, false};
template <typename T>
constexpr Tile<T> kTransposedTile = {multiply<true, T>, kVectors * kLanes<T>, true, false};
