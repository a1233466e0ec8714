// The operators fused_preact::*: schemas, checks and the CPU kernels, through LibTorch's stable ABI.
//
// The arguments and results are those of fused_preact/reference.py. All is checked before anything
// is allocated; a layout other than channels_last is converted.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "runtime.h"

namespace preact {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// --- checks -------------------------------------------------------------------------------------

std::string text(const Sizes& sizes) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << (sizes.size() == 1 ? ",)" : ")");
  return out.str();
}

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

void check_shape(const char* name, const Tensor& tensor, const Sizes& expected) {
  const Sizes sizes = sizes_of(tensor);
  check(sizes == expected, name, ": expected shape ", text(expected), ", got ", text(sizes));
}

Dtype dtype_of(const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      throw std::invalid_argument("input: expected float32, bfloat16 or float64");
  }
}

ScalarType accumulator_of(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  check(tensor.scalar_type() == expected, name, ": expected ",
        torch::headeronly::toString(expected), ", got ",
        torch::headeronly::toString(tensor.scalar_type()));
}

ImageShape image_shape(const Tensor& input) {
  const Sizes sizes = sizes_of(input);
  check(sizes.size() == 4, "input: expected (N, C, H, W), got shape ", text(sizes));
  check(input.numel() > 0, "input: expected at least one value, got shape ", text(sizes));
  return {sizes[0], sizes[2], sizes[3], sizes[1]};
}

Sizes sizes_of(const ImageShape& shape) {
  return {shape.images, shape.channels, shape.height, shape.width};
}

// input's dtype and the given shape, in channels_last memory
Tensor activation(const char* name, const Tensor& tensor, const Tensor& input,
                  const ImageShape& shape) {
  check_shape(name, tensor, sizes_of(shape));
  check_dtype(name, tensor, input.scalar_type());
  return torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast);
}

// the accumulator's dtype, [rows, channels]
Tensor vectors(const char* name, const Tensor& tensor, const Tensor& input, int64_t rows,
               int64_t channels) {
  check_shape(name, tensor, {rows, channels});
  check_dtype(name, tensor, accumulator_of(input));
  return torch::stable::contiguous(tensor);
}

template <typename Check, typename... Arguments>
OptionalTensor optional(Check check, const char* name, const OptionalTensor& tensor,
                        const Arguments&... arguments) {
  return tensor ? OptionalTensor(check(name, *tensor, arguments...)) : std::nullopt;
}

const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
const void* data(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

Activation activation_of(const std::string& name) {
  check(name == "relu" || name == "silu", "activation: expected 'relu' or 'silu', got '", name, "'");
  return name == "relu" ? Activation::kRelu : Activation::kSilu;
}

ConvShape conv_shape(const Tensor& input, int64_t output_channels, const Sizes& kernel,
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

Weight weight_of(const Tensor& weight, const Tensor& input, int64_t channels) {
  const Sizes sizes = sizes_of(weight);
  check(sizes.size() == 4 && sizes[1] == channels, "weight: expected shape (K, ", channels,
        ", R, S), got ", text(sizes));
  check_dtype("weight", weight, input.scalar_type());
  const auto strides = weight.strides();
  return {data(weight), strides[0], strides[1], strides[2], strides[3]};
}

// The checked tensors behind an OutputGrad.
struct OutputGradTensors {
  Tensor grad;
  OptionalTensor output, affine, sums;

  OutputGradTensors(const Tensor& grad, const OptionalTensor& output,
                    const OptionalTensor& output_affine, const OptionalTensor& output_sums,
                    const Tensor& input, const ImageShape& shape)
      : grad(activation("grad", grad, input, shape)),
        output(optional(activation, "output", output, input, shape)),
        affine(optional(vectors, "output_affine", output_affine, input, int64_t{4},
                        shape.channels)),
        sums(optional(vectors, "output_sums", output_sums, input, int64_t{2}, shape.channels)) {
    check(output.has_value() == output_affine.has_value(),
          "output_affine: expected a tensor where output is given, and only there");
    check(output.has_value() || !output_sums, "output_sums: expected None without output");
  }

  OutputGrad get() const { return {data(grad), data(output), data(affine), data(sums)}; }
};

// --- results ------------------------------------------------------------------------------------

Tensor new_activation(const Tensor& input, const ImageShape& shape) {
  return torch::stable::empty(sizes_of(shape), input.scalar_type(), std::nullopt, input.device(),
                              std::nullopt, MemoryFormat::ChannelsLast);
}

Tensor new_vectors(const Tensor& input, int64_t rows, int64_t channels) {
  return torch::stable::empty({rows, channels}, accumulator_of(input), std::nullopt,
                              input.device());
}

void* mutable_data(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr();
}

// --- operators ----------------------------------------------------------------------------------

Tensor bn_stats_cpu(const Tensor& input) {
  const Dtype dtype = dtype_of(input);
  const ImageShape shape = image_shape(input);
  const Tensor u = activation("input", input, input, shape);
  const Tensor stats = new_vectors(input, 2, shape.channels);
  bn_stats(torch_runtime(), dtype, shape, data(u), mutable_data(stats));
  return stats;
}

Tensor bn_affine_cpu(const Tensor& stats, const OptionalTensor& weight, const OptionalTensor& bias,
                     double eps) {
  const Sizes sizes = sizes_of(stats);
  check(sizes.size() == 2 && sizes[0] == 2, "stats: expected shape (2, C), got ", text(sizes));
  const Dtype dtype = dtype_of(stats);
  check(dtype != Dtype::kBFloat16, "stats: expected float32 or float64, got bfloat16");
  const auto vector = [&](const char* name, const Tensor& tensor) {
    check_shape(name, tensor, {sizes[1]});
    check_dtype(name, tensor, stats.scalar_type());
    return torch::stable::contiguous(tensor);
  };
  const Tensor s = torch::stable::contiguous(stats);
  const OptionalTensor w = optional(vector, "weight", weight), b = optional(vector, "bias", bias);
  const Tensor affine = new_vectors(stats, 4, sizes[1]);
  bn_affine(dtype, sizes[1], data(s), data(w), data(b), eps, mutable_data(affine));
  return affine;
}

Tensor bn_relu_forward_cpu(const Tensor& input, const Tensor& affine, std::string activation_name) {
  const Dtype dtype = dtype_of(input);
  const ImageShape shape = image_shape(input);
  const Activation act = activation_of(activation_name);
  const Tensor u = activation("input", input, input, shape);
  const Tensor a = vectors("affine", affine, input, 4, shape.channels);
  const Tensor output = new_activation(input, shape);
  bn_relu_forward(torch_runtime(), dtype, shape, act, data(u), data(a), mutable_data(output));
  return output;
}

std::tuple<Tensor, Tensor> bn_relu_backward_cpu(const Tensor& grad, const Tensor& input,
                                                const Tensor& affine, std::string activation_name,
                                                bool with_sums) {
  const Dtype dtype = dtype_of(input);
  const ImageShape shape = image_shape(input);
  const Activation act = activation_of(activation_name);
  const Tensor u = activation("input", input, input, shape);
  const Tensor dh = activation("grad", grad, input, shape);
  const Tensor a = vectors("affine", affine, input, 4, shape.channels);
  const Tensor g = new_activation(input, shape);
  const Tensor sums = new_vectors(input, 2, with_sums ? shape.channels : 0);
  bn_relu_backward(torch_runtime(), dtype, shape, act, data(dh), data(u), data(a), mutable_data(g),
                   mutable_data(sums));
  return {g, sums};
}

std::tuple<Tensor, Tensor> preact_conv_forward_cpu(
    const Tensor& input, const OptionalTensor& affine, const Tensor& weight,
    const OptionalTensor& residual, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
    std::string activation_name, bool with_stats) {
  const Dtype dtype = dtype_of(input);
  const int64_t channels = image_shape(input).channels;
  const Weight w = weight_of(weight, input, channels);
  const ConvShape shape = conv_shape(input, weight.size(0), {weight.size(2), weight.size(3)}, stride,
                                     padding, dilation, groups);
  const Activation act = activation_of(activation_name);
  const Tensor u = activation("input", input, input, shape.input);
  const OptionalTensor a = optional(vectors, "affine", affine, input, int64_t{4}, channels);
  const OptionalTensor added = optional(activation, "residual", residual, input, shape.output);
  const Tensor output = new_activation(input, shape.output);
  const Tensor stats = new_vectors(input, 2, with_stats ? shape.output.channels : 0);
  preact_conv_forward(torch_runtime(), {dtype, shape, act, data(u), data(a), w, data(added),
                                        mutable_data(output), mutable_data(stats)});
  return {output, stats};
}

std::tuple<Tensor, Tensor> preact_conv_dgrad_cpu(
    const Tensor& grad, const OptionalTensor& output, const OptionalTensor& output_affine,
    const OptionalTensor& output_sums, const Tensor& weight, const Tensor& input,
    const OptionalTensor& affine, const OptionalTensor& addend, Sizes stride, Sizes padding,
    Sizes dilation, int64_t groups, std::string activation_name, bool with_sums) {
  const Dtype dtype = dtype_of(input);
  const int64_t channels = image_shape(input).channels;
  const Weight w = weight_of(weight, input, channels);
  const ConvShape shape = conv_shape(input, weight.size(0), {weight.size(2), weight.size(3)}, stride,
                                     padding, dilation, groups);
  const Activation act = activation_of(activation_name);
  const OutputGradTensors dy(grad, output, output_affine, output_sums, input, shape.output);
  const Tensor u = activation("input", input, input, shape.input);
  const OptionalTensor a = optional(vectors, "affine", affine, input, int64_t{4}, channels);
  const OptionalTensor added = optional(activation, "addend", addend, input, shape.input);
  const Tensor g = new_activation(input, shape.input);
  const Tensor sums = new_vectors(input, 2, affine && with_sums ? channels : 0);
  preact_conv_dgrad(torch_runtime(), {dtype, shape, act, dy.get(), w, data(u), data(a), data(added),
                                      mutable_data(g), mutable_data(sums)});
  return {g, sums};
}

Tensor preact_conv_wgrad_cpu(const Tensor& grad, const OptionalTensor& output,
                             const OptionalTensor& output_affine, const OptionalTensor& output_sums,
                             const Tensor& input, const OptionalTensor& affine, Sizes kernel_size,
                             Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                             std::string activation_name) {
  const Dtype dtype = dtype_of(input);
  check(grad.dim() == 4, "grad: expected (N, K, H', W'), got shape ", text(sizes_of(grad)));
  const ConvShape shape =
      conv_shape(input, grad.size(1), kernel_size, stride, padding, dilation, groups);
  const Activation act = activation_of(activation_name);
  const OutputGradTensors dy(grad, output, output_affine, output_sums, input, shape.output);
  const Tensor u = activation("input", input, input, shape.input);
  const OptionalTensor a =
      optional(vectors, "affine", affine, input, int64_t{4}, shape.input.channels);
  const Sizes sizes{shape.output.channels, shape.input.channels, kernel_size[0], kernel_size[1]};
  const Tensor dweight =
      torch::stable::empty(sizes, accumulator_of(input), std::nullopt, input.device());
  preact_conv_wgrad(torch_runtime(), {dtype, shape, act, dy.get(), data(u), data(a),
                                      mutable_data(dweight)});
  return dweight;
}

Tensor residual_grad_cpu(const OptionalTensor& grad, const Tensor& g, const Tensor& input,
                         const Tensor& affine, const OptionalTensor& sums) {
  const Dtype dtype = dtype_of(input);
  const ImageShape shape = image_shape(input);
  const OptionalTensor dy = optional(activation, "grad", grad, input, shape);
  const Tensor g_ = activation("g", g, input, shape), u = activation("input", input, input, shape);
  const Tensor a = vectors("affine", affine, input, 4, shape.channels);
  const OptionalTensor s = optional(vectors, "sums", sums, input, int64_t{2}, shape.channels);
  const Tensor dinput = new_activation(input, shape);
  residual_grad(torch_runtime(), dtype, shape, data(dy), data(g_), data(u), data(a), data(s),
                mutable_data(dinput));
  return dinput;
}

}  // namespace

STABLE_TORCH_LIBRARY(fused_preact, m) {
  m.def("bn_stats(Tensor input) -> Tensor");
  m.def("bn_affine(Tensor stats, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  m.def("bn_relu_forward(Tensor input, Tensor affine, str activation) -> Tensor");
  m.def(
      "bn_relu_backward(Tensor grad, Tensor input, Tensor affine, str activation, bool with_sums) "
      "-> (Tensor, Tensor)");
  m.def(
      "preact_conv_forward(Tensor input, Tensor? affine, Tensor weight, Tensor? residual, "
      "int[] stride, int[] padding, int[] dilation, int groups, str activation, bool with_stats) "
      "-> (Tensor, Tensor)");
  m.def(
      "preact_conv_dgrad(Tensor grad, Tensor? output, Tensor? output_affine, Tensor? output_sums, "
      "Tensor weight, Tensor input, Tensor? affine, Tensor? addend, int[] stride, int[] padding, "
      "int[] dilation, int groups, str activation, bool with_sums) -> (Tensor, Tensor)");
  m.def(
      "preact_conv_wgrad(Tensor grad, Tensor? output, Tensor? output_affine, Tensor? output_sums, "
      "Tensor input, Tensor? affine, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, int groups, str activation) -> Tensor");
  m.def(
      "residual_grad(Tensor? grad, Tensor g, Tensor input, Tensor affine, Tensor? sums) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  m.impl("bn_stats", TORCH_BOX(&bn_stats_cpu));
  m.impl("bn_affine", TORCH_BOX(&bn_affine_cpu));
  m.impl("bn_relu_forward", TORCH_BOX(&bn_relu_forward_cpu));
  m.impl("bn_relu_backward", TORCH_BOX(&bn_relu_backward_cpu));
  m.impl("preact_conv_forward", TORCH_BOX(&preact_conv_forward_cpu));
  m.impl("preact_conv_dgrad", TORCH_BOX(&preact_conv_dgrad_cpu));
  m.impl("preact_conv_wgrad", TORCH_BOX(&preact_conv_wgrad_cpu));
  m.impl("residual_grad", TORCH_BOX(&residual_grad_cpu));
}

}  // namespace preact
