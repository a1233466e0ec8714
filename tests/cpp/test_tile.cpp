// The portable tile in the vectors of every instruction set; where they are longer than this
// processor's, the compiler divides them up. Products of small integers are exact in any order.

#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/common.h"

using namespace preact;

namespace {

#define PREACT_TARGET
namespace bytes16 {
constexpr int64_t kVectorBytes = 16, kDepth = 128, kRowsOf[] = {6, 6};
constexpr int kVectors = 2, kUnrolled = 4;
#include "cpu/tile_loops.h"
}  // namespace bytes16
namespace bytes32 {
constexpr int64_t kVectorBytes = 32, kDepth = 256, kRowsOf[] = {6, 6};
constexpr int kVectors = 2, kUnrolled = 4;
#include "cpu/tile_loops.h"
}  // namespace bytes32
namespace bytes64 {
constexpr int64_t kVectorBytes = 64, kDepth = 128, kRowsOf[] = {16, 6, 6};
constexpr int kVectors = 4, kUnrolled = 4;
#include "cpu/tile_loops.h"
}  // namespace bytes64

std::mt19937 random_bits;

int64_t between(int64_t least, int64_t most) {
  return least + static_cast<int64_t>(random_bits() % (most - least + 1));
}

template <typename T>
std::vector<T> integers(int64_t count) {
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(between(-8, 8));
  return values;
}

// Rows of all operands end in values that belong to nobody; C's are compared too. A is [m, k], or
// [k, m].
template <typename T>
bool one_product_is_right(const Tile<T>& tile, bool transposed) {
  const int64_t m = between(1, 40), n = between(1, 3 * tile.columns), k = between(1, 600);
  const int64_t lda = (transposed ? m : k) + between(0, 3), ldb = n + between(0, 3),
                ldc = n + between(0, 3);
  const bool accumulate = between(0, 1);
  const std::vector<T> a = integers<T>((transposed ? k : m) * lda), b = integers<T>(k * ldb);
  std::vector<T> c = integers<T>(m * ldc), expected = c;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      T sum = accumulate ? c[i * ldc + j] : 0;
      for (int64_t l = 0; l < k; ++l)
        sum += a[transposed ? l * lda + i : i * lda + l] * b[l * ldb + j];
      expected[i * ldc + j] = sum;
    }
  tile.multiply(m, n, k, lda, ldb, ldc, accumulate, a.data(), b.data(), c.data());
  return c == expected;
}

// The same of bfloat16, whose B has its rows in pairs.
bool one_product_of_pairs_is_right(const Tile<bf16, float>& tile) {
  const int64_t m = between(1, 40), n = between(1, 3 * tile.columns), k = 2 * between(1, 600);
  const int64_t lda = k + 2 * between(0, 3), ldb = n + between(0, 3), ldc = n + between(0, 3);
  const bool accumulate = between(0, 1);
  const std::vector<float> a = integers<float>(m * lda), b = integers<float>(k * ldb);
  std::vector<float> c = integers<float>(m * ldc), expected = c;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = accumulate ? c[i * ldc + j] : 0;
      for (int64_t l = 0; l < k; ++l) sum += a[i * lda + l] * b[l / 2 * 2 * ldb + 2 * j + l % 2];
      expected[i * ldc + j] = sum;
    }
  std::vector<bf16> short_a(a.size()), short_b(b.size());
  for (size_t i = 0; i < a.size(); ++i) narrow(a[i], short_a[i]);
  for (size_t i = 0; i < b.size(); ++i) narrow(b[i], short_b[i]);
  tile.multiply(m, n, k, lda, ldb, ldc, accumulate, short_a.data(), short_b.data(), c.data());
  return c == expected;
}

template <typename F>
int wrong_of(const char* name, const F& one_is_right) {
  constexpr int kProducts = 300;
  int wrong = 0;
  for (int i = 0; i < kProducts; ++i) wrong += !one_is_right();
  if (wrong) std::printf("%s: %d of %d products are wrong\n", name, wrong, kProducts);
  return wrong;
}

template <typename T>
int wrong_products(const char* name, const Tile<T>& tile, bool transposed = false) {
  return wrong_of(name, [&] { return one_product_is_right(tile, transposed); });
}

int wrong_products_of_pairs() {
  const Tile<bf16, float> tile = portable_pairs_tile();
  if (!tile.multiply) {
    std::printf("this processor or build multiplies no bfloat16\n");
    return 0;
  }
  return wrong_of("pairs", [&] { return one_product_of_pairs_is_right(tile); });
}

}  // namespace

int main() {
  const int wrong = wrong_products("float, 16 bytes", bytes16::kTile<float>) +
                    wrong_products("float, 32 bytes", bytes32::kTile<float>) +
                    wrong_products("float, 64 bytes", bytes64::kTile<float>) +
                    wrong_products("float, this processor", portable_tile<float>()) +
                    wrong_products("transposed, 16 bytes", bytes16::kTransposedTile<float>, true) +
                    wrong_products("transposed, 32 bytes", bytes32::kTransposedTile<float>, true) +
                    wrong_products("transposed, 64 bytes", bytes64::kTransposedTile<float>, true) +
                    wrong_products("transposed, this processor", transposed_tile<float>(), true) +
                    wrong_products("double, 16 bytes", bytes16::kTile<double>) +
                    wrong_products("double, 32 bytes", bytes32::kTile<double>) +
                    wrong_products("double, 64 bytes", bytes64::kTile<double>) +
                    wrong_products("double, this processor", portable_tile<double>()) +
                    wrong_products("transposed, double", transposed_tile<double>(), true) +
                    wrong_products_of_pairs();
  std::printf(wrong ? "%d products are wrong\n" : "all products are right\n", wrong);
  return wrong != 0;
}
