// Convolutions of operators.h as PyTorch's convolution between the pointwise kernels of a device.
// fused_preact/composed.py does the same for any backend, and says what for; dW comes in the dtype
// of the activations.
#pragma once

#include <array>

#include "operators.h"

namespace preact {

// An operator of PyTorch, which takes its arguments from the stack and leaves its results there.
template <size_t kSize>
void call_aten(const char* name, const char* overload, std::array<StableIValue, kSize>& stack) {
#ifdef STABLE_TORCH_ERROR_CODE_CHECK  // since torch 2.13 it passes on what went wrong
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
#else
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
#endif
}

// PyTorch's convolution, for which h is padded first where a side differs from the one across.
struct AtenConvolution {
  const Sizes &stride, &padding, &dilation;  // padding: top, bottom, left, right
  const int64_t groups;

  bool symmetric() const { return padding[0] == padding[1] && padding[2] == padding[3]; }
  Sizes inner_padding() const { return symmetric() ? Sizes{padding[0], padding[2]} : Sizes{0, 0}; }
  Tensor padded(const Tensor& h) const {
    return torch::stable::pad(h, Sizes{padding[2], padding[3], padding[0], padding[1]});
  }

  Tensor forward(const Tensor& h, const Tensor& weight) const {
    using torch::stable::detail::from;
    std::array<StableIValue, 9> stack{from(symmetric() ? h : padded(h)),
                                      from(weight),
                                      from(OptionalTensor()),  // bias
                                      from(stride),
                                      from(inner_padding()),
                                      from(dilation),
                                      from(false),  // transposed
                                      from(Sizes{0, 0}),
                                      from(groups)};
    call_aten("aten::convolution", "", stack);
    return channels_last(torch::stable::detail::to<Tensor>(stack[0]));
  }
};

// dh and dW; what is not wanted is undefined.
inline std::array<Tensor, 2> convolution_backward(const Tensor& dy, const Tensor& h,
                                                  const Tensor& weight, const Sizes& stride,
                                                  const Sizes& padding, const Sizes& dilation,
                                                  int64_t groups, bool wants_dh, bool wants_dw) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const bool wanted[] = {wants_dh, wants_dw, false};  // no gradient of a bias
  std::array<StableIValue, 11> stack{from(dy),
                                     from(channels_last(h)),
                                     from(channels_last(weight)),
                                     from(std::optional<Sizes>()),  // of the bias
                                     from(stride),
                                     from(padding),
                                     from(dilation),
                                     from(false),  // transposed
                                     from(Sizes{0, 0}),
                                     from(groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted, 3))};
  call_aten("aten::convolution_backward", "", stack);
  to<Tensor>(stack[2]);  // frees it
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// Every step-th row or column.
inline Tensor every(const Tensor& tensor, int64_t dimension, int64_t step) {
  using torch::stable::detail::from;
  std::array<StableIValue, 5> stack{from(tensor), from(dimension), from(std::optional<int64_t>()),
                                    from(std::optional<int64_t>()), from(step)};
  call_aten("aten::slice", "Tensor", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor sum_of(const Tensor& a, const Tensor& b) {
  return channels_last(torch::stable::subtract(a, b, -1.0));
}

template <class Device>
struct Composed {
  using Kernels = Operators<Device>;

  static std::tuple<Tensor, Tensor, Tensor> preact_conv_forward(
      const Tensor& input, const OptionalTensor& affine, const Tensor& weight,
      const OptionalTensor& residual, const Sizes& stride, const Sizes& padding,
      const Sizes& dilation, int64_t groups, const std::string& activation_name, bool with_stats,
      bool, const OptionalTensor& next_weight, const OptionalTensor& next_bias,
      std::optional<double> next_eps) {
    const AtenConvolution conv{stride, padding, dilation, groups};
    Tensor output = conv.forward(activated(input, affine, activation_name), weight);
    if (residual) output = sum_of(output, *residual);
    const Tensor stats = with_stats ? Kernels::bn_stats(output) : new_vectors(input, 2, 0);
    const Tensor next = next_eps ? Kernels::bn_affine(stats, next_weight, next_bias, *next_eps)
                                 : new_vectors(input, 4, 0);
    return {output, stats, next};
  }

  static std::tuple<Tensor, Tensor> preact_conv_dgrad(
      const Tensor& grad, const OptionalTensor& output, const OptionalTensor& output_affine,
      const OptionalTensor& output_sums, const Tensor& weight, const Tensor& input,
      const OptionalTensor& affine, const OptionalTensor& addend, const Sizes& stride,
      const Sizes& padding, const Sizes& dilation, int64_t groups,
      const std::string& activation_name, bool with_sums, bool, bool frozen,
      const OptionalTensor& residual) {
    const Tensor dy = output_grad(grad, output, output_affine, output_sums);
    const AtenConvolution conv{stride, padding, dilation, groups};
    const int64_t height = input.size(2), width = input.size(3);
    const Tensor source =
        conv.symmetric() ? input
                         : new_activation(input, {input.size(0), height + padding[0] + padding[1],
                                                  width + padding[2] + padding[3], input.size(1)});
    Tensor dh = convolution_backward(dy, source, weight, stride, conv.inner_padding(), dilation,
                                     groups, true, false)[0];
    if (!conv.symmetric()) {
      dh = torch::stable::narrow(dh, 2, padding[0], height);
      dh = torch::stable::narrow(dh, 3, padding[2], width);
    }
    return input_grad(dh, input, affine, addend, activation_name, with_sums, frozen, residual);
  }

  static Tensor preact_conv_wgrad(const Tensor& grad, const OptionalTensor& output,
                                  const OptionalTensor& output_affine,
                                  const OptionalTensor& output_sums, const Tensor& input,
                                  const OptionalTensor& affine, const Sizes& kernel_size,
                                  const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                                  int64_t groups, const std::string& activation_name, bool) {
    const Tensor dy = output_grad(grad, output, output_affine, output_sums);
    Tensor h = activated(input, affine, activation_name);
    const AtenConvolution conv{stride, padding, dilation, groups};
    const bool one = kernel_size == Sizes{1, 1}, own_padding = one || !conv.symmetric();
    if (own_padding) h = conv.padded(h);
    // PyTorch's own strided 1x1 writes past its buffers, see reference.py.
    if (one) h = channels_last(every(every(h, 2, stride[0]), 3, stride[1]));
    const Tensor weight =
        new_activation(h, {grad.size(1), kernel_size[0], kernel_size[1], input.size(1) / groups});
    return channels_last(convolution_backward(dy, h, weight, one ? Sizes{1, 1} : stride,
                                              own_padding ? Sizes{0, 0} : conv.inner_padding(),
                                              dilation, groups, false, true)[1]);
  }

  static std::tuple<Tensor, Tensor, Tensor> preact_conv_backward(
      const Tensor& grad, const OptionalTensor& output, const OptionalTensor& output_affine,
      const OptionalTensor& output_sums, const Tensor& weight, const Tensor& input,
      const OptionalTensor& affine, const OptionalTensor& addend, const Sizes& stride,
      const Sizes& padding, const Sizes& dilation, int64_t groups,
      const std::string& activation_name, bool with_sums, bool allow_tf32, bool frozen,
      const OptionalTensor& residual) {
    const Tensor dy = output_grad(grad, output, output_affine, output_sums);
    const AtenConvolution conv{stride, padding, dilation, groups};
    const Sizes kernel{weight.size(2), weight.size(3)};
    const bool one = kernel == Sizes{1, 1}, plain = stride == Sizes{1, 1} && padding == Sizes(4);
    if (one ? plain : conv.symmetric()) {  // one h serves both gradients
      const auto [dh, dw] =
          convolution_backward(dy, activated(input, affine, activation_name), weight, stride,
                               conv.inner_padding(), dilation, groups, true, true);
      const auto [g, sums] =
          input_grad(dh, input, affine, addend, activation_name, with_sums, frozen, residual);
      return {g, sums, channels_last(dw)};
    }
    const Tensor dw =
        preact_conv_wgrad(dy, std::nullopt, std::nullopt, std::nullopt, input, affine, kernel,
                          stride, padding, dilation, groups, activation_name, allow_tf32);
    const auto [g, sums] = preact_conv_dgrad(
        dy, std::nullopt, std::nullopt, std::nullopt, weight, input, affine, addend, stride,
        padding, dilation, groups, activation_name, with_sums, allow_tf32, frozen, residual);
    return {g, sums, dw};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> residual_conv_backward_into(
      const OptionalTensor& to, const OptionalTensor& residual, const Tensor& grad,
      const Tensor& output, const Tensor& output_affine, const Tensor& output_sums,
      const Tensor& weight, const Tensor& input, const Tensor& affine, const Sizes& stride,
      const Sizes& padding, const Sizes& dilation, int64_t groups,
      const std::string& activation_name, bool allow_tf32) {
    const Tensor dy =
        Kernels::residual_grad_into(to ? *to : new_activation(output, image_shape(output)),
                                    residual, grad, output, output_affine, output_sums);
    const auto [g, sums, dw] = preact_conv_backward(
        dy, std::nullopt, std::nullopt, std::nullopt, weight, input, affine, std::nullopt, stride,
        padding, dilation, groups, activation_name, true, allow_tf32, false, std::nullopt);
    return {dy, g, sums, dw};
  }

 private:
  static Tensor activated(const Tensor& input, const OptionalTensor& affine,
                          const std::string& activation_name) {
    return affine ? Kernels::bn_relu_forward(input, *affine, activation_name) : input;
  }

  static Tensor output_grad(const Tensor& grad, const OptionalTensor& output,
                            const OptionalTensor& affine, const OptionalTensor& sums) {
    return output ? Kernels::residual_grad(std::nullopt, grad, *output, *affine, *sums) : grad;
  }

  static std::tuple<Tensor, Tensor> input_grad(const Tensor& dh, const Tensor& input,
                                               const OptionalTensor& affine,
                                               const OptionalTensor& addend,
                                               const std::string& activation_name, bool with_sums,
                                               bool frozen, const OptionalTensor& residual) {
    const Tensor all = addend ? sum_of(dh, *addend) : channels_last(dh);
    if (!affine) return {all, new_vectors(input, 2, 0)};
    return Kernels::bn_relu_backward(all, input, *affine, activation_name, with_sums, frozen,
                                     residual);
  }
};

}  // namespace preact
