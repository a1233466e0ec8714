// The arguments of the operators, checked before anything is allocated, and their results. A layout
// other than channels_last is converted.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../preact.h"

namespace preact {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// --- checks -------------------------------------------------------------------------------------

// A shape in an error message; written only where there is one.
struct Text {
  const Sizes& sizes;
};

inline Text text(const Sizes& sizes) { return {sizes}; }

inline std::ostream& operator<<(std::ostream& out, const Text& text) {
  out << '(';
  for (size_t i = 0; i < text.sizes.size(); ++i) out << (i ? ", " : "") << text.sizes[i];
  return out << (text.sizes.size() == 1 ? ",)" : ")");
}

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

inline void check_shape(const char* name, const Tensor& tensor, const Sizes& expected) {
  const Sizes sizes = sizes_of(tensor);
  check(sizes == expected, name, ": expected shape ", text(expected), ", got ", text(sizes));
}

template <class Device>
Dtype dtype_of(const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      if (Device::runs(Dtype::kFloat16)) return Dtype::kFloat16;
      break;
    case ScalarType::Double:
      if (Device::runs(Dtype::kFloat64)) return Dtype::kFloat64;
      break;
    default:
      break;
  }
  throw std::invalid_argument(std::string("input: expected ") + Device::kDtypes);
}

// Running statistics may be kept in a dtype that no activation has here: float64 on a GPU.
template <class Device>
Dtype running_dtype(const Tensor& running_mean) {
  if (running_mean.scalar_type() == ScalarType::Double) return Dtype::kFloat64;
  return dtype_of<Device>(running_mean);
}

inline ScalarType accumulator_of(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  check(tensor.scalar_type() == expected, name, ": expected ",
        torch::headeronly::toString(expected), ", got ",
        torch::headeronly::toString(tensor.scalar_type()));
}

inline std::string device_name(const torch::stable::Device& device) {
  if (device.is_cpu()) return "cpu";
  return (device.is_cuda() ? "cuda:" : "another device, ") + std::to_string(device.index());
}

// A kernel that reads another device's memory fails long after the call, and takes all with it.
inline void check_device(const char* name, const Tensor& tensor, const Tensor& input) {
  const torch::stable::Device device = tensor.device(), expected = input.device();
  if (device == expected) return;  // before names are made of them
  check(false, name, ": expected a tensor on ", device_name(expected),
        ", as the input is, got one on ", device_name(device));
}

inline ImageShape image_shape(const Tensor& input) {
  const Sizes sizes = sizes_of(input);
  check(sizes.size() == 4, "input: expected (N, C, H, W), got shape ", text(sizes));
  check(input.numel() > 0, "input: expected at least one value, got shape ", text(sizes));
  return {sizes[0], sizes[2], sizes[3], sizes[1]};
}

inline Sizes sizes_of(const ImageShape& shape) {
  return {shape.images, shape.channels, shape.height, shape.width};
}

// As torch has it: the stride of a dimension of size 1 says nothing.
inline bool is_channels_last(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (const size_t dim : {1, 3, 2, 0}) {
    if (sizes[dim] != 1 && strides[dim] != expected) return false;
    expected *= sizes[dim];
  }
  return true;
}

// A call through torch's dispatcher costs a microsecond even where nothing is to be done.
inline Tensor channels_last(const Tensor& tensor) {
  return is_channels_last(tensor) ? tensor
                                  : torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast);
}

// input's dtype and the given shape, in channels_last memory
inline Tensor activation(const char* name, const Tensor& tensor, const Tensor& input,
                         const ImageShape& shape) {
  check_shape(name, tensor, sizes_of(shape));
  check_dtype(name, tensor, input.scalar_type());
  check_device(name, tensor, input);
  return channels_last(tensor);
}

inline Tensor in_order(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// the accumulator's dtype, [rows, channels]
inline Tensor vectors(const char* name, const Tensor& tensor, const Tensor& input, int64_t rows,
                      int64_t channels) {
  check_shape(name, tensor, {rows, channels});
  check_dtype(name, tensor, accumulator_of(input));
  check_device(name, tensor, input);
  return in_order(tensor);
}

// likewise, [channels]
inline Tensor vector(const char* name, const Tensor& tensor, const Tensor& input,
                     int64_t channels) {
  check_shape(name, tensor, {channels});
  check_dtype(name, tensor, accumulator_of(input));
  check_device(name, tensor, input);
  return in_order(tensor);
}

template <typename Check, typename... Arguments>
OptionalTensor optional(Check check, const char* name, const OptionalTensor& tensor,
                        const Arguments&... arguments) {
  return tensor ? OptionalTensor(check(name, *tensor, arguments...)) : std::nullopt;
}

inline const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline const void* data(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

inline Activation activation_of(const std::string& name) {
  check(name == "relu" || name == "silu", "activation: expected 'relu' or 'silu', got '", name,
        "'");
  return name == "relu" ? Activation::kRelu : Activation::kSilu;
}

inline ConvShape conv_shape(const Tensor& input, int64_t output_channels, const Sizes& kernel,
                            const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                            int64_t groups) {
  const ImageShape image = image_shape(input);
  check(kernel.size() == 2 && kernel[0] > 0 && kernel[1] > 0,
        "kernel_size: expected two positive sizes, got ", text(kernel));
  check(stride.size() == 2 && stride[0] > 0 && stride[1] > 0,
        "stride: expected two positive steps, got ", text(stride));
  check(padding.size() == 4 && *std::min_element(padding.begin(), padding.end()) >= 0,
        "padding: expected (top, bottom, left, right), none negative, got ", text(padding));
  check(dilation == Sizes{1, 1}, "dilation: this backend runs (1, 1) only, got ", text(dilation));
  check(groups == 1, "groups: this backend runs 1 only, got ", groups);
  const int64_t room_h = image.height + padding[0] + padding[1] - kernel[0];
  const int64_t room_w = image.width + padding[2] + padding[3] - kernel[1];
  check(room_h >= 0 && room_w >= 0, "weight: a kernel of ", text(kernel),
        " does not fit into the padded input");
  const ImageShape output{image.images, room_h / stride[0] + 1, room_w / stride[1] + 1,
                          output_channels};
  return {image, output, kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[2]};
}

inline Weight weight_of(const Tensor& weight, const Tensor& input, int64_t channels) {
  const Sizes sizes = sizes_of(weight);
  check(sizes.size() == 4 && sizes[1] == channels, "weight: expected shape (K, ", channels,
        ", R, S), got ", text(sizes));
  check_dtype("weight", weight, input.scalar_type());
  check_device("weight", weight, input);
  const auto strides = weight.strides();
  // Of a dimension of size 1 torch's stride says nothing, and must not spoil the vectors.
  const auto stride = [&](size_t i) { return sizes[i] == 1 ? 0 : strides[i]; };
  return {data(weight), strides[0], strides[1], stride(2), stride(3)};
}

// The checked tensors behind an OutputGrad.
struct OutputGradTensors {
  Tensor grad;
  OptionalTensor output, affine, sums, joins;

  OutputGradTensors(const Tensor& grad, const OptionalTensor& output,
                    const OptionalTensor& output_affine, const OptionalTensor& output_sums,
                    const OptionalTensor& residual, const Tensor& input, const ImageShape& shape)
      : grad(activation("grad", grad, input, shape)),
        output(optional(activation, "output", output, input, shape)),
        affine(
            optional(vectors, "output_affine", output_affine, input, int64_t{4}, shape.channels)),
        sums(optional(vectors, "output_sums", output_sums, input, int64_t{2}, shape.channels)),
        joins(optional(activation, "residual", residual, input, shape)) {
    check(output.has_value() == output_affine.has_value(),
          "output_affine: expected a tensor where output is given, and only there");
    check(output.has_value() == output_sums.has_value(),
          "output_sums: expected a tensor where output is given, and only there");
  }

  OutputGrad get() const {
    return {data(grad), data(output), data(affine), data(sums), data(joins)};
  }
};

// --- results ------------------------------------------------------------------------------------

inline Tensor new_activation(const Tensor& input, const ImageShape& shape) {
  return torch::stable::empty(sizes_of(shape), input.scalar_type(), std::nullopt, input.device(),
                              std::nullopt, MemoryFormat::ChannelsLast);
}

inline Tensor new_vectors(const Tensor& input, int64_t rows, int64_t channels) {
  return torch::stable::empty({rows, channels}, accumulator_of(input), std::nullopt,
                              input.device());
}

// the accumulator's dtype, [K, C, R, S] in channels_last memory
inline Tensor new_weight_grad(const Tensor& input, const Sizes& sizes) {
  return torch::stable::empty(sizes, accumulator_of(input), std::nullopt, input.device(),
                              std::nullopt, MemoryFormat::ChannelsLast);
}

inline void* mutable_data(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr();
}

}  // namespace preact
