// Walk, which has no division, against plain arithmetic that has: every pixel of every tile's
// region, for each thread that might begin there. Says what differs and how many were compared.
#include <cstdio>

#include "conv.cuh"

using namespace preact::cuda;

namespace {

int64_t compared = 0, inside = 0, different = 0;

// Pixel i of an axis' part of a tile from output `first`, in the tensor.
int64_t pixel_of(const Axis& axis, int64_t first, int i) {
  return (first * axis.step + i) * axis.gather + axis.offset;
}

void compare(const Axis& r, const Axis& c, int64_t images, int most, int step) {
  constexpr int64_t kChannels = 24, kChannel = 8;
  const Patch patch = choose_patch(images, r, c, most, 2048);
  const Region region(r, c, patch, images, kChannels);
  for (int64_t tile = 0; tile < patch.tiles(images, r, c); ++tile) {
    const Origin origin(tile, patch, r, c);
    const Place place = region.place(origin);
    for (int first = 0; first < step; ++first) {
      Walk walk(region, place, region.packed(first), region.packed(step), kChannel);
      // beyond the region as well, as where a window is filled up
      for (int i = first; i < region.pixels() + step; i += step, walk.advance()) {
        const int of_image = region.rows() * region.columns();
        const int64_t n = origin.image + i / of_image;
        const int64_t y = pixel_of(r, origin.row, i % of_image / region.columns());
        const int64_t x = pixel_of(c, origin.column, i % of_image % region.columns());
        const bool there =
            i < region.pixels() && n < images && y >= 0 && y < r.source && x >= 0 && x < c.source;
        const int64_t offset = ((n * r.source + y) * c.source + x) * kChannels + kChannel;
        ++compared;
        inside += there;
        if (walk.inside() == there && (!there || walk.offset() == offset)) continue;
        if (++different < 10)
          std::printf("tile %ld, pixel %d of %d x %d x %d: %d %ld, not %d %ld\n",
                      static_cast<long>(tile), i, patch.images, region.rows(), region.columns(),
                      walk.inside(), static_cast<long>(walk.offset()), there,
                      static_cast<long>(offset));
      }
    }
  }
}

}  // namespace

int main() {
  for (int64_t images : {1, 5})
    for (int64_t height : {1, 4, 7, 18})
      for (int64_t width : {3, 8, 21})
        for (int64_t kernel : {1, 2, 3, 5})  // 1 with a stride gathers
          for (int64_t stride : {1, 2})
            for (int64_t pad : {0, 1, 2}) {
              if (pad >= kernel || height + 2 * pad < kernel || width + 2 * pad < kernel) continue;
              const int64_t down = (height + 2 * pad - kernel) / stride + 1;
              const int64_t across =
                  (width + pad - kernel) / stride + 1;  // no padding at the right
              if (across < 1) continue;
              const int taps = static_cast<int>(kernel);
              const Axis r = forward_axis(height, down, 0, taps, stride, pad);
              const Axis c = forward_axis(width, across, 0, taps, stride, pad);
              for (int step : {4, 10, 32})
                for (int most : {64, 128}) {
                  compare(r, c, images, most, step);
                  for (int64_t phase = 0; phase < stride; ++phase) {
                    const Axis p = dgrad_axis(height, down, kernel, stride, pad, phase);
                    const Axis q = dgrad_axis(width, across, kernel, stride, pad, phase);
                    if (p.outputs == 0 || q.outputs == 0) continue;
                    if (p.taps > 0 && q.taps > 0) compare(p, q, images, most, step);
                    const Axis results_r = p.results(height), results_c = q.results(width);
                    compare(results_r, results_c, images, most, step);
                  }
                }
            }
  std::printf("%ld compared, %ld inside, %ld different\n", static_cast<long>(compared),
              static_cast<long>(inside), static_cast<long>(different));
  return different > 0;
}
