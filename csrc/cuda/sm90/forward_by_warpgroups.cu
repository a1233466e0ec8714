// preact_conv_forward by wgmma:
//   y = conv(h, W) + residual, h = act(scale * (u - mean) + shift), and the mean and variance of y.
// Reads u [M, C] once for each 64 or 128 output channels (from the cache after the first) with the
// halo of its tiles, the residual [M', K], the weights for each 128 or 256 positions; writes y
// [M', K]. FLOPs 2*M'*K*C*R*S.
#include "choose.cuh"

namespace preact::cuda {

namespace {

template <typename T, class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kResident) void forward_by_warpgroups_kernel(
    const GroupTiling tiling, const Activated<T, false> source, const Weight weight,
    const ForwardEpilogue<T> epilogue, const ReductionMemory memory,
    float* stats,  // [2, K] or null
    const AffineMaker next) {
  const int64_t k = tiling.result_count;
  const Line& line = tiling.conv.line;
  const float pixels = static_cast<float>(int64_t{line.images} * line.height * line.width);
  conv_warpgroups<T, false, Tile>(tiling, source, weight, epilogue, memory,
                                  [&](int64_t c, const Moments& total) {
                                    const float mean = total.mean();
                                    const float variance = total.squares / pixels;
                                    store(stats + c, mean);
                                    store(stats + k + c, variance);
                                    if (next.affine) next.make(k, c, mean, variance);
                                  });
}

}  // namespace

bool forward_by_warpgroups(const CudaRuntime& runtime, const PreactConvForward& op) {
  if (!warpgroups_can(runtime, op.dtype, op.activation, op.shape)) return false;
  const int64_t c = op.shape.input.channels, k = op.shape.output.channels;
  if (k <= kFewChannels) return false;
  const Channels channels = channels_of(c, {op.input, op.affine});
  if (!channels.vectors || !ForwardEpilogue<bf16>(op).channels.vectors ||
      !weight_channels(op.weight, c).vectors)
    return false;
  return run_on_warpgroups<false>(
      runtime, op, c, k, [&]<typename T, class Tile>(const GroupTiling& tiling) {
        const auto kernel = forward_by_warpgroups_kernel<T, Tile>;
        const Grid grid = grid_of<Tile>(runtime, kernel, tiling);
        const int64_t groups = ceil_div(k, Tile::kChannels);
        ReductionMemory memory;
        if (op.stats) memory = {runtime, Moments::kValues, grid.x / groups, k, groups};
        const Activated<T, false> source{channels, static_cast<const T*>(op.input),
                                         static_cast<const float*>(op.affine), op.activation};
        launch("preact_conv_forward", kernel, grid, Tile::kThreads, tiling.shared.total,
               runtime.device, runtime.stream, tiling, source, op.weight, ForwardEpilogue<T>(op),
               memory, static_cast<float*>(op.stats),
               AffineMaker(op.next.weight, op.next.bias, op.next.eps, op.next.affine));
      });
}

}  // namespace preact::cuda
