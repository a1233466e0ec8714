// What the running torch lends the kernels: its threads and, where it has one, its matrix tile.
#include "runtime.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "../cpu/common.h"

// oneDNN's matrix tile, as torch exports it. Weak symbols: absent in some torch, they are null.
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
__attribute__((weak)) void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb,
                                  int64_t ldc, const bool accumulate, const float* a,
                                  const float* b, float* c, bool is_vnni);
__attribute__((weak)) void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb,
                                  int64_t ldc, const bool accumulate, const c10::BFloat16* a,
                                  const c10::BFloat16* b, float* c, bool is_vnni);
// A thread that has used brgemm gives AMX's tiles back before others use them.
__attribute__((weak)) void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace preact {
namespace {

constexpr char kBrgemm[] = "brgemm", kPortable[] = "portable";

std::atomic<const char*> chosen{nullptr};  // by the user

void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate,
            const float* a, const float* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, false);
}

void brgemm_pairs(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc,
                  bool accumulate, const bf16* a, const bf16* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate,
                              reinterpret_cast<const c10::BFloat16*>(a),
                              reinterpret_cast<const c10::BFloat16*>(b), c, true);
}

constexpr Tile<float> kBrgemmTile = {brgemm, 64, false, false};
// From one kind of product to another it sets AMX up anew, which takes 2 us.
constexpr Tile<bf16, float> kBrgemmPairsTile = {brgemm_pairs, 64, false, true};

// torch refuses, by an exception, on processors without it and where mkldnn is switched off.
template <typename Operand>
bool runs(const Tile<Operand, float>& tile, const Operand* ones) {
  float product = 0;
  try {
    tile.multiply(1, 1, 2, 2, 1, 1, false, ones, ones, &product);
  } catch (const std::exception&) {
    return false;
  }
  return product == 2;
}

bool brgemm_runs() {
  using Function = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool,
                            const float*, const float*, float*, bool);
  const float ones[] = {1, 1};
  return static_cast<Function>(at::native::cpublas::brgemm) && runs(kBrgemmTile, ones);
}

bool brgemm_multiplies_bfloat16() {
#if defined(__x86_64__)
  using Function = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool,
                            const c10::BFloat16*, const c10::BFloat16*, float*, bool);
  const bf16 ones[] = {{0x3f80}, {0x3f80}};
  return __builtin_cpu_supports("avx512bf16") && at::native::cpublas::brgemm_release &&
         static_cast<Function>(at::native::cpublas::brgemm) && runs(kBrgemmPairsTile, ones);
#else
  return false;
#endif
}

// A range of its own for each thread; one that is through with it takes what another has left, so
// that a processor busy elsewhere holds the rest up by one piece only.
struct alignas(64) Range {
  std::atomic<int64_t> next;
  int64_t end;
};

bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("x86-64-v4");
#else
  return false;
#endif
}

// Than brgemm: where it is compiled for the processor. On Intel's with AVX-512 it is not measured.
bool portable_is_faster() {
#ifdef PREACT_VERSIONS
  return __builtin_cpu_supports("x86-64-v3") && !(has_avx512() && __builtin_cpu_is("intel"));
#else
  return false;
#endif
}

// AMX multiplies 32 values deep, and takes its time over the rest of a product.
int64_t pairs_depth() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("amx-bf16") ? 32 : 2;
#else
  return 2;
#endif
}

void torch_parallel_for(int64_t count, void (*body)(int64_t, void*), void* context) {
  const int64_t threads =
      std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), count));
  std::vector<Range> ranges(threads);
  for (int64_t i = 0; i < threads; ++i) {
    ranges[i].next = i * count / threads;
    ranges[i].end = (i + 1) * count / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; ++own)
      for (int64_t i = 0; i < threads; ++i) {
        Range& range = ranges[(own + i) % threads];
        for (int64_t piece; (piece = range.next++) < range.end;) body(piece, context);
      }
    if (at::native::cpublas::brgemm_release) at::native::cpublas::brgemm_release(true);
  });
}

}  // namespace

std::vector<std::string> tile_providers() {
  if (!brgemm_runs()) return {kPortable};
  if (portable_is_faster()) return {kPortable, kBrgemm};
  return {kBrgemm, kPortable};
}

bool multiplies_bfloat16() {
  return portable_pairs_tile().multiply || brgemm_multiplies_bfloat16();
}

void use_tile_provider(const std::string& name) {
  std::string known;
  for (const std::string& provider : tile_providers()) {
    if (provider == name) {
      chosen = name == kPortable ? kPortable : kBrgemm;
      return;
    }
    known += (known.empty() ? "" : ", ") + provider;
  }
  throw std::invalid_argument("tile provider: expected one of " + known + ", got " + name);
}

Runtime torch_runtime() {
  const char* const name = chosen;
  const bool brgemm = (name ? name == kBrgemm : !portable_is_faster()) && brgemm_runs();
  Runtime runtime{torch_parallel_for,
                  torch::stable::get_num_threads(),
                  portable_tile<float>(),
                  portable_pairs_tile(),
                  2,
                  !has_avx512()};
  if (!brgemm) return runtime;
  runtime.tile = kBrgemmTile;
  runtime.pairs_tile = {};
  if (!brgemm_multiplies_bfloat16()) return runtime;
  runtime.pairs_tile = kBrgemmPairsTile;
  runtime.pairs_depth = pairs_depth();
  return runtime;
}

}  // namespace preact
