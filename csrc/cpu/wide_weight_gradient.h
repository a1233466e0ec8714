// dW = sum over pixels of dy h^T where dW fills the cache, with h = act(scale * (u - mean) + shift)
// computed again, a group of bands of output rows at a time.
//
// The bands of a group leave their operands side by side, laid out for the tile, h once for each
// tap. Then each block of dW is read, added to and written once for all of them: there is one dW,
// by whichever thread, and no partial sums.
#pragma once

#include "conv.h"

namespace preact {

template <typename S, typename O>
class WideWeightGradient {
  using A = Accumulator<S>;
  static constexpr int64_t kFilters = 64, kChannels = 128;  // of a block of dW
  static constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(O));

 public:
  // Where the operands of a band lie in its group's: those of its pixels, then zeros.
  struct Pixels {
    int64_t begin, end;
  };

  // op's shape is flattened.
  WideWeightGradient(const Runtime& runtime, const PreactConvWgrad& op)
      : op_(op),
        window_(op.shape),
        bands_(gradient_bands<O>(op.shape)),
        step_depth_(kPairs<O> ? runtime.pairs_depth : 1),
        pixels_(
            round_up(bands_.parts.parts * round_depth<O>(bands_.rows_per_band * q_), step_depth_)),
        tile_(wgrad_tile(runtime, O{})),
        dy_(buffer<O>(Buffer::kLeft, kPairs<O> ? k_ * pitch_ : down_ * pixels_ * pitch_)),
        h_(buffer<O>(Buffer::kRight, taps_ * pixels_ * c_)) {}

  // Values of dy of a band.
  int64_t grad_size() const { return bands_.rows_per_band * q_ * k_; }

  // dy of a band, [rows, Q, K], where it lies or in `loaded`.
  const O* load_grad(const OutputGradient<S>& grad, int64_t band, O* loaded) const {
    const int64_t row = bands_.image(band) * op_.shape.output.height + bands_.first_row(band);
    return grad.rows(row * q_, pixels(band), loaded);
  }

  // Writes dW. Calls load_band(part, band, place) for all bands, in order for those of a part,
  // which has to call load(band, place, dy).
  template <typename F>
  void run(const Runtime& runtime, const F& load_band) const {
    struct Load {
      int64_t part, band;
      Pixels place;
    };
    const Parts& parts = bands_.parts;
    // A group has one band of each part, as long as there are any.
    for (int64_t group = 0; group < ceil_div(parts.count, parts.parts); ++group) {
      std::vector<Load> loads;
      int64_t end = 0;
      for (int64_t part = 0; part < parts.parts; ++part) {
        const int64_t band = parts.begin(part) + group, begin = end;
        if (band >= parts.end(part)) continue;
        end += round_depth<O>(pixels(band));
        loads.push_back({part, band, {begin, end}});
      }
      end = loads.back().place.end = round_up(end, step_depth_);
      parallel_for(runtime, static_cast<int64_t>(loads.size()),
                   [&](int64_t i) { load_band(loads[i].part, loads[i].band, loads[i].place); });
      parallel_for(runtime, taps_ * down_ * across_, [&](int64_t block) {
        multiply(block / (down_ * across_), block / across_ % down_, block % across_, end,
                 group > 0);
      });
    }
  }

  // Makes a band's operands of its dy [rows, Q, K].
  void load(int64_t band, Pixels place, const O* dy) const {
    load_left(dy, pixels(band), place);
    const int64_t rows = bands_.end_row(band) - bands_.first_row(band);
    const int64_t most_rows = window_.rows(op_.shape, bands_.rows_per_band);
    O* const window = buffer<O>(Buffer::kSource, most_rows * window_.width * c_);
    const ImageShape& input = op_.shape.input;
    window_.fill(
        op_.shape,
        static_cast<const S*>(op_.input) + bands_.image(band) * input.height * input.width * c_,
        bands_.first_row(band), rows, static_cast<const A*>(op_.affine), op_.activation, window);
    // of each pixel, what its first tap reads
    std::vector<const O*> sources;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < q_; ++column)
        sources.push_back(
            window +
            (row * window_.step_height * window_.width + column * window_.step_width) * c_);
    for (int64_t tap = 0; tap < taps_; ++tap) load_right(tap, sources, place);
  }

 private:
  const PreactConvWgrad& op_;
  const int64_t c_ = op_.shape.input.channels, k_ = op_.shape.output.channels;
  const int64_t q_ = op_.shape.output.width;
  const int64_t taps_ = op_.shape.kernel_height * op_.shape.kernel_width;
  const int64_t down_ = ceil_div(k_, kFilters), across_ = ceil_div(c_, kChannels);  // blocks of dW
  const Window window_;
  const Bands bands_;
  const int64_t step_depth_;  // of the products
  const int64_t pixels_;      // of a group, at most
  const Tile<O, A> tile_;
  // Of dy's rows: an odd number of cache lines sets them apart in the cache.
  const int64_t pitch_ = (ceil_div(kPairs<O> ? pixels_ : kFilters, kLine) | 1) * kLine;
  O* const dy_;  // [K / kFilters][pixels, pitch], or transposed, [K, pitch], for pairs
  O* const h_;   // of each tap [pixels, C], Packed

  int64_t pixels(int64_t band) const {
    return (bands_.end_row(band) - bands_.first_row(band)) * q_;
  }
  int64_t filters(int64_t down) const { return std::min(kFilters, k_ - down * kFilters); }
  O* dy_block(int64_t down) const { return dy_ + down * (kPairs<O> ? kFilters : pixels_) * pitch_; }
  Packed<O> of_tap(int64_t tap) const {
    return {h_ + tap * pixels_ * c_, pixels_, c_, tile_.columns};
  }

  void load_left(const O* dy, int64_t count, Pixels place) const {
    if constexpr (kPairs<O>) {
      transpose(dy, count, k_, k_, pitch_, dy_ + place.begin);
      for (int64_t k = 0; k < k_; ++k)
        std::fill(dy_ + k * pitch_ + place.begin + count, dy_ + k * pitch_ + place.end, O{});
    } else {
      for (int64_t down = 0; down < down_; ++down) {
        O* const out = dy_block(down) + place.begin * pitch_;
        for (int64_t i = 0; i < count; ++i)
          std::copy_n(dy + i * k_ + down * kFilters, filters(down), out + i * pitch_);
      }
    }
  }

  // Of a tap, from what the first one reads.
  void load_right(int64_t tap, const std::vector<const O*>& sources, Pixels place) const {
    const int64_t r = tap / op_.shape.kernel_width, s = tap % op_.shape.kernel_width;
    const int64_t count = static_cast<int64_t>(sources.size());
    const Packed<O> h = of_tap(tap);
    for (int64_t block = 0; block < h.blocks(); ++block) {
      const int64_t n = h.columns(block);
      const int64_t shift = (r * window_.width + s) * c_ + h.first(block);
      O* const out = h.at(block, place.begin);
      if constexpr (kPairs<O>) {
        for (int64_t i = 0; i < count; i += 2) {
          const O* const first = sources[i] + shift;
          if (i + 1 < count)
            pair_rows(first, 2, n, sources[i + 1] - sources[i], out + i * n);
          else
            pair_rows(first, 1, n, n, out + i * n);
        }
        std::fill(out + round_depth<O>(count) * n, h.at(block, place.end), O{});
      } else {
        for (int64_t i = 0; i < count; ++i) std::copy_n(sources[i] + shift, n, out + i * n);
      }
    }
  }

  void multiply(int64_t tap, int64_t down, int64_t across, int64_t pixels, bool accumulate) const {
    const Packed<O> h = of_tap(tap);
    const int64_t pitch = taps_ * c_, of_block = kChannels / tile_.columns;
    A* const out = static_cast<A*>(op_.dweight) + down * kFilters * pitch + tap * c_;
    const int64_t end = std::min(h.blocks(), (across + 1) * of_block);
    for (int64_t block = across * of_block; block < end; ++block)
      tile_.multiply(filters(down), h.columns(block), pixels, pitch_, h.columns(block), pitch,
                     accumulate, dy_block(down), h.at(block, 0), out + h.first(block));
  }
};

}  // namespace preact
