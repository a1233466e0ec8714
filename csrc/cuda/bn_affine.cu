// bn_affine: mean, rstd = (var + eps)^-1/2, scale = gamma * rstd, shift = beta for each channel.
// Reads 4*C floats, writes 4*C: a launch's latency.
#include "launch.cuh"

namespace preact {
namespace cuda {
namespace {

constexpr int kThreads = 128;

__global__ void bn_affine_kernel(int64_t channels, double eps,
                                 const float* stats,   // [2, C]
                                 const float* weight,  // [C] or null: 1
                                 const float* bias,    // [C] or null: 0
                                 float* affine) {      // [4, C]
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= channels) return;
  const double variance = load(stats + channels + c);
  const float rstd = static_cast<float>(1 / sqrt(variance + eps));
  store(affine + c, load(stats + c));
  store(affine + channels + c, rstd);
  store(affine + 2 * channels + c, weight ? load(weight + c) * rstd : rstd);
  store(affine + 3 * channels + c, bias ? load(bias + c) : 0.f);
}

}  // namespace
}  // namespace cuda

void bn_affine(const CudaRuntime& runtime, Dtype accumulator, int64_t channels, const void* stats,
               const void* weight, const void* bias, double eps, void* affine) {
  using namespace cuda;
  if (accumulator != Dtype::kFloat32) throw std::invalid_argument("stats: expected float32");
  launch("bn_affine", bn_affine_kernel, {static_cast<unsigned>(ceil_div(channels, kThreads))},
         kThreads, 0, runtime.device, runtime.stream, channels, eps,
         static_cast<const float*>(stats), static_cast<const float*>(weight),
         static_cast<const float*>(bias), static_cast<float*>(affine));
}

}  // namespace preact
