// Host side of the kernels for compute capability 9.0: whether one takes a convolution, and its
// tile.
#pragma once

#include "conv_warpgroups.cuh"
#include "warpgroups.h"

namespace preact::cuda {

bool warpgroups_used();

// Whether the device, and all of a convolution but its tensors' alignment, are such that these
// kernels can run.
inline bool warpgroups_can(const CudaRuntime& runtime, Dtype dtype, Activation activation,
                           const ConvShape& shape) {
  const ConvShape s = flattened(shape);
  const bool has_gaps = s.kernel_height > 1;
  return warpgroups_used() && has_warpgroups(runtime.device) &&
         (dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16) &&
         activation == Activation::kRelu && lies_on_line(s) && positions_of(s) <= kMostPositions &&
         (!has_gaps || std::max(s.input.height, s.input.width) < kMostPitch);
}

// Calls run.operator()<T, Tile>(tiling): the wide tile where at most a fifth of its channels are
// left over and it fills the device, else the slim one. Returns whether the tile fits into the
// device's shared memory.
template <bool kDgrad, class Op, typename F>
bool run_on_warpgroups(const CudaRuntime& runtime, const Op& op, int64_t source_channels,
                       int64_t result_channels, const F& run) {
  const ConvShape s = flattened(op.shape);
  const auto with_tile = [&]<class Tile>() {
    const GroupTiling tiling = tile_line<kDgrad, Tile>(s, source_channels, result_channels);
    if (tiling.shared.total > most_shared_bytes(runtime.device)) return false;
    if (op.dtype == Dtype::kBFloat16)
      run.template operator()<bf16, Tile>(tiling);
    else
      run.template operator()<f16, Tile>(tiling);
    return true;
  };
  const int64_t across = ceil_div(result_channels, WideGroups::kChannels);
  const bool fits = 5 * (across * WideGroups::kChannels - result_channels) <= 3 * result_channels;
  const int64_t tiles = ceil_div(positions_of(s), WideGroups::kPixels) * across;
  if (fits && tiles >= multiprocessors(runtime.device))
    if (s.kernel_height == 1 ? with_tile.template operator()<PointGroups>()
                             : with_tile.template operator()<WideGroups>())
      return true;
  return with_tile.template operator()<SlimGroups>();
}

// As many blocks as the device has room for: neighbours have the same positions, other channels.
template <class Tile, class Kernel>
Grid grid_of(const CudaRuntime& runtime, Kernel kernel, const GroupTiling& tiling) {
  const int64_t across = ceil_div(tiling.result_count, Tile::kChannels);
  const int64_t resident =
      resident_blocks(kernel, Tile::kThreads, tiling.shared.total, runtime.device) *
      multiprocessors(runtime.device);
  const int64_t blocks = std::clamp<int64_t>(resident / across, 1, tiling.tiles);
  return {static_cast<unsigned>(blocks * across)};
}

}  // namespace preact::cuda
