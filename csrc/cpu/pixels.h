// Blocks of pixels for the kernels that work on one pixel at a time.
#pragma once

#include "common.h"

namespace preact {

// Calls body(part, first, count) for blocks of pixels that fit the cache; the blocks of a part come
// in order.
class PixelBlocks {
 public:
  PixelBlocks(const ImageShape& shape, size_t element)
      : pixels_(shape.pixels()),
        block_(block_size(shape, element)),
        parts_(ceil_div(pixels_, block_), kMostParts) {}

  int64_t parts() const { return parts_.parts; }
  int64_t block() const { return block_; }

  template <typename F>
  void parallel(const Runtime& runtime, const F& body) const {
    parallel_for(runtime, parts_.parts, [&](int64_t part) {
      for (int64_t i = parts_.begin(part); i < parts_.end(part); ++i)
        body(part, i * block_, std::min(block_, pixels_ - i * block_));
    });
  }

 private:
  static int64_t block_size(const ImageShape& shape, size_t element) {
    const int64_t pixel = shape.channels * static_cast<int64_t>(element);
    return std::clamp<int64_t>(kCacheBytes / 8 / std::max<int64_t>(pixel, 1), 16, 1024);
  }

  int64_t pixels_, block_;
  Parts parts_;
};

}  // namespace preact
