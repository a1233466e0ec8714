// bn_stats: mean and biased variance of each channel of u [N, H, W, C].
// Reads u once.
#include "pixels.h"
#include "statistics.h"

namespace preact {

void bn_stats(const Runtime& runtime, Dtype dtype, const ImageShape& shape, const void* input,
              void* stats) {
  dispatch(dtype, [&]<typename S>(S) {
    using A = Accumulator<S>;
    const PixelBlocks blocks(shape, sizeof(S));
    const S* const u = static_cast<const S*>(input);
    const int64_t channels = shape.channels;
    PartialMoments moments(blocks.parts(), channels);
    blocks.parallel(runtime, [&](int64_t part, int64_t first, int64_t count) {
      A* const sum = tile_sum<A>(channels);
      sum_rows(u + first * channels, count, channels, sum);
      add_tile(moments[part], u + first * channels, count, channels, sum);
    });
    moments.finish(static_cast<A*>(stats));
  });
}

}  // namespace preact
