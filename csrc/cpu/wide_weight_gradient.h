// dW = sum over pixels of dy h^T where dW fills the cache, with h = act(scale * (u - mean) + shift)
// computed again, a group of bands of output rows at a time.
//
// The bands of a group leave dy, laid out for the tile, and h. Then each piece of the work takes a
// tap and some channels, lays h out for them, and reads, adds to and writes a column of blocks of
// dW once for all bands: there is one dW, by whichever thread, and no partial sums.
//
// Rows of an image that some tap reads above or below it come first and last in a group, so that
// each tap's pixels are a range: rows that it finds zeros for are left out of its product.
#pragma once

#include "conv.h"

namespace preact {

template <typename S, typename O>
class WideWeightGradient {
  using A = Accumulator<S>;
  static constexpr int64_t kFilters = 64, kChannels = 64;  // of a block of dW
  static constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(O));

 public:
  // Output rows [first, end) of a band, and where the first of their pixels is in the group.
  struct Rows {
    int64_t first, end, pixel;
  };
  // A band of a group.
  struct Load {
    int64_t part, band;
    std::vector<Rows> rows;
  };

  // op's shape is flattened.
  WideWeightGradient(const Runtime& runtime, const PreactConvWgrad& op)
      : op_(op),
        window_(op.shape),
        bands_(gradient_bands<O>(op.shape)),
        step_depth_(kPairs<O> ? runtime.pairs_depth : 1),
        pixels_(round_up(bands_.parts.parts * bands_.rows_per_band * q_, step_depth_)),
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
        if (band < parts.end(part)) loads.push_back({part, band, {}});
      }
      const int64_t pixels = place(loads);
      const std::vector<const O*> sources = sources_of(loads, pixels);
      const std::vector<Span> spans = spans_of(loads);
      if constexpr (kPairs<O>) zero_grad(pixels, static_cast<int64_t>(sources.size()));
      parallel_for(runtime, static_cast<int64_t>(loads.size()),
                   [&](int64_t i) { load_band(loads[i]); });
      parallel_for(runtime, taps_ * across_ * pieces_,
                   [&](int64_t piece) { multiply(piece, sources, spans, group > 0); });
    }
  }

  // Makes a band's operands of its dy [rows, Q, K].
  void load(const Load& l, const O* dy) const {
    for (const Rows& r : l.rows) {
      const int64_t count = (r.end - r.first) * q_;
      const O* const in = dy + (r.first - bands_.first_row(l.band)) * q_ * k_;
      if constexpr (kPairs<O>) {
        transpose(in, count, k_, k_, pitch_, dy_ + r.pixel);
      } else {
        for (int64_t down = 0; down < down_; ++down) {
          O* const out = dy_block(down) + r.pixel * pitch_;
          for (int64_t i = 0; i < count; ++i)
            std::copy_n(in + i * k_ + down * kFilters, filters(down), out + i * pitch_);
        }
      }
    }
    window_.fill(op_.shape, static_cast<const S*>(op_.input), bands_.image(l.band),
                 bands_.first_row(l.band), rows(l.band), static_cast<const A*>(op_.affine),
                 op_.activation, windows_ + l.part * window_size_);
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
  const int64_t dy_pixel_ = kPairs<O> ? 1 : pitch_;  // from one of dy's pixels to the next
  O* const dy_;       // [K / kFilters][pixels, pitch], or transposed, [K, pitch], for pairs
  O* const windows_;  // [parts][window_size]

  int64_t rows(int64_t band) const { return bands_.end_row(band) - bands_.first_row(band); }
  int64_t filters(int64_t down) const { return std::min(kFilters, k_ - down * kFilters); }
  O* dy_block(int64_t down) const { return dy_ + down * (kPairs<O> ? kFilters : pixels_) * pitch_; }

  // The output rows that kernel row r finds rows of the image for.
  Span output_rows(int64_t r) const {
    const ConvShape& shape = op_.shape;
    return reads_inside(r - shape.pad_top, shape.stride_height, shape.input.height,
                        shape.output.height);
  }

  // Sets the rows of the bands of a group; how many pixels they have.
  int64_t place(std::vector<Load>& loads) const {
    // where all kernel rows find rows of the image, there is no need of an order
    const Span inside{output_rows(0).begin, output_rows(op_.shape.kernel_height - 1).end};
    int64_t pixel = 0;
    for (int64_t first = 0, end; first < op_.shape.output.height; first = end) {
      end = first == inside.begin ? std::max(inside.end, first + 1) : first + 1;
      for (Load& l : loads) {
        const int64_t row = std::max(first, bands_.first_row(l.band));
        const int64_t end_row = std::min(end, bands_.end_row(l.band));
        if (row >= end_row) continue;
        l.rows.push_back({row, end_row, pixel});
        pixel += (end_row - row) * q_;
      }
    }
    return pixel;
  }

  // Zeros behind the pixels of dy^T, which make a product as deep as it should be.
  void zero_grad(int64_t begin, int64_t end) const {
    for (int64_t k = 0; k < k_; ++k)
      std::fill(dy_ + k * pitch_ + begin, dy_ + k * pitch_ + end, O{});
  }

  // What the first tap reads for each pixel of a group; where dy is zero, any pixel.
  std::vector<const O*> sources_of(const std::vector<Load>& loads, int64_t pixels) const {
    std::vector<const O*> sources(pixels);
    for (const Load& l : loads) {
      const O* const window = windows_ + l.part * window_size_;
      for (const Rows& r : l.rows)
        for (int64_t i = 0; i < (r.end - r.first) * q_; ++i) {
          const int64_t row = r.first - bands_.first_row(l.band) + i / q_, column = i % q_;
          sources[r.pixel + i] =
              window +
              (row * window_.step_height * window_.width + column * window_.step_width) * c_;
        }
    }
    sources.resize(round_up(pixels, step_depth_), sources.back());
    return sources;
  }

  // Pixels of a group in output rows above `row`, before which or behind which all of them lie.
  int64_t pixels_above(const std::vector<Load>& loads, int64_t row) const {
    int64_t rows = 0;
    for (const Load& l : loads) {
      const int64_t first = bands_.first_row(l.band);
      rows += std::clamp(row, first, bands_.end_row(l.band)) - first;
    }
    return rows * q_;
  }

  // The pixels of a group that each kernel row finds rows of the image for, and as many others, to
  // which it adds zeros, as make a product of them.
  std::vector<Span> spans_of(const std::vector<Load>& loads) const {
    std::vector<Span> spans;
    for (int64_t r = 0; r < op_.shape.kernel_height; ++r) {
      const Span rows = output_rows(r);
      const int64_t begin = pixels_above(loads, rows.begin) / step_depth_ * step_depth_;
      const int64_t end = round_up(pixels_above(loads, rows.end), step_depth_);
      spans.push_back(begin < end ? Span{begin, end} : Span{0, step_depth_});
    }
    return spans;
  }

  // Some blocks of a column of a tap's dW.
  void multiply(int64_t piece, const std::vector<const O*>& sources, const std::vector<Span>& spans,
                bool accumulate) const {
    const int64_t tap = piece / pieces_ / across_, c = piece / pieces_ % across_ * kChannels;
    const int64_t r = tap / op_.shape.kernel_width, s = tap % op_.shape.kernel_width;
    const int64_t begin = spans[r].begin, pixels = spans[r].end - begin;
    const int64_t columns = std::min(kChannels, c_ - c);
    const Packed<O> h{buffer<O>(Buffer::kSource, pixels_ * kChannels), pixels, columns,
                      tile_.columns};
    const int64_t shift = (r * window_.width + s) * c_ + c;
    h.copy_rows(0, pixels, [&](int64_t i) { return sources[begin + i] + shift; });
    const int64_t pitch = taps_ * c_;
    const Parts blocks(down_, pieces_);
    for (int64_t down = blocks.begin(piece % pieces_); down < blocks.end(piece % pieces_); ++down) {
      A* const out = static_cast<A*>(op_.dweight) + down * kFilters * pitch + tap * c_ + c;
      for (int64_t block = 0; block < h.blocks(); ++block)
        tile_.multiply(filters(down), h.columns(block), pixels, pitch_, h.columns(block), pitch,
                       accumulate, dy_block(down) + begin * dy_pixel_, h.at(block, 0),
                       out + h.first(block));
    }
  }
};

}  // namespace preact
