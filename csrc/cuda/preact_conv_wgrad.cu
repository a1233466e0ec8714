// preact_conv_wgrad: dW[k, c, r, s] = sum over pixels of dy[p, k] * h[p at tap (r, s), c],
//   dy = scale' * g' + B' * (u' - mean') + C' of the layer above, h = act(scale * (u - mean) +
//   shift).
// Reads g', u' [M', K] once for each 64 input channels and row of the kernel, u [M, C] once for
// each 64 output channels and row of the kernel with the halo of its patches (from the cache after
// the first), writes and reads `splits` partial results of K*C*R*S floats. FLOPs 2*M'*K*C*R*S.
//
// A block has 64 by 64 channels, up to three taps of one row of the kernel, and every splits-th
// patch of 64 pixels. A second launch adds the splits up, in order.
#include "conv.cuh"

namespace preact {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 64;         // channels, of both
constexpr int kPatchPixels = 64;  // the GEMM's k axis, in one step
constexpr int kReduceThreads = 256;
constexpr int64_t kBlocksPerMultiprocessor = 2;

// Where a tile's windows lie.
struct WgradPlaces {
  Place grad, input;
};

// Shared memory, in bytes from its start: the table of rows, axes, the places of tiles, and rings
// whose slots are used in turn: what is inside of the windows, gradients, second tensors, windows.
constexpr int kAxesAt = kPatchPixels * static_cast<int>(sizeof(int));
constexpr int kPlacesAt = kAxesAt + 128;
static_assert(2 * sizeof(Axis) <= 128);
constexpr int kInsideAt = kPlacesAt + kPlaces * static_cast<int>(sizeof(WgradPlaces));
static_assert(kInsideAt % 128 == 0);
struct WgradTiling {
  Patch patch;
  int splits;
  int stages;  // tiles that are copied or multiplied at the same time
  int64_t grads, second, windows, window_bytes, shared_bytes;
};

template <typename T, Activation kActivation, int kTaps>
__global__ __launch_bounds__(kThreads) void preact_conv_wgrad_kernel(
    const WgradTiling tiling, const ConvShape s, const Gradient<T> grad,
    const Activated<T, kActivation> input,
    float* partial) {  // [splits, R * S, K, C]
  constexpr int kPieces = kTile / kPiece, kPitch = pitch<T>(kTile, true);
  constexpr int kM = 2, kN = 4;  // a warp has 32 by 32 channels
  constexpr int64_t kGradBytes = kPatchPixels * kPitch * static_cast<int64_t>(sizeof(T));
  const int64_t k = s.output.channels, c = s.input.channels;
  const int tiles_across = static_cast<int>((c + kTile - 1) / kTile);
  const int first_k = static_cast<int>(blockIdx.y) / tiles_across * kTile;
  const int first_c = static_cast<int>(blockIdx.y) % tiles_across * kTile;

  const int kernel_width = static_cast<int>(s.kernel_width);
  const int groups = (kernel_width + kTaps - 1) / kTaps;
  const int tap_row = static_cast<int>(blockIdx.z) / groups;
  const int first_tap = static_cast<int>(blockIdx.z) % groups * kTaps;
  const int taps = kernel_width - first_tap < kTaps ? kernel_width - first_tap : kTaps;
  const Axis grad_rows = forward_axis(s.output.height, s.output.height, 0, 1, 1, 0);
  const Axis grad_columns = forward_axis(s.output.width, s.output.width, 0, 1, 1, 0);

  unsigned char* const shared = shared_memory();
  // In shared memory, since what depends on the block would take registers in every loop.
  Axis* const axes = reinterpret_cast<Axis*>(shared + kAxesAt);
  if (threadIdx.x == 0) {
    axes[0] = forward_axis(s.input.height, s.output.height, tap_row, 1, s.stride_height, s.pad_top);
    axes[1] =
        forward_axis(s.input.width, s.output.width, first_tap, taps, s.stride_width, s.pad_left);
  }
  __syncthreads();
  const Axis &rows = axes[0], &columns = axes[1];
  int* const table = reinterpret_cast<int*>(shared);
  WgradPlaces* const places = reinterpret_cast<WgradPlaces*>(shared + kPlacesAt);
  const auto grad_at = [&](int slot) {
    return reinterpret_cast<T*>(shared + tiling.grads + slot * kGradBytes);
  };
  const auto second_at = [&](int slot) {
    return reinterpret_cast<T*>(shared + tiling.second + slot * kGradBytes);
  };
  const auto window_at = [&](int slot) {
    return reinterpret_cast<T*>(shared + tiling.windows + slot * tiling.window_bytes);
  };
  // of this thread's pieces alone
  const auto inside_at = [&](int slot) {
    return reinterpret_cast<uint32_t*>(shared + kInsideAt) + 2 * kThreads * slot + threadIdx.x;
  };

  const Window<T, Gradient<T>, kPieces, true, kThreads> dy(
      grad, grad_rows, grad_columns, tiling.patch, s.input.images, kPatchPixels);
  const Window<T, Activated<T, kActivation>, kPieces, true, kThreads> h(
      input, rows, columns, tiling.patch, s.input.images);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int warp_k = thread / 64 * 32, warp_c = thread / 32 % 2 * 32;
  const int live = static_cast<int>(c - first_c - warp_c < 32 ? c - first_c - warp_c : 32);
  const bool works = live > 0 && first_k + warp_k < k;

  float sums[kTaps][kM][kN][4] = {};
  const int64_t all_tiles = tiling.patch.tiles(s.input.images, rows, columns);
  const int tiles = static_cast<int>((all_tiles - blockIdx.x + tiling.splits - 1) / tiling.splits);
  // A tile's divisions are made by one thread, a tile before anybody needs them.
  const auto find_places = [&](int tile) {
    const Origin origin(blockIdx.x + int64_t{tile} * tiling.splits, tiling.patch, rows, columns);
    places[tile % kPlaces] = {dy.region.place(origin), h.region.place(origin)};
  };
  // Starts the copies of a tile: one group each, empty behind the last one.
  const auto fetch = [&](int tile, int slot, int second) {
    if (tile < tiles) {
      const WgradPlaces& place = places[tile % kPlaces];
      uint32_t* const inside = inside_at(slot);
      store_shared(inside, dy.fetch(place.grad, first_k, grad_at(slot), second_at(second)));
      store_shared(inside + kThreads, h.fetch(place.input, first_c, window_at(slot), nullptr));
    }
    copies_commit();
  };
  fill_row_table(table, kPatchPixels, tiling.patch, rows, columns, kPitch);
  const int copied = tiling.stages - 1;  // tiles
  if (thread == 0)
    for (int tile = 0; tile <= copied; ++tile) find_places(tile);
  __syncthreads();
  for (int tile = 0; tile < copied; ++tile) fetch(tile, tile, tile);
  int slot = 0, slot_before = copied, second = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    if (thread == 0) find_places(tile + tiling.stages);
    copies_wait(tiling.stages - 2);
    const uint32_t* const inside = inside_at(slot);
    dy.transform(first_k, load_shared(inside), grad_at(slot), second_at(second));
    h.transform(first_c, load_shared(inside + kThreads), window_at(slot), nullptr);
    __syncthreads();
    fetch(tile + copied, slot_before, second);  // where everybody has finished
    const T* const a = grad_at(slot) + warp_k;
    const T* const b = window_at(slot) + warp_c;
    slot_before = slot;
    slot = next_slot(slot, tiling.stages);
    second = next_slot(second, copied);
    if (!works) continue;
#pragma unroll
    for (int p0 = 0; p0 < kPatchPixels; p0 += 16) {
      if (p0 >= tiling.patch.pixels()) break;
#pragma unroll
      for (int t = 0; t < kTaps; ++t)
        if (t < taps)
          multiply<T, true, true>(
              sums[t], live, [&](int m, int p) { return a + (p0 + p) * kPitch + m; },
              [&](int n, int p) { return b + load_shared(table + p0 + p) + t * kPitch + n; });
    }
  }

#pragma unroll
  for (int t = 0; t < kTaps; ++t)
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t row = first_k + warp_k + 16 * m + 8 * h + lane / 4;
          const int64_t column = first_c + warp_c + 8 * n + lane % 4 * 2;
          if (t >= taps || row >= k || column >= c) continue;
          const int64_t tap = int64_t{tap_row} * kernel_width + first_tap + t;
          const int64_t plane = blockIdx.x * s.kernel_height * s.kernel_width + tap;
          float* const to = partial + (plane * k + row) * c + column;
          const float2 pair = make_float2(sums[t][m][n][2 * h], sums[t][m][n][2 * h + 1]);
          if (c % 2 == 0) {
            store(reinterpret_cast<float2*>(to), pair);
          } else {
            store(to, pair.x);
            if (column + 1 < c) store(to + 1, pair.y);
          }
        }
}

__global__ __launch_bounds__(kReduceThreads) void reduce_splits_kernel(
    int splits, int64_t taps, int64_t k, int64_t c,
    const float* partial,  // [splits, taps, K, C]
    float* dweight) {      // [K, taps, C]
  const int64_t i = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x, size = taps * k * c;
  if (i >= size) return;
  float sum = 0;
#pragma unroll 8
  for (int split = 0; split < splits; ++split) sum += load(partial + split * size + i);
  const int64_t tap = i / (k * c), row = i / c % k;
  store(dweight + (row * taps + tap) * c + i % c, sum);
}

template <typename T, Activation kActivation, int kTaps>
void run(const CudaRuntime& runtime, const PreactConvWgrad& op) {
  const ConvShape s = flattened(op.shape);
  const int64_t k = s.output.channels, c = s.input.channels;
  const int64_t taps = s.kernel_height * s.kernel_width;
  const int taps_across = static_cast<int>(std::min<int64_t>(kTaps, s.kernel_width));
  const Axis rows = forward_axis(s.input.height, s.output.height, 0, 1, s.stride_height, 0);
  const Axis columns =
      forward_axis(s.input.width, s.output.width, 0, taps_across, s.stride_width, 0);

  constexpr int64_t kPixelBytes = pitch<T>(kTile, true) * static_cast<int64_t>(sizeof(T));
  constexpr int64_t kGradBytes = kPatchPixels * kPixelBytes;
  const auto lay_out = [&](WgradTiling tiling, int64_t window, int stages) {
    tiling.stages = stages;
    tiling.grads = kInsideAt + 2 * kThreads * stages * static_cast<int64_t>(sizeof(uint32_t));
    tiling.second = tiling.grads + stages * kGradBytes;
    tiling.windows = tiling.second + (op.grad.output ? stages - 1 : 0) * kGradBytes;
    tiling.window_bytes = window * kPixelBytes;
    tiling.shared_bytes = tiling.windows + stages * tiling.window_bytes;
    return tiling;
  };
  const int64_t fixed = lay_out({}, 0, 2).shared_bytes;
  using Inputs = Window<T, Activated<T, kActivation>, kTile / kPiece, true, kThreads>;
  const int64_t most_window = std::min<int64_t>(
      (most_shared_bytes(runtime.device) - fixed) / (2 * kPixelBytes), Inputs::kMostPixels);
  WgradTiling tiling{};
  tiling.patch =
      choose_patch(s.input.images, rows, columns, kPatchPixels, static_cast<int>(most_window));
  const int64_t window = tiling.patch.window(rows, columns);
  const auto kernel = preact_conv_wgrad_kernel<T, kActivation, kTaps>;
  const int stages =
      choose_stages(runtime, kernel, kThreads, kBlocksPerMultiprocessor,
                    [&](int stages) { return lay_out(tiling, window, stages).shared_bytes; });
  tiling = lay_out(tiling, window, stages);

  // Enough blocks to fill the device, but partial results that stay small against what is read.
  const int64_t channel_tiles = ceil_div(k, kTile) * ceil_div(c, kTile);
  const int64_t tap_groups = s.kernel_height * ceil_div(s.kernel_width, kTaps);
  const int64_t to_fill =
      kBlocksPerMultiprocessor * multiprocessors(runtime.device) / (channel_tiles * tap_groups);
  const int64_t read =
      (s.input.pixels() * c + s.output.pixels() * k) * static_cast<int64_t>(sizeof(T));
  const int64_t partial_bytes = k * c * taps * static_cast<int64_t>(sizeof(float));
  const int64_t most = std::max<int64_t>(read / partial_bytes, 16);
  tiling.splits = static_cast<int>(std::clamp<int64_t>(
      std::min(to_fill, most), 1, tiling.patch.tiles(s.input.images, rows, columns)));
  float* const partial =
      static_cast<float*>(runtime.allocate(tiling.splits * partial_bytes, runtime.context));

  const Activated<T, kActivation> input{channels_of(c, {op.input, op.affine}),
                                        static_cast<const T*>(op.input),
                                        static_cast<const float*>(op.affine)};
  const Grid grid{static_cast<unsigned>(tiling.splits), static_cast<unsigned>(channel_tiles),
                  static_cast<unsigned>(tap_groups)};
  launch("preact_conv_wgrad", kernel, grid, kThreads, tiling.shared_bytes, runtime.device,
         runtime.stream, tiling, s, Gradient<T>(op.grad, s.output), input, partial);
  launch("preact_conv_wgrad (splits)", reduce_splits_kernel,
         {static_cast<unsigned>(ceil_div(taps * k * c, kReduceThreads))}, kReduceThreads, 0,
         runtime.device, runtime.stream, tiling.splits, taps, k, c,
         static_cast<const float*>(partial), static_cast<float*>(op.dweight));
}

}  // namespace
}  // namespace cuda

void preact_conv_wgrad(const CudaRuntime& runtime, const PreactConvWgrad& op) {
  cuda::dispatch_conv(op, [&]<typename T, Activation kActivation>() {
    if (op.shape.kernel_width == 1)
      cuda::run<T, kActivation, 1>(runtime, op);
    else
      cuda::run<T, kActivation, 3>(runtime, op);
  });
}

}  // namespace preact
