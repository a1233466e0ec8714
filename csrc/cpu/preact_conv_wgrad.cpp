// preact_conv_wgrad: dW = sum over pixels of dy h^T;  h = act(scale * (u - mean) + shift) is
//   computed again, dy = scale' * g' + B' * (u' - mean') + C' of the layer above.
// Reads g', u' [M', K] and u [M, C]; writes dW [K, R, S, C]; FLOPs 2*M'*K*C*R*S.
//
// Each part of the work sums its own dW over its bands; the parts are added in order. For each tap,
// dW is a matrix product over pixels: h transposed, shifted by the tap, times dy. dy is laid out as
// wide as h's window, zero at its right, so that all rows of a band are one product.
#include "conv.h"

namespace preact {
namespace {

constexpr int64_t kFewestParts = 8, kMostWgradParts = 32;
constexpr int64_t kSumChunk = 256, kFilters = 16;
constexpr int64_t kProductRows = 128, kProductColumns = 256;  // of one matrix product
// Bands whose operands are there together for each block of dW.
constexpr int64_t kGroupBytes = 512 * 1024, kMostTogether = 16;

template <typename S, typename O>
void run(const Runtime& runtime, const PreactConvWgrad& op) {
  using A = Accumulator<S>;
  const ConvShape shape = flattened(op.shape);
  const Window window(shape);
  const int64_t c = shape.input.channels, k = shape.output.channels;
  const int64_t p = shape.output.height, q = shape.output.width;
  const int64_t r = shape.kernel_height, s = shape.kernel_width;
  const int64_t size = r * s * k * c;
  const A* const affine = static_cast<const A*>(op.affine);

  const OutputGradient<S> grad(op.grad, shape.output);

  // The left operand is transposed: h; or of a 1x1 convolution dy, which leaves dW as it should
  // lie, unless that is the wider one and pixels are many.
  const bool transposes_h = r * s > 1 || (c < k && shape.output.pixels() > 4 * c);
  const int64_t product_rows = transposes_h ? c : k, product_columns = transposes_h ? k : c;
  // Columns of the window a stride apart lie in a plane of their own.
  const int64_t step = window.step_width, plane_width = ceil_div(window.width, step);
  const bool joined = window.step_height == 1;  // all rows of a band in one product
  const int64_t pitch = joined ? plane_width : round_depth<O>(q);  // of dy's rows
  const bool dy_as_it_lies = std::is_same_v<S, O> && grad.plain() && pitch == q;

  const int64_t row_bytes =
      std::max(window.width * c * window.step_height, pitch * k) * static_cast<int64_t>(sizeof(O));
  // so many that all their dW are no more than the operands
  const int64_t values = shape.input.pixels() * c + shape.output.pixels() * k;
  const int64_t most_parts = std::clamp(values / size, kFewestParts, kMostWgradParts);
  const Bands bands(shape.output, kCacheBytes / row_bytes, most_parts, 0);
  // [parts][R, S, product_rows, product_columns]
  A* const partial = buffer<A>(Buffer::kWeight, bands.parts.parts * size);

  const int64_t most_rows = bands.rows_per_band, most_window = window.rows(shape, most_rows);
  // A row of a plane ends with a zero; an odd number of cache lines sets rows apart in the cache.
  const int64_t line = 64 / static_cast<int64_t>(sizeof(O));
  const int64_t ld = (ceil_div(most_window * plane_width + 1, line) | 1) * line;
  const int64_t plane = product_rows * ld, left_size = step * plane;
  const int64_t right_size = round_depth<O>(most_rows * pitch) * product_columns;
  const int64_t group = std::clamp<int64_t>(
      kGroupBytes / ((left_size + right_size) * static_cast<int64_t>(sizeof(O))), 1, kMostTogether);
  const Tile<O, A> tile = tile_of(runtime, O{});

  parallel_for(runtime, bands.parts.parts, [&](int64_t part) {
    const int64_t h_size = most_window * window.width * c;
    O* const source = buffer<O>(Buffer::kSource, transposes_h ? h_size : most_rows * q * k);
    O* const unpaired = kPairs<O> ? buffer<O>(Buffer::kGrad, right_size) : nullptr;
    O* const left = buffer<O>(Buffer::kTransposed, group * left_size);
    O* const right = buffer<O>(Buffer::kPaired, group * right_size);
    A* const dweight = partial + part * size;

    // the operands of one band; returns the right one
    const auto prepare = [&](int64_t band, O* transposed, O* other) -> const O* {
      const int64_t image = bands.image(band), first = bands.first_row(band);
      const int64_t rows = bands.end_row(band) - first;
      O* const plain = kPairs<O> ? unpaired : other;
      O* const h = transposes_h ? source : plain;
      O* const dy = transposes_h ? plain : source;

      const S* const u =
          static_cast<const S*>(op.input) + image * shape.input.height * shape.input.width * c;
      window.fill(shape, u, first, rows, affine, op.activation, h);
      const O* right_operand = plain;
      if (transposes_h && dy_as_it_lies && rows * q % 2 == 0) {
        right_operand = static_cast<const O*>(op.grad.grad) + (image * p + first) * q * k;
      } else if (pitch == q) {
        grad.load((image * p + first) * q, rows * q, dy);
      } else {
        for (int64_t row = 0; row < rows; ++row) {
          O* const out = dy + row * pitch * k;
          grad.load((image * p + first + row) * q, q, out);
          std::fill_n(out + q * k, (pitch - q) * k, O{});
        }
      }

      const int64_t pixels = transposes_h ? window.rows(shape, rows) * plane_width : rows * q;
      for (int64_t i = 0; i < step; ++i) {
        O* const out = transposed + i * plane;
        if (step == 1) {
          transpose(source, pixels, product_rows, product_rows, ld, out);
        } else {
          const int64_t columns = ceil_div(window.width - i, step);
          for (int64_t row = 0; row < pixels / plane_width; ++row) {
            transpose(source + (row * window.width + i) * c, columns, c, step * c, ld,
                      out + row * plane_width);
            if (columns < plane_width)
              for (int64_t j = 0; j < c; ++j) out[j * ld + row * plane_width + columns] = O{};
          }
        }
        for (int64_t j = 0; j < product_rows; ++j) out[j * ld + pixels] = O{};
      }
      if constexpr (kPairs<O>) {
        const int64_t count = rows * pitch;
        std::fill_n(plain + count * product_columns, count % 2 * product_columns, O{});
        pair_rows(right_operand, round_depth<O>(count), product_columns, other);
        return other;
      }
      return right_operand;
    };

    for (int64_t band = bands.parts.begin(part); band < bands.parts.end(part); band += group) {
      const int64_t count = std::min(group, bands.parts.end(part) - band);
      const O* operands[kMostTogether];
      for (int64_t i = 0; i < count; ++i)
        operands[i] = prepare(band + i, left + i * left_size, right + i * right_size);
      for (int64_t tap = 0; tap < r * s; ++tap)
        for (int64_t row = 0; row < product_rows; row += kProductRows)
          for (int64_t column = 0; column < product_columns; column += kProductColumns)
            for (int64_t i = 0; i < count; ++i) {
              const int64_t rows = bands.end_row(band + i) - bands.first_row(band + i);
              const int64_t calls = joined ? 1 : rows;
              const int64_t depth = round_depth<O>(joined ? (rows - 1) * pitch + q : q);
              const O* const a = left + i * left_size + tap % s % step * plane + row * ld +
                                 tap / s * plane_width + tap % s / step;
              const O* const b = operands[i] + column * (kPairs<O> ? 2 : 1);
              for (int64_t call = 0; call < calls; ++call)
                tile(
                    std::min(kProductRows, product_rows - row),
                    std::min(kProductColumns, product_columns - column), depth, ld, product_columns,
                    product_columns, band + i > bands.parts.begin(part) || call > 0,
                    a + call * window.step_height * plane_width, b + call * pitch * product_columns,
                    dweight + (tap * product_rows + row) * product_columns + column);
            }
    }
  });

  // the parts' sum, in order, where it lies as in dW, or into the first
  A* const dweight = static_cast<A*>(op.dweight);
  A* const sum = transposes_h ? partial : dweight;
  const Parts chunks(ceil_div(size, kSumChunk), kMostParts);
  parallel_for(runtime, chunks.parts, [&](int64_t chunk) {
    const int64_t begin = chunks.begin(chunk) * kSumChunk;
    const int64_t end = std::min(size, chunks.end(chunk) * kSumChunk);
    if (sum != partial) std::copy(partial + begin, partial + end, sum + begin);
    for (int64_t j = 1; j < bands.parts.parts; ++j)
      sum_rows(partial + j * size + begin, 1, end - begin, sum + begin);
  });
  if (!transposes_h) return;
  const int64_t row = r * s * c;  // of dW
  parallel_for(runtime, ceil_div(k, kFilters), [&](int64_t block) {
    const int64_t first = block * kFilters;
    transpose(partial + first, row, std::min(kFilters, k - first), k, row, dweight + first * row);
  });
}

}  // namespace

void preact_conv_wgrad(const Runtime& runtime, const PreactConvWgrad& op) {
  dispatch(runtime, op.dtype, 2, [&]<typename S, typename O>(S, O) { run<S, O>(runtime, op); });
}

}  // namespace preact
