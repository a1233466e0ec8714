// preact_conv_wgrad: dW = sum over pixels of dy h^T;  h = act(scale * (u - mean) + shift) is
//   computed again, dy = scale' * g' + B' * (u' - mean') + C' of the layer above.
// Reads g', u' [M', K] and u [M, C]; writes dW [K, R, S, C]; FLOPs 2*M'*K*C*R*S.
#include "weight_gradient.h"
#include "wide_weight_gradient.h"
#include "winograd_weight_gradient.h"

namespace preact {
namespace {

template <typename S, typename O, typename Gradient>
void run(const Runtime& runtime, PreactConvWgrad op) {
  op.shape = flattened(op.shape);
  const OutputGradient<S> grad(op.grad, op.shape.output);
  const Gradient dweight(runtime, op);
  const Bands& bands = dweight.bands;
  const int64_t size = dweight.grad_size(), together = dweight.together(size);
  parallel_for(runtime, bands.parts.parts * dweight.pieces, [&](int64_t index) {
    const int64_t part = index / dweight.pieces, piece = index % dweight.pieces;
    Ahead ahead(runtime.asks_ahead);
    O* const loaded = buffer<O>(Buffer::kGrad, together * size);
    typename Gradient::Operands operands;
    const int64_t end = bands.parts.end(part);
    for (int64_t first = bands.parts.begin(part); first < end; first += together) {
      const int64_t count = std::min(together, end - first);
      for (int64_t i = 0; i < count; ++i) {
        const O* const dy = dweight.load_grad(grad, first + i, loaded + i * size);
        dweight.load(i, together, first + i, dy, operands);
      }
      ahead.clear();
      if (first + count < end) dweight.want(grad, first + count, ahead);
      dweight.multiply(part, piece, first, count, together, operands, ahead);
    }
  });
  dweight.finish(runtime);
}

template <typename S, typename O>
void run_wide(const Runtime& runtime, PreactConvWgrad op) {
  op.shape = flattened(op.shape);
  const OutputGradient<S> grad(op.grad, op.shape.output);
  const WideWeightGradient<S, O> dweight(runtime, op);
  dweight.run(runtime, [&](const auto& l) {
    O* const loaded = buffer<O>(Buffer::kGrad, dweight.grad_size());
    dweight.load(l, dweight.load_grad(grad, l.band, loaded));
  });
}

}  // namespace

void preact_conv_wgrad(const Runtime& runtime, const PreactConvWgrad& op) {
  dispatch(runtime, op.dtype, 2, [&]<typename S, typename O>(S, O) {
    if constexpr (std::is_same_v<O, float>)
      if (winograd_pays<O>(op.shape, op.shape.output))
        return run<S, O, WinogradWeightGradient<S>>(runtime, op);
    if (dweight_is_wide<O>(op.shape)) return run_wide<S, O>(runtime, op);
    run<S, O, WeightGradient<S, O>>(runtime, op);
  });
}

}  // namespace preact
