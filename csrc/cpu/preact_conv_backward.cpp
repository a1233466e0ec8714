// preact_conv_backward: g and its sums as preact_conv_dgrad has them, dW as preact_conv_wgrad, bit
//   for bit.
// Reads g', u' [M', K] and u, addend, residual [M, C]; writes g [M, C] and dW; FLOPs 4*M'*K*C*R*S.
// Of a residual sum it reads the gradient of its shortcut as well, and writes dy [M', K].
//
// Where both gradients go over the same bands (share_bands), dy is loaded once, and u is still in
// cache when g is computed. Bands of a 1x1 share no pixel, so that a residual sum's dy is made
// there; else residual_grad makes it before.
#include "../residual_sum.h"
#include "input_gradient.h"
#include "weight_gradient.h"
#include "wide_weight_gradient.h"
#include "winograd_weight_gradient.h"

namespace preact {
namespace {

template <typename S, typename O, typename Gradient>
void run(const Runtime& runtime, PreactConvDgrad dgrad, PreactConvWgrad wgrad) {
  dgrad.shape = wgrad.shape = flattened(dgrad.shape);
  const OutputGradient<S> grad(dgrad.grad, dgrad.shape.output);
  InputGradient<S, O> dinput(runtime, dgrad);
  const Gradient dweight(runtime, wgrad);
  const Bands& bands = dweight.bands;
  const int64_t size = dinput.source_size(), together = dweight.together(size);
  parallel_for(runtime, bands.parts.parts, [&](int64_t part) {
    Ahead ahead(runtime.asks_ahead);
    O* const loaded = buffer<O>(Buffer::kGrad, together * size);
    const O* dy[Gradient::kMostTogether];
    typename Gradient::Operands operands;
    const int64_t end = bands.parts.end(part);
    for (int64_t first = bands.parts.begin(part); first < end; first += together) {
      const int64_t count = std::min(together, end - first);
      for (int64_t i = 0, computed = 0; i < count; ++i) {
        const int64_t band = first + i, ready = i + 1 - computed;
        dy[i] = dinput.load_grad(grad, band, loaded + i * size);
        dweight.load(i, together, band, dy[i] + dinput.first_pixel(band), operands);
        if (ready < dinput.together() && i + 1 < count) continue;
        dinput.compute(part, first + computed, ready, dy + computed, ahead);
        computed = i + 1;
      }
      ahead.clear();
      if (first + count < end) dweight.want(grad, first + count, ahead);
      dweight.multiply(part, 0, first, count, together, operands, ahead);
    }
  });
  dinput.finish();
  dweight.finish(runtime);
}

// Of a 1x1.
template <typename S, typename O>
void run_wide(const Runtime& runtime, PreactConvDgrad dgrad, PreactConvWgrad wgrad) {
  dgrad.shape = wgrad.shape = flattened(dgrad.shape);
  const OutputGradient<S> grad(dgrad.grad, dgrad.shape.output);
  InputGradient<S, O> dinput(runtime, dgrad);
  const WideWeightGradient<S, O> dweight(runtime, wgrad);
  dweight.run(runtime, [&](const auto& l) {
    O* const loaded = buffer<O>(Buffer::kGrad, dinput.source_size());
    const O* const dy = dinput.load_grad(grad, l.band, loaded);
    dweight.load(l, dy);
    Ahead ahead(runtime.asks_ahead);
    dinput.compute(l.part, l.band, 1, &dy, ahead);
  });
  dinput.finish();
}

void run_apart(const Runtime& runtime, const PreactConvDgrad& dgrad, const PreactConvWgrad& wgrad) {
  preact_conv_wgrad(runtime, wgrad);
  preact_conv_dgrad(runtime, dgrad);
}

}  // namespace

void preact_conv_backward(const Runtime& runtime, const PreactConvDgrad& dgrad,
                          const PreactConvWgrad& wgrad) {
  // dgrad's products are as deep as there are filters, wgrad's as there are pixels.
  const bool same_operands =
      dgrad.dtype != Dtype::kBFloat16 || dgrad.shape.output.channels % 2 == 0;
  const bool together = keeps_size(dgrad.shape) && same_operands;
  if (dgrad.grad.dy && !(together && is_pointwise(dgrad.shape)))
    return backward_after_residual_grad(runtime, dgrad, wgrad);
  if (!together) return run_apart(runtime, dgrad, wgrad);
  dispatch(runtime, dgrad.dtype, 2, [&]<typename S, typename O>(S, O) {
    if (!share_bands<O>(wgrad.shape)) return run_apart(runtime, dgrad, wgrad);
    if constexpr (std::is_same_v<O, float>)
      if (winograd_pays<O>(wgrad.shape, wgrad.shape.output))
        return run<S, O, WinogradWeightGradient<S>>(runtime, dgrad, wgrad);
    if (dweight_is_wide<O>(wgrad.shape)) return run_wide<S, O>(runtime, dgrad, wgrad);
    run<S, O, WeightGradient<S, O>>(runtime, dgrad, wgrad);
  });
}

}  // namespace preact
