// dW = sum over pixels of dy h^T where dW fills the cache, with h = act(scale * (u - mean) + shift)
// computed again, a group of bands of output rows at a time.
//
// The bands of a group leave dy, laid out for the tile, and h. Then each piece of the work takes a
// tap and some channels, lays h out for them, and reads, adds to and writes a column of blocks of
// dW once for all bands: there is one dW, by whichever thread, and no partial sums.
#pragma once

#include "conv.h"

namespace preact {

template <typename S, typename O>
class WideWeightGradient {
  using A = Accumulator<S>;
  static constexpr int64_t kFilters = 64, kChannels = 64;  // of a block of dW
  static constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(O));

 public:
  // A band of a group, and where its pixels lie in the group's, with zeros behind them.
  struct Load {
    int64_t part, band, begin, end;
  };

  // op's shape is flattened.
  WideWeightGradient(const Runtime& runtime, const PreactConvWgrad& op)
      : op_(op),
        window_(op.shape),
        bands_(gradient_bands<O>(op.shape)),
        step_depth_(kPairs<O> ? runtime.pairs_depth : 1),
        pixels_(
            round_up(bands_.parts.parts * round_depth<O>(bands_.rows_per_band * q_), step_depth_)),
        pieces_(std::clamp(ceil_div(kPiecesPerThread * runtime.threads, taps_ * across_),
                           int64_t{1}, down_)),
        tile_(wgrad_tile(runtime, O{})),
        dy_(buffer<O>(Buffer::kLeft, kPairs<O> ? k_ * pitch_ : down_ * pixels_ * pitch_)),
        windows_(buffer<O>(Buffer::kRight, bands_.parts.parts * window_size_)) {}

  // Values of dy of a band.
  int64_t grad_size() const { return bands_.rows_per_band * q_ * k_; }

  // dy of a band, [rows, Q, K], where it lies or in `loaded`.
  const O* load_grad(const OutputGradient<S>& grad, int64_t band, O* loaded) const {
    const int64_t row = bands_.image(band) * op_.shape.output.height + bands_.first_row(band);
    return grad.rows(row * q_, rows(band) * q_, loaded);
  }

  // Writes dW. Calls load_band(l) for all bands, in order for those of a part, which has to call
  // load(l, dy).
  template <typename F>
  void run(const Runtime& runtime, const F& load_band) const {
    const Parts& parts = bands_.parts;
    // A group has one band of each part, as long as there are any.
    for (int64_t group = 0; group < ceil_div(parts.count, parts.parts); ++group) {
      std::vector<Load> loads;
      for (int64_t part = 0; part < parts.parts; ++part) {
        const int64_t band = parts.begin(part) + group;
        if (band >= parts.end(part)) continue;
        const int64_t begin = loads.empty() ? 0 : loads.back().end;
        loads.push_back({part, band, begin, begin + round_depth<O>(rows(band) * q_)});
      }
      loads.back().end = round_up(loads.back().end, step_depth_);
      const std::vector<const O*> sources = sources_of(loads);
      parallel_for(runtime, static_cast<int64_t>(loads.size()),
                   [&](int64_t i) { load_band(loads[i]); });
      parallel_for(runtime, taps_ * across_ * pieces_,
                   [&](int64_t piece) { multiply(piece, sources, group > 0); });
    }
  }

  // Makes a band's operands of its dy [rows, Q, K].
  void load(const Load& l, const O* dy) const {
    const int64_t count = rows(l.band) * q_;
    if constexpr (kPairs<O>) {
      transpose(dy, count, k_, k_, pitch_, dy_ + l.begin);
      for (int64_t k = 0; k < k_; ++k)
        std::fill(dy_ + k * pitch_ + l.begin + count, dy_ + k * pitch_ + l.end, O{});
    } else {
      for (int64_t down = 0; down < down_; ++down) {
        O* const out = dy_block(down) + l.begin * pitch_;
        for (int64_t i = 0; i < count; ++i)
          std::copy_n(dy + i * k_ + down * kFilters, filters(down), out + i * pitch_);
      }
    }
    const ImageShape& input = op_.shape.input;
    window_.fill(
        op_.shape,
        static_cast<const S*>(op_.input) + bands_.image(l.band) * input.height * input.width * c_,
        bands_.first_row(l.band), rows(l.band), static_cast<const A*>(op_.affine), op_.activation,
        windows_ + l.part * window_size_);
  }

 private:
  static constexpr int64_t kPiecesPerThread = 2;

  const PreactConvWgrad& op_;
  const int64_t c_ = op_.shape.input.channels, k_ = op_.shape.output.channels;
  const int64_t q_ = op_.shape.output.width;
  const int64_t taps_ = op_.shape.kernel_height * op_.shape.kernel_width;
  const int64_t down_ = ceil_div(k_, kFilters), across_ = ceil_div(c_, kChannels);  // blocks of dW
  const Window window_;
  const Bands bands_;
  const int64_t window_size_ = window_.rows(op_.shape, bands_.rows_per_band) * window_.width * c_;
  const int64_t step_depth_;  // of the products
  const int64_t pixels_;      // of a group, at most
  const int64_t pieces_;      // of a column of blocks
  const Tile<O, A> tile_;
  // Of dy's rows: an odd number of cache lines sets them apart in the cache.
  const int64_t pitch_ = (ceil_div(kPairs<O> ? pixels_ : kFilters, kLine) | 1) * kLine;
  O* const dy_;       // [K / kFilters][pixels, pitch], or transposed, [K, pitch], for pairs
  O* const windows_;  // [parts][window_size]

  int64_t rows(int64_t band) const { return bands_.end_row(band) - bands_.first_row(band); }
  int64_t filters(int64_t down) const { return std::min(kFilters, k_ - down * kFilters); }
  O* dy_block(int64_t down) const { return dy_ + down * (kPairs<O> ? kFilters : pixels_) * pitch_; }

  // What the first tap reads for each pixel of a group; where dy is zero, any pixel.
  std::vector<const O*> sources_of(const std::vector<Load>& loads) const {
    std::vector<const O*> sources;
    for (const Load& l : loads) {
      const O* const window = windows_ + l.part * window_size_;
      for (int64_t row = 0; row < rows(l.band); ++row)
        for (int64_t column = 0; column < q_; ++column)
          sources.push_back(
              window +
              (row * window_.step_height * window_.width + column * window_.step_width) * c_);
      sources.resize(l.end, sources.back());
    }
    return sources;
  }

  // Some blocks of a column of a tap's dW.
  void multiply(int64_t piece, const std::vector<const O*>& sources, bool accumulate) const {
    const int64_t tap = piece / pieces_ / across_, c = piece / pieces_ % across_ * kChannels;
    const int64_t r = tap / op_.shape.kernel_width, s = tap % op_.shape.kernel_width;
    const int64_t pixels = static_cast<int64_t>(sources.size());
    const int64_t columns = std::min(kChannels, c_ - c);
    const Packed<O> h{buffer<O>(Buffer::kSource, pixels_ * kChannels), pixels, columns,
                      tile_.columns};
    const int64_t shift = (r * window_.width + s) * c_ + c;
    h.copy_rows(0, pixels, [&](int64_t i) { return sources[i] + shift; });
    const int64_t pitch = taps_ * c_;
    const Parts blocks(down_, pieces_);
    for (int64_t down = blocks.begin(piece % pieces_); down < blocks.end(piece % pieces_); ++down) {
      A* const out = static_cast<A*>(op_.dweight) + down * kFilters * pitch + tap * c_ + c;
      for (int64_t block = 0; block < h.blocks(); ++block)
        tile_.multiply(filters(down), h.columns(block), pixels, pitch_, h.columns(block), pitch,
                       accumulate, dy_block(down), h.at(block, 0), out + h.first(block));
    }
  }
};

}  // namespace preact
