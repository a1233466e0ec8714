// dW = sum over pixels of dy h^T of a 1x1 convolution whose dW fills the cache, with
// h = act(scale * (u - mean) + shift) computed again, a group of bands of pixels at a time.
//
// The bands of a group leave their operands side by side, laid out for the tile. Then each block of
// dW is read, added to and written once for all of them: there is one dW, by whichever thread, and
// no partial sums.
#pragma once

#include "conv.h"

namespace preact {

template <typename S, typename O>
class WideWeightGradient {
  using A = Accumulator<S>;
  static constexpr int64_t kFilters = 64, kChannels = 128;  // of a block of dW
  // Of dy's rows: an odd number of cache lines sets them apart in the cache.
  static constexpr int64_t kPitch = kFilters + kLineBytes / static_cast<int64_t>(sizeof(O));

 public:
  // op's shape is flattened.
  explicit WideWeightGradient(const PreactConvWgrad& op)
      : op_(op),
        bands_(gradient_bands<O>(op.shape)),
        pixels_(bands_.parts.parts * bands_.rows_per_band),
        dy_(buffer<O>(Buffer::kLeft, down_ * pixels_ * kPitch)),
        h_{buffer<O>(Buffer::kRight, pixels_ * c_), pixels_, c_, tile_.columns} {}

  // Values of dy of a band.
  int64_t grad_size() const { return bands_.rows_per_band * k_; }

  // dy of a band, [rows, K], where it lies or in `loaded`.
  const O* load_grad(const OutputGradient<S>& grad, int64_t band, O* loaded) const {
    return grad.rows(bands_.first_row(band), rows(band), loaded);
  }

  // Writes dW. Calls load_band(part, band, place) for each band, in order for those of a part; it
  // has to call load().
  template <typename F>
  void run(const Runtime& runtime, const F& load_band) const {
    const Parts& parts = bands_.parts;
    // A group has one band of each part, as long as there are any.
    for (int64_t group = 0; group < ceil_div(parts.count, parts.parts); ++group) {
      std::vector<int64_t> with_band;
      for (int64_t part = 0; part < parts.parts; ++part)
        if (parts.begin(part) + group < parts.end(part)) with_band.push_back(part);
      const int64_t count = static_cast<int64_t>(with_band.size());
      parallel_for(runtime, count, [&](int64_t place) {
        const int64_t part = with_band[place];
        load_band(part, parts.begin(part) + group, place);
      });
      const int64_t last = parts.begin(with_band.back()) + group;
      const int64_t pixels = (count - 1) * bands_.rows_per_band + rows(last);
      parallel_for(runtime, down_ * across_, [&](int64_t block) {
        multiply(block % down_, block / down_, pixels, group > 0);
      });
    }
  }

  // The operands of a band, of its dy [rows, K].
  void load(int64_t band, int64_t place, const O* dy) const {
    const int64_t pixel = place * bands_.rows_per_band, count = rows(band);
    for (int64_t block = 0; block < down_; ++block) {
      O* const out = dy_block(block) + pixel * kPitch;
      for (int64_t i = 0; i < count; ++i)
        std::copy_n(dy + i * k_ + block * kFilters, filters(block), out + i * kPitch);
    }
    O* const h = buffer<O>(Buffer::kSource, bands_.rows_per_band * c_);
    activate_rows(static_cast<const S*>(op_.input) + bands_.first_row(band) * c_, count, c_,
                  static_cast<const A*>(op_.affine), op_.activation, h);
    for (int64_t block = 0; block < h_.blocks(); ++block) {
      const int64_t n = h_.columns(block);
      O* const out = h_.at(block, pixel);
      for (int64_t i = 0; i < count; ++i) std::copy_n(h + i * c_ + h_.first(block), n, out + i * n);
    }
  }

 private:
  const PreactConvWgrad& op_;
  const int64_t c_ = op_.shape.input.channels, k_ = op_.shape.output.channels;
  const int64_t down_ = ceil_div(k_, kFilters), across_ = ceil_div(c_, kChannels);  // blocks of dW
  const Bands bands_;
  const int64_t pixels_;  // of a group, at most
  const Tile<O, A> tile_ = transposed_tile<O>();
  O* const dy_;        // [K / kFilters][pixels, kPitch]
  const Packed<O> h_;  // [pixels, C]

  int64_t rows(int64_t band) const { return bands_.end_row(band) - bands_.first_row(band); }
  int64_t filters(int64_t block) const { return std::min(kFilters, k_ - block * kFilters); }
  O* dy_block(int64_t block) const { return dy_ + block * pixels_ * kPitch; }

  void multiply(int64_t down, int64_t across, int64_t pixels, bool accumulate) const {
    A* const out = static_cast<A*>(op_.dweight) + down * kFilters * c_;
    const int64_t of_block = kChannels / tile_.columns;
    const int64_t end = std::min(h_.blocks(), (across + 1) * of_block);
    for (int64_t block = across * of_block; block < end; ++block)
      tile_.multiply(filters(down), h_.columns(block), pixels, kPitch, h_.columns(block), c_,
                     accumulate, dy_block(down), h_.at(block, 0), out + h_.first(block));
  }
};

}  // namespace preact
