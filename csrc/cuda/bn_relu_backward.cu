// bn_relu_backward: g = dh * act'(z),  S1 = sum g,  S2 = sum g * (u - mean) * rstd; or with frozen
//   statistics du = residual + scale * g.
// Reads dh, u (and residual), writes g [M, C], 6 (8) * M*C bytes in 16 bits; bound by memory.
#include "bn.cuh"
#include "pointwise.cuh"

namespace preact {
namespace cuda {
namespace {

template <typename T, Activation kActivation>
__global__ __launch_bounds__(kPointwiseThreads,
                             2) void bn_relu_backward_kernel(const Pointwise p,
                                                             const ReductionMemory memory,
                                                             const T* dh,          // [M, C]
                                                             const T* u,           // [M, C]
                                                             const float* affine,  // [4, C]
                                                             bool frozen,
                                                             const T* residual,  // [M, C] or null
                                                             T* g,               // [M, C]
                                                             float* sums) {      // [2, C] or null
  const PointwiseThread me(p);
  const Affine bn(affine, p.channels, me.channel);
  PieceSums mine;
  me.for_each(p, [&](int64_t offset) {
    Piece v, x;
    load_piece(dh + offset, me.valid, p.channels.vectors, v);
    load_piece(u + offset, me.valid, p.channels.vectors, x);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) v[j] *= slope<kActivation>(bn.z(j, x[j]));
    if (frozen) {
      mine.add(v, x, bn.mean);
      end_frozen(residual, offset, me.valid, p.channels.vectors, bn, v);
      return store_piece(g + offset, me.valid, p.channels.vectors, v);
    }
    store_piece(g + offset, me.valid, p.channels.vectors, v);
    round_piece<T>(v);
    mine.add(v, x, bn.mean);
  });
  if (!sums) return;
  const int64_t row = p.channels.count;
  reduce(me.reduction(p, memory), mine, me.column, me.row, p.rows,
         reinterpret_cast<float*>(shared_memory()), [&](int64_t c, const Sums& total) {
           store(sums + c, total.s1);
           store(sums + row + c, total.s2 * load(affine + row + c));
         });
}

}  // namespace
}  // namespace cuda

void bn_relu_backward(const CudaRuntime& runtime, Dtype dtype, const ImageShape& shape,
                      Activation activation, const void* grad, const void* input,
                      const void* affine, bool frozen, const void* residual, void* g, void* sums) {
  using namespace cuda;
  const Pointwise p(shape, runtime, {grad, input, affine, residual, g});
  ReductionMemory memory;
  if (sums) memory = {runtime, Sums::kValues, p.grid.x, shape.channels, p.grid.y};
  dispatch(dtype, activation, [&]<typename T, Activation kActivation>() {
    launch("bn_relu_backward", bn_relu_backward_kernel<T, kActivation>, p.grid, kPointwiseThreads,
           p.shared_bytes(Sums::kValues), runtime.device, runtime.stream, p, memory,
           static_cast<const T*>(grad), static_cast<const T*>(input),
           static_cast<const float*>(affine), frozen, static_cast<const T*>(residual),
           static_cast<T*>(g), static_cast<float*>(sums));
  });
}

}  // namespace preact
