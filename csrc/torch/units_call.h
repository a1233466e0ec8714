// What operators that run one after the other share, so that it is one launch and not one for each:
// memory at zero, and the sums of wgrad's partial results. And how the launchers come to it.
#pragma once

#include "arguments.h"

namespace preact {

inline Tensor new_bytes(int64_t bytes, torch::stable::Device device) {
  return torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, device);
}

inline Tensor new_zeros(int64_t bytes, torch::stable::Device device) {
  Tensor zeros = new_bytes(bytes, device);
  return torch::stable::zero_(zeros);
}

// While it lives, it serves the operators of this thread on the device of `tensor`.
template <class Device>
class UnitsCall {
 public:
  explicit UnitsCall(const Tensor& tensor) : tensor_(tensor), outer_(running) { running = this; }
  ~UnitsCall() { running = outer_; }
  UnitsCall(const UnitsCall&) = delete;

  // Null where no such call is running.
  static UnitsCall* on(torch::stable::Device device) {
    return running && running->tensor_.device() == device ? running : nullptr;
  }

  void* zeros(int64_t bytes) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (bytes > left_) {
      left_ = std::max(bytes, kZeros);
      zeros_.push_back(new_zeros(left_, tensor_.device()));
      next_ = static_cast<char*>(zeros_.back().mutable_data_ptr());
    }
    left_ -= bytes;
    next_ += bytes;
    return next_ - bytes;
  }

  // For partial results of which a sum follows.
  void* partial(int64_t bytes) {
    if (partial_bytes_ + bytes > kMostPartial) finish();
    partial_bytes_ += bytes;
    partial_.push_back(new_bytes(bytes, tensor_.device()));
    return partial_.back().mutable_data_ptr();
  }
  void add_splits(const SplitSum& sum) { sums_.push_back(sum); }

  // Takes the sums, whose results nobody may have read before.
  void finish() {
    if (!sums_.empty()) {
      Device device(tensor_);
      preact::add_splits(device.runtime(), static_cast<int64_t>(sums_.size()), sums_.data());
    }
    sums_.clear();
    partial_.clear();
    partial_bytes_ = 0;
  }

 private:
  static constexpr int64_t kZeros = 16 << 10, kAlignment = 128, kMostPartial = 64 << 20;  // bytes
  static inline thread_local UnitsCall* running = nullptr;

  const Tensor tensor_;
  UnitsCall* const outer_;
  std::vector<Tensor> zeros_, partial_;
  std::vector<SplitSum> sums_;
  int64_t partial_bytes_ = 0;
  char* next_ = nullptr;
  int64_t left_ = 0;
};

// What a Device lends its launchers: from the call that is running, else of its own, which it has
// as allocate(bytes) and allocate_zeros(bytes); where() is its device.
template <class Device>
class Lender {
 public:
  using Call = UnitsCall<Device>;

 protected:
  CudaRuntime lend(int device, void* stream) {
    return {device,       stream,    &allocate, &allocate_zeros, &allocate_partial,
            &sum_partial, self(this)};
  }

 private:
  static Device* self(void* context) { return static_cast<Device*>(context); }
  static Device* self(Lender* lender) { return static_cast<Device*>(lender); }
  static Call* running(void* context) { return Call::on(self(context)->where()); }

  static void* allocate(int64_t bytes, void* context) { return self(context)->allocate(bytes); }
  static void* allocate_zeros(int64_t bytes, void* context) {
    Call* const call = running(context);
    return call ? call->zeros(bytes) : self(context)->allocate_zeros(bytes);
  }
  static void* allocate_partial(int64_t bytes, void* context) {
    Call* const call = running(context);
    return call ? call->partial(bytes) : allocate(bytes, context);
  }
  static void sum_partial(const SplitSum& sum, void* context) {
    if (Call* const call = running(context)) return call->add_splits(sum);
    preact::add_splits(self(context)->runtime(), 1, &sum);
  }
};

}  // namespace preact
