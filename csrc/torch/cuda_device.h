// A CUDA device as the operators see it; the device guard, stream and memory are torch's.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "call_zeros.h"

// Weak: a torch without CUDA lacks it, and never calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace preact {

class CudaDevice {
 public:
  static constexpr char kDtypes[] = "float32, bfloat16 or float16";
  static bool runs(Dtype dtype) { return dtype != Dtype::kFloat64; }
  using Call = CallZeros;

  explicit CudaDevice(const Tensor& tensor) : device_(tensor.device()), guard_(device_.index()) {
    check(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_.index(), &stream_));
  }
  CudaDevice(const CudaDevice&) = delete;

  CudaRuntime runtime() { return {device_.index(), stream_, &allocate, &allocate_zeros, this}; }

 private:
  // Given back when the call ends: torch hands it out again in the order of the stream.
  static void* allocate(int64_t bytes, void* context) {
    auto* const self = static_cast<CudaDevice*>(context);
    self->memory_.push_back(
        torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, self->device_));
    return self->memory_.back().mutable_data_ptr();
  }
  static void* allocate_zeros(int64_t bytes, void* context) {
    auto* const self = static_cast<CudaDevice*>(context);
    if (void* const zeros = CallZeros::take(bytes, self->device_)) return zeros;
    self->memory_.push_back(new_zeros(bytes, self->device_));
    return self->memory_.back().mutable_data_ptr();
  }

  torch::stable::Device device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
  std::vector<Tensor> memory_;
};

}  // namespace preact
