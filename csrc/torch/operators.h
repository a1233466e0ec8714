// The operators fused_preact::*, the same for every device: schemas, checks, allocation, and the
// call of the launcher. The arguments and results are those of fused_preact/reference.py.
//
// A Device is made for a call, of a tensor that lives there. It has runs(dtype), kDtypes (their
// names) and runtime(), what the launchers of preact.h take first. A Device::Call lives while
// several of them run one after the other; results may be missing until its finish().
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"

namespace preact {

inline void bn_affine(const Runtime&, Dtype accumulator, int64_t channels, const void* stats,
                      const void* weight, const void* bias, double eps, void* affine) {
  bn_affine(accumulator, channels, stats, weight, bias, eps, affine);
}

inline void bn_update_running(const Runtime&, Dtype accumulator, int64_t count,
                              const RunningStats* updates) {
  bn_update_running(accumulator, count, updates);
}

// The checked tensors behind a PreactConvDgrad, and its results.
template <class Device>
struct DgradTensors {
  const Dtype dtype;
  const Weight w;
  const ConvShape shape;
  const Activation act;
  const OutputGradTensors dy;
  const Tensor u;
  const OptionalTensor a, added;
  const bool allow_tf32, frozen;
  const OptionalTensor joins;
  const Tensor g, sums;

  DgradTensors(const Tensor& grad, const OptionalTensor& output,
               const OptionalTensor& output_affine, const OptionalTensor& output_sums,
               const Tensor& weight, const Tensor& input, const OptionalTensor& affine,
               const OptionalTensor& addend, const Sizes& stride, const Sizes& padding,
               const Sizes& dilation, int64_t groups, const std::string& activation_name,
               bool with_sums, bool allow_tf32, bool frozen, const OptionalTensor& residual,
               const OptionalTensor& output_residual = std::nullopt)
      : dtype(dtype_of<Device>(input)),
        w(weight_of(weight, input, image_shape(input).channels)),
        shape(conv_shape(input, weight.size(0), {weight.size(2), weight.size(3)}, stride, padding,
                         dilation, groups)),
        act(activation_of(activation_name)),
        dy(grad, output, output_affine, output_sums, output_residual, input, shape.output),
        u(activation("input", input, input, shape.input)),
        a(optional(vectors, "affine", affine, input, int64_t{4}, shape.input.channels)),
        added(optional(activation, "addend", addend, input, shape.input)),
        allow_tf32(allow_tf32),
        frozen(frozen),
        joins(optional(activation, "residual", residual, input, shape.input)),
        g(checked_result(input, affine, residual)),
        sums(new_vectors(input, 2, affine && with_sums ? shape.input.channels : 0)) {}

  PreactConvDgrad get() const {
    return {dtype,      shape,   act,         dy.get(),        w,
            data(u),    data(a), data(added), mutable_data(g), mutable_data(sums),
            allow_tf32, frozen,  data(joins)};
  }

 private:
  // Nothing is allocated before the last check.
  Tensor checked_result(const Tensor& input, const OptionalTensor& affine,
                        const OptionalTensor& residual) const {
    check(affine || !frozen, "affine: expected a tensor where it is frozen, got None");
    check(frozen || !residual, "residual: expected None without frozen");
    return new_activation(input, shape.input);
  }
};

template <class Device>
struct Operators {
  static Tensor bn_stats(const Tensor& input) {
    const Dtype dtype = dtype_of<Device>(input);
    const ImageShape shape = image_shape(input);
    const Tensor u = activation("input", input, input, shape);
    const Tensor stats = new_vectors(input, 2, shape.channels);
    Device device(input);
    preact::bn_stats(device.runtime(), dtype, shape, data(u), mutable_data(stats));
    return stats;
  }

  static Tensor bn_affine(const Tensor& stats, const OptionalTensor& weight,
                          const OptionalTensor& bias, double eps) {
    const Sizes sizes = sizes_of(stats);
    check(sizes.size() == 2 && sizes[0] == 2, "stats: expected shape (2, C), got ", text(sizes));
    const Dtype dtype = dtype_of<Device>(stats);
    check(dtype != Dtype::kBFloat16, "stats: expected float32 or float64, got bfloat16");
    const Tensor s = in_order(stats);
    const OptionalTensor w = optional(vector, "weight", weight, stats, sizes[1]);
    const OptionalTensor b = optional(vector, "bias", bias, stats, sizes[1]);
    const Tensor affine = new_vectors(stats, 4, sizes[1]);
    Device device(stats);
    preact::bn_affine(device.runtime(), dtype, sizes[1], data(s), data(w), data(b), eps,
                      mutable_data(affine));
    return affine;
  }

  static void bn_update_running(std::vector<Tensor> running_mean, std::vector<Tensor> running_var,
                                std::vector<Tensor> stats, std::vector<double> momentum,
                                Sizes counts) {
    const size_t n = stats.size();
    check(running_mean.size() == n && running_var.size() == n && momentum.size() == n &&
              counts.size() == n,
          "running_mean, running_var, stats, momentum, counts: expected as many of each");
    if (n == 0) return;
    const Dtype accumulator = dtype_of<Device>(stats[0]);
    std::vector<Tensor> batch;
    std::vector<RunningStats> updates;
    for (size_t i = 0; i < n; ++i) {
      const Tensor &mean = running_mean[i], &var = running_var[i];
      check(mean.dim() == 1, "running_mean: expected shape (C,), got ", text(sizes_of(mean)));
      const int64_t channels = mean.size(0);
      check_shape("running_var", var, {channels});
      check_dtype("running_var", var, mean.scalar_type());
      check_device("running_mean", mean, stats[0]);
      check_device("running_var", var, stats[0]);
      check(counts[i] > 1, "counts: expected more than 1 value per channel, got ", counts[i]);
      batch.push_back(vectors("stats", stats[i], stats[0], 2, channels));
      const double count = static_cast<double>(counts[i]);
      updates.push_back({running_dtype<Device>(mean), channels, mean.mutable_data_ptr(),
                         var.mutable_data_ptr(), mean.stride(0), var.stride(0), data(batch.back()),
                         momentum[i], count / (count - 1)});
    }
    Device device(stats[0]);
    preact::bn_update_running(device.runtime(), accumulator, static_cast<int64_t>(n),
                              updates.data());
  }

  static Tensor bn_relu_forward(const Tensor& input, const Tensor& affine,
                                std::string activation_name) {
    const Dtype dtype = dtype_of<Device>(input);
    const ImageShape shape = image_shape(input);
    const Activation act = activation_of(activation_name);
    const Tensor u = activation("input", input, input, shape);
    const Tensor a = vectors("affine", affine, input, 4, shape.channels);
    const Tensor output = new_activation(input, shape);
    Device device(input);
    preact::bn_relu_forward(device.runtime(), dtype, shape, act, data(u), data(a),
                            mutable_data(output));
    return output;
  }

  static std::tuple<Tensor, Tensor> bn_relu_backward(const Tensor& grad, const Tensor& input,
                                                     const Tensor& affine,
                                                     std::string activation_name, bool with_sums,
                                                     bool frozen, const OptionalTensor& residual) {
    const Dtype dtype = dtype_of<Device>(input);
    const ImageShape shape = image_shape(input);
    const Activation act = activation_of(activation_name);
    const Tensor u = activation("input", input, input, shape);
    const Tensor dh = activation("grad", grad, input, shape);
    const Tensor a = vectors("affine", affine, input, 4, shape.channels);
    check(frozen || !residual, "residual: expected None without frozen");
    const OptionalTensor joins = optional(activation, "residual", residual, input, shape);
    const Tensor g = new_activation(input, shape);
    const Tensor sums = new_vectors(input, 2, with_sums ? shape.channels : 0);
    Device device(input);
    preact::bn_relu_backward(device.runtime(), dtype, shape, act, data(dh), data(u), data(a),
                             frozen, data(joins), mutable_data(g), mutable_data(sums));
    return {g, sums};
  }

  static std::tuple<Tensor, Tensor, Tensor> preact_conv_forward(
      const Tensor& input, const OptionalTensor& affine, const Tensor& weight,
      const OptionalTensor& residual, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
      std::string activation_name, bool with_stats, bool allow_tf32,
      const OptionalTensor& next_weight, const OptionalTensor& next_bias,
      std::optional<double> next_eps) {
    const Dtype dtype = dtype_of<Device>(input);
    const int64_t channels = image_shape(input).channels;
    const Weight w = weight_of(weight, input, channels);
    const ConvShape shape = conv_shape(input, weight.size(0), {weight.size(2), weight.size(3)},
                                       stride, padding, dilation, groups);
    const Activation act = activation_of(activation_name);
    const Tensor u = activation("input", input, input, shape.input);
    const OptionalTensor a = optional(vectors, "affine", affine, input, int64_t{4}, channels);
    const OptionalTensor added = optional(activation, "residual", residual, input, shape.output);
    const Tensor output = new_activation(input, shape.output);
    const int64_t k = shape.output.channels;
    check(with_stats || !next_eps, "next_eps: expected None without with_stats");
    const OptionalTensor gamma = optional(vector, "next_weight", next_weight, input, k);
    const OptionalTensor beta = optional(vector, "next_bias", next_bias, input, k);
    const Tensor stats = new_vectors(input, 2, with_stats ? k : 0);
    const Tensor next = new_vectors(input, 4, next_eps ? k : 0);
    Device device(input);
    preact::preact_conv_forward(
        device.runtime(), {dtype,
                           shape,
                           act,
                           data(u),
                           data(a),
                           w,
                           data(added),
                           mutable_data(output),
                           mutable_data(stats),
                           allow_tf32,
                           {data(gamma), data(beta), next_eps.value_or(0), mutable_data(next)}});
    return {output, stats, next};
  }

  static std::tuple<Tensor, Tensor> preact_conv_dgrad(
      const Tensor& grad, const OptionalTensor& output, const OptionalTensor& output_affine,
      const OptionalTensor& output_sums, const Tensor& weight, const Tensor& input,
      const OptionalTensor& affine, const OptionalTensor& addend, Sizes stride, Sizes padding,
      Sizes dilation, int64_t groups, std::string activation_name, bool with_sums, bool allow_tf32,
      bool frozen, const OptionalTensor& residual) {
    const DgradTensors<Device> dgrad(grad, output, output_affine, output_sums, weight, input,
                                     affine, addend, stride, padding, dilation, groups,
                                     activation_name, with_sums, allow_tf32, frozen, residual);
    Device device(input);
    preact::preact_conv_dgrad(device.runtime(), dgrad.get());
    return {dgrad.g, dgrad.sums};
  }

  static Tensor preact_conv_wgrad(const Tensor& grad, const OptionalTensor& output,
                                  const OptionalTensor& output_affine,
                                  const OptionalTensor& output_sums, const Tensor& input,
                                  const OptionalTensor& affine, Sizes kernel_size, Sizes stride,
                                  Sizes padding, Sizes dilation, int64_t groups,
                                  std::string activation_name, bool allow_tf32) {
    const Dtype dtype = dtype_of<Device>(input);
    check(grad.dim() == 4, "grad: expected (N, K, H', W'), got shape ", text(sizes_of(grad)));
    const ConvShape shape =
        conv_shape(input, grad.size(1), kernel_size, stride, padding, dilation, groups);
    const Activation act = activation_of(activation_name);
    const OutputGradTensors dy(grad, output, output_affine, output_sums, std::nullopt, input,
                               shape.output);
    const Tensor u = activation("input", input, input, shape.input);
    const OptionalTensor a =
        optional(vectors, "affine", affine, input, int64_t{4}, shape.input.channels);
    const Tensor dweight = new_weight_grad(
        input, {shape.output.channels, shape.input.channels, kernel_size[0], kernel_size[1]});
    Device device(input);
    preact::preact_conv_wgrad(device.runtime(), {dtype, shape, act, dy.get(), data(u), data(a),
                                                 mutable_data(dweight), allow_tf32});
    return dweight;
  }

  static std::tuple<Tensor, Tensor, Tensor> preact_conv_backward(
      const Tensor& grad, const OptionalTensor& output, const OptionalTensor& output_affine,
      const OptionalTensor& output_sums, const Tensor& weight, const Tensor& input,
      const OptionalTensor& affine, const OptionalTensor& addend, Sizes stride, Sizes padding,
      Sizes dilation, int64_t groups, std::string activation_name, bool with_sums, bool allow_tf32,
      bool frozen, const OptionalTensor& residual) {
    const DgradTensors<Device> dgrad(grad, output, output_affine, output_sums, weight, input,
                                     affine, addend, stride, padding, dilation, groups,
                                     activation_name, with_sums, allow_tf32, frozen, residual);
    const Tensor dweight = conv_backward(dgrad.get(), weight, input);
    return {dgrad.g, dgrad.sums, dweight};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> residual_conv_backward(
      const OptionalTensor& residual, const Tensor& grad, const Tensor& output,
      const Tensor& output_affine, const Tensor& output_sums, const Tensor& weight,
      const Tensor& input, const Tensor& affine, Sizes stride, Sizes padding, Sizes dilation,
      int64_t groups, std::string activation_name, bool allow_tf32) {
    return residual_conv_backward_into(std::nullopt, residual, grad, output, output_affine,
                                       output_sums, weight, input, affine, stride, padding,
                                       dilation, groups, activation_name, allow_tf32);
  }

  // With dy in new memory, or in `to`, which may be grad where Device::kResidualGradInPlace.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> residual_conv_backward_into(
      const OptionalTensor& to, const OptionalTensor& residual, const Tensor& grad,
      const Tensor& output, const Tensor& output_affine, const Tensor& output_sums,
      const Tensor& weight, const Tensor& input, const Tensor& affine, const Sizes& stride,
      const Sizes& padding, const Sizes& dilation, int64_t groups,
      const std::string& activation_name, bool allow_tf32) {
    const DgradTensors<Device> dgrad(grad, output, output_affine, output_sums, weight, input,
                                     affine, std::nullopt, stride, padding, dilation, groups,
                                     activation_name, true, allow_tf32, false, std::nullopt,
                                     residual);
    const Tensor dy = to ? *to : new_activation(input, dgrad.shape.output);
    PreactConvDgrad op = dgrad.get();
    op.grad.dy = mutable_data(dy);
    const Tensor dweight = conv_backward(op, weight, input);
    return {dy, dgrad.g, dgrad.sums, dweight};
  }

  static Tensor residual_grad(const OptionalTensor& grad, const Tensor& g, const Tensor& input,
                              const Tensor& affine, const Tensor& sums) {
    return residual_grad_into(new_activation(input, image_shape(input)), grad, g, input, affine,
                              sums);
  }

  // Into dinput, which may be g where Device::kResidualGradInPlace.
  static Tensor residual_grad_into(const Tensor& dinput, const OptionalTensor& grad,
                                   const Tensor& g, const Tensor& input, const Tensor& affine,
                                   const Tensor& sums) {
    const Dtype dtype = dtype_of<Device>(input);
    const ImageShape shape = image_shape(input);
    const OptionalTensor dy = optional(activation, "grad", grad, input, shape);
    const Tensor g_ = activation("g", g, input, shape),
                 u = activation("input", input, input, shape);
    const Tensor a = vectors("affine", affine, input, 4, shape.channels);
    const Tensor s = vectors("sums", sums, input, 2, shape.channels);
    Device device(input);
    preact::residual_grad(device.runtime(), dtype, shape, data(dy), data(g_), data(u), data(a),
                          data(s), mutable_data(dinput));
    return dinput;
  }

 private:
  // Returns dW.
  static Tensor conv_backward(const PreactConvDgrad& op, const Tensor& weight,
                              const Tensor& input) {
    const Tensor dweight = new_weight_grad(input, sizes_of(weight));
    Device device(input);
    preact::preact_conv_backward(device.runtime(), op,
                                 {op.dtype, op.shape, op.activation, op.grad, op.input, op.affine,
                                  mutable_data(dweight), op.allow_tf32});
    return dweight;
  }
};

// Into an m of STABLE_TORCH_LIBRARY.
template <class Library>
void define_operators(Library& m) {
  m.def("bn_stats(Tensor input) -> Tensor");
  m.def("bn_affine(Tensor stats, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  m.def(
      "bn_update_running(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor[] stats, "
      "float[] momentum, SymInt[] counts) -> ()");
  m.def("bn_relu_forward(Tensor input, Tensor affine, str activation) -> Tensor");
  m.def(
      "bn_relu_backward(Tensor grad, Tensor input, Tensor affine, str activation, bool with_sums, "
      "bool frozen=False, Tensor? residual=None) -> (Tensor, Tensor)");
  m.def(
      "preact_conv_forward(Tensor input, Tensor? affine, Tensor weight, Tensor? residual, "
      "int[] stride, int[] padding, int[] dilation, int groups, str activation, bool with_stats, "
      "bool allow_tf32=False, Tensor? next_weight=None, Tensor? next_bias=None, "
      "float? next_eps=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "preact_conv_dgrad(Tensor grad, Tensor? output, Tensor? output_affine, Tensor? output_sums, "
      "Tensor weight, Tensor input, Tensor? affine, Tensor? addend, int[] stride, int[] padding, "
      "int[] dilation, int groups, str activation, bool with_sums, "
      "bool allow_tf32=False, bool frozen=False, Tensor? residual=None) -> (Tensor, Tensor)");
  m.def(
      "preact_conv_wgrad(Tensor grad, Tensor? output, Tensor? output_affine, Tensor? output_sums, "
      "Tensor input, Tensor? affine, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, int groups, str activation, bool allow_tf32=False) -> Tensor");
  m.def(
      "preact_conv_backward(Tensor grad, Tensor? output, Tensor? output_affine, "
      "Tensor? output_sums, Tensor weight, Tensor input, Tensor? affine, Tensor? addend, "
      "int[] stride, int[] padding, int[] dilation, int groups, str activation, bool with_sums, "
      "bool allow_tf32=False, bool frozen=False, Tensor? residual=None) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "residual_conv_backward(Tensor? residual, Tensor grad, Tensor output, Tensor output_affine, "
      "Tensor output_sums, Tensor weight, Tensor input, Tensor affine, int[] stride, "
      "int[] padding, int[] dilation, int groups, str activation, bool allow_tf32=False) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_grad(Tensor? grad, Tensor g, Tensor input, Tensor affine, Tensor sums) -> Tensor");
}

// Into an m of STABLE_TORCH_LIBRARY_IMPL.
template <class Device, class Library>
void implement_operators(Library& m) {
  m.impl("bn_stats", TORCH_BOX(&Operators<Device>::bn_stats));
  m.impl("bn_affine", TORCH_BOX(&Operators<Device>::bn_affine));
  m.impl("bn_update_running", TORCH_BOX(&Operators<Device>::bn_update_running));
  m.impl("bn_relu_forward", TORCH_BOX(&Operators<Device>::bn_relu_forward));
  m.impl("bn_relu_backward", TORCH_BOX(&Operators<Device>::bn_relu_backward));
  m.impl("preact_conv_forward", TORCH_BOX(&Operators<Device>::preact_conv_forward));
  m.impl("preact_conv_dgrad", TORCH_BOX(&Operators<Device>::preact_conv_dgrad));
  m.impl("preact_conv_wgrad", TORCH_BOX(&Operators<Device>::preact_conv_wgrad));
  m.impl("preact_conv_backward", TORCH_BOX(&Operators<Device>::preact_conv_backward));
  m.impl("residual_conv_backward", TORCH_BOX(&Operators<Device>::residual_conv_backward));
  m.impl("residual_grad", TORCH_BOX(&Operators<Device>::residual_grad));
}

}  // namespace preact
