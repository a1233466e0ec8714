// preact_conv_dgrad: g = (dgrad(dy, W) + addend) * act'(z),  S1 = sum g,
//   S2 = sum g * (u - mean) * rstd;  dy = scale' * g' + B' * (u' - mean') + C' of the layer above.
//   With frozen statistics g becomes residual + scale * g.
// Reads g', u' [M', K] once for each 64 to 256 input channels (from the cache after the first) with
// the halo of its patches, u, addend, residual [M, C], the weights; writes g [M, C]. FLOPs
// 2*M'*K*C*R*S.
//
// The pixels of u with the same place in the stride's grid (its phase) are reached by the same
// taps: each phase, blockIdx.z, is a convolution of stride 1 over dy.
#include "conv_tiles.cuh"
#include "sm90/warpgroups.h"

namespace preact {
namespace cuda {
namespace {

template <typename T, class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void preact_conv_dgrad_kernel(
    const ConvTiling tiling, const ConvShape s, const Gradient<T> source, const Weight weight,
    const DgradEpilogue<T, Tile::kSilu> epilogue, const ReductionMemory memory,
    float* sums) {  // [2, C] or null
  const int64_t c = epilogue.channels.count;
  // In shared memory, since what depends on the block would take registers in every loop.
  Axis* const axes = reinterpret_cast<Axis*>(shared_memory() + Tile::kAxesAt);
  static_assert(2 * sizeof(Axis) <= 128);
  if (threadIdx.x == 0) {
    axes[0] = dgrad_axis(s.input.height, s.output.height, s.kernel_height, s.stride_height,
                         s.pad_top, blockIdx.z / s.stride_width);
    axes[1] = dgrad_axis(s.input.width, s.output.width, s.kernel_width, s.stride_width, s.pad_left,
                         blockIdx.z % s.stride_width);
  }
  __syncthreads();
  conv_tiles<T, true, Tile>(tiling, axes[0], axes[1], source, weight, epilogue.channels,
                            s.input.height, s.input.width, epilogue, memory,
                            [&](int64_t i, const Sums& total) {
                              store(sums + i, total.s1);
                              store(sums + c + i, total.s2 * load(epilogue.affine + c + i));
                            });
}

// The most taps and outputs that a phase has along an axis.
Axis most_of(int64_t input, int64_t output, int64_t kernel, int64_t stride, int64_t pad) {
  Axis most = dgrad_axis(input, output, kernel, stride, pad, 0);
  for (int64_t phase = 1; phase < stride; ++phase)
    most.outputs =
        std::max(most.outputs, dgrad_axis(input, output, kernel, stride, pad, phase).outputs);
  return most;
}

}  // namespace
}  // namespace cuda

void preact_conv_dgrad(const CudaRuntime& runtime, const PreactConvDgrad& op) {
  using namespace cuda;
#ifdef PREACT_SM90
  if (dgrad_by_warpgroups(runtime, op)) return;
#endif
  const ConvShape s = flattened(op.shape);
  const int64_t images = s.input.images, c = s.input.channels, k = s.output.channels;
  const Axis rows =
      most_of(s.input.height, s.output.height, s.kernel_height, s.stride_height, s.pad_top);
  const Axis columns =
      most_of(s.input.width, s.output.width, s.kernel_width, s.stride_width, s.pad_left);
  const int phases = static_cast<int>(s.stride_height * s.stride_width);
  dispatch_conv_dtype(op, [&]<typename T>() {
    choose_tile<T>(runtime, op.activation, s.input.pixels(), c, k, [&]<class Tile>() {
      const int64_t groups = ceil_div(c, Tile::kChannels);
      const Gradient<T> source(op.grad, op.shape.output);
      const auto kernel = preact_conv_dgrad_kernel<T, Tile>;
      const auto [tiling, grid] =
          tile_conv<T, true, Tile>(runtime, kernel, images, rows, columns, op.weight, c, k,
                                   op.grad.output != nullptr, phases);
      const int64_t parts = grid.x / groups * phases;
      ReductionMemory memory;
      if (op.sums) memory = {runtime, Sums::kValues, parts, c, groups};
      launch("preact_conv_dgrad", kernel, grid, Tile::kThreads, tiling.shared.total, runtime.device,
             runtime.stream, tiling, s, source, op.weight, DgradEpilogue<T, Tile::kSilu>(op),
             memory, static_cast<float*>(op.sums));
    });
  });
}

}  // namespace preact
