// preact_conv_wgrad: dW = sum over pixels of dy h^T;  h = act(scale * (u - mean) + shift) is
//   computed again, dy = scale' * g' + B' * (u' - mean') + C' of the layer above.
// Reads g', u' [M', K] and u [M, C]; writes dW [K, C, R, S]; FLOPs 2*M'*K*C*R*S.
//
// Each part of the work sums its own dW over its bands; the parts are added in order.
#include "conv.h"

namespace preact {
namespace {

constexpr int64_t kPartialBytes = 32 << 20;  // of all parts' dW together, where they are large
constexpr int64_t kFewestParts = 8, kMostWgradParts = 32;
constexpr int64_t kProductColumns = 256;  // of one matrix product

template <typename S>
void run(const Runtime& runtime, const PreactConvWgrad& op) {
  using A = Accumulator<S>;
  const ConvShape shape = flattened(op.shape);
  const Window window(shape);
  const int64_t c = shape.input.channels, k = shape.output.channels;
  const int64_t p = shape.output.height, q = shape.output.width;
  const int64_t r = shape.kernel_height, s = shape.kernel_width, run_length = s * c;
  const int64_t size = r * k * run_length;
  // One operand of the product is transposed: dy, or of a 1x1 convolution the narrower one.
  const bool transposes_h = r == 1 && s == 1 && c < k;
  const int64_t product_rows = transposes_h ? c : k,
                product_columns = transposes_h ? k : run_length;
  const A* const affine = static_cast<const A*>(op.affine);

  std::vector<A> coefficients;
  if (op.grad.output) {
    coefficients.resize(4 * k);
    grad_coefficients(static_cast<const A*>(op.grad.affine), static_cast<const A*>(op.grad.sums), k,
                      shape.output.pixels(), coefficients.data());
  }

  const int64_t row_bytes =
      std::max(window.width * c * window.step_height, q * k) * static_cast<int64_t>(sizeof(A));
  const int64_t most_parts = std::clamp<int64_t>(
      kPartialBytes / (size * static_cast<int64_t>(sizeof(A))), kFewestParts, kMostWgradParts);
  const Bands bands(shape.output, kCacheBytes / row_bytes, most_parts);
  // [parts][R, product_rows, product_columns]
  A* const partial = buffer<A>(Buffer::kWeight, bands.parts.parts * size);

  // With stride 1 a band is one product: dy is laid out as wide as the window, zero at the right.
  const bool joined = window.step_height == 1 && window.step_width == 1;
  const int64_t pitch = joined ? window.width : q;  // of dy's rows
  // of a channel's pixels; an odd number of cache lines, so that channels fall into different sets
  const int64_t line = 64 / static_cast<int64_t>(sizeof(A));
  const int64_t ld = (ceil_div(bands.rows_per_band * pitch, line) | 1) * line;
  const Tile<A> tile = tile_of(runtime, A{});

  parallel_for(runtime, bands.parts.parts, [&](int64_t part) {
    const int64_t most_rows = bands.rows_per_band;
    A* const h = buffer<A>(Buffer::kSource, window.rows(shape, most_rows) * window.width * c);
    A* const dy = buffer<A>(Buffer::kGrad, most_rows * q * k);
    A* const transposed = buffer<A>(Buffer::kTransposed, ld * product_rows);  // pixels last
    A* const dweight = partial + part * size;
    for (int64_t band = bands.parts.begin(part); band < bands.parts.end(part); ++band) {
      const int64_t image = bands.image(band), first = bands.first_row(band);
      const int64_t rows = bands.end_row(band) - first;
      const S* const u =
          static_cast<const S*>(op.input) + image * shape.input.height * shape.input.width * c;
      window.fill(shape, u, first, rows, affine, op.activation, h);

      const int64_t offset = (image * p + first) * q * k;
      output_grad_rows(static_cast<const S*>(op.grad.grad) + offset,
                       op.grad.output ? static_cast<const S*>(op.grad.output) + offset : nullptr,
                       rows * q, k, coefficients.data(), dy);
      if (pitch == q) {
        transpose(transposes_h ? h : dy, rows * q, product_rows, ld, transposed);
      } else {
        std::fill_n(transposed, ld * k, A(0));
        for (int64_t row = 0; row < rows; ++row)
          transpose(dy + row * q * k, q, k, ld, transposed + row * pitch);
      }

      const int64_t calls = joined ? 1 : rows, pixels = joined ? (rows - 1) * pitch + q : q;
      const A* const right = transposes_h ? dy : h;
      const int64_t ld_right = transposes_h ? k : window.step_width * c;
      for (int64_t tap = 0; tap < r; ++tap)
        for (int64_t column = 0; column < product_columns; column += kProductColumns)
          for (int64_t row = 0; row < calls; ++row) {
            const int64_t source = (row * window.step_height + tap) * window.width * c + column;
            const bool accumulate = band > bands.parts.begin(part) || row > 0;
            tile(product_rows, std::min(kProductColumns, product_columns - column), pixels, ld,
                 ld_right, product_columns, accumulate, transposed + row * pitch, right + source,
                 dweight + tap * k * run_length + column);
          }
    }
  });

  // the parts' sum, in order, into the first; then each value to its place in dW
  const Parts chunks(ceil_div(size, kProductColumns), kMostParts);
  parallel_for(runtime, chunks.parts, [&](int64_t chunk) {
    const int64_t begin = chunks.begin(chunk) * kProductColumns;
    const int64_t end = std::min(size, chunks.end(chunk) * kProductColumns);
    for (int64_t j = 1; j < bands.parts.parts; ++j)
      sum_rows(partial + j * size + begin, 1, end - begin, partial + begin);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i % product_columns, row = i / product_columns % product_rows;
      const int64_t tap = i / (product_columns * product_rows);
      const int64_t output = transposes_h ? column : row, source = transposes_h ? row : column;
      const int64_t place = ((output * c + source % c) * r + tap) * s + source / c;
      static_cast<A*>(op.dweight)[place] = partial[i];
    }
  });
}

}  // namespace

void preact_conv_wgrad(const Runtime& runtime, const PreactConvWgrad& op) {
  dispatch(op.dtype, [&]<typename S>(S) { run<S>(runtime, op); });
}

}  // namespace preact
