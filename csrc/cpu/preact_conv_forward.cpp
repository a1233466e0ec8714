// preact_conv_forward: y = conv(act(scale * (u - mean) + shift), W) + residual, statistics of y.
// Reads u [M, C] and residual, writes y [M', K]; FLOPs 2*M'*K*C*R*S, of 3x3 convolutions fewer
// (winograd.h).
//
// A band of output rows: its window of h is made once (prologue), then each tile of rows is
// multiplied, and gets its residual, is stored and measured while it is in cache (epilogue).
#include "conv.h"
#include "statistics.h"
#include "winograd.h"

namespace preact {
namespace {

// One matrix product per kernel row, since S*C values of h lie in a row, or per tap.
template <typename S, typename O>
class DirectProducts {
  using A = Accumulator<S>;

 public:
  static constexpr int64_t kStep = 1;  // of rows
  const ConvShape shape;
  const Window window{shape};

  DirectProducts(const Runtime& runtime, const PreactConvForward& op)
      : shape(flattened(op.shape)),
        tile_(tile_of(runtime, O{})),
        weight_{buffer<O>(Buffer::kWeight, r_ * run_length_ * k_), r_ * run_length_, k_,
                tile_.columns} {
    if (std::is_same_v<S, O> && filters_are_rows(op.weight, shape))
      weight_.fill_transposed(runtime, static_cast<const O*>(op.weight.data), op.weight.stride_k);
    else
      weight_.fill(runtime, op.weight.stride_k, [&](int64_t row) {
        return weight_at<S>(op.weight, 0, row % c_, row / run_length_,
                            row / c_ % shape.kernel_width);
      });
  }

  Bands bands() const {
    const int64_t bytes = static_cast<int64_t>(sizeof(O));
    const int64_t row_bytes = window.width * c_ * window.step_height * bytes;
    return {shape.output, kCacheBytes / row_bytes, kMostParts, r_ * run_length_ * k_ * bytes,
            kStep};
  }
  int64_t pitch() const { return joined_ ? window.width : q_; }  // of a tile's rows
  int64_t tile_rows(const Bands& bands) const {
    return rows_of_tile(pitch(), k_ * static_cast<int64_t>(sizeof(A)), bands.rows_per_band);
  }
  // Bands whose only tiles are multiplied together.
  int64_t together(const Bands& /*bands*/) const { return 1; }

  // out [rows, pitch, K] of output rows from `row` on, of the window h that begins with theirs.
  void multiply(int64_t /*bands*/, int64_t row, int64_t rows, const O* const* h, A* out,
                Ahead& ahead) const {
    const int64_t calls = joined_ ? 1 : rows, joined_pixels = (rows - 1) * pitch() + q_;
    const bool adds_to_zeros =
        (tile_.alike && r_ > 1) || !one_product_ || !is_read(0, row) || !is_read(0, row + rows - 1);
    if (adds_to_zeros) std::fill_n(out, rows * pitch() * k_, A(0));
    for (int64_t block = 0; block < weight_.blocks(); ++block)
      for (int64_t i = 0; i < calls; ++i)
        for (int64_t tap = 0; tap < r_; ++tap) {
          if (!is_read(tap, row + i)) continue;
          const int64_t source = (i * window.step_height + tap) * window.width;
          for (const TapRun& run : runs_)
            ahead.multiply<O, A>(tile_, joined_ ? joined_pixels : run.end - run.begin,
                                 weight_.columns(block), run.taps * c_, window.step_width * c_,
                                 weight_.columns(block), k_, adds_to_zeros || tap > 0,
                                 *h + (source + run.begin * window.step_width + run.first) * c_,
                                 weight_.at(block, tap * run_length_ + run.first * c_),
                                 out + (i * q_ + run.begin) * k_ + weight_.first(block));
        }
  }

 private:
  // Whether a tap's product for an output row is asked for: of a row above or below the image, all
  // zeros, only where it comes with those of others.
  bool is_read(int64_t tap, int64_t row) const {
    const int64_t y = row * shape.stride_height + tap - shape.pad_top;
    return joined_ || (y >= 0 && y < shape.input.height);
  }

  const int64_t c_ = shape.input.channels, k_ = shape.output.channels, q_ = shape.output.width;
  const int64_t r_ = shape.kernel_height, run_length_ = shape.kernel_width * c_;
  const Tile<O, A> tile_;
  const int64_t call_ = call_cost(tile_, k_);
  const bool joined_ = window.step_height == 1 && window.step_width == 1 &&
                       rows_join(window.width, q_, run_length_* k_, call_);
  const Packed<O> weight_;
  const std::vector<TapRun> runs_ =
      tap_runs(shape.kernel_width, q_, -shape.pad_left, shape.stride_width, shape.input.width,
               joined_ || tile_.alike ? 0 : c_ * std::min(k_, tile_.columns), call_);
  const bool one_product_ = is_one_product(runs_, q_);  // for each row of the kernel
};

// The same of 3x3 convolutions in fewer multiplications.
template <typename S>
class WinogradProducts {
 public:
  static constexpr int64_t kStep = 2;
  const ConvShape shape;
  const Window window{in_whole_tiles(shape)};

  WinogradProducts(const Runtime& runtime, const PreactConvForward& op)
      : shape(op.shape), conv_(runtime, shape.input.channels, shape.output.channels) {
    if (std::is_same_v<S, float> && filters_are_rows(op.weight, shape))
      conv_.fill_transposed(runtime, static_cast<const float*>(op.weight.data), op.weight.stride_k);
    else
      conv_.fill(runtime, op.weight.stride_k, [&](int64_t tap, int64_t c) {
        return weight_at<S>(op.weight, 0, c, tap / 3, tap % 3);
      });
  }

  Bands bands() const {
    const int64_t row = window.width * shape.input.channels;
    const int64_t cached = kCacheBytes / (row * static_cast<int64_t>(sizeof(float)));
    return {shape.output, winograd_rows(shape, shape.output, cached),
            winograd_parts(shape, shape.output), conv_.weight_bytes(), kStep};
  }
  int64_t pitch() const { return window.width - 2; }
  int64_t tile_rows(const Bands& bands) const {
    return std::min(2 * conv_.lines_at_once(pitch()), bands.rows_per_band);
  }
  int64_t together(const Bands& bands) const {
    const int64_t lines = bands.rows_per_band / 2;
    return bands.per_image > 1 ? 1 : std::max<int64_t>(conv_.lines_at_once(pitch()) / lines, 1);
  }

  void multiply(int64_t bands, int64_t /*row*/, int64_t rows, const float* const* h, float* out,
                Ahead& ahead) const {
    conv_.multiply(bands, rows, pitch(), h, out, ahead);
  }

 private:
  WinogradConv conv_;
};

template <typename S, typename O, typename Products>
void run(const Runtime& runtime, const PreactConvForward& op) {
  using A = Accumulator<S>;
  const Products products(runtime, op);
  const ConvShape& shape = products.shape;
  const Window& window = products.window;
  const int64_t c = shape.input.channels, k = shape.output.channels;
  const int64_t q = shape.output.width, p = shape.output.height;
  const S* const input = static_cast<const S*>(op.input);
  const A* const affine = static_cast<const A*>(op.affine);
  const Bands bands = products.bands();
  const int64_t pitch = products.pitch(), tile_rows = products.tile_rows(bands);
  const int64_t together = products.together(bands);

  PartialMoments moments(op.stats ? bands.parts.parts : 0, k);
  parallel_for(runtime, bands.parts.parts, [&](int64_t part) {
    const int64_t row_values = window.width * c;
    const int64_t window_values = window.rows(shape, bands.rows_per_band) * row_values;
    O* const h = buffer<O>(Buffer::kSource, together * window_values);
    A* const out = buffer<A>(Buffer::kTile, together * tile_rows * pitch * k);
    std::vector<const O*> sources(together);
    Ahead ahead(runtime.asks_ahead);
    const int64_t end_band = bands.parts.end(part);
    for (int64_t band = bands.parts.begin(part), count; band < end_band; band += count) {
      count = std::min(together, end_band - band);
      const int64_t first = bands.first_row(band), end = bands.end_row(band);
      for (int64_t i = 0; i < count; ++i)
        window.fill(shape, input, bands.image(band + i), first,
                    round_up(end - first, Products::kStep), affine, op.activation,
                    h + i * window_values);
      for (int64_t row = first; row < end; row += tile_rows) {
        const int64_t rows = std::min(tile_rows, end - row), values = rows * q * k;
        const int64_t whole_rows = round_up(rows, Products::kStep);
        const int64_t first_value = (bands.image(band) * p + row) * q * k;
        ahead.clear();
        ahead.want<S>(op.output, first_value, count * values);
        ahead.want<S>(op.residual, first_value, count * values);
        if (const int64_t next = band + count; row + rows == end && next < end_band)
          window.want(shape, input, bands.image(next), bands.first_row(next),
                      bands.end_row(next) - bands.first_row(next), ahead);
        for (int64_t i = 0; i < count; ++i)
          sources[i] = h + i * window_values + (row - first) * window.step_height * row_values;
        products.multiply(count, row, whole_rows, sources.data(), out, ahead);
        const int64_t runs = pitch == q ? 1 : rows, pixels = rows / runs * q;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t value = first_value + i * values;
          A* const tile = out + i * whole_rows * pitch * k;
          A* const sum = op.stats ? tile_sum<A>(k) : nullptr;
          for (int64_t run = 0; run < runs; ++run) {
            const int64_t offset = value + run * pixels * k;
            store_rows(tile + run * pitch * k,
                       op.residual ? static_cast<const S*>(op.residual) + offset : nullptr, pixels,
                       k, static_cast<S*>(op.output) + offset, sum);
          }
          if (op.stats)
            add_tile(moments[part], static_cast<const S*>(op.output) + value, rows * q, k, sum);
        }
      }
    }
  });
  if (op.stats) moments.finish(static_cast<A*>(op.stats));
  if (op.next.affine)
    bn_affine(std::is_same_v<A, double> ? Dtype::kFloat64 : Dtype::kFloat32, k, op.stats,
              op.next.weight, op.next.bias, op.next.eps, op.next.affine);
}

}  // namespace

void preact_conv_forward(const Runtime& runtime, const PreactConvForward& op) {
  dispatch(runtime, op.dtype, op.shape.input.channels, [&]<typename S, typename O>(S, O) {
    if constexpr (std::is_same_v<O, float>)
      if (winograd_pays<O>(op.shape, op.shape.output))
        return run<S, O, WinogradProducts<S>>(runtime, op);
    run<S, O, DirectProducts<S, O>>(runtime, op);
  });
}

}  // namespace preact
