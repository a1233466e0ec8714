// What the convolution kernels share: the split into bands, the activated window that a band reads,
// weights packed for the matrix tile, the gradient that comes in.
#pragma once

#include "ahead.h"
#include "rows.h"

namespace preact {

constexpr int64_t kTileBytes = 64 * 1024;  // of accumulators that stay in cache for the epilogue
constexpr int64_t kTilePixels = 64;        // of a tile, at least
constexpr int64_t kFewestBands = 32;       // so that every thread gets some, where the work allows
constexpr int64_t kFewestPixels = 32;      // of a band
constexpr int64_t kCallCost = 16 * 1024;   // of a tile call, in multiplications
constexpr int64_t kFewestParts = 8;        // of dW; one where it is split by products
constexpr int64_t kMostDweights = 32;      // their number, at most
constexpr int64_t kWideParts = 16;         // of the pixels where all have one dW

// Rows of a tile of results, of a band's: few enough to stay in cache, with pixels enough to read
// weights for, and the last tile as high as the others if may be.
inline int64_t rows_of_tile(int64_t row_pixels, int64_t pixel_bytes, int64_t band) {
  const int64_t pixels = std::max(kTileBytes / pixel_bytes, kTilePixels);
  const int64_t most = std::clamp<int64_t>(pixels / row_pixels, 1, band);
  return ceil_div(band, ceil_div(band, most));
}

// What a tile call for so many columns costs, in multiplications: of our own less, unless it copies
// a right operand that has not as many columns as it likes.
template <typename O, typename A>
int64_t call_cost(const Tile<O, A>& tile, int64_t columns) {
  const bool as_it_likes = columns % tile.columns == 0 || tile.columns % columns == 0;
  return tile.copies && as_it_likes ? kCallCost / 4 : kCallCost;
}

// Whether all rows of a band are one matrix product: with stride 1 the window of one row runs into
// that of the next, at the price of columns between them that are computed and thrown away.
inline bool rows_join(int64_t window_width, int64_t width, int64_t multiplications, int64_t call) {
  return (window_width - width) * multiplications <= call;
}

struct Span {
  int64_t begin, end;
};

// Which of so many results read a value that there is: result i reads value first + step * i of
// `width`, zeros outside. The same of columns and of rows.
inline Span reads_inside(int64_t first, int64_t step, int64_t width, int64_t results) {
  const int64_t begin = std::clamp<int64_t>(ceil_div(-first, step), 0, results);
  return {begin, std::clamp(ceil_div(width - first, step), begin, results)};
}

// Taps of a row of the kernel that are multiplied together, as what they read lies side by side,
// and the results [begin, end) of a row that they are multiplied for.
struct TapRun {
  int64_t first, taps, begin, end;
};

// Those of a row: tap t reads value first + t + step * i for result i, as in reads_inside.
// All taps for all results, or each for those that it reads no zeros for, if that saves more than
// the calls cost that come in addition; a tap takes so many multiplications a result.
inline std::vector<TapRun> tap_runs(int64_t taps, int64_t results, int64_t first, int64_t step,
                                    int64_t width, int64_t multiplications, int64_t call) {
  std::vector<TapRun> runs;
  int64_t saved = 0;
  for (int64_t t = 0; t < taps; ++t) {
    const auto [begin, end] = reads_inside(first + t, step, width, results);
    if (begin < end) runs.push_back({t, 1, begin, end});
    saved += results - (end - begin);
  }
  if (saved * multiplications <= std::max<int64_t>(taps - 1, 0) * call)
    return {{0, taps, 0, results}};
  return runs;
}

// Whether one product writes all results of a row.
inline bool is_one_product(const std::vector<TapRun>& runs, int64_t results) {
  return runs.size() == 1 && runs[0].begin == 0 && runs[0].end == results;
}

// A 1x1 convolution that moves no pixel.
inline bool is_pointwise(const ConvShape& shape) {
  return shape.kernel_height == 1 && shape.kernel_width == 1 && shape.stride_height == 1 &&
         shape.stride_width == 1 && shape.input.height == shape.output.height &&
         shape.input.width == shape.output.width && shape.pad_top == 0 && shape.pad_left == 0;
}
// It works on [pixels, C], whatever the images.
inline ConvShape flattened(ConvShape shape) {
  if (is_pointwise(shape)) {
    shape.input = {1, shape.input.pixels(), 1, shape.input.channels};
    shape.output = {1, shape.output.pixels(), 1, shape.output.channels};
  }
  return shape;
}

// Whether each input pixel has an output pixel of its own, so that dgrad and wgrad read the same
// rows of both.
inline bool keeps_size(const ConvShape& shape) {
  return shape.stride_height == 1 && shape.stride_width == 1 &&
         shape.input.height == shape.output.height && shape.input.width == shape.output.width;
}

// Whether winograd.h computes the results, or the gradient of all taps, of so many pixels: where
// its tiles, of 16 multiplications for up to four pixels, save enough of nine a pixel.
template <typename O>
bool winograd_pays(const ConvShape& shape, const ImageShape& results) {
  constexpr int64_t kFewestChannels = 16;
  const int64_t tiles = ceil_div(results.height, 2) * ceil_div(results.width, 2);
  return std::is_same_v<O, float> && shape.kernel_height == 3 && shape.kernel_width == 3 &&
         shape.stride_height == 1 && shape.stride_width == 1 &&
         std::min(shape.input.channels, shape.output.channels) >= kFewestChannels &&
         3 * 16 * tiles <= 2 * 9 * results.height * results.width;
}

// Whether its 16 matrices of weights are more than caches hold, so that dW has few partial sums,
// and is not computed with the other gradient.
inline bool winograd_is_large(int64_t channels, int64_t filters) {
  return channels * filters >= 256 * 256;
}

// Tiles that are transformed and multiplied at once: few, which stay in cache, as long as a product
// is worth its call and the weights stay there too; else many, which read those less often.
inline int64_t tiles_at_once(int64_t channels, int64_t filters) {
  constexpr int64_t kFewest = 32, kMost = 128;
  if (winograd_is_large(channels, filters)) return kMost;
  return std::clamp(2 * kCallCost / (channels * filters), kFewest, kMost);
}

// Most rows of a band of so many results: as many as stay in cache, and of large ones no fewer than
// are multiplied at once.
inline int64_t winograd_rows(const ConvShape& shape, const ImageShape& results, int64_t cached) {
  const int64_t c = shape.input.channels, k = shape.output.channels;
  if (!winograd_is_large(c, k)) return cached;
  return std::max(cached, 2 * ceil_div(tiles_at_once(c, k), ceil_div(results.width, 2)));
}

// Whether dW is more than caches hold, so that all parts of the work share one; Winograd's is split
// by other rules.
template <typename O>
bool dweight_is_wide(const ConvShape& shape) {
  // bytes: all of an L2, or half of it for products that take half the time
  constexpr int64_t kWide = (kPairs<O> ? 256 : 512) * 1024;
  const int64_t taps = shape.kernel_height * shape.kernel_width;
  const int64_t size = taps * shape.input.channels * shape.output.channels;
  return !winograd_pays<O>(shape, shape.output) &&
         size * static_cast<int64_t>(sizeof(Accumulator<O>)) >= kWide;
}

// Whether the gradients of input and weights go over the same bands: not where dW is large, unless
// bands share no pixel.
template <typename O>
bool share_bands(const ConvShape& shape) {
  if (!keeps_size(shape)) return false;
  if (winograd_pays<O>(shape, shape.output))
    return !winograd_is_large(shape.input.channels, shape.output.channels);
  return is_pointwise(shape) || !dweight_is_wide<O>(shape);
}

// What multiplies dy by h over pixels: the tile for pairs wants its left operand transposed in
// memory, ours reads it as it lies.
template <typename O>
auto wgrad_tile(const Runtime& runtime, O) {
  if constexpr (kPairs<O>)
    return runtime.pairs_tile;
  else
    return transposed_tile<O>();
}

// Rows of each image in bands of at most `most` rows; the split depends on the shape alone. Each
// band reads `weight_bytes`: where they do not fit the cache, bands are as large as they may be.
// All but the last of an image have a multiple of `step` rows.
struct Bands {
  int64_t rows, rows_per_band, per_image;
  Parts parts;

  Bands(const ImageShape& image, int64_t most, int64_t most_parts, int64_t weight_bytes,
        int64_t step)
      : rows(image.height),
        rows_per_band(round_up(ceil_div(rows, bands_wanted(image, most, weight_bytes)), step)),
        per_image(ceil_div(rows, rows_per_band)),
        parts(image.images * per_image, most_parts) {}

  int64_t image(int64_t band) const { return band / per_image; }
  int64_t first_row(int64_t band) const { return band % per_image * rows_per_band; }
  int64_t end_row(int64_t band) const { return std::min(rows, first_row(band) + rows_per_band); }

 private:
  static int64_t bands_wanted(const ImageShape& image, int64_t most, int64_t weight_bytes) {
    const int64_t fewest = ceil_div(image.height, std::clamp<int64_t>(most, 1, image.height));
    if (weight_bytes > kCacheBytes) return fewest;
    const int64_t to_share = ceil_div(kFewestBands, image.images);
    const int64_t sensible = std::max<int64_t>(image.height * image.width / kFewestPixels, 1);
    return std::clamp(std::min(to_share, sensible), fewest, image.height);
  }
};

// The pixels of h = act(bn(u)) that some output rows read, zero-padded: [rows, width, C]. Where the
// kernel has one row (or column), only the rows (columns) that the stride reaches are there.
struct Window {
  int64_t gather_height, gather_width;  // input pixels from one row, column to the next
  int64_t step_height, step_width;      // rows, columns from one output pixel to the next
  int64_t width;

  explicit Window(const ConvShape& shape)
      : gather_height(shape.kernel_height == 1 ? shape.stride_height : 1),
        gather_width(shape.kernel_width == 1 ? shape.stride_width : 1),
        step_height(shape.kernel_height == 1 ? 1 : shape.stride_height),
        step_width(shape.kernel_width == 1 ? 1 : shape.stride_width),
        width((shape.output.width - 1) * step_width + shape.kernel_width) {}

  int64_t rows(const ConvShape& shape, int64_t output_rows) const {
    return (output_rows - 1) * step_height + shape.kernel_height;
  }

  // Lets ahead want u of output rows [first, first + output_rows) of an image; input [N, H, W, C].
  template <typename S>
  void want(const ConvShape& shape, const S* input, int64_t image, int64_t first,
            int64_t output_rows, Ahead& ahead) const {
    const int64_t row = shape.input.width * shape.input.channels;
    const int64_t image_row = image * shape.input.height;
    const int64_t top = first * step_height * gather_height - shape.pad_top;
    const int64_t end = top + rows(shape, output_rows) * gather_height;
    const int64_t begin = std::max<int64_t>(top, 0);
    ahead.want<S>(input, (image_row + begin) * row,
                  (std::min(end, shape.input.height) - begin) * row);
  }

  // Fills h for output rows [first, first + output_rows) of an image; input [N, H, W, C].
  template <typename S, typename A, typename O>
  void fill(const ConvShape& shape, const S* input, int64_t image, int64_t first,
            int64_t output_rows, const A* affine, Activation activation, O* h) const {
    const int64_t height = shape.input.height, channels = shape.input.channels;
    const int64_t image_row = image * height;
    const int64_t columns = shape.input.width, count = rows(shape, output_rows);
    const int64_t top = first * step_height * gather_height - shape.pad_top;
    const bool dense = gather_height == 1 && gather_width == 1 && shape.pad_left == 0 &&
                       width == columns && top >= 0 && top + count <= height;
    if (dense) {
      activate_rows(input + (image_row + top) * columns * channels, count * columns, channels,
                    affine, activation, h);
      return;
    }
    // columns of the window that lie inside the image
    const auto [begin, end] = reads_inside(-shape.pad_left, gather_width, columns, width);
    for (int64_t i = 0; i < count; ++i, h += width * channels) {
      const int64_t y = top + i * gather_height;
      if (y < 0 || y >= height || begin == end) {
        std::fill_n(h, width * channels, O{});
        continue;
      }
      std::fill_n(h, begin * channels, O{});
      std::fill_n(h + end * channels, (width - end) * channels, O{});
      const int64_t pixel = (image_row + y) * columns + begin * gather_width - shape.pad_left;
      const S* const u = input + pixel * channels;
      if (gather_width == 1) {
        activate_rows(u, end - begin, channels, affine, activation, h + begin * channels);
      } else {
        for (int64_t j = begin; j < end; ++j)
          activate_rows(u + (j - begin) * gather_width * channels, 1, channels, affine, activation,
                        h + j * channels);
      }
    }
  }
};

// Columns of dy as wgrad multiplies it: as wide as h's window, or where its rows are products of
// their own, as wide as it is.
template <typename O>
int64_t grad_pitch(const ConvShape& shape, const Window& window) {
  return window.step_height == 1 ? ceil_div(window.width, window.step_width)
                                 : round_depth<O>(shape.output.width);
}

// The bands of output rows that wgrad works on, and dgrad too where they share them: each gradient
// then has the same bits alone as with the other.
template <typename O>
Bands gradient_bands(const ConvShape& shape) {
  const Window window(shape);
  const int64_t c = shape.input.channels, k = shape.output.channels;
  const bool winograd = winograd_pays<O>(shape, shape.output);
  const int64_t taps = winograd ? 16 : shape.kernel_height * shape.kernel_width;
  const int64_t size = taps * k * c;
  const int64_t fewest = winograd && winograd_is_large(c, k) ? 1 : kFewestParts;
  const int64_t row =
      std::max(window.width * c * window.step_height, grad_pitch<O>(shape, window) * k);
  // so many parts that all their dW are no more than the operands
  const int64_t values = shape.input.pixels() * c + shape.output.pixels() * k;
  const int64_t most_parts =
      dweight_is_wide<O>(shape) ? kWideParts : std::clamp(values / size, fewest, kMostDweights);
  const int64_t bytes = static_cast<int64_t>(sizeof(O));
  const int64_t cached = kCacheBytes / (row * bytes);
  return {shape.output, winograd ? winograd_rows(shape, shape.output, cached) : cached, most_parts,
          share_bands<O>(shape) ? size * bytes : 0, winograd ? 2 : 1};
}

// A weight matrix [k, n] in blocks of columns as the tile likes them: [n / block][k][block], or
// [n / block][k / 2][block][2] where it takes pairs of rows.
template <typename O>
struct Packed {
  O* data;
  int64_t k, n, block_columns;

  int64_t blocks() const { return ceil_div(n, block_columns); }
  int64_t first(int64_t block) const { return block * block_columns; }
  int64_t columns(int64_t block) const { return std::min(block_columns, n - first(block)); }
  O* at(int64_t block, int64_t row) const { return data + first(block) * k + row * columns(block); }

  // Value j of row i is row_of(i)[j * stride]; rows in parallel. Those that lie in memory as they
  // are go one by one, from end to end; else rows of a block may share cache lines.
  template <typename F>
  void fill(const Runtime& runtime, int64_t stride, const F& row_of) const {
    const Parts parts(k / kRows, kMostParts);
    parallel_for(runtime, parts.parts, [&](int64_t part) {
      const int64_t begin = parts.begin(part) * kRows, end = parts.end(part) * kRows;
      if (stride == 1) return copy_rows(begin, end, row_of);
      for (int64_t block = 0; block < blocks(); ++block)
        for (int64_t i = begin; i < end; i += kRows) gather(block, i, stride, row_of);
    });
  }

  // Rows [begin, end) of `stride` 1. For pairs both are even.
  template <typename F>
  void copy_rows(int64_t begin, int64_t end, const F& row_of) const {
    for (int64_t i = begin; i < end; i += kRows) {
      const auto* const row = row_of(i);
      const int64_t pitch = kPairs<O> ? row_of(i + 1) - row : 0;
      for (int64_t block = 0; block < blocks(); ++block) {
        const auto* const in = row + first(block);
        O* const out = at(block, i);
        if constexpr (kPairs<O>)
          pair_rows(in, 2, columns(block), pitch, out);
        else
          for (int64_t j = 0; j < columns(block); ++j) narrow(widen(in[j]), out[j]);
      }
    }
  }

  // From the matrix's transpose [n, k], whose rows are `pitch` apart.
  void fill_transposed(const Runtime& runtime, const O* transposed, int64_t pitch) const {
    using Unit = std::conditional_t<kPairs<O>, Pair, O>;  // what moves as one
    // As many columns as a processor foresees reads of, long runs of each, and whole lines written.
    constexpr int64_t kTogether = 16, kRun = 512;
    const int64_t units = k / kRows, runs = ceil_div(units, kRun);
    const int64_t groups = ceil_div(std::min(block_columns, n), kTogether);  // of a block
    parallel_for(runtime, blocks() * groups * runs, [&](int64_t index) {
      const int64_t block = index / runs / groups, begin = index % runs * kRun;
      const int64_t column = index / runs % groups * kTogether;
      const int64_t count = std::min(kTogether, columns(block) - column);
      if (count <= 0) return;
      transpose(reinterpret_cast<const Unit*>(transposed + (first(block) + column) * pitch) + begin,
                count, std::min(kRun, units - begin), pitch / kRows, columns(block),
                reinterpret_cast<Unit*>(at(block, begin * kRows)) + column);
    });
  }

 private:
  static constexpr int64_t kRows = kPairs<O> ? 2 : 1;  // that lie together

  template <typename F>
  void gather(int64_t block, int64_t i, int64_t stride, const F& row_of) const {
    const int64_t begin = first(block);
    const auto* const row = row_of(i);
    O* const out = at(block, i);
    if constexpr (kPairs<O>) {
      const auto* const next = row_of(i + 1);
      for (int64_t j = 0; j < columns(block); ++j)
        reinterpret_cast<Pair*>(out)[j] = {row[(begin + j) * stride], next[(begin + j) * stride]};
    } else {
      for (int64_t j = 0; j < columns(block); ++j) narrow(widen(row[(begin + j) * stride]), out[j]);
    }
  }
};

// dy of a convolution's output; where BatchNorm's backward pass is deferred, its end.
template <typename S>
class OutputGradient {
 public:
  OutputGradient(const OutputGrad& grad, const ImageShape& shape)
      : channels_(shape.channels),
        g_(static_cast<const S*>(grad.grad)),
        residual_(static_cast<const S*>(grad.residual)),
        dy_(static_cast<S*>(grad.dy)) {
    if (!grad.output) return;
    output_ = static_cast<const S*>(grad.output);
    coefficients_.resize(4 * channels_);
    grad_coefficients(static_cast<const A*>(grad.affine), static_cast<const A*>(grad.sums),
                      channels_, shape.pixels(), coefficients_.data());
  }

  // Pixels [first, first + count) as they are multiplied, where they lie or in `loaded`. Those of a
  // residual sum are written, and have to be asked for once each.
  template <typename O>
  const O* rows(int64_t first, int64_t count, O* loaded) const {
    const int64_t offset = first * channels_;
    if (dy_)
      residual_grad_rows(residual_ ? residual_ + offset : nullptr, g_ + offset, output_ + offset,
                         count, channels_, coefficients_.data(), dy_ + offset);
    // Of a residual sum dy is there by now, a gradient like any other.
    const S* const g = (dy_ ? dy_ : g_) + offset;
    const S* const output = dy_ || !output_ ? nullptr : output_ + offset;
    if constexpr (std::is_same_v<S, O>)
      if (!output) return g;
    output_grad_rows(g, output, count, channels_, coefficients_.data(), loaded);
    return loaded;
  }

  // Lets ahead want what pixels [first, first + count) are made of.
  void want(int64_t first, int64_t count, Ahead& ahead) const {
    for (const S* tensor : {g_, output_, residual_})
      ahead.want<S>(tensor, first * channels_, count * channels_);
  }

  // The same, not of a residual sum, into `loaded`.
  template <typename O>
  void load(int64_t first, int64_t count, O* loaded) const {
    const int64_t offset = first * channels_;
    output_grad_rows(g_ + offset, output_ ? output_ + offset : nullptr, count, channels_,
                     coefficients_.data(), loaded);
  }

 private:
  using A = Accumulator<S>;
  int64_t channels_;
  const S *g_, *output_ = nullptr, *residual_;
  S* dy_;
  std::vector<A> coefficients_;
};

template <typename S>
const S* weight_at(const Weight& w, int64_t k, int64_t c, int64_t r, int64_t s) {
  return static_cast<const S*>(w.data) + k * w.stride_k + c * w.stride_c + r * w.stride_r +
         s * w.stride_s;
}

// Whether each filter lies in memory as [R, S, C], as in channels_last weights, an even number of
// values from one to the next, so that pairs of them can be moved.
inline bool filters_are_rows(const Weight& w, const ConvShape& shape) {
  const int64_t c = shape.input.channels, s = shape.kernel_width;
  return w.stride_c == 1 && (s == 1 || w.stride_s == c) &&
         (shape.kernel_height == 1 || w.stride_r == s * c) && w.stride_k % 2 == 0;
}

}  // namespace preact
