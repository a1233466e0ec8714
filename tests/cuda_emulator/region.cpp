// A Region's pixels, found once, and a tile's Place, compared all at once, against plain
// arithmetic: every pixel of every tile's region. Says what differs and how many were compared.
#include <cstdio>

#include "conv.cuh"

using namespace preact::cuda;

namespace {

int64_t compared = 0, inside = 0, different = 0;

// Pixel i of an axis' part of a tile from output `first`, in the tensor.
int64_t pixel_of(const Axis& axis, int64_t first, int i) {
  return (first * axis.step + i) * axis.gather + axis.offset;
}

void compare(const Axis& r, const Axis& c, int64_t images, int most) {
  constexpr int64_t kChannels = 24;
  constexpr int kBeyond = 10;  // as where a window is filled up
  const Patch patch = choose_patch(images, r, c, most, 2048);
  const Region region(r, c, patch, images, kChannels);
  const SmallDivisor by_rows(region.rows()), by_columns(region.columns());
  for (int tile = 0; tile < patch.tiles; ++tile) {
    const Origin origin(tile, patch);
    const Place place = region.place(origin);
    for (int i = 0; i < region.pixels() + kBeyond; ++i) {
      const int of_image = region.rows() * region.columns();
      const int64_t n = origin.image + i / of_image;
      const int64_t y = pixel_of(r, origin.row, i % of_image / region.columns());
      const int64_t x = pixel_of(c, origin.column, i % of_image % region.columns());
      const bool there =
          i < region.pixels() && n < images && y >= 0 && y < r.source && x >= 0 && x < c.source;
      const int64_t element = ((n * r.source + y) * c.source + x) * kChannels;
      const RegionPixel pixel = region.pixel(i, by_rows, by_columns);
      ++compared;
      inside += there;
      if (pixel.inside(place) == there && (!there || pixel.element(place, kChannels) == element))
        continue;
      if (++different < 10)
        std::printf("tile %d, pixel %d of %d x %d x %d: %d %ld, not %d %ld\n", tile, i,
                    patch.images, region.rows(), region.columns(), pixel.inside(place),
                    static_cast<long>(pixel.element(place, kChannels)), there,
                    static_cast<long>(element));
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
              if ((kernel > 1 && pad >= kernel) || height + 2 * pad < kernel ||
                  width + 2 * pad < kernel)
                continue;
              const int64_t down = (height + 2 * pad - kernel) / stride + 1;
              const int64_t across =
                  (width + pad - kernel) / stride + 1;  // no padding at the right
              if (across < 1) continue;
              const int taps = static_cast<int>(kernel);
              const Axis r = forward_axis(height, down, 0, taps, stride, pad);
              const Axis c = forward_axis(width, across, 0, taps, stride, pad);
              for (int most : {64, 128}) {
                compare(r, c, images, most);
                for (int64_t phase = 0; phase < stride; ++phase) {
                  const Axis p = dgrad_axis(height, down, kernel, stride, pad, phase);
                  const Axis q = dgrad_axis(width, across, kernel, stride, pad, phase);
                  if (p.outputs == 0 || q.outputs == 0) continue;
                  if (p.taps > 0 && q.taps > 0) compare(p, q, images, most);
                  compare(p.results(height), q.results(width), images, most);
                }
              }
            }
  std::printf("%ld compared, %ld inside, %ld different\n", static_cast<long>(compared),
              static_cast<long>(inside), static_cast<long>(different));
  return different > 0;
}
