// bn_stats: mean and biased variance of each channel of u [M, C].
// Reads u once, 2*M*C bytes in 16 bits; a few FLOPs a value: bound by memory.
#include "pointwise.cuh"

namespace preact {
namespace cuda {
namespace {

template <typename T>
__global__ __launch_bounds__(kPointwiseThreads,
                             2) void bn_stats_kernel(const Pointwise p,
                                                     const ReductionMemory memory,
                                                     const T* u,      // [M, C]
                                                     float* stats) {  // [2, C]
  const PointwiseThread me(p);
  PieceMoments moments;
  me.for_each(p, [&](int64_t offset) {
    Piece v;
    load_piece(u + offset, me.valid, p.channels.vectors, v);
    moments.add(v);
  });
  reduce(me.reduction(p, memory), moments, me.column, me.row, p.rows,
         reinterpret_cast<float*>(shared_memory()), [&](int64_t c, const Moments& total) {
           store(stats + c, total.mean());
           store(stats + p.channels.count + c, total.squares / static_cast<float>(p.pixels));
         });
}

}  // namespace
}  // namespace cuda

void bn_stats(const CudaRuntime& runtime, Dtype dtype, const ImageShape& shape, const void* input,
              void* stats) {
  using namespace cuda;
  const Pointwise p(shape, runtime, {input});
  const ReductionMemory memory(runtime, Moments::kValues, p.grid.x, shape.channels, p.grid.y);
  dispatch_dtype(dtype, [&]<typename T>() {
    launch("bn_stats", bn_stats_kernel<T>, p.grid, kPointwiseThreads,
           p.shared_bytes(Moments::kValues), runtime.device, runtime.stream, p, memory,
           static_cast<const T*>(input), static_cast<float*>(stats));
  });
}

}  // namespace preact
