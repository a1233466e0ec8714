// residual_grad: du = dy + scale * g + B * (u - mean) + C, B = -scale * rstd * S2 / M,
//   C = -scale * S1 / M: the end of BatchNorm's backward pass, joined with the shortcut's gradient.
// Reads dy, g, u, writes du [M, C], 8*M*C bytes in 16 bits; bound by memory.
#include "bn.cuh"
#include "pointwise.cuh"

namespace preact {
namespace cuda {
namespace {

template <typename T>
__global__ __launch_bounds__(kPointwiseThreads,
                             2) void residual_grad_kernel(const Pointwise p,
                                                          const T* dy,          // [M, C] or null
                                                          const T* g,           // [M, C]
                                                          const T* u,           // [M, C]
                                                          const float* affine,  // [4, C]
                                                          const float* sums,    // [2, C]
                                                          T* du) {              // [M, C]
  const PointwiseThread me(p);
  const BnGrad<T> bn(affine, sums, 1.f / static_cast<float>(p.pixels), p.channels, me.channel);
  me.for_each(p, [&](int64_t offset) {
    Piece v, x, added{};
    load_piece(g + offset, me.valid, p.channels.vectors, v);
    load_piece(u + offset, me.valid, p.channels.vectors, x);
    if (dy) load_piece(dy + offset, me.valid, p.channels.vectors, added);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) v[j] = added[j] + bn.du(j, v[j], x[j]);
    store_piece(du + offset, me.valid, p.channels.vectors, v);
  });
}

}  // namespace
}  // namespace cuda

void residual_grad(const CudaRuntime& runtime, Dtype dtype, const ImageShape& shape,
                   const void* grad, const void* g, const void* input, const void* affine,
                   const void* sums, void* dinput) {
  using namespace cuda;
  const Pointwise p(shape, runtime, {grad, g, input, affine, sums, dinput});
  dispatch_dtype(dtype, [&]<typename T>() {
    launch("residual_grad", residual_grad_kernel<T>, p.grid, kPointwiseThreads, 0, runtime.device,
           runtime.stream, p, static_cast<const T*>(grad), static_cast<const T*>(g),
           static_cast<const T*>(input), static_cast<const float*>(affine),
           static_cast<const float*>(sums), static_cast<T*>(dinput));
  });
}

}  // namespace preact
