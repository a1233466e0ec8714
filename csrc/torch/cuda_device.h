// A CUDA device as the operators see it; the device guard, stream and memory are torch's.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "units_call.h"

// Weak: a torch without CUDA lacks it, and never calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace preact {

class CudaDevice {
 public:
  static constexpr char kDtypes[] = "float32, bfloat16 or float16";
  static constexpr bool kResidualGradInPlace = false;  // kernels read by __ldg
  static bool runs(Dtype dtype) { return dtype != Dtype::kFloat64; }
  using Call = UnitsCall<CudaDevice>;

  explicit CudaDevice(const Tensor& tensor) : device_(tensor.device()), guard_(device_.index()) {
    check(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_.index(), &stream_));
  }
  CudaDevice(const CudaDevice&) = delete;

  CudaRuntime runtime() {
    return {device_.index(),   stream_,      &allocate, &allocate_zeros,
            &allocate_partial, &sum_partial, this};
  }

 private:
  // Given back when the call ends: torch hands it out again in the order of the stream.
  static void* allocate(int64_t bytes, void* context) {
    auto* const self = static_cast<CudaDevice*>(context);
    self->memory_.push_back(new_bytes(bytes, self->device_));
    return self->memory_.back().mutable_data_ptr();
  }
  static void* allocate_zeros(int64_t bytes, void* context) {
    auto* const self = static_cast<CudaDevice*>(context);
    if (Call* const call = Call::on(self->device_)) return call->zeros(bytes);
    self->memory_.push_back(new_zeros(bytes, self->device_));
    return self->memory_.back().mutable_data_ptr();
  }

  static void* allocate_partial(int64_t bytes, void* context) {
    Call* const call = Call::on(static_cast<CudaDevice*>(context)->device_);
    return call ? call->partial(bytes) : allocate(bytes, context);
  }
  static void sum_partial(const SplitSum& sum, void* context) {
    auto* const self = static_cast<CudaDevice*>(context);
    if (Call* const call = Call::on(self->device_)) return call->add_splits(sum);
    add_splits(self->runtime(), 1, &sum);
  }

  torch::stable::Device device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
  std::vector<Tensor> memory_;
};

}  // namespace preact
