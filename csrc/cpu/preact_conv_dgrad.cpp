// preact_conv_dgrad: g = (dgrad(dy, W) + addend) * act'(z),  S1 = sum g,
//   S2 = sum g * (u - mean) * rstd;  dy = scale' * g' + B' * (u' - mean') + C' of the layer above.
// Reads g', u' [M', K] and u, addend [M, C]; writes g [M, C]; FLOPs 2*M'*K*C*R*S.
//
// The pixels of u that have the same place in the stride's grid (its phase) are reached by the same
// taps, so that for each phase dgrad is a small convolution of stride 1 over dy.
#include "conv.h"
#include "statistics.h"

namespace preact {
namespace {

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
void run(const Runtime& runtime, const PreactConvDgrad& op) {
  using A = Accumulator<S>;
  const ConvShape shape = flattened(op.shape);
  const int64_t c = shape.input.channels, k = shape.output.channels;
  const int64_t height = shape.input.height, width = shape.input.width;
  const int64_t p = shape.output.height, q = shape.output.width;
  const int64_t r = shape.kernel_height, s = shape.kernel_width;
  const int64_t stride_h = shape.stride_height, stride_w = shape.stride_width;
  const int64_t top = shape.pad_top, left = shape.pad_left;
  const A* const affine = static_cast<const A*>(op.affine);

  // weights of each phase, [taps down, taps across (backwards), K] by C
  std::vector<Phase> down, across;
  for (int64_t i = 0; i < stride_h; ++i) down.emplace_back(i, r, stride_h, top, height);
  for (int64_t j = 0; j < stride_w; ++j) across.emplace_back(j, s, stride_w, left, width);
  std::vector<Packed<O>> weights;
  O* packed = buffer<O>(Buffer::kWeight, r * s * k * c);
  bool every_pixel_reached = true;
  for (int64_t i = 0; i < stride_h; ++i)
    for (int64_t j = 0; j < stride_w; ++j) {
      const int64_t taps_across = across[j].taps;
      const Packed<O>& weight =
          weights.emplace_back(Packed<O>{packed, down[i].taps * taps_across * k, c});
      packed += weight.k * c;
      every_pixel_reached = every_pixel_reached && weight.k > 0;
      weight.fill(runtime, op.weight.stride_c, [&](int64_t row) {
        const int64_t t = row / (taps_across * k), u = taps_across - 1 - row / k % taps_across;
        return weight_at<S>(op.weight, row % k, 0, i + stride_h * t, j + stride_w * u);
      });
    }

  // what a band reads of dy: rows [first_p, last_p], columns [first_q, first_q + source_width)
  const auto first_p = [&](int64_t x) { return ceil_div(x + top - (r - 1), stride_h); };
  const auto last_p = [&](int64_t x) { return floor_div(x + top, stride_h); };
  const int64_t first_q = ceil_div(left - (s - 1), stride_w);
  const int64_t source_width = floor_div(width - 1 + left, stride_w) - first_q + 1;
  const int64_t begin_q = std::clamp<int64_t>(-first_q, 0, source_width);
  const int64_t end_q = std::clamp<int64_t>(q - first_q, begin_q, source_width);
  const bool dense = begin_q == 0 && end_q == source_width && source_width == q;

  const OutputGradient<S> grad(op.grad, shape.output);

  const int64_t row_bytes =
      std::max<int64_t>(source_width, 1) * k * static_cast<int64_t>(sizeof(O));
  const int64_t weight_bytes = r * s * k * c * static_cast<int64_t>(sizeof(O));
  const Bands bands(shape.input, kCacheBytes * stride_h / row_bytes, kMostParts, weight_bytes);
  const bool joined = stride_h == 1 && stride_w == 1 && rows_join(source_width, width, s * k * c);
  const int64_t pitch = joined ? source_width : width;  // of a tile's rows
  const int64_t tile_rows =
      rows_of_tile(pitch, c * static_cast<int64_t>(sizeof(A)), bands.rows_per_band);
  const Tile<O, A> tile = tile_of(runtime, O{});

  PartialSums partial(op.sums ? bands.parts.parts : 0, c);
  parallel_for(runtime, bands.parts.parts, [&](int64_t part) {
    const int64_t most_rows = bands.rows_per_band / stride_h + r + 1;
    O* const loaded = buffer<O>(Buffer::kSource, most_rows * source_width * k);
    A* const out = buffer<A>(Buffer::kTile, tile_rows * pitch * c);
    A* const tile_sums = op.sums ? buffer<A>(Buffer::kVectors, 2 * c) : nullptr;
    if (op.sums) std::fill_n(tile_sums, 2 * c, A(0));
    for (int64_t band = bands.parts.begin(part); band < bands.parts.end(part); ++band) {
      const int64_t image = bands.image(band), first = bands.first_row(band);
      const int64_t end = bands.end_row(band);

      const int64_t source_first = first_p(first), source_last = last_p(end - 1);
      const int64_t inside_first = std::max<int64_t>(source_first, 0);
      const int64_t inside_last = std::min(source_last, p - 1);
      const O* dy = loaded;
      if (dense && inside_first == source_first && inside_last == source_last) {
        const int64_t pixel = (image * p + source_first) * q;
        if constexpr (std::is_same_v<S, O>)
          if (grad.plain()) dy = grad.plain() + pixel * k;
        if (dy == loaded) grad.load(pixel, (source_last - source_first + 1) * q, loaded);
      } else {
        for (int64_t y = source_first; y <= source_last; ++y) {
          O* const row = loaded + (y - source_first) * source_width * k;
          if (y < 0 || y >= p) {
            std::fill_n(row, source_width * k, O{});
            continue;
          }
          std::fill_n(row, begin_q * k, O{});
          std::fill_n(row + end_q * k, (source_width - end_q) * k, O{});
          grad.load((image * p + y) * q + first_q + begin_q, end_q - begin_q, row + begin_q * k);
        }
      }

      for (int64_t row = first; row < end; row += tile_rows) {
        const int64_t rows = std::min(tile_rows, end - row);
        if (!every_pixel_reached) std::fill_n(out, rows * pitch * c, A(0));
        for (int64_t x = row; x < (joined ? row + 1 : row + rows); ++x) {
          const int64_t phase_h = (x + top) % stride_h, i = (x + top) / stride_h;
          for (int64_t j = 0; j < stride_w; ++j) {
            const Phase& phase = across[j];
            const Packed<O>& weight = weights[phase_h * stride_w + j];
            const int64_t run_length = phase.taps * k;
            if (run_length == 0 || phase.pixels == 0) continue;
            for (int64_t block = 0; block < weight.blocks(); ++block)
              for (int64_t t = 0; t < down[phase_h].taps; ++t) {
                const int64_t y = i - t - source_first;
                const int64_t column = phase.first_i - (phase.taps - 1) - first_q;
                tile(joined ? (rows - 1) * pitch + width : phase.pixels, weight.columns(block),
                     run_length, k, weight.columns(block), stride_w * c, t > 0,
                     dy + (y * source_width + column) * k, weight.at(block, t * run_length),
                     out + ((x - row) * pitch + phase.first_x) * c + block * kColumnBlock);
              }
          }
        }
        const int64_t runs = pitch == width ? 1 : rows, pixels = rows / runs * width;
        for (int64_t run = 0; run < runs; ++run) {
          A* const dh = out + run * pitch * c;
          const int64_t offset = ((image * height + row) * width + run * pixels) * c;
          const S* const addend = op.addend ? static_cast<const S*>(op.addend) + offset : nullptr;
          S* const g = static_cast<S*>(op.g) + offset;
          if (affine)
            slope_rows(dh, addend, static_cast<const S*>(op.input) + offset, pixels, c, affine,
                       op.activation, g, tile_sums, op.sums ? tile_sums + c : nullptr);
          else
            store_rows(dh, addend, pixels, c, g, nullptr);
        }
        if (op.sums) partial.add(part, tile_sums);
      }
    }
  });
  if (op.sums) partial.finish(affine + c, static_cast<A*>(op.sums));
}

}  // namespace

void preact_conv_dgrad(const Runtime& runtime, const PreactConvDgrad& op) {
  dispatch(runtime, op.dtype, op.shape.output.channels,
           [&]<typename S, typename O>(S, O) { run<S, O>(runtime, op); });
}

}  // namespace preact
