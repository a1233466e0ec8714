// preact_conv_forward: y = conv(h, W) + residual, h = act(scale * (u - mean) + shift), and the mean
// and variance of y, with the affine of the BatchNorm that reads it.
// Reads u [M, C] once for each 64 to 256 output channels (from the cache after the first) with the
// halo of its patches, the residual [M', K], the weights; writes y [M', K]. FLOPs 2*M'*K*C*R*S.
#include "conv_tiles.cuh"
#include "sm90/warpgroups.h"

namespace preact {
namespace cuda {
namespace {

template <typename T, class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void preact_conv_forward_kernel(
    const ConvTiling tiling, const Axis rows, const Axis columns,
    const Activated<T, Tile::kSilu> source, const Weight weight, const ForwardEpilogue<T> epilogue,
    const ReductionMemory memory,
    float* stats,  // [2, K] or null
    const AffineMaker next) {
  const int64_t k = tiling.output_channels;
  const float pixels = static_cast<float>(tiling.images * rows.outputs * columns.outputs);
  conv_tiles<T, false, Tile>(tiling, rows, columns, source, weight, epilogue.channels, rows.outputs,
                             columns.outputs, epilogue, memory,
                             [&](int64_t c, const Moments& total) {
                               const float mean = total.mean(), variance = total.squares / pixels;
                               store(stats + c, mean);
                               store(stats + k + c, variance);
                               if (next.affine) next.make(k, c, mean, variance);
                             });
}

}  // namespace
}  // namespace cuda

void preact_conv_forward(const CudaRuntime& runtime, const PreactConvForward& op) {
  using namespace cuda;
#ifdef PREACT_SM90
  if (forward_by_warpgroups(runtime, op)) return;
#endif
  const ConvShape s = flattened(op.shape);
  const int64_t images = s.input.images, c = s.input.channels, k = s.output.channels;
  const Axis rows = forward_axis(s.input.height, s.output.height, 0,
                                 static_cast<int>(s.kernel_height), s.stride_height, s.pad_top);
  const Axis columns = forward_axis(s.input.width, s.output.width, 0,
                                    static_cast<int>(s.kernel_width), s.stride_width, s.pad_left);
  dispatch_conv_dtype(op, [&]<typename T>() {
    choose_tile<T>(runtime, op.activation, s.output.pixels(), k, c, [&]<class Tile>() {
      const int64_t groups = ceil_div(k, Tile::kChannels);
      const auto kernel = preact_conv_forward_kernel<T, Tile>;
      const auto [tiling, grid] = tile_conv<T, false, Tile>(runtime, kernel, images, rows, columns,
                                                            op.weight, c, k, false, 1);
      const int64_t parts = grid.x / groups;
      ReductionMemory memory;
      if (op.stats) memory = {runtime, Moments::kValues, parts, k, groups};
      const Activated<T, Tile::kSilu> source{channels_of(c, {op.input, op.affine}),
                                             static_cast<const T*>(op.input),
                                             static_cast<const float*>(op.affine), op.activation};
      launch("preact_conv_forward", kernel, grid, Tile::kThreads, tiling.shared.total,
             runtime.device, runtime.stream, tiling, rows, columns, source, op.weight,
             ForwardEpilogue<T>(op), memory, static_cast<float*>(op.stats),
             AffineMaker(op.next.weight, op.next.bias, op.next.eps, op.next.affine));
    });
  });
}

}  // namespace preact
