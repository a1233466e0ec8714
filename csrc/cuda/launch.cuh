// Host side of every launcher: which instance of a kernel runs, on how many blocks.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "../preact.h"
#include "reduce.cuh"

namespace preact::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pieces are vectors where every pointer and every row of channels lies at a multiple of 16 bytes.
inline Channels channels_of(int64_t count, std::initializer_list<const void*> pointers) {
  bool vectors = count % kPiece == 0;
  for (const void* p : pointers) vectors = vectors && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return {count, vectors};
}

// Calls f.operator()<T>().
template <typename F>
void dispatch_dtype(Dtype dtype, F&& f) {
  if (dtype == Dtype::kFloat32) return f.template operator()<float>();
  if (dtype == Dtype::kBFloat16) return f.template operator()<bf16>();
  if (dtype == Dtype::kFloat16) return f.template operator()<f16>();
  throw std::invalid_argument("input: expected float32, bfloat16 or float16");
}

// Likewise for a convolution: T is tf32 for float32 that may be rounded as it is multiplied.
template <class Op, typename F>
void dispatch_conv_dtype(const Op& op, F&& f) {
  if (op.dtype == Dtype::kFloat32 && op.allow_tf32) return f.template operator()<tf32>();
  dispatch_dtype(op.dtype, f);
}

template <typename T, typename F>
void dispatch_activation(Activation activation, F&& f) {
  if (activation == Activation::kRelu)
    f.template operator()<T, Activation::kRelu>();
  else
    f.template operator()<T, Activation::kSilu>();
}

// Calls f.operator()<T, activation>().
template <typename F>
void dispatch(Dtype dtype, Activation activation, F&& f) {
  dispatch_dtype(dtype, [&]<typename T>() { dispatch_activation<T>(activation, f); });
}

// Memory for partial results of `groups` reductions of `parts` blocks, with tickets at zero.
struct ReductionMemory {
  float* partial = nullptr;
  int* tickets = nullptr;

  ReductionMemory() = default;
  ReductionMemory(const CudaRuntime& runtime, int values, int64_t parts, int64_t channels,
                  int64_t groups) {
    const int64_t floats = parts * values * ceil_div(channels, kLine) * kLine;
    partial = static_cast<float*>(
        runtime.allocate(floats * static_cast<int64_t>(sizeof(float)), runtime.context));
    tickets = static_cast<int*>(runtime.allocate_zeros(
        groups * tickets_of(parts) * static_cast<int64_t>(sizeof(int)), runtime.context));
  }
};

}  // namespace preact::cuda
