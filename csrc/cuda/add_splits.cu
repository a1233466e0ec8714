// add_splits: dW [K, taps, C] = sum over splits of wgrad's partial results [splits, taps, K, C], in
// a fixed order.
// Reads splits*K*C*R*S floats, most of them from the cache, and writes K*C*R*S: one launch for all
// convolutions of a call. Up to eight threads share the splits of a value, so that no thread waits
// for memory hundreds of times.
#include "launch.cuh"

namespace preact {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostSums = 32;    // of a launch
constexpr int kMostSlices = 8;   // threads that share the splits of a value
constexpr int kSliceSplits = 8;  // of one of them, at least: what it loads at the same time

__host__ __device__ constexpr int slices_of(int64_t splits) {
  int slices = 1;
  while (slices < kMostSlices && splits >= 2 * slices * kSliceSplits) slices *= 2;
  return slices;
}

struct SplitSums {
  SplitSum of[kMostSums];
};

// blockIdx.y is a sum, of which some have fewer blocks than others.
__global__ __launch_bounds__(kThreads) void add_splits_kernel(const SplitSums sums) {
  const SplitSum& s = sums.of[blockIdx.y];
  const int64_t size = s.taps * s.filters * s.channels;
  const int slices = slices_of(s.splits), values = kThreads / slices;
  const int thread = static_cast<int>(threadIdx.x), first = thread / values;
  const int64_t i = int64_t{blockIdx.x} * values + thread % values;
  float sum = 0;
  if (i < size) {
    const float* const partial = s.partial + i;
    const int mine = parts_of_slice(first, static_cast<int>(s.splits), slices);
#pragma unroll 8
    for (int j = 0; j < mine; ++j) sum += load(partial + (first + int64_t{j} * slices) * size);
  }
  if (slices > 1) {
    float* const sums_of_slices = reinterpret_cast<float*>(shared_memory());
    store_shared(sums_of_slices + thread, sum);
    __syncthreads();
    if (first > 0) return;
    for (int slice = 1; slice < slices; ++slice)
      sum += load_shared(sums_of_slices + slice * values + thread);
  }
  if (i >= size) return;
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
    int64_t blocks = 1;
    for (int64_t i = first; i < first + here; ++i) {
      const int64_t size = sums[i].taps * sums[i].filters * sums[i].channels;
      blocks = std::max(blocks, ceil_div(size * slices_of(sums[i].splits), kThreads));
    }
    launch("add_splits", add_splits_kernel,
           {static_cast<unsigned>(blocks), static_cast<unsigned>(here)}, kThreads,
           kThreads * sizeof(float), runtime.device, runtime.stream, some);
  }
}

}  // namespace preact
