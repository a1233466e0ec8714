// preact_conv_forward: y = conv(act(scale * (u - mean) + shift), W) + residual, statistics of y.
// Reads u [M, C] and residual, writes y [M', K]; FLOPs 2*M'*K*C*R*S.
//
// A band of output rows: its window of h is made once (prologue), then each tile of rows is one
// matrix product per kernel row, since S*C values of h lie in a row; the tile gets its residual, is
// stored and measured while it is in cache (epilogue).
#include "conv.h"
#include "statistics.h"

namespace preact {
namespace {

template <typename S, typename O>
void run(const Runtime& runtime, const PreactConvForward& op) {
  using A = Accumulator<S>;
  const ConvShape shape = flattened(op.shape);
  const Window window(shape);
  const int64_t c = shape.input.channels, k = shape.output.channels;
  const int64_t q = shape.output.width, p = shape.output.height;
  const int64_t r = shape.kernel_height, run_length = shape.kernel_width * c;
  const A* const affine = static_cast<const A*>(op.affine);

  const Tile<O, A> tile = tile_of(runtime, O{});
  const Packed<O> weight{buffer<O>(Buffer::kWeight, r * run_length * k), r * run_length, k,
                         tile.columns};
  if (std::is_same_v<S, O> && filters_are_rows(op.weight, shape))
    weight.fill_transposed(runtime, static_cast<const O*>(op.weight.data), op.weight.stride_k);
  else
    weight.fill(runtime, op.weight.stride_k, [&](int64_t row) {
      return weight_at<S>(op.weight, 0, row % c, row / run_length, row / c % shape.kernel_width);
    });

  const int64_t row_bytes = window.width * c * window.step_height * static_cast<int64_t>(sizeof(O));
  const int64_t weight_bytes = r * run_length * k * static_cast<int64_t>(sizeof(O));
  const Bands bands(shape.output, kCacheBytes / row_bytes, kMostParts, weight_bytes);
  const bool joined = window.step_height == 1 && window.step_width == 1 &&
                      rows_join(window.width, q, run_length * k);
  const int64_t pitch = joined ? window.width : q;  // of a tile's rows
  const int64_t tile_rows =
      rows_of_tile(pitch, k * static_cast<int64_t>(sizeof(A)), bands.rows_per_band);
  const bool adds_to_zeros = kAddsToZeros<O> && r > 1;

  PartialMoments moments(op.stats ? bands.parts.parts : 0, k);
  parallel_for(runtime, bands.parts.parts, [&](int64_t part) {
    const int64_t most_rows = window.rows(shape, bands.rows_per_band);
    O* const h = buffer<O>(Buffer::kSource, most_rows * window.width * c);
    A* const out = buffer<A>(Buffer::kTile, tile_rows * pitch * k);
    Ahead ahead = make_ahead<O>(runtime);
    const auto image_at = [&](int64_t band) {
      return static_cast<const S*>(op.input) +
             bands.image(band) * shape.input.height * shape.input.width * c;
    };
    const int64_t end_band = bands.parts.end(part);
    for (int64_t band = bands.parts.begin(part); band < end_band; ++band) {
      const int64_t image = bands.image(band), first = bands.first_row(band);
      const int64_t end = bands.end_row(band);
      window.fill(shape, image_at(band), first, end - first, affine, op.activation, h);
      for (int64_t row = first; row < end; row += tile_rows) {
        const int64_t rows = std::min(tile_rows, end - row);
        const int64_t calls = joined ? 1 : rows, m = joined ? (rows - 1) * pitch + q : q;
        const int64_t first_value = (image * p + row) * q * k;
        ahead.clear();
        ahead.want<S>(op.output, first_value, rows * q * k);
        ahead.want<S>(op.residual, first_value, rows * q * k);
        if (row + rows == end && band + 1 < end_band)
          window.want(shape, image_at(band + 1), bands.first_row(band + 1),
                      bands.end_row(band + 1) - bands.first_row(band + 1), ahead);
        if (adds_to_zeros) std::fill_n(out, rows * pitch * k, A(0));
        for (int64_t block = 0; block < weight.blocks(); ++block)
          for (int64_t i = 0; i < calls; ++i)
            for (int64_t tap = 0; tap < r; ++tap) {
              const int64_t source = ((row - first + i) * window.step_height + tap) * window.width;
              ahead.multiply<O, A>(
                  tile, m, weight.columns(block), run_length, window.step_width * c,
                  weight.columns(block), k, adds_to_zeros || tap > 0, h + source * c,
                  weight.at(block, tap * run_length), out + i * q * k + weight.first(block));
            }
        const int64_t runs = pitch == q ? 1 : rows, pixels = rows / runs * q;
        A* const sum = op.stats ? tile_sum<A>(k) : nullptr;
        for (int64_t run = 0; run < runs; ++run) {
          const int64_t offset = first_value + run * pixels * k;
          store_rows(out + run * pitch * k,
                     op.residual ? static_cast<const S*>(op.residual) + offset : nullptr, pixels, k,
                     static_cast<S*>(op.output) + offset, sum);
        }
        if (op.stats)
          add_tile(moments[part], static_cast<const S*>(op.output) + first_value, rows * q, k, sum);
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
  dispatch(runtime, op.dtype, op.shape.input.channels,
           [&]<typename S, typename O>(S, O) { run<S, O>(runtime, op); });
}

}  // namespace preact
