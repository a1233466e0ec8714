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
  const A* const affine = static_cast<const A*>(op.affine);

  std::vector<A> coefficients;
  if (op.grad.output) {
    coefficients.resize(4 * k);
    grad_coefficients(static_cast<const A*>(op.grad.affine), static_cast<const A*>(op.grad.sums), k,
                      shape.output.pixels(), coefficients.data());
  }

  const int64_t row_bytes = std::max(window.width * c * window.step_height, q * k) *
                            static_cast<int64_t>(sizeof(A));
  const int64_t most_parts = std::clamp<int64_t>(
      kPartialBytes / (size * static_cast<int64_t>(sizeof(A))), kFewestParts, kMostWgradParts);
  const Bands bands(shape.output, kCacheBytes / row_bytes, most_parts);
  A* const partial = buffer<A>(Buffer::kWeight, bands.parts.parts * size);  // [parts][R, K, S * C]

  // With stride 1 a band is one product: dy is laid out as wide as the window, zero at the right.
  const bool joined = window.step_height == 1 && window.step_width == 1;
  const int64_t pitch = joined ? window.width : q;  // of dy's rows
  const Tile<A> tile = tile_of(runtime, A{});

  parallel_for(runtime, bands.parts.parts, [&](int64_t part) {
    const int64_t most_rows = bands.rows_per_band;
    A* const h = buffer<A>(Buffer::kSource, window.rows(shape, most_rows) * window.width * c);
    A* const dy = buffer<A>(Buffer::kGrad, most_rows * q * k);
    A* const transposed = buffer<A>(Buffer::kTransposed, most_rows * pitch * k);  // [K, rows, pitch]
    A* const dweight = partial + part * size;
    for (int64_t band = bands.parts.begin(part); band < bands.parts.end(part); ++band) {
      const int64_t image = bands.image(band), first = bands.first_row(band);
      const int64_t rows = bands.end_row(band) - first, ld = rows * pitch;
      const S* const u =
          static_cast<const S*>(op.input) + image * shape.input.height * shape.input.width * c;
      window.fill(shape, u, first, rows, affine, op.activation, h);

      const int64_t offset = (image * p + first) * q * k;
      output_grad_rows(static_cast<const S*>(op.grad.grad) + offset,
                       op.grad.output ? static_cast<const S*>(op.grad.output) + offset : nullptr,
                       rows * q, k, coefficients.data(), dy);
      if (pitch == q) {
        transpose(dy, rows * q, k, ld, transposed);
      } else {
        std::fill_n(transposed, ld * k, A(0));
        for (int64_t row = 0; row < rows; ++row)
          transpose(dy + row * q * k, q, k, ld, transposed + row * pitch);
      }

      const int64_t calls = joined ? 1 : rows, pixels = joined ? (rows - 1) * pitch + q : q;
      for (int64_t tap = 0; tap < r; ++tap)
        for (int64_t column = 0; column < run_length; column += kProductColumns)
          for (int64_t row = 0; row < calls; ++row) {
            const int64_t source = (row * window.step_height + tap) * window.width * c + column;
            const bool accumulate = band > bands.parts.begin(part) || row > 0;
            tile(k, std::min(kProductColumns, run_length - column), pixels, ld,
                 window.step_width * c, run_length, accumulate, transposed + row * pitch,
                 h + source, dweight + tap * k * run_length + column);
          }
    }
  });

  const Parts outputs(k, kMostParts);
  parallel_for(runtime, outputs.parts, [&](int64_t part) {
    for (int64_t i = outputs.begin(part); i < outputs.end(part); ++i)
      for (int64_t tap = 0; tap < r; ++tap)
        for (int64_t column = 0; column < run_length; ++column) {
          A sum = 0;
          for (int64_t j = 0; j < bands.parts.parts; ++j)
            sum += partial[j * size + (tap * k + i) * run_length + column];
          const int64_t channel = column % c, across = column / c;
          static_cast<A*>(op.dweight)[((i * c + channel) * r + tap) * s + across] = sum;
        }
  });
}

}  // namespace

void preact_conv_wgrad(const Runtime& runtime, const PreactConvWgrad& op) {
  dispatch(op.dtype, [&]<typename S>(S) { run<S>(runtime, op); });
}

}  // namespace preact
