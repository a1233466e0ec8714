// bn_relu_backward: g = dh * act'(z),  S1 = sum g,  S2 = sum g * (u - mean) * rstd.
// Reads dh and u, writes g. residual_grad finishes du from g, S1 and S2.
#include "pixels.h"
#include "statistics.h"

namespace preact {

void bn_relu_backward(const Runtime& runtime, Dtype dtype, const ImageShape& shape,
                      Activation activation, const void* grad, const void* input,
                      const void* affine, void* g, void* sums) {
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
      slope_rows(dh, static_cast<const S*>(nullptr), static_cast<const S*>(input) + offset, count,
                 channels, static_cast<const A*>(affine), activation, static_cast<S*>(g) + offset,
                 tile_sums, sums ? tile_sums + channels : nullptr);
      if (sums) partial.add(part, tile_sums);
    });
    if (sums) partial.finish(static_cast<const A*>(affine) + channels, static_cast<A*>(sums));
  });
}

}  // namespace preact
