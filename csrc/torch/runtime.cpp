// What the running torch lends the kernels: its threads and, where it has one, its matrix tile.
#include "runtime.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <stdexcept>

// oneDNN's matrix tile, as torch exports it. A weak symbol: absent in some torch, it is null.
namespace at::native::cpublas {
__attribute__((weak)) void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb,
                                  int64_t ldc, const bool accumulate, const float* a,
                                  const float* b, float* c, bool is_vnni);
}

namespace preact {
namespace {

std::atomic<bool> portable_only{false};

void brgemm_tile(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc,
                 bool accumulate, const float* a, const float* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, false);
}

// torch refuses, by an exception, on processors without it and where mkldnn is switched off.
bool brgemm_runs() {
  if (!at::native::cpublas::brgemm) return false;
  const float one = 1;
  float product = 0;
  try {
    brgemm_tile(1, 1, 1, 1, 1, 1, false, &one, &one, &product);
  } catch (const std::exception&) {
    return false;
  }
  return product == 1;
}

void torch_parallel_for(int64_t count, void (*body)(int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i, context);
  });
}

}  // namespace

std::vector<std::string> tile_providers() {
  return brgemm_runs() ? std::vector<std::string>{"brgemm", "portable"}
                       : std::vector<std::string>{"portable"};
}

void use_tile_provider(const std::string& name) {
  std::string known;
  for (const std::string& provider : tile_providers()) {
    if (provider == name) {
      portable_only = name == "portable";
      return;
    }
    known += (known.empty() ? "" : ", ") + provider;
  }
  throw std::invalid_argument("tile provider: expected one of " + known + ", got " + name);
}

Runtime torch_runtime() {
  const Tile<float> portable = portable_tile;
  return {torch_parallel_for, !portable_only && brgemm_runs() ? brgemm_tile : portable};
}

}  // namespace preact
