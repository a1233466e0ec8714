// bn_relu_forward: h = act(scale * (u - mean) + shift).
// Reads u, writes h.
#include "pixels.h"
#include "rows.h"

namespace preact {

void bn_relu_forward(const Runtime& runtime, Dtype dtype, const ImageShape& shape,
                     Activation activation, const void* input, const void* affine, void* output) {
  dispatch(dtype, [&]<typename S>(S) {
    using A = Accumulator<S>;
    const PixelBlocks blocks(shape, sizeof(S));
    const int64_t channels = shape.channels;
    blocks.parallel(runtime, [&](int64_t, int64_t first, int64_t count) {
      A* const h = buffer<A>(Buffer::kTile, blocks.block() * channels);
      activate_rows(static_cast<const S*>(input) + first * channels, count, channels,
                    static_cast<const A*>(affine), activation, h);
      store_rows(h, static_cast<const S*>(nullptr), count, channels,
                 static_cast<S*>(output) + first * channels);
    });
  });
}

}  // namespace preact
