// dW of 3x3 convolutions of stride 1 in fewer multiplications (winograd.h), a group of bands of
// output rows at a time: what weight_gradient.h is for the others.
//
// Each part of the work sums 16 matrix products over its tiles, of A dY A^T, transposed as the tile
// reads it, by B^T h B; the parts are added in order, and become dW in the end. Where dW is large
// there is one part, unless pixels are many, in pieces: some of the products, some filters.
#pragma once

#include "winograd.h"

namespace preact {

template <typename S>
class WinogradWeightGradient {
  static constexpr int64_t kFilters = 16;  // of dW at a time
  const PreactConvWgrad& op_;
  const Window window_;

 public:
  static constexpr int64_t kMostTogether = 16;
  // Of a group of bands, [rows, window's width, channels] each.
  struct Operands {
    const float *h[kMostTogether], *dy[kMostTogether];
  };
  const Bands bands;
  // Of a part, by rows of transformed tiles and, where threads are many, by filters. Each loads the
  // operands for itself.
  const int64_t pieces;

  WinogradWeightGradient(const Runtime& runtime, const PreactConvWgrad& op)
      : op_(op),
        window_(in_whole_tiles(op.shape)),
        bands(gradient_bands<float>(op.shape)),
        pieces(share_bands<float>(op.shape) ? 1 : kSide * filter_parts(runtime)),
        partial_(buffer<float>(Buffer::kPartial, bands.parts.parts * size_)) {}

  // Values of dy of a band.
  int64_t grad_size() const { return bands.rows_per_band * window_.width * k_; }

  // How many bands are multiplied together: enough for one product over tiles.
  int64_t together(int64_t /*grad_size*/) const {
    return std::clamp<int64_t>(2 * at_once_ / bands.rows_per_band, 1, kMostTogether);
  }

  // dy of a band, [rows, window's width, K], as many rows as fill its tiles.
  const float* load_grad(const OutputGradient<S>& grad, int64_t band, float* loaded) const {
    const int64_t q = op_.shape.output.width, end = bands.end_row(band);
    const int64_t pixel = bands.image(band) * op_.shape.output.height * q;
    float* out = loaded;
    for (int64_t row = bands.first_row(band); row < end; ++row, out += window_.width * k_) {
      grad.load(pixel + row * q, q, out);
      std::fill_n(out + q * k_, (window_.width - q) * k_, 0.0f);
    }
    if (end % 2 == 1) std::fill_n(out, window_.width * k_, 0.0f);
    return loaded;
  }

  // Makes the operands of the i-th band of `together`; dy has to stay for multiply().
  void load(int64_t i, int64_t together, int64_t band, const float* dy, Operands& operands) const {
    const int64_t first = bands.first_row(band);
    const int64_t values = window_.rows(op_.shape, bands.rows_per_band) * window_.width * c_;
    float* const h = buffer<float>(Buffer::kSource, together * values) + i * values;
    window_.fill(op_.shape, static_cast<const S*>(op_.input), bands.image(band), first,
                 round_up(bands.end_row(band) - first, 2), static_cast<const float*>(op_.affine),
                 op_.activation, h);
    operands.h[i] = h;
    operands.dy[i] = dy;
  }

  // Lets ahead want what the operands of a band are made of.
  void want(const OutputGradient<S>& grad, int64_t band, Ahead& ahead) const {
    const int64_t first = bands.first_row(band), rows = bands.end_row(band) - first;
    const int64_t row = bands.image(band) * op_.shape.output.height + first;
    grad.want(row * op_.shape.output.width, rows * op_.shape.output.width, ahead);
    window_.want(op_.shape, static_cast<const S*>(op_.input), bands.image(band), first, rows,
                 ahead);
  }

  // Adds to a piece of a part's products those of `count` bands from `first` on.
  void multiply(int64_t part, int64_t piece, int64_t first, int64_t count, int64_t /*together*/,
                const Operands& operands, Ahead& ahead) const {
    float* const sources = buffer<float>(Buffer::kTransformed, kSide * source_plane_);
    float* const grads = buffer<float>(Buffer::kProducts, kSide * grad_plane_);
    std::vector<Line> lines;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t row = bands.first_row(first + i); row < bands.end_row(first + i); row += 2) {
        const int64_t pixel = (row - bands.first_row(first + i)) * window_.width;
        lines.push_back({operands.h[i] + pixel * c_, operands.dy[i] + pixel * k_});
      }
    const int64_t rows = std::min(pieces, kSide);
    const Parts filters(k_, pieces / rows);
    const int64_t own = piece % filters.parts, row = piece / filters.parts;
    const int64_t begin = row * kSide / rows, end = (row + 1) * kSide / rows;
    const int64_t all = static_cast<int64_t>(lines.size());
    // Two sums, half as long, have smaller rounding errors than one.
    const int64_t most = std::min(at_once_, ceil_div(all, 2));
    for (int64_t line = 0; line < all; line += most) {
      const int64_t high = std::min(most, all - line);
      const bool accumulate = line > 0 || first > bands.parts.begin(part);
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t l = 0; l < high; ++l) {
          transform_source(i, lines[line + l].h, window_.width * c_, tiles_, c_,
                           {sources + l * tiles_ * columns_, source_plane_, columns_,
                            at_once_ * tiles_ * columns_, columns_});
          transform_grad(i, lines[line + l].dy, window_.width * k_, tiles_, k_,
                         {grads + l * tiles_ * k_, grad_plane_, k_, 0, k_});
        }
        for (int64_t j = 0; j < kSide; ++j)
          add_product(high * tiles_, filters.begin(own), filters.end(own), accumulate,
                      sources + j * source_plane_, grads + j * grad_plane_,
                      partial_ + part * size_ + (kSide * i + j) * k_ * c_, ahead);
      }
    }
  }

  // Writes dW, once all bands are in.
  void finish(const Runtime& runtime) const {
    parallel_for(runtime, ceil_div(k_, kFilters), [&](int64_t block) {
      const int64_t first = block * kFilters, filters = std::min(kFilters, k_ - first);
      for (int64_t e = 0; e < kProducts; ++e) {
        float* const sum = partial_ + (e * k_ + first) * c_;
        for (int64_t j = 1; j < bands.parts.parts; ++j)
          sum_rows(sum + j * size_, 1, filters * c_, sum);
      }
      for (int64_t k = first; k < first + filters; ++k)
        transform_dweights(partial_ + k * c_, c_, k_ * c_, c_,
                           static_cast<float*>(op_.dweight) + k * kTaps * c_);
    });
  }

 private:
  const int64_t c_ = op_.shape.input.channels, k_ = op_.shape.output.channels;
  const int64_t size_ = kProducts * k_ * c_;
  const int64_t tiles_ = (window_.width - 2) / 2;  // of a line
  // Lines that are multiplied at once: a product is added to the sums of all pairs of channels.
  const int64_t at_once_ = ceil_div(2 * tiles_at_once(c_, k_), tiles_);
  const Tile<float> tile_ = transposed_tile<float>();
  const int64_t columns_ = tile_.columns;  // of a block of channels of h
  const int64_t source_plane_ = plane_of(round_up(c_, columns_) * at_once_ * tiles_);
  const int64_t grad_plane_ = plane_of(k_ * at_once_ * tiles_);
  float* const partial_;  // [parts][16, K, C]

  struct Line {
    const float *h, *dy;
  };

  int64_t filter_parts(const Runtime& runtime) const {
    const int64_t wanted = ceil_div(runtime.threads, kSide * bands.parts.parts);
    return std::min(wanted, op_.shape.output.channels);
  }

  // sum [K, C] += grads [tiles, K]^T sources [tiles, C] for filters [begin, end)
  void add_product(int64_t tiles, int64_t begin, int64_t end, bool accumulate, const float* sources,
                   const float* grads, float* sum, Ahead& ahead) const {
    for (int64_t first = 0; first < c_; first += columns_) {
      const int64_t n = std::min(columns_, c_ - first);
      ahead.before((end - begin) * n * tiles);
      tile_.multiply(end - begin, n, tiles, k_, columns_, c_, accumulate, grads + begin,
                     sources + first * at_once_ * tiles_, sum + begin * c_ + first);
    }
  }
};

}  // namespace preact
