// The portable matrix tile: C[m, n] (+)= A[m, k] B[k, n] for any processor.
#include "common.h"

namespace preact {
namespace {

// kVectors of kDepth rows of B share the first cache with what they are multiplied with; a single
// vector needs so many rows of C as sums that none waits for the one before it.
namespace any {
constexpr int64_t kVectorBytes = 16, kDepth = 128, kNarrowRows = 6;
constexpr int kVectors = 2;
#define PREACT_TARGET
#include "tile_loops.h"
#undef PREACT_TARGET
}  // namespace any

#ifdef PREACT_VERSIONS
namespace v3 {
constexpr int64_t kVectorBytes = 32, kDepth = 256, kNarrowRows = 6;
constexpr int kVectors = 2;
#define PREACT_TARGET __attribute__((target("arch=x86-64-v3")))
#include "tile_loops.h"
#undef PREACT_TARGET
}  // namespace v3

namespace v4 {
constexpr int64_t kVectorBytes = 64, kDepth = 128, kNarrowRows = 16;
constexpr int kVectors = 4;
#define PREACT_TARGET __attribute__((target("arch=x86-64-v4")))
#include "tile_loops.h"
#undef PREACT_TARGET
}  // namespace v4
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

template <typename T>
Tile<T> transposed_tile() {
  PREACT_BEST_TILE(kTransposedTile<T>)
}
template Tile<float> transposed_tile();
template Tile<double> transposed_tile();

}  // namespace preact
