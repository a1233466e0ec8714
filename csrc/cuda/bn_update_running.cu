// bn_update_running: running = (1 - momentum) * running + momentum * batch, for mean and variance.
// Reads and writes a few vectors of C values: a launch's latency, one for all BatchNorms of units
// that share a call.
#include <type_traits>

#include "launch.cuh"

namespace preact {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMostUpdates = 32;  // of a launch

struct Updates {
  int count;
  RunningStats of[kMostUpdates];
};

template <typename T>
PREACT_DEVICE void approach(void* vector, int64_t i, double batch, double momentum) {
  T& running = static_cast<T*>(vector)[i];
  double value;
  if constexpr (std::is_same_v<T, double>)
    value = running;
  else
    value = widen(running);
  const double step = batch - value;
  const double next = momentum < 0.5 ? value + momentum * step : batch - (1 - momentum) * step;
  if constexpr (std::is_same_v<T, double>)
    running = next;
  else
    running = narrow<T>(static_cast<float>(next));
}

PREACT_DEVICE void approach(Dtype dtype, void* vector, int64_t i, double batch, double momentum) {
  if (dtype == Dtype::kFloat32) approach<float>(vector, i, batch, momentum);
  if (dtype == Dtype::kFloat64) approach<double>(vector, i, batch, momentum);
  if (dtype == Dtype::kBFloat16) approach<bf16>(vector, i, batch, momentum);
  if (dtype == Dtype::kFloat16) approach<f16>(vector, i, batch, momentum);
}

// blockIdx.y is an update, and takes along later ones of the same BatchNorm, one after the other.
__global__ void bn_update_running_kernel(const Updates updates) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int own = static_cast<int>(blockIdx.y);
  void* const mean = updates.of[own].mean;
  for (int i = 0; i < own; ++i)
    if (updates.of[i].mean == mean) return;
  for (int i = own; i < updates.count; ++i) {
    const RunningStats& update = updates.of[i];
    if (update.mean != mean || c >= update.channels) continue;
    const float* const stats = static_cast<const float*>(update.stats);
    approach(update.dtype, update.mean, c * update.mean_stride, load(stats + c), update.momentum);
    approach(update.dtype, update.var, c * update.var_stride,
             load(stats + update.channels + c) * update.unbiased, update.momentum);
  }
}

}  // namespace
}  // namespace cuda

void bn_update_running(const CudaRuntime& runtime, Dtype accumulator, int64_t count,
                       const RunningStats* updates) {
  using namespace cuda;
  if (accumulator != Dtype::kFloat32) throw std::invalid_argument("stats: expected float32");
  for (int64_t first = 0; first < count; first += kMostUpdates) {
    Updates some{static_cast<int>(std::min<int64_t>(count - first, kMostUpdates)), {}};
    std::copy_n(updates + first, some.count, some.of);
    int64_t channels = 1;
    for (int i = 0; i < some.count; ++i) channels = std::max(channels, some.of[i].channels);
    launch("bn_update_running", bn_update_running_kernel,
           {static_cast<unsigned>(ceil_div(channels, kThreads)), static_cast<unsigned>(some.count)},
           kThreads, 0, runtime.device, runtime.stream, some);
  }
}

}  // namespace preact
