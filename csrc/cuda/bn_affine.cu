// bn_affine: mean, rstd = (var + eps)^-1/2, scale = gamma * rstd, shift = beta for each channel.
// Reads 4*C floats, writes 4*C: a launch's latency.
#include "bn.cuh"
#include "launch.cuh"

namespace preact {
namespace cuda {
namespace {

constexpr int kThreads = 128;

__global__ void bn_affine_kernel(int64_t channels,
                                 const float* stats,  // [2, C]
                                 const AffineMaker maker) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c < channels) maker.make(channels, c, load(stats + c), load(stats + channels + c));
}

}  // namespace
}  // namespace cuda

void bn_affine(const CudaRuntime& runtime, Dtype accumulator, int64_t channels, const void* stats,
               const void* weight, const void* bias, double eps, void* affine) {
  using namespace cuda;
  if (accumulator != Dtype::kFloat32) throw std::invalid_argument("stats: expected float32");
  launch("bn_affine", bn_affine_kernel, {static_cast<unsigned>(ceil_div(channels, kThreads))},
         kThreads, 0, runtime.device, runtime.stream, channels, static_cast<const float*>(stats),
         AffineMaker(weight, bias, eps, affine));
}

}  // namespace preact
