// add_splits: dW [K, taps, C] = sum over splits of wgrad's partial results [splits, taps, K, C], in
// their order.
// Reads splits*K*C*R*S floats, most of them from the cache, and writes K*C*R*S: a launch's latency,
// one for all convolutions of a call.
#include "launch.cuh"

namespace preact {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostSums = 32;  // of a launch

struct SplitSums {
  SplitSum of[kMostSums];
};

// blockIdx.y is a sum.
__global__ __launch_bounds__(kThreads) void add_splits_kernel(const SplitSums sums) {
  const SplitSum& s = sums.of[blockIdx.y];
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t size = s.taps * s.filters * s.channels;
  if (i >= size) return;
  float sum = 0;
  const float* const partial = s.partial + i;
  const int splits = static_cast<int>(s.splits);
#pragma unroll 8
  for (int split = 0; split < splits; ++split) sum += load(partial + split * size);
  const int64_t tap = i / (s.filters * s.channels), row = i / s.channels % s.filters;
  store(s.dweight + (row * s.taps + tap) * s.channels + i % s.channels, sum);
}

}  // namespace
}  // namespace cuda

void add_splits(const CudaRuntime& runtime, int64_t count, const SplitSum* sums) {
  using namespace cuda;
  for (int64_t first = 0; first < count; first += kMostSums) {
    const int64_t here = std::min<int64_t>(count - first, kMostSums);
    SplitSums some{};
    std::copy_n(sums + first, here, some.of);
    int64_t largest = 1;
    for (int64_t i = first; i < first + here; ++i)
      largest = std::max(largest, sums[i].taps * sums[i].filters * sums[i].channels);
    launch("add_splits", add_splits_kernel,
           {static_cast<unsigned>(ceil_div(largest, kThreads)), static_cast<unsigned>(here)},
           kThreads, 0, runtime.device, runtime.stream, some);
  }
}

}  // namespace preact
