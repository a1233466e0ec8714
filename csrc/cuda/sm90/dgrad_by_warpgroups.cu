// preact_conv_dgrad by wgmma:
//   g = (dgrad(dy, W) + addend) * act'(z),  S1 = sum g,  S2 = sum g * (u - mean) * rstd;
//   dy = scale' * g' + B' * (u' - mean') + C' of the layer above.
//   With frozen statistics g becomes residual + scale * g.
// Reads g', u' [M', K] once for each 64 or 128 input channels, with stride 2 for each phase that
// has taps (from the cache after the first), with the halo of its tiles, u, addend, residual [M,
// C], the weights for each 128 or 256 positions; writes g [M, C]. FLOPs 2*M'*K*C*R*S.
#include "choose.cuh"

namespace preact::cuda {

namespace {

template <typename T, class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kResident) void dgrad_by_warpgroups_kernel(
    const GroupTiling tiling, const Gradient<T> source, const Weight weight,
    const DgradEpilogue<T, false> epilogue, const ReductionMemory memory,
    float* sums) {  // [2, C] or null
  const int64_t c = tiling.result_count;
  conv_warpgroups<T, true, Tile>(tiling, source, weight, epilogue, memory,
                                 [&](int64_t i, const Sums& total) {
                                   store(sums + i, total.s1);
                                   store(sums + c + i, total.s2 * load(epilogue.affine + c + i));
                                 });
}

}  // namespace

bool dgrad_by_warpgroups(const CudaRuntime& runtime, const PreactConvDgrad& op) {
  if (!warpgroups_can(runtime, op.dtype, op.activation, op.shape)) return false;
  const int64_t c = op.shape.input.channels, k = op.shape.output.channels;
  if (!Gradient<bf16>(op.grad, op.shape.output).channels.vectors ||
      !DgradEpilogue<bf16, false>(op).channels.vectors || !weight_channels(op.weight, c).vectors)
    return false;
  return run_on_warpgroups<true>(
      runtime, op, k, c, [&]<typename T, class Tile>(const GroupTiling& tiling) {
        const auto kernel = dgrad_by_warpgroups_kernel<T, Tile>;
        const Grid grid = grid_of<Tile>(runtime, kernel, tiling);
        const int64_t groups = ceil_div(c, Tile::kChannels);
        ReductionMemory memory;
        if (op.sums) memory = {runtime, Sums::kValues, grid.x / groups, c, groups};
        launch("preact_conv_dgrad", kernel, grid, Tile::kThreads, tiling.shared.total,
               runtime.device, runtime.stream, tiling, Gradient<T>(op.grad, op.shape.output),
               op.weight, DgradEpilogue<T, false>(op), memory, static_cast<float*>(op.sums));
      });
}

}  // namespace preact::cuda
