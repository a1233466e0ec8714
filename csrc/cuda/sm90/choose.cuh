// Host side of the kernels for compute capability 9.0: whether one takes a convolution, and its
// tile.
#pragma once

#include "conv_warpgroups.cuh"
#include "warpgroups.h"

namespace preact::cuda {

bool warpgroups_used();

// Of so few channels most of a product would be left unused.
constexpr int64_t kFewChannels = 32;

// Whether the device, and all of a convolution but its tensors' alignment, are such that these
// kernels can run.
inline bool warpgroups_can(const CudaRuntime& runtime, Dtype dtype, Activation activation,
                           const ConvShape& shape) {
  const ConvShape s = flattened(shape);
  return warpgroups_used() && has_warpgroups(runtime.device) &&
         (dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16) &&
         activation == Activation::kRelu && lies_on_line(s) && positions_of(s) <= kMostPositions &&
         (is_pointwise(s) || std::max(s.input.height, s.input.width) < kMostPitch);
}

// Calls run.operator()<T, Tile>(tiling): a tile of 128 channels where not too many of them are left
// over and the tiles fill the device, or of a 1x1 whose weights stay of 256, which reads what it
// transforms less often; else one of 64, with twice the positions where shared memory has no room
// for two blocks, or the stride is 2. Returns whether there is one that fits into the device's
// shared memory and, with stride 2 or of a 1x1, fills the device.
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
  // A quarter of it may be idle, since tiles half as large take longer.
  const auto fills_device = [&](int64_t positions, int64_t channels) {
    const int64_t tiles = ceil_div(positions_of(s), positions);
    return 4 * tiles * ceil_div(result_channels, channels) >= 3 * multiprocessors(runtime.device);
  };
  // Wide tiles are counted as if each had 256 positions: with fewer, small ones end sooner.
  const auto takes = [&](int64_t channels) {
    const int64_t left = ceil_div(result_channels, channels) * channels - result_channels;
    return 5 * left <= 3 * result_channels && fills_device(WideGroups::kPixels, channels);
  };
  const bool weights_stay = source_channels <= kWeightSlots * kMostChunk;
  if (is_pointwise(s) && weights_stay && takes(BroadGroups::kChannels) &&
      with_tile.template operator()<BroadGroups>())
    return true;
  if (takes(WideGroups::kChannels))
    if (is_pointwise(s) ? with_tile.template operator()<PointGroups>()
                        : with_tile.template operator()<WideGroups>())
      return true;
  const int64_t slim =
      tile_line<kDgrad, SlimGroups>(s, source_channels, result_channels).shared.total;
  const bool strided = s.stride_height > 1;
  if ((strided || 2 * slim > most_shared_bytes(runtime.device)) &&
      fills_device(TallGroups::kPixels, TallGroups::kChannels) &&
      with_tile.template operator()<TallGroups>())
    return true;
  if (strided || (is_pointwise(s) && !fills_device(SlimGroups::kPixels, SlimGroups::kChannels)))
    return false;
  return with_tile.template operator()<SlimGroups>();
}

// As many blocks as the device has room for: neighbours have the same positions, other channels.
// More blocks than share the registers would wait for ever.
template <class Tile, class Kernel>
Grid grid_of(const CudaRuntime& runtime, Kernel kernel, const GroupTiling& tiling) {
  const int64_t across = ceil_div(tiling.result_count, Tile::kChannels);
  const int64_t resident = std::min<int64_t>(resident_blocks(kernel, Tile::kThreads,
                                                             tiling.shared.total, runtime.device),
                                             Tile::kResident) *
                           multiprocessors(runtime.device);
  const int64_t blocks = std::clamp<int64_t>(resident / across, 1, tiling.tiles);
  return {static_cast<unsigned>(blocks * across)};
}

}  // namespace preact::cuda
