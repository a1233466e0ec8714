// bn_relu_forward: h = act(scale * (u - mean) + shift).
// Reads u, writes h [M, C], 4*M*C bytes in 16 bits; bound by memory.
#include "bn.cuh"
#include "pointwise.cuh"

namespace preact {
namespace cuda {
namespace {

template <typename T, Activation kActivation>
__global__ __launch_bounds__(kPointwiseThreads,
                             2) void bn_relu_forward_kernel(const Pointwise p,
                                                            const T* u,           // [M, C]
                                                            const float* affine,  // [4, C]
                                                            T* h) {               // [M, C]
  const PointwiseThread me(p);
  const Affine bn(affine, p.channels, me.channel);
  me.for_each(p, [&](int64_t offset) {
    Piece v;
    load_piece(u + offset, me.valid, p.channels.vectors, v);
    store_raw_piece(h + offset, me.valid, p.channels.vectors,
                    bn.template activated<kActivation, T>(v));
  });
}

}  // namespace
}  // namespace cuda

void bn_relu_forward(const CudaRuntime& runtime, Dtype dtype, const ImageShape& shape,
                     Activation activation, const void* input, const void* affine, void* output) {
  using namespace cuda;
  const Pointwise p(shape, runtime, {input, affine, output});
  dispatch(dtype, activation, [&]<typename T, Activation kActivation>() {
    launch("bn_relu_forward", bn_relu_forward_kernel<T, kActivation>, p.grid, kPointwiseThreads, 0,
           runtime.device, runtime.stream, p, static_cast<const T*>(input),
           static_cast<const float*>(affine), static_cast<T*>(output));
  });
}

}  // namespace preact
