// Both gradients of a convolution whose output's gradient is that of a residual sum, where no
// kernel makes that on the way: residual_grad writes it, and the convolution reads it like any
// other.
#pragma once

#include "preact.h"

namespace preact {

template <class AnyRuntime>
void backward_after_residual_grad(const AnyRuntime& runtime, PreactConvDgrad dgrad,
                                  PreactConvWgrad wgrad) {
  const OutputGrad sum = dgrad.grad;
  residual_grad(runtime, dgrad.dtype, dgrad.shape.output, sum.residual, sum.grad, sum.output,
                sum.affine, sum.sums, sum.dy);
  dgrad.grad = wgrad.grad = {sum.dy, nullptr, nullptr, nullptr};
  preact_conv_backward(runtime, dgrad, wgrad);
}

}  // namespace preact
