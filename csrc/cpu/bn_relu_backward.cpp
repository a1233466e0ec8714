// bn_relu_backward: g = dh * act'(z),  S1 = sum g,  S2 = sum g * (u - mean) * rstd; or with frozen
//   statistics du = residual + scale * g.
// Reads dh, u and residual, writes g or du. residual_grad finishes du from g, S1 and S2.
#include "pixels.h"
#include "statistics.h"

namespace preact {

void bn_relu_backward(const Runtime& runtime, Dtype dtype, const ImageShape& shape,
                      Activation activation, const void* grad, const void* input,
                      const void* affine, bool frozen, const void* residual, void* g, void* sums) {
  dispatch(dtype, [&]<typename S>(S) {
    using A = Accumulator<S>;
    const PixelBlocks blocks(shape, sizeof(S));
    const int64_t channels = shape.channels;
    PartialSums partial(sums ? blocks.parts() : 0, channels);
    blocks.parallel(runtime, [&](int64_t part, int64_t first, int64_t count) {
      const int64_t offset = first * channels;
      A* const dh = buffer<A>(Buffer::kTile, blocks.block() * channels);
      A* const tile_sums = sums ? buffer<A>(Buffer::kVectors, 2 * channels) : nullptr;
      if (sums) std::fill_n(tile_sums, 2 * channels, A(0));
      output_grad_rows(static_cast<const S*>(grad) + offset, static_cast<const S*>(nullptr), count,
                       channels, static_cast<const A*>(nullptr), dh);
      const S* const u = static_cast<const S*>(input) + offset;
      const A* const a = static_cast<const A*>(affine);
      A* const s2 = sums ? tile_sums + channels : nullptr;
      S* const out = static_cast<S*>(g) + offset;
      if (frozen)
        frozen_slope_rows(dh, residual ? static_cast<const S*>(residual) + offset : nullptr, u,
                          count, channels, a, activation, out, tile_sums, s2);
      else
        slope_rows(dh, static_cast<const S*>(nullptr), u, count, channels, a, activation, out,
                   tile_sums, s2);
      if (sums) partial.add(part, tile_sums);
    });
    if (sums) partial.finish(static_cast<const A*>(affine) + channels, static_cast<A*>(sums));
  });
}

}  // namespace preact
