// The portable matrix tile: C[m, n] (+)= A[m, k] B[k, n] for any processor; of bfloat16 for those
// that multiply it.
#include "rows.h"

namespace preact {
namespace {

// kVectors of kDepth rows of B share the first cache with what they are multiplied with. Blocks by
// 1, 2 and 4 vectors have kRowsOf rows, enough that no sum waits for the one before it.
namespace any {
constexpr int64_t kVectorBytes = 16, kDepth = 128, kRowsOf[] = {6, 6};
constexpr int kVectors = 2, kUnrolled = 4;
#define PREACT_TARGET
#include "tile_loops.h"
#undef PREACT_TARGET
}  // namespace any

#ifdef PREACT_VERSIONS
namespace v3 {
constexpr int64_t kVectorBytes = 32, kDepth = 256, kRowsOf[] = {6, 6};
constexpr int kVectors = 2, kUnrolled = 4;
#define PREACT_TARGET __attribute__((target("arch=x86-64-v3")))
#include "tile_loops.h"
#undef PREACT_TARGET
}  // namespace v3

namespace v4 {
constexpr int64_t kVectorBytes = 64, kDepth = 128, kRowsOf[] = {16, 6, 6};
constexpr int kVectors = 4, kUnrolled = 4;
#define PREACT_TARGET __attribute__((target("arch=x86-64-v4")))
#include "tile_loops.h"
#undef PREACT_TARGET
}  // namespace v4

// Compilers do not find the instruction that adds up pairs of products, nor its operand that is one
// pair of memory everywhere: what a load of its own would cost shows where rows are few.
namespace v4_bf16 {
constexpr int64_t kVectorBytes = 64, kDepth = 128, kRowsOf[] = {16, 12, 7};
constexpr int kVectors = 4, kUnrolled = 1;
#define PREACT_TARGET __attribute__((target("arch=x86-64-v4,avx512bf16")))
#include "tile_loops.h"

template <>
struct Products<Pair> {
  using Sum = float;
  typedef uint32_t Vector __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
  using SumVector = VectorOf<float>::type;
  static PREACT_TARGET PREACT_INLINE void add(const Pair& a, const Vector& b, SumVector& sum) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(a));
  }
};

// a: [m, k], b: [k / 2, n, 2]
PREACT_TARGET void multiply_pairs(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb,
                                  int64_t ldc, bool accumulate, const bf16* a, const bf16* b,
                                  float* c) {
  multiply<false>(m, n, k / 2, lda / 2, ldb, ldc, accumulate, reinterpret_cast<const Pair*>(a),
                  reinterpret_cast<const Pair*>(b), c);
}
#undef PREACT_TARGET
}  // namespace v4_bf16
#endif

}  // namespace

#ifdef PREACT_VERSIONS
#define PREACT_BEST_TILE(name)                              \
  if (__builtin_cpu_supports("x86-64-v4")) return v4::name; \
  if (__builtin_cpu_supports("x86-64-v3")) return v3::name; \
  return any::name;
#else
#define PREACT_BEST_TILE(name) return any::name;
#endif

template <typename T>
Tile<T> portable_tile() {
  PREACT_BEST_TILE(kTile<T>)
}
template Tile<float> portable_tile();
template Tile<double> portable_tile();

Tile<bf16, float> portable_pairs_tile() {
#ifdef PREACT_VERSIONS
  if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16"))
    return {v4_bf16::multiply_pairs, v4_bf16::kVectors * v4_bf16::kLanes<Pair>, true, false};
#endif
  return {};
}

template <typename T>
Tile<T> transposed_tile() {
  PREACT_BEST_TILE(kTransposedTile<T>)
}
template Tile<float> transposed_tile();
template Tile<double> transposed_tile();

}  // namespace preact
