// cuda_unavailable: whether the kernels can run here at all.
#include <string>

#include "launch.cuh"

namespace preact {
namespace {

std::string version(int v) {
  return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
}

std::string find_problem() {
  int driver = 0, devices = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver";
  if (driver / 1000 < CUDART_VERSION / 1000)
    return "the NVIDIA driver is too old: it runs CUDA " + version(driver) +
           ", these kernels were built with CUDA " + version(CUDART_VERSION) +
           "; update the driver, or build with an older nvcc";
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (devices == 0) return "no GPU";
  for (int device = 0; device < devices; ++device) {
    const int major = cuda::device_attribute(device, cudaDevAttrComputeCapabilityMajor);
    if (major < 8)
      return "GPU " + std::to_string(device) + " has compute capability " + std::to_string(major) +
             ".x, the kernels need 8.0";
  }
  return "";
}

}  // namespace

const char* cuda_unavailable() {
  static const std::string problem = find_problem();
  return problem.empty() ? nullptr : problem.c_str();
}

}  // namespace preact
