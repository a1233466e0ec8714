// Memory at zero for operators that run one after the other: one launch sets it, not one for each.
#pragma once

#include "arguments.h"

namespace preact {

inline Tensor new_zeros(int64_t bytes, torch::stable::Device device) {
  Tensor zeros = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, device);
  return torch::stable::zero_(zeros);
}

// While it lives, take() serves the operators of this thread on the device of `tensor`.
class CallZeros {
 public:
  explicit CallZeros(const Tensor& tensor) : device_(tensor.device()), outer_(running) {
    running = this;
  }
  ~CallZeros() { running = outer_; }
  CallZeros(const CallZeros&) = delete;

  // Null where no such call is running.
  static void* take(int64_t bytes, torch::stable::Device device) {
    return running && running->device_ == device ? running->take(bytes) : nullptr;
  }

 private:
  static constexpr int64_t kBytes = 16 << 10, kAlignment = 128;
  static inline thread_local CallZeros* running = nullptr;

  void* take(int64_t bytes) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (bytes > left_) {
      left_ = std::max(bytes, kBytes);
      zeros_.push_back(new_zeros(left_, device_));
      next_ = static_cast<char*>(zeros_.back().mutable_data_ptr());
    }
    left_ -= bytes;
    next_ += bytes;
    return next_ - bytes;
  }

  torch::stable::Device device_;
  CallZeros* outer_;
  std::vector<Tensor> zeros_;
  char* next_ = nullptr;
  int64_t left_ = 0;
};

}  // namespace preact
