// 3x3 convolutions of stride 1 with 16 multiplications for 4 results instead of 36: F(2x2, 3x3) of
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), section 4.1.
//
// Y = A^T [(G g G^T) * (B^T d B)] A of a tile d of 4x4 pixels, the next of which begins two pixels
// on, gives 2x2 results; * multiplies value by value, so that over channels and tiles it is 16
// matrix products. A's and B's last columns have their signs changed, which cancels:
//   B^T = [1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 -1 0 1], A^T = [1 1 1 0; 0 1 -1 1],
//   G = [1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1]
// The gradient is G^T [(A dY A^T) * (B^T d B)] G, summed up over tiles before G. Rounding errors
// are about those of direct convolution: what the transformations add, shorter sums save. What is
// not finite reaches all four results of a tile.
#pragma once

#include "conv.h"

namespace preact {

constexpr int64_t kSide = 4, kProducts = kSide * kSide;  // values of a tile, one a matrix product
constexpr int64_t kTaps = 9;

// Where a row of transformed tiles is: its value j of tile t and channel c, in blocks of channels,
// at data + j * plane + (c / columns) * block + t * pitch + c % columns.
struct Transformed {
  float* data;
  int64_t plane, columns, block, pitch;
};

// Of a line of tiles, each [2 or 4, 2 or 4] pixels of `channels` values, rows of pixels `pitch`
// values apart:
// row i of B^T d B
void transform_source(int64_t i, const float* d, int64_t pitch, int64_t tiles, int64_t channels,
                      const Transformed& out);
// row i of A dY A^T
void transform_grad(int64_t i, const float* dy, int64_t pitch, int64_t tiles, int64_t channels,
                    const Transformed& out);
// Y = A^T m A; channels of m lie side by side, tiles are `channels` apart
void transform_products(const float* m, int64_t plane, int64_t tiles, int64_t channels,
                        int64_t pitch, float* y);
// G g G^T of g [3, 3, count], out[e * plane + i]
void transform_weights(const float* g, int64_t count, int64_t plane, float* out);
// G^T m G of m[e * plane + i], dg [3, 3] values `pitch` apart
void transform_dweights(const float* m, int64_t count, int64_t plane, int64_t pitch, float* dg);

// A convolution that ends with whole tiles: of outputs that nobody asks for where its own is odd.
inline ConvShape in_whole_tiles(ConvShape shape) {
  shape.output.height = round_up(shape.output.height, 2);
  shape.output.width = round_up(shape.output.width, 2);
  return shape;
}

// Most parts of the work on so many results, so that most of them multiply as many tiles at once.
inline int64_t winograd_parts(const ConvShape& shape, const ImageShape& results) {
  const int64_t tiles = results.images * ceil_div(results.height, 2) * ceil_div(results.width, 2);
  const int64_t at_once = tiles_at_once(shape.input.channels, shape.output.channels);
  return std::clamp(tiles / at_once, kFewestParts, kMostParts);
}

// Values from one plane to the next: an odd number of cache lines.
inline int64_t plane_of(int64_t values) {
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(float));
  return (ceil_div(values, kLine) | 1) * kLine;
}

// A convolution of [rows + 2, width + 2, depth] with weights [3, 3, depth, n].
class WinogradConv {
 public:
  WinogradConv(const Runtime& runtime, int64_t depth, int64_t n)
      : tile_(runtime.tile),
        depth_(depth),
        n_(n),
        at_once_(tiles_at_once(depth, n)),
        weight_{buffer<float>(Buffer::kWeight, kProducts * depth * n), kProducts * depth, n,
                tile_.columns} {}

  // Value j of tap and row i of the weights is row_of(tap, i)[j * stride].
  template <typename F>
  void fill(const Runtime& runtime, int64_t stride, const F& row_of) const {
    fill_pieces(runtime, [&](int64_t row, int64_t rows, int64_t first, int64_t columns, float* g) {
      for (int64_t tap = 0; tap < kTaps; ++tap)
        for (int64_t i = row; i < row + rows; ++i) {
          const auto* const values = row_of(tap, i) + first * stride;
          for (int64_t j = 0; j < columns; ++j) *g++ = widen(values[j * stride]);
        }
    });
  }

  // From filters [n, 3, 3, depth] that are `pitch` apart.
  void fill_transposed(const Runtime& runtime, const float* filters, int64_t pitch) const {
    fill_pieces(runtime, [&](int64_t row, int64_t rows, int64_t first, int64_t columns, float* g) {
      for (int64_t tap = 0; tap < kTaps; ++tap, g += rows * columns)
        transpose(filters + first * pitch + tap * depth_ + row, columns, rows, pitch, columns, g);
    });
  }

  int64_t weight_bytes() const {
    return kProducts * depth_ * n_ * static_cast<int64_t>(sizeof(float));
  }

  // Lines of tiles that are multiplied at once, of results so wide.
  int64_t lines_at_once(int64_t width) const { return std::max<int64_t>(at_once_ * 2 / width, 1); }

  // Of each of `images` sources [rows + 2, width + 2, depth], out [rows, width, n]; rows and width
  // are even.
  void multiply(int64_t images, int64_t rows, int64_t width, const float* const* sources,
                float* out, Ahead& ahead) const {
    const int64_t source_pitch = (width + 2) * depth_, tiles = width / 2, high = rows / 2;
    const int64_t lines = images * high;  // of tiles
    const int64_t most = std::min(lines_at_once(width), lines);
    const int64_t source_plane = plane_of(most * tiles * depth_);
    const int64_t product_plane = plane_of(most * tiles * n_);
    float* const transformed = buffer<float>(Buffer::kTransformed, kSide * source_plane);
    float* const products = buffer<float>(Buffer::kProducts, kProducts * product_plane);
    for (int64_t first = 0; first < lines; first += most) {
      const int64_t count = std::min(most, lines - first), m = count * tiles;
      for (int64_t i = 0; i < kSide; ++i) {
        for (int64_t line = 0; line < count; ++line) {
          const float* const source = sources[(first + line) / high];
          transform_source(i, source + (first + line) % high * 2 * source_pitch, source_pitch,
                           tiles, depth_,
                           {transformed + line * tiles * depth_, source_plane, depth_, 0, depth_});
        }
        for (int64_t j = 0; j < kSide; ++j)
          for (int64_t block = 0; block < weight_.blocks(); ++block) {
            const int64_t columns = weight_.columns(block), e = kSide * i + j;
            ahead.before(m * columns * depth_);
            tile_.multiply(m, columns, depth_, depth_, columns, n_, false,
                           transformed + j * source_plane, weight_.at(block, e * depth_),
                           products + e * product_plane + weight_.first(block));
          }
      }
      for (int64_t line = 0; line < count; ++line)
        transform_products(products + line * tiles * n_, product_plane, tiles, n_, width * n_,
                           out + (first + line) * 2 * width * n_);
    }
  }

 private:
  // piece(row, rows, first, columns, g) gives g [3, 3, rows, columns].
  template <typename F>
  void fill_pieces(const Runtime& runtime, const F& piece) const {
    parallel_for(runtime, ceil_div(depth_, kRows), [&](int64_t part) {
      float g[kTaps * kRows * kMostColumns];
      const int64_t row = part * kRows, rows = std::min(kRows, depth_ - row);
      for (int64_t block = 0; block < weight_.blocks(); ++block) {
        const int64_t columns = weight_.columns(block);
        piece(row, rows, weight_.first(block), columns, g);
        transform_weights(g, rows * columns, depth_ * columns, weight_.at(block, row));
      }
    });
  }

  static constexpr int64_t kRows = 16, kMostColumns = 64;  // of a piece of the weights
  const Tile<float> tile_;
  const int64_t depth_, n_, at_once_;
  const Packed<float> weight_;  // [16, depth] by n
};

}  // namespace preact
