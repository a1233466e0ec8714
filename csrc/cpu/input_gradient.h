// g = (dgrad(dy, W) + addend) * act'(z) and its sums, or residual + scale * g, a band of input rows
// at a time.
//
// The pixels of u that have the same place in the stride's grid (its phase) are reached by the same
// taps, so that for each phase dgrad is a small convolution of stride 1 over dy.
#pragma once

#include <optional>

#include "conv.h"
#include "statistics.h"
#include "winograd.h"

namespace preact {

// Along one axis, input pixel x = stride * i + phase - pad gets dy[i - t] W[phase + stride * t].
struct Phase {
  int64_t taps;     // how many t
  int64_t first_x;  // the first pixel of this phase
  int64_t first_i;  // its i
  int64_t pixels;   // how many there are

  Phase(int64_t phase, int64_t kernel, int64_t stride, int64_t pad, int64_t size)
      : taps(phase < kernel ? (kernel - 1 - phase) / stride + 1 : 0),
        first_x(((phase - pad) % stride + stride) % stride),
        first_i((first_x + pad - phase) / stride),
        pixels(first_x < size ? (size - 1 - first_x) / stride + 1 : 0) {}
};

template <typename S, typename O>
class InputGradient {
  using A = Accumulator<S>;

 public:
  const Bands bands;

  // op's shape is flattened.
  InputGradient(const Runtime& runtime, const PreactConvDgrad& op)
      : bands(bands_of(op.shape)),
        op_(op),
        tile_(tile_of(runtime, O{})),
        joined_(step_ == 1 && op.shape.stride_height == 1 && op.shape.stride_width == 1 &&
                rows_join(source_width(), width_,
                          op.shape.kernel_width * op.shape.output.channels * c_,
                          call_cost(tile_, c_))),
        pitch_(joined_ ? source_width() : round_up(width_, step_)),
        partial_(op.sums ? bands.parts.parts : 0, c_) {
    if constexpr (std::is_same_v<O, float>)
      if (step_ == 2) {
        winograd_.emplace(runtime, k_, c_);
        winograd_->fill(runtime, op.weight.stride_c, [&](int64_t tap, int64_t k) {
          return weight_at<S>(op.weight, k, 0, 2 - tap / 3, 2 - tap % 3);
        });
        const int64_t lines = winograd_->lines_at_once(pitch_), band = bands.rows_per_band / 2;
        tile_rows_ = 2 * std::min(lines, band);
        if (bands.per_image == 1) together_ = std::max<int64_t>(lines / band, 1);
        return;
      }
    tile_rows_ = rows_of_tile(pitch_, c_ * static_cast<int64_t>(sizeof(A)), bands.rows_per_band);
    pack_weights(runtime);
  }

  // Bands whose g is computed together, each of them a whole image if they are several.
  int64_t together() const { return together_; }

  // Values of dy that a band reads.
  int64_t source_size() const { return most_source_rows() * source_width() * k_; }

  // How far into them its own first pixel is, where the convolution keeps the size.
  int64_t first_pixel(int64_t band) const {
    const int64_t first = bands.first_row(band);
    return ((first - first_p(first)) * source_width() - first_q()) * k_;
  }

  // dy of the rows that a band reads, zero where there are none: [rows, source_width, K], where it
  // lies or in `loaded`.
  const O* load_grad(const OutputGradient<S>& grad, int64_t band, O* loaded) const {
    const int64_t image = bands.image(band), p = op_.shape.output.height, q = q_;
    const int64_t first_row = bands.first_row(band);
    const int64_t rows = round_up(bands.end_row(band) - first_row, step_);
    const int64_t first = first_p(first_row), last = last_p(first_row + rows - 1);
    const int64_t width = source_width();
    const auto [begin_q, end_q] = reads_inside(first_q(), 1, q, width);
    if (begin_q == 0 && end_q == width && width == q && first >= 0 && last < p) {
      return grad.rows((image * p + first) * q, (last - first + 1) * q, loaded);
    }
    for (int64_t y = first; y <= last; ++y) {
      O* const row = loaded + (y - first) * width * k_;
      if (y < 0 || y >= p) {
        std::fill_n(row, width * k_, O{});
        continue;
      }
      std::fill_n(row, begin_q * k_, O{});
      std::fill_n(row + end_q * k_, (width - end_q) * k_, O{});
      grad.load((image * p + y) * q + first_q() + begin_q, end_q - begin_q, row + begin_q * k_);
    }
    return loaded;
  }

  // Writes g of `count` bands from `band` on, from the dy that load_grad() gave for each; bands of
  // a part come in order.
  void compute(int64_t part, int64_t band, int64_t count, const O* const* dy, Ahead& ahead) {
    const A* const affine = static_cast<const A*>(op_.affine);
    const int64_t first = bands.first_row(band), end = bands.end_row(band);
    A* const out = buffer<A>(Buffer::kTile, together_ * tile_rows_ * pitch_ * c_);
    A* const tile_sums = op_.sums ? buffer<A>(Buffer::kVectors, 2 * c_) : nullptr;
    if (op_.sums) std::fill_n(tile_sums, 2 * c_, A(0));
    for (int64_t row = first; row < end; row += tile_rows_) {
      const int64_t rows = std::min(tile_rows_, end - row), values = rows * width_ * c_;
      const int64_t whole_rows = round_up(rows, step_);
      const int64_t first_value = (bands.image(band) * height_ + row) * width_ * c_;
      ahead.clear();
      const void* const touched[] = {op_.g, op_.addend, op_.residual, affine ? op_.input : nullptr};
      for (const void* tensor : touched) ahead.want<S>(tensor, first_value, count * values);
      multiply(first, row, whole_rows, count, dy, out, ahead);
      for (int64_t i = 0; i < count; ++i) {
        store(first_value + i * values, rows, out + i * whole_rows * pitch_ * c_, tile_sums);
        if (op_.sums) partial_.add(part, tile_sums);
      }
    }
  }

  // Writes the sums, once all bands are computed.
  void finish() {
    if (op_.sums)
      partial_.finish(static_cast<const A*>(op_.affine) + c_, static_cast<A*>(op_.sums));
  }

 private:
  const PreactConvDgrad& op_;
  const int64_t c_ = op_.shape.input.channels, k_ = op_.shape.output.channels;
  const int64_t height_ = op_.shape.input.height, width_ = op_.shape.input.width;
  const int64_t q_ = op_.shape.output.width;
  const int64_t stride_h_ = op_.shape.stride_height, stride_w_ = op_.shape.stride_width;
  const int64_t top_ = op_.shape.pad_top, left_ = op_.shape.pad_left;
  const int64_t step_ = step(op_.shape);  // of rows and columns that are computed
  const Tile<O, A> tile_;
  const bool joined_;    // all rows of a tile in one product
  const int64_t pitch_;  // of a tile's rows
  int64_t tile_rows_, together_ = 1;
  std::optional<WinogradConv> winograd_;
  std::vector<Phase> down_, across_;
  std::vector<std::vector<TapRun>> runs_;  // of each phase across
  std::vector<Packed<O>> weights_;  // of each phase, [taps down, taps across (backwards), K] by C
  bool adds_to_zeros_ = tile_.alike && op_.shape.kernel_height > stride_h_;
  bool every_pixel_reached_ = true;
  PartialSums partial_;

  static Bands bands_of(const ConvShape& shape) {
    if (share_bands<O>(shape)) return gradient_bands<O>(shape);
    const int64_t k = shape.output.channels, bytes = static_cast<int64_t>(sizeof(O));
    const int64_t row = std::max<int64_t>(source_width(shape), 1) * k * bytes;
    const int64_t weight = shape.kernel_height * shape.kernel_width * k * shape.input.channels;
    const int64_t cached = kCacheBytes * shape.stride_height / row;
    if (step(shape) == 1) return {shape.input, cached, kMostParts, weight * bytes, 1};
    return {shape.input, winograd_rows(shape, shape.input, cached),
            winograd_parts(shape, shape.input), weight * bytes, step(shape)};
  }

  // A band of rows [x, end) reads rows [first_p(x), last_p(end - 1)] of dy, and of each the columns
  // [first_q, first_q + source_width).
  int64_t first_p(int64_t x) const {
    return ceil_div(x + top_ - (op_.shape.kernel_height - 1), stride_h_);
  }
  int64_t last_p(int64_t x) const { return floor_div(x + top_, stride_h_); }
  int64_t first_q() const { return first_q(op_.shape); }
  // The column that the first tap reads for a phase's first pixel.
  static int64_t first_read(const Phase& phase) { return phase.first_i - (phase.taps - 1); }
  int64_t source_width() const { return source_width(op_.shape); }
  int64_t most_source_rows() const {
    return bands.rows_per_band / stride_h_ + op_.shape.kernel_height + 1;
  }
  static int64_t first_q(const ConvShape& shape) {
    return ceil_div(shape.pad_left - (shape.kernel_width - 1), shape.stride_width);
  }
  static int64_t source_width(const ConvShape& shape) {
    const int64_t width = round_up(shape.input.width, step(shape));
    return floor_div(width - 1 + shape.pad_left, shape.stride_width) - first_q(shape) + 1;
  }
  static int64_t step(const ConvShape& shape) {
    return winograd_pays<O>(shape, shape.input) ? 2 : 1;
  }

  void pack_weights(const Runtime& runtime) {
    const ConvShape& shape = op_.shape;
    for (int64_t i = 0; i < stride_h_; ++i)
      down_.emplace_back(i, shape.kernel_height, stride_h_, top_, height_);
    for (int64_t j = 0; j < stride_w_; ++j)
      across_.emplace_back(j, shape.kernel_width, stride_w_, left_, width_);
    for (const Phase& phase : across_) {
      const int64_t multiplications = joined_ || tile_.alike ? 0 : k_ * std::min(c_, tile_.columns);
      const auto& runs = runs_.emplace_back(tap_runs(phase.taps, phase.pixels, first_read(phase), 1,
                                                     q_, multiplications, call_cost(tile_, c_)));
      adds_to_zeros_ = adds_to_zeros_ || !is_one_product(runs, phase.pixels);
    }
    O* packed = buffer<O>(Buffer::kWeight, shape.kernel_height * shape.kernel_width * k_ * c_);
    for (int64_t i = 0; i < stride_h_; ++i)
      for (int64_t j = 0; j < stride_w_; ++j) {
        const int64_t taps_across = across_[j].taps;
        const Packed<O>& weight = weights_.emplace_back(
            Packed<O>{packed, down_[i].taps * taps_across * k_, c_, tile_.columns});
        packed += weight.k * c_;
        every_pixel_reached_ = every_pixel_reached_ && weight.k > 0;
        weight.fill(runtime, op_.weight.stride_c, [&](int64_t row) {
          const int64_t t = row / (taps_across * k_), u = taps_across - 1 - row / k_ % taps_across;
          return weight_at<S>(op_.weight, row % k_, 0, i + stride_h_ * t, j + stride_w_ * u);
        });
      }
  }

  // dh [rows, pitch, C] of input rows [row, row + rows) of bands that begin with row `first`.
  void multiply(int64_t first, int64_t row, int64_t rows, int64_t count, const O* const* dy, A* out,
                Ahead& ahead) const {
    if constexpr (std::is_same_v<O, float>)
      if (winograd_) {
        std::vector<const O*> sources(dy, dy + count);
        for (const O*& source : sources) source += (row - first) * source_width() * k_;
        return winograd_->multiply(count, rows, pitch_, sources.data(), out, ahead);
      }
    // Below dy's last row only later taps find some.
    const bool adds_to_zeros =
        adds_to_zeros_ || (!joined_ && last_p(row + rows - 1) >= op_.shape.output.height);
    if (adds_to_zeros || !every_pixel_reached_) std::fill_n(out, rows * pitch_ * c_, A(0));
    for (int64_t x = row; x < (joined_ ? row + 1 : row + rows); ++x)
      multiply_rows(x, joined_ ? rows : 1, adds_to_zeros, *dy, first_p(first),
                    out + (x - row) * pitch_ * c_, ahead);
  }

  // Stores what has become of dh.
  void store(int64_t first_value, int64_t rows, A* out, A* sums) const {
    const A* const affine = static_cast<const A*>(op_.affine);
    const int64_t runs = pitch_ == width_ ? 1 : rows, pixels = rows / runs * width_;
    for (int64_t run = 0; run < runs; ++run) {
      A* const dh = out + run * pitch_ * c_;
      const int64_t offset = first_value + run * pixels * c_;
      const S* const addend = op_.addend ? static_cast<const S*>(op_.addend) + offset : nullptr;
      S* const g = static_cast<S*>(op_.g) + offset;
      const S* const u = static_cast<const S*>(op_.input) + offset;
      A* const s2 = sums ? sums + c_ : nullptr;
      if (!affine || (op_.frozen && addend)) store_rows(dh, addend, pixels, c_, g, nullptr);
      if (!affine) continue;
      if (op_.frozen)
        frozen_slope_rows(dh, op_.residual ? static_cast<const S*>(op_.residual) + offset : nullptr,
                          u, pixels, c_, affine, op_.activation, g, sums, s2);
      else
        slope_rows(dh, addend, u, pixels, c_, affine, op_.activation, g, sums, s2);
    }
  }

  // dh of input rows [x, x + rows), several only where they join.
  void multiply_rows(int64_t x, int64_t rows, bool adds_to_zeros, const O* dy, int64_t source_first,
                     A* out, Ahead& ahead) const {
    const int64_t phase_h = (x + top_) % stride_h_, i = (x + top_) / stride_h_;
    for (int64_t j = 0; j < stride_w_; ++j) {
      const Phase& phase = across_[j];
      const Packed<O>& weight = weights_[phase_h * stride_w_ + j];
      const int64_t run_length = phase.taps * k_;
      if (run_length == 0 || phase.pixels == 0) continue;
      for (int64_t block = 0; block < weight.blocks(); ++block)
        for (int64_t t = 0; t < down_[phase_h].taps; ++t) {
          const int64_t p = i - t;
          if (!joined_ && (p < 0 || p >= op_.shape.output.height)) continue;  // zeros
          const int64_t y = p - source_first, column = first_read(phase) - first_q();
          for (const TapRun& run : runs_[j])
            ahead.multiply<O, A>(
                tile_, joined_ ? (rows - 1) * pitch_ + width_ : run.end - run.begin,
                weight.columns(block), run.taps * k_, k_, weight.columns(block), stride_w_ * c_,
                adds_to_zeros || t > 0,
                dy + (y * source_width() + column + run.begin + run.first) * k_,
                weight.at(block, t * run_length + run.first * k_),
                out + (phase.first_x + run.begin * stride_w_) * c_ + weight.first(block));
        }
    }
  }
};

}  // namespace preact
