// preact_conv_dgrad: g = (dgrad(dy, W) + addend) * act'(z),  S1 = sum g,
//   S2 = sum g * (u - mean) * rstd;  dy = scale' * g' + B' * (u' - mean') + C' of the layer above.
//   With frozen statistics g becomes residual + scale * g.
// Reads g', u' [M', K] and u, addend, residual [M, C]; writes g [M, C]; FLOPs 2*M'*K*C*R*S.
#include "input_gradient.h"

namespace preact {
namespace {

template <typename S, typename O>
void run(const Runtime& runtime, PreactConvDgrad op) {
  op.shape = flattened(op.shape);
  const OutputGradient<S> grad(op.grad, op.shape.output);
  InputGradient<S, O> dinput(runtime, op);
  const Parts& parts = dinput.bands.parts;
  parallel_for(runtime, parts.parts, [&](int64_t part) {
    Ahead ahead(runtime.asks_ahead);
    const int64_t size = dinput.source_size(), together = dinput.together();
    O* const loaded = buffer<O>(Buffer::kGrad, together * size);
    std::vector<const O*> dy(together);
    const int64_t end = parts.end(part);
    for (int64_t band = parts.begin(part), count; band < end; band += count) {
      count = std::min(together, end - band);
      for (int64_t i = 0; i < count; ++i)
        dy[i] = dinput.load_grad(grad, band + i, loaded + i * size);
      dinput.compute(part, band, count, dy.data(), ahead);
    }
  });
  dinput.finish();
}

}  // namespace

void preact_conv_dgrad(const Runtime& runtime, const PreactConvDgrad& op) {
  dispatch(runtime, op.dtype, op.shape.output.channels,
           [&]<typename S, typename O>(S, O) { run<S, O>(runtime, op); });
}

}  // namespace preact
