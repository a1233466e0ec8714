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
  // Of dy's rows: an odd number of cache lines sets them apart in the cache.
  static constexpr int64_t kPitch = kFilters + kLineBytes / static_cast<int64_t>(sizeof(O));

 public:
  // op's shape is flattened.
  explicit WideWeightGradient(const PreactConvWgrad& op)
      : op_(op),
        window_(op.shape),
        bands_(gradient_bands<O>(op.shape)),
        pixels_(bands_.parts.parts * bands_.rows_per_band * q_),
        dy_(buffer<O>(Buffer::kLeft, down_ * pixels_ * kPitch)),
        h_(buffer<O>(Buffer::kRight, taps_ * pixels_ * c_)) {}

  // Values of dy of a band.
  int64_t grad_size() const { return bands_.rows_per_band * q_ * k_; }

  // dy of a band, [rows, Q, K], where it lies or in `loaded`.
  const O* load_grad(const OutputGradient<S>& grad, int64_t band, O* loaded) const {
    const int64_t row = bands_.image(band) * op_.shape.output.height + bands_.first_row(band);
    return grad.rows(row * q_, rows(band) * q_, loaded);
  }

  // Writes dW. Calls load_band(part, band, pixel) for all bands, in order for those of a part,
  // which has to call load(band, pixel, dy).
  template <typename F>
  void run(const Runtime& runtime, const F& load_band) const {
    struct Load {
      int64_t part, band, pixel;
    };
    const Parts& parts = bands_.parts;
    // A group has one band of each part, as long as there are any.
    for (int64_t group = 0; group < ceil_div(parts.count, parts.parts); ++group) {
      std::vector<Load> loads;
      int64_t pixels = 0;
      for (int64_t part = 0; part < parts.parts; ++part) {
        const int64_t band = parts.begin(part) + group;
        if (band >= parts.end(part)) continue;
        loads.push_back({part, band, pixels});
        pixels += rows(band) * q_;
      }
      parallel_for(runtime, static_cast<int64_t>(loads.size()),
                   [&](int64_t i) { load_band(loads[i].part, loads[i].band, loads[i].pixel); });
      parallel_for(runtime, taps_ * down_ * across_, [&](int64_t block) {
        multiply(block / (down_ * across_), block / across_ % down_, block % across_, pixels,
                 group > 0);
      });
    }
  }

  // The operands of a band, of its dy [rows, Q, K], from the group's `pixel` on.
  void load(int64_t band, int64_t pixel, const O* dy) const {
    const int64_t count = rows(band);
    for (int64_t down = 0; down < down_; ++down) {
      O* const out = dy_block(down) + pixel * kPitch;
      for (int64_t i = 0; i < count * q_; ++i)
        std::copy_n(dy + i * k_ + down * kFilters, filters(down), out + i * kPitch);
    }
    const int64_t most_rows = window_.rows(op_.shape, bands_.rows_per_band);
    O* const window = buffer<O>(Buffer::kSource, most_rows * window_.width * c_);
    const ImageShape& input = op_.shape.input;
    window_.fill(
        op_.shape,
        static_cast<const S*>(op_.input) + bands_.image(band) * input.height * input.width * c_,
        bands_.first_row(band), count, static_cast<const A*>(op_.affine), op_.activation, window);
    const int64_t row_step = window_.step_height * window_.width;
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const Packed<O> h = of_tap(tap);
      for (int64_t block = 0; block < h.blocks(); ++block) {
        const int64_t n = h.columns(block);
        const O* const from = window + first_source(tap) * c_ + h.first(block);
        O* out = h.at(block, pixel);
        for (int64_t row = 0; row < count; ++row)
          for (int64_t column = 0; column < q_; ++column, out += n)
            std::copy_n(from + (row * row_step + column * window_.step_width) * c_, n, out);
      }
    }
  }

 private:
  const PreactConvWgrad& op_;
  const int64_t c_ = op_.shape.input.channels, k_ = op_.shape.output.channels;
  const int64_t q_ = op_.shape.output.width;
  const int64_t taps_ = op_.shape.kernel_height * op_.shape.kernel_width;
  const int64_t down_ = ceil_div(k_, kFilters), across_ = ceil_div(c_, kChannels);  // blocks of dW
  const Window window_;
  const Bands bands_;
  const int64_t pixels_;  // of a group, at most
  const Tile<O, A> tile_ = transposed_tile<O>();
  O* const dy_;  // [K / kFilters][pixels, kPitch]
  O* const h_;   // of each tap [pixels, C], Packed

  int64_t rows(int64_t band) const { return bands_.end_row(band) - bands_.first_row(band); }
  int64_t filters(int64_t down) const { return std::min(kFilters, k_ - down * kFilters); }
  O* dy_block(int64_t down) const { return dy_ + down * pixels_ * kPitch; }
  Packed<O> of_tap(int64_t tap) const {
    return {h_ + tap * pixels_ * c_, pixels_, c_, tile_.columns};
  }

  // Which pixel of a band's window a tap reads for the band's first pixel of dy.
  int64_t first_source(int64_t tap) const {
    return tap / op_.shape.kernel_width * window_.width + tap % op_.shape.kernel_width;
  }

  void multiply(int64_t tap, int64_t down, int64_t across, int64_t pixels, bool accumulate) const {
    const Packed<O> h = of_tap(tap);
    const int64_t pitch = taps_ * c_, of_block = kChannels / tile_.columns;
    A* const out = static_cast<A*>(op_.dweight) + down * kFilters * pitch + tap * c_;
    const int64_t end = std::min(h.blocks(), (across + 1) * of_block);
    for (int64_t block = across * of_block; block < end; ++block)
      tile_.multiply(filters(down), h.columns(block), pixels, kPitch, h.columns(block), pitch,
                     accumulate, dy_block(down), h.at(block, 0), out + h.first(block));
  }
};

}  // namespace preact
