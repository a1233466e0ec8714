// residual_grad: du = grad + scale * g + B * (u - mean) + C, the end of BatchNorm's backward pass.
//   B = -scale * rstd * S2 / M, C = -scale * S1 / M.
// Reads grad, g and u, writes du.
#include "pixels.h"
#include "rows.h"

namespace preact {

void residual_grad(const Runtime& runtime, Dtype dtype, const ImageShape& shape, const void* grad,
                   const void* g, const void* input, const void* affine, const void* sums,
                   void* dinput) {
  dispatch(dtype, [&]<typename S>(S) {
    using A = Accumulator<S>;
    const PixelBlocks blocks(shape, sizeof(S));
    const int64_t channels = shape.channels;
    std::vector<A> coefficients(4 * channels);
    grad_coefficients(static_cast<const A*>(affine), static_cast<const A*>(sums), channels,
                      shape.pixels(), coefficients.data());
    blocks.parallel(runtime, [&](int64_t, int64_t first, int64_t count) {
      const int64_t offset = first * channels;
      residual_grad_rows(grad ? static_cast<const S*>(grad) + offset : nullptr,
                         static_cast<const S*>(g) + offset, static_cast<const S*>(input) + offset,
                         count, channels, coefficients.data(), static_cast<S*>(dinput) + offset);
    });
  });
}

}  // namespace preact
