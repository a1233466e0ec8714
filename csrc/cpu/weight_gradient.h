// dW = sum over pixels of dy h^T, with h = act(scale * (u - mean) + shift) computed again, a group
// of bands of output rows at a time.
//
// Each part of the work sums its own dW over its bands; the parts are added in order. For each tap,
// dW is a matrix product over pixels: h transposed, shifted by the tap, times dy. dy is laid out as
// wide as h's window, zero at its right, so that all rows of a band are one product. The tile for
// pairs wants its left operand transposed in memory; ours reads it as it lies.
#pragma once

#include "conv.h"

namespace preact {

template <typename S, typename O>
class WeightGradient {
  using A = Accumulator<S>;
  static constexpr int64_t kSumChunk = 256, kFilters = 16;
  static constexpr int64_t kProductRows = 128, kProductColumns = 256;  // of one matrix product
  static constexpr int64_t kGroupBytes = 256 * 1024;
  const PreactConvWgrad& op_;
  const Window window_;

 public:
  static constexpr int64_t kMostTogether = 16, pieces = 1;
  // Of a group of bands.
  struct Operands {
    const O *left[kMostTogether], *right[kMostTogether];
  };
  const Bands bands;

  // op's shape is flattened.
  WeightGradient(const Runtime& runtime, const PreactConvWgrad& op)
      : op_(op),
        window_(op.shape),
        bands(gradient_bands<O>(op.shape)),
        step_depth_(!kPairs<O> ? 1
                    : joined_  ? runtime.pairs_depth
                               : 2),
        tile_(wgrad_tile(runtime, O{})),
        partial_(buffer<A>(Buffer::kPartial, bands.parts.parts * size_)) {}

  // Values of dy of a band.
  int64_t grad_size() const { return bands.rows_per_band * pitch_ * k_; }

  // How many bands are multiplied together: each block of dW then is there for all of them. A band
  // has `grad_size` values of dy.
  int64_t together(int64_t grad_size) const {
    const int64_t values = left_size_ + right_size_ + grad_size;
    return std::clamp<int64_t>(kGroupBytes / (values * static_cast<int64_t>(sizeof(O))), 1,
                               kMostTogether);
  }

  // dy of a band, [rows, pitch, K], where it lies or in `loaded`.
  const O* load_grad(const OutputGradient<S>& grad, int64_t band, O* loaded) const {
    const int64_t first = bands.first_row(band), rows = bands.end_row(band) - first;
    const int64_t pixel = (bands.image(band) * op_.shape.output.height + first) * q_;
    if (pitch_ == q_) return grad.rows(pixel, rows * q_, loaded);
    for (int64_t row = 0; row < rows; ++row) {
      O* const out = loaded + row * pitch_ * k_;
      grad.load(pixel + row * q_, q_, out);
      std::fill_n(out + q_ * k_, (pitch_ - q_) * k_, O{});
    }
    return loaded;
  }

  // Makes the operands of the i-th band of `together`, of its dy [rows, pitch, K], which has to
  // stay for multiply().
  void load(int64_t i, int64_t together, int64_t band, const O* dy, Operands& operands) const {
    const int64_t first = bands.first_row(band), rows = bands.end_row(band) - first;
    const int64_t window = most_window_ * window_.width * c_;
    O* const h = kPairs<O> ? buffer<O>(Buffer::kSource, window)
                           : buffer<O>(Buffer::kSource, together * window) + i * window;
    window_.fill(op_.shape, static_cast<const S*>(op_.input), bands.image(band), first, rows,
                 static_cast<const A*>(op_.affine), op_.activation, h);
    const O *const left = h_is_left_ ? h : dy, *const right = h_is_left_ ? dy : h;
    operands.left[i] = left;
    operands.right[i] = right;
    O* const laid_out = kPairs<O> || in_blocks_
                            ? buffer<O>(Buffer::kRight, together * right_size_) + i * right_size_
                            : nullptr;
    if constexpr (kPairs<O>) {
      O* const planes = buffer<O>(Buffer::kLeft, together * left_size_) + i * left_size_;
      transpose_planes(left, h_is_left_ ? window_.rows(op_.shape, rows) : rows, planes);
      operands.left[i] = planes;
      operands.right[i] = to_pairs(right, pixels(rows), laid_out);
    } else if (in_blocks_) {
      operands.right[i] = to_blocks(right, pixels(rows), laid_out);
    }
  }

  // Lets ahead want what the operands of a band are made of.
  void want(const OutputGradient<S>& grad, int64_t band, Ahead& ahead) const {
    const int64_t first = bands.first_row(band), rows = bands.end_row(band) - first;
    const int64_t row = bands.image(band) * op_.shape.output.height + first;
    grad.want(row * q_, rows * q_, ahead);
    window_.want(op_.shape, static_cast<const S*>(op_.input), bands.image(band), first, rows,
                 ahead);
  }

  // Adds to a part's dW `count` bands from `first` on, of `together`, the operands that load()
  // made.
  void multiply(int64_t part, int64_t /*piece*/, int64_t first, int64_t count, int64_t /*together*/,
                const Operands& operands, Ahead& ahead) const {
    A* const dweight = partial_ + part * size_;
    const bool begins = first == bands.parts.begin(part);
    for (int64_t tap = 0; tap < taps_; ++tap)
      for (int64_t row = 0; row < product_rows_; row += kProductRows) {
        const int64_t m = std::min(kProductRows, product_rows_ - row);
        A* const out = dweight + (tap * product_rows_ + row) * product_columns_;
        if (tile_.alike && begins) std::fill_n(out, m * product_columns_, A(0));
        for (int64_t column = 0; column < product_columns_; column += block_columns_) {
          const int64_t n = std::min(block_columns_, product_columns_ - column);
          const int64_t ldb = in_blocks_ ? n : product_columns_;
          for (int64_t i = 0; i < count; ++i) {
            const int64_t rows = bands.end_row(first + i) - bands.first_row(first + i);
            const int64_t calls = joined_ ? 1 : rows, k = depth(pixels(joined_ ? rows : 1));
            const O* const a = operands.left[i] + left_offset(tap, row);
            const int64_t to_column = in_blocks_ ? depth(pixels(rows)) : kPairs<O> ? 2 : 1;
            const O* const b = operands.right[i] + column * to_column;
            for (int64_t call = 0; call < calls; ++call) {
              ahead.before(m * n * k);
              tile_.multiply(m, n, k, ld_, ldb, product_columns_,
                             tile_.alike || !begins || i > 0 || call > 0, a + call * left_row_,
                             b + call * pitch_ * ldb, out + column);
            }
          }
        }
      }
  }

  // Writes dW, once all bands are in: the parts' sum, in order, where it lies as in dW, or into the
  // first of them.
  void finish(const Runtime& runtime) const {
    A* const dweight = static_cast<A*>(op_.dweight);
    A* const sum = h_is_left_ ? partial_ : dweight;
    const Parts chunks(ceil_div(size_, kSumChunk), kMostParts);
    parallel_for(runtime, chunks.parts, [&](int64_t chunk) {
      const int64_t begin = chunks.begin(chunk) * kSumChunk;
      const int64_t end = std::min(size_, chunks.end(chunk) * kSumChunk);
      if (sum != partial_) std::copy(partial_ + begin, partial_ + end, sum + begin);
      for (int64_t j = 1; j < bands.parts.parts; ++j)
        sum_rows(partial_ + j * size_ + begin, 1, end - begin, sum + begin);
    });
    if (!h_is_left_) return;
    const int64_t row = size_ / k_;  // of dW
    parallel_for(runtime, ceil_div(k_, kFilters), [&](int64_t block) {
      const int64_t first = block * kFilters;
      transpose(partial_ + first, row, std::min(kFilters, k_ - first), k_, row,
                dweight + first * row);
    });
  }

 private:
  const int64_t c_ = op_.shape.input.channels, k_ = op_.shape.output.channels;
  const int64_t q_ = op_.shape.output.width;
  const int64_t taps_ = op_.shape.kernel_height * op_.shape.kernel_width;
  const int64_t size_ = taps_ * k_ * c_;  // of dW
  // The left operand is h; or of a 1x1 convolution dy, which leaves dW as it should lie, unless
  // that is the wider one and pixels are many.
  const bool h_is_left_ = taps_ > 1 || (c_ < k_ && op_.shape.output.pixels() > 4 * c_);
  const int64_t product_rows_ = h_is_left_ ? c_ : k_, product_columns_ = h_is_left_ ? k_ : c_;
  // Of a transposed window, columns a stride apart lie in a plane of their own.
  const int64_t step_ = window_.step_width, plane_width_ = ceil_div(window_.width, step_);
  // All rows of a band are one product: of a left operand as it lies, where its rows join.
  const bool joined_ = window_.step_height == 1 && (kPairs<O> || step_ == 1);
  const int64_t pitch_ = grad_pitch<O>(op_.shape, window_);  // of dy's rows
  const int64_t most_window_ = window_.rows(op_.shape, bands.rows_per_band);
  const int64_t step_depth_;  // what the depth of a product is a multiple of, by zeros at its end
  // A row of a plane ends with as many as there can be (of a multiple of 32, AMX's): a constant is
  // much faster to write. An odd number of cache lines sets rows apart in the cache.
  static constexpr int64_t kMostZeros = 31;
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(O));
  const int64_t plane_pitch_ =
      (ceil_div(most_window_ * plane_width_ + kMostZeros, kLine) | 1) * kLine;
  const int64_t plane_size_ = product_rows_ * plane_pitch_, left_size_ = step_ * plane_size_;
  // Of the left operand as the tile reads it: of its rows, and from one row of dy to the next.
  const int64_t ld_ = kPairs<O> ? plane_pitch_ : step_ * product_rows_;
  const int64_t left_row_ =
      window_.step_height * (kPairs<O> ? plane_width_ : window_.width * product_rows_);
  const int64_t right_size_ = depth(bands.rows_per_band * pitch_) * product_columns_;
  const Tile<O, A> tile_;
  // The right operand is laid out for the tile, which would do so for every tap, or costs nothing.
  const bool in_blocks_ =
      tile_.copies && (taps_ > 1 || kPairs<O>) && product_columns_ > tile_.columns;
  const int64_t block_columns_ = in_blocks_ ? tile_.columns : kProductColumns;
  A* const partial_;  // [parts][R, S, product_rows, product_columns]

  // Where in the left operand the product of a tap begins, of its rows from `row` on.
  int64_t left_offset(int64_t tap, int64_t row) const {
    const int64_t s = op_.shape.kernel_width, down = tap / s, across = tap % s;
    if constexpr (kPairs<O>)
      return across % step_ * plane_size_ + row * ld_ + down * plane_width_ + across / step_;
    else
      return (down * window_.width + across) * product_rows_ + row;
  }

  // Of so many rows of dy, without the zeros behind the last.
  int64_t pixels(int64_t rows) const { return (rows - 1) * pitch_ + q_; }

  // Of a product over so many pixels.
  int64_t depth(int64_t pixels) const { return ceil_div(pixels, step_depth_) * step_depth_; }

  // [pixels, product_columns] to blocks of columns, [pixels, block_columns].
  const O* to_blocks(const O* in, int64_t pixels, O* out) const {
    const O* const blocks = out;
    for (int64_t column = 0; column < product_columns_; column += block_columns_) {
      const int64_t n = std::min(block_columns_, product_columns_ - column);
      for (int64_t i = 0; i < pixels; ++i, out += n)
        std::copy_n(in + i * product_columns_ + column, n, out);
    }
    return blocks;
  }

  // [pixels, product_columns] to pairs of pixels, in blocks of columns or one.
  const O* to_pairs(const O* in, int64_t pixels, O* out) const {
    const O* const pairs = out;
    const int64_t even = pixels + pixels % 2, end = depth(pixels);
    const int64_t most = in_blocks_ ? block_columns_ : product_columns_;
    for (int64_t column = 0; column < product_columns_; column += most, out += end * most) {
      const int64_t n = std::min(most, product_columns_ - column);
      pair_rows(in + column, pixels, n, product_columns_, out);
      std::fill_n(out + even * n, (end - even) * n, O{});
    }
    return pairs;
  }

  // Rows of the window, [rows, width, product_rows], to [step][product_rows][rows, plane_width] and
  // zeros.
  void transpose_planes(const O* in, int64_t rows, O* out) const {
    const int64_t n = product_rows_;
    for (int64_t i = 0; i < step_; ++i, out += plane_size_) {
      const int64_t columns = ceil_div(window_.width - i, step_);
      if (step_ == 1) {
        transpose(in, rows * plane_width_, n, n, plane_pitch_, out);
      } else {
        for (int64_t row = 0; row < rows; ++row) {
          O* const to = out + row * plane_width_;
          transpose(in + (row * window_.width + i) * n, columns, n, step_ * n, plane_pitch_, to);
          if (columns < plane_width_)
            for (int64_t j = 0; j < n; ++j) to[j * plane_pitch_ + columns] = O{};
        }
      }
      for (int64_t j = 0; j < n; ++j)
        std::fill_n(out + j * plane_pitch_ + rows * plane_width_, kMostZeros, O{});
    }
  }
};

}  // namespace preact
