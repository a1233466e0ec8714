// A CUDA device as the operators see it; the device guard, stream and memory are torch's.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "units_call.h"

// Weak: a torch without CUDA lacks it, and never calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace preact {

class CudaDevice : public Lender<CudaDevice> {
 public:
  static constexpr char kDtypes[] = "float32, bfloat16 or float16";
  static constexpr bool kResidualGradInPlace = false;  // kernels read by __ldg
  static bool runs(Dtype dtype) { return dtype != Dtype::kFloat64; }

  explicit CudaDevice(const Tensor& tensor) : device_(tensor.device()), guard_(device_.index()) {
    check(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_.index(), &stream_));
  }
  CudaDevice(const CudaDevice&) = delete;

  CudaRuntime runtime() { return lend(device_.index(), stream_); }
  torch::stable::Device where() const { return device_; }
  // Given back when the call ends: torch hands it out again in the order of the stream.
  void* allocate(int64_t bytes) { return keep(new_bytes(bytes, device_)); }
  void* allocate_zeros(int64_t bytes) { return keep(new_zeros(bytes, device_)); }

 private:
  void* keep(const Tensor& memory) {
    memory_.push_back(memory);
    return memory_.back().mutable_data_ptr();
  }

  torch::stable::Device device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
  std::vector<Tensor> memory_;
};

}  // namespace preact
