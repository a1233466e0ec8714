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

struct WgradTiling {
  Patch patch;
  int splits;
  int64_t window_bytes, shared_bytes;
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
  const int64_t first_k = int64_t{blockIdx.y} / tiles_across * kTile;
  const int64_t first_c = int64_t{blockIdx.y} % tiles_across * kTile;

  const int kernel_width = static_cast<int>(s.kernel_width);
  const int groups = (kernel_width + kTaps - 1) / kTaps;
  const int tap_row = static_cast<int>(blockIdx.z) / groups;
  const int first_tap = static_cast<int>(blockIdx.z) % groups * kTaps;
  const int taps = kernel_width - first_tap < kTaps ? kernel_width - first_tap : kTaps;
  const Axis rows =
      forward_axis(s.input.height, s.output.height, tap_row, 1, s.stride_height, s.pad_top);
  const Axis columns =
      forward_axis(s.input.width, s.output.width, first_tap, taps, s.stride_width, s.pad_left);
  const Axis grad_rows = forward_axis(s.output.height, s.output.height, 0, 1, 1, 0);
  const Axis grad_columns = forward_axis(s.output.width, s.output.width, 0, 1, 1, 0);

  unsigned char* const shared = shared_memory();
  int* const table = reinterpret_cast<int*>(shared);
  unsigned char* const grads = shared + kPatchPixels * sizeof(int);  // two, and the second tensor
  unsigned char* const windows = grads + (grad.plain() ? 2 : 3) * kGradBytes;  // two
  T* const second = reinterpret_cast<T*>(grads + 2 * kGradBytes);
  const auto grad_at = [&](int step) {
    return reinterpret_cast<T*>(grads + step % 2 * kGradBytes);
  };
  const auto window_at = [&](int step) {
    return reinterpret_cast<T*>(windows + step % 2 * tiling.window_bytes);
  };
  fill_row_table(table, kPatchPixels, tiling.patch, rows, columns, kPitch);

  Window<T, Gradient<T>, kPieces, true, kThreads> dy(grad, grad_rows, grad_columns, tiling.patch,
                                                     s.input.images, kPatchPixels);
  Window<T, Activated<T, kActivation>, kPieces, true, kThreads> h(input, rows, columns,
                                                                  tiling.patch, s.input.images);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int warp_k = thread / 64 * 32, warp_c = thread / 32 % 2 * 32;
  const int live = static_cast<int>(c - first_c - warp_c < 32 ? c - first_c - warp_c : 32);
  const bool works = live > 0 && first_k + warp_k < k;

  float sums[kTaps][kM][kN][4] = {};
  const int64_t tiles = tiling.patch.tiles(s.input.images, rows, columns);
  const auto fetch = [&](int64_t tile, int step) {
    const Origin origin(tile, tiling.patch, rows, columns);
    dy.fetch(origin, first_k, grad_at(step), second);
    h.fetch(origin, first_c, window_at(step), nullptr);
  };
  int step = 0;
  if (int64_t{blockIdx.x} < tiles) fetch(blockIdx.x, 0);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += tiling.splits, ++step) {
    copies_wait();
    dy.transform(first_k, grad_at(step), second);
    h.transform(first_c, window_at(step), nullptr);
    __syncthreads();
    if (tile + tiling.splits < tiles) fetch(tile + tiling.splits, step + 1);
    if (!works) continue;
    const T* const a = grad_at(step) + warp_k;
    const T* const b = window_at(step) + warp_c;
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
  const int64_t fixed = kPatchPixels * static_cast<int64_t>(sizeof(int)) +
                        (op.grad.output ? 3 : 2) * kPatchPixels * kPixelBytes;
  using Inputs = Window<T, Activated<T, kActivation>, kTile / kPiece, true, kThreads>;
  const int64_t most_window = std::min<int64_t>(
      (most_shared_bytes(runtime.device) - fixed) / (2 * kPixelBytes), Inputs::kMostPixels);
  WgradTiling tiling{};
  tiling.patch =
      choose_patch(s.input.images, rows, columns, kPatchPixels, static_cast<int>(most_window));
  tiling.window_bytes = tiling.patch.window(rows, columns) * kPixelBytes;
  tiling.shared_bytes = fixed + 2 * tiling.window_bytes;

  // Enough blocks to fill the device, but partial results that stay small against what is read.
  const int64_t channel_tiles = ceil_div(k, kTile) * ceil_div(c, kTile);
  const int64_t tap_groups = s.kernel_height * ceil_div(s.kernel_width, kTaps);
  const int64_t to_fill = 2 * multiprocessors(runtime.device) / (channel_tiles * tap_groups);
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
  launch("preact_conv_wgrad", preact_conv_wgrad_kernel<T, kActivation, kTaps>, grid, kThreads,
         tiling.shared_bytes, runtime.device, runtime.stream, tiling, s,
         Gradient<T>(op.grad, s.output), input, partial);
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
