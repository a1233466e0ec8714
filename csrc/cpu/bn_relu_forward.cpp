// bn_relu_forward: h = act(scale * (u - mean) + shift).
// Reads u, writes h.
#include "pixels.h"
#include "rows.h"

namespace preact {

void bn_relu_forward(const Runtime& runtime, Dtype dtype, const ImageShape& shape,
                     Activation activation, const void* input, const void* affine, void* output) {
  dispatch(dtype, [&]<typename S>(S) {
    const S* const u = static_cast<const S*>(input);
    S* const h = static_cast<S*>(output);
    const int64_t channels = shape.channels;
    PixelBlocks(shape, sizeof(S)).parallel(runtime, [&](int64_t, int64_t first, int64_t count) {
      activate_rows(u + first * channels, count, channels,
                    static_cast<const Accumulator<S>*>(affine), activation, h + first * channels);
    });
  });
}

}  // namespace preact
