// preact_conv_wgrad: dW[k, c, r, s] = sum over pixels of dy[p, k] * h[p at tap (r, s), c],
//   dy = scale' * g' + B' * (u' - mean') + C' of the layer above, h = act(scale * (u - mean) +
//   shift).
// Reads g', u' [M', K] once for each 64 to 256 input channels and each row, or three rows, of the
// kernel, u [M, C] once for each 64 or 128 output channels and these rows with the halo of its
// patches (from the cache after the first), writes `splits` partial results of K*C*R*S floats.
// FLOPs 2*M'*K*C*R*S.
//
// A block has 64 output by 64 input channels, three taps of one row of the kernel, and every
// splits-th patch of 64 pixels. In 16 bits, where enough blocks remain, it has more, so that fewer
// blocks copy and transform the same channels: three rows of the kernel, or 128 outputs by 128 or
// 256 inputs of a 1x1. Up to 32 by 32 channels have three rows and a tile of their own.
// add_splits() adds the splits up, in a fixed order.
#include "conv.cuh"
#include "sm90/warpgroups.h"

namespace preact {
namespace cuda {
namespace {

// What a block has: the channels of kDown by kAcross warps with 16 * kM outputs by 8 * kN inputs
// each, kTaps of a row of the kernel, kRows of its rows, each with warps of its own, and kPixels of
// a patch, the GEMM's k axis, in one step.
template <int kDown, int kAcross_, int kM_, int kN_, int kTaps_, int kRows_, int kPixels_>
struct WgradTile {
  static constexpr int kAcross = kAcross_, kM = kM_, kN = kN_, kTaps = kTaps_, kRows = kRows_;
  static constexpr int kPixels = kPixels_;
  static constexpr int kOutputs = kDown * 16 * kM, kInputs = kAcross * 8 * kN;
  static constexpr int kThreads = 32 * kDown * kAcross * kRows;
  static constexpr int kBlocks = kThreads > 192 ? 1 : 2;  // a multiprocessor
};
template <int kTaps>
using SquareTile = WgradTile<2, 2, 2, 4, kTaps, 1, 64>;
using TallTile = WgradTile<2, 2, 2, 4, 3, 3, 64>;
using WideTile = WgradTile<2, 4, 4, 4, 1, 1, 64>;
using WidestTile = WgradTile<2, 4, 4, 8, 1, 1, 64>;
using NarrowTile = WgradTile<2, 1, 1, 4, 3, 3, 128>;

// Where a tile's windows lie.
struct WgradPlaces {
  Place grad, input;
};

// The part of dW that a block has: its first output and input, row of the kernel and tap in it;
// rows and columns of its windows.
struct WgradPart {
  int k, c, row, tap;
  Axis rows, columns;
};

// Shared memory, in bytes from its start: the table of rows, the block's part, the places of tiles,
// the tables of a patch's and a window's pixels, and rings whose slots are used in turn: what is
// inside of the windows, gradients, second tensors, windows.
constexpr int kPartAt =
    std::max(SquareTile<1>::kPixels, NarrowTile::kPixels) * static_cast<int>(sizeof(int));
constexpr int kPlacesAt = kPartAt + 128;
static_assert(sizeof(WgradPart) <= 128);
constexpr int kPixelsAt = kPlacesAt + kPlaces * static_cast<int>(sizeof(WgradPlaces));
static_assert(kPixelsAt % 128 == 0);
struct WgradTiling {
  Patch patch;
  int splits;
  int stages;  // tiles that are copied or multiplied at the same time
  int64_t window_pixels, inside, grads, second, windows, window_bytes, shared_bytes;
};

template <typename T, class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void preact_conv_wgrad_kernel(
    const WgradTiling tiling, const ConvShape s, const Gradient<T> grad,
    const Activated<T, true> input,
    float* partial) {  // [splits, R * S, K, C]
  constexpr int kThreads = Tile::kThreads, kTaps = Tile::kTaps;
  constexpr int kGradPitch = pitch<T>(Tile::kOutputs, true);
  constexpr int kPitch = pitch<T>(Tile::kInputs, true);
  constexpr int kM = Tile::kM, kN = Tile::kN;
  constexpr int64_t kGradBytes = Tile::kPixels * kGradPitch * static_cast<int64_t>(sizeof(T));
  const int64_t k = s.output.channels, c = s.input.channels;
  const int kernel_width = static_cast<int>(s.kernel_width);
  const Axis grad_rows = forward_axis(s.output.height, s.output.height, 0, 1, 1, 0);
  const Axis grad_columns = forward_axis(s.output.width, s.output.width, 0, 1, 1, 0);

  unsigned char* const shared = shared_memory();
  // In shared memory, since what depends on the block would take registers in every loop.
  WgradPart& part = *reinterpret_cast<WgradPart*>(shared + kPartAt);
  if (threadIdx.x == 0) {
    const int tiles_across = static_cast<int>((c + Tile::kInputs - 1) / Tile::kInputs);
    const int channels = static_cast<int>(blockIdx.y), taps = static_cast<int>(blockIdx.z);
    const int groups = (kernel_width + kTaps - 1) / kTaps;
    part.k = channels / tiles_across * Tile::kOutputs;
    part.c = channels % tiles_across * Tile::kInputs;
    part.row = taps / groups * Tile::kRows;
    part.tap = taps % groups * kTaps;
    const int rows_left = static_cast<int>(s.kernel_height) - part.row;
    const int taps_left = kernel_width - part.tap;
    part.rows =
        forward_axis(s.input.height, s.output.height, part.row,
                     rows_left < Tile::kRows ? rows_left : Tile::kRows, s.stride_height, s.pad_top);
    part.columns = forward_axis(s.input.width, s.output.width, part.tap,
                                taps_left < kTaps ? taps_left : kTaps, s.stride_width, s.pad_left);
  }
  __syncthreads();
  const Axis &rows = part.rows, &columns = part.columns;
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
    return reinterpret_cast<uint32_t*>(shared + tiling.inside) + 2 * kThreads * slot + threadIdx.x;
  };

  const Window<T, Gradient<T>, Tile::kOutputs / kPiece, true, kThreads> dy(
      grad, grad_rows, grad_columns, tiling.patch, s.input.images,
      reinterpret_cast<RegionPixel*>(shared + kPixelsAt), Tile::kPixels);
  const Window<T, Activated<T, true>, Tile::kInputs / kPiece, true, kThreads> h(
      input, rows, columns, tiling.patch, s.input.images,
      reinterpret_cast<RegionPixel*>(shared + tiling.window_pixels),
      tiling.patch.window(rows, columns));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int warp = thread / 32, tap_row = warp % Tile::kRows;
  const int warp_k = warp / Tile::kRows / Tile::kAcross * 16 * kM;
  const int warp_c = warp / Tile::kRows % Tile::kAcross * 8 * kN;
  // A tile of more than 64 input channels has them all.
  const int64_t channels_left = c - part.c - warp_c;
  const int live =
      Tile::kInputs <= 64 && channels_left < 8 * kN ? static_cast<int>(channels_left) : 8 * kN;
  const bool works = live > 0 && part.k + warp_k < k && tap_row < rows.taps;

  float sums[kTaps][kM][kN][4] = {};
  const int split = static_cast<int>(blockIdx.x);
  const int tiles = (tiling.patch.tiles - split + tiling.splits - 1) / tiling.splits;
  // A tile's divisions are made by one thread, a tile before anybody needs them.
  const auto find_places = [&](int tile) {
    const Origin origin(split + tile * tiling.splits, tiling.patch);
    places[tile % kPlaces] = {dy.region.place(origin), h.region.place(origin)};
  };
  // Starts the copies of a tile: one group each, empty behind the last one.
  const auto fetch = [&](int tile, int slot, int second) {
    if (tile < tiles) {
      const WgradPlaces& place = places[tile % kPlaces];
      uint32_t* const inside = inside_at(slot);
      store_shared(inside, dy.fetch(place.grad, part.k, grad_at(slot), second_at(second)));
      store_shared(inside + kThreads, h.fetch(place.input, part.c, window_at(slot), nullptr));
    }
    copies_commit();
  };
  fill_row_table(table, Tile::kPixels, tiling.patch, rows, columns, kPitch);
  dy.fill_table();
  h.fill_table();
  const int copied = tiling.stages - 1;  // tiles
  if (thread == 0)
    for (int tile = 0; tile <= copied; ++tile) find_places(tile);
  __syncthreads();
  // The slots of the tile whose copies start, while the one `copied` before it is multiplied; that
  // one's second tensor has been read when they do.
  int next = 0, second = 0;
  for (int tile = -copied; tile < tiles; ++tile) {
    const int slot = next_slot(next, tiling.stages);
    if (tile >= 0) {
      if (thread == 0) find_places(tile + tiling.stages);
      copies_wait(tiling.stages - 2);
      const uint32_t* const inside = inside_at(slot);
      dy.transform(part.k, load_shared(inside), grad_at(slot), second_at(second));
      h.transform(part.c, load_shared(inside + kThreads), window_at(slot), nullptr);
      __syncthreads();
    }
    fetch(tile + copied, next, second);
    next = slot;
    second = next_slot(second, copied);
    if (tile < 0 || !works) continue;
    const T* const a = grad_at(slot) + warp_k;
    const T* const b = window_at(slot) + tap_row * h.region.columns() * kPitch + warp_c;
#pragma unroll
    for (int p0 = 0; p0 < Tile::kPixels; p0 += 16) {
      if (p0 >= tiling.patch.pixels()) break;
      multiply<T, true, true>(
          sums, columns.taps, live,
          [&](int m, int i, int p) { return a + (p0 + p) * kGradPitch + 16 * m + i; },
          [&](int t, int n, int p) { return b + load_shared(table + p0 + p) + t * kPitch + n; });
    }
  }

  if (tap_row >= rows.taps) return;
#pragma unroll
  for (int t = 0; t < kTaps; ++t)
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t row = part.k + warp_k + 16 * m + 8 * h + lane / 4;
          const int64_t column = part.c + warp_c + 8 * n + lane % 4 * 2;
          if (t >= columns.taps || row >= k || column >= c) continue;
          const int64_t tap = int64_t{part.row + tap_row} * kernel_width + part.tap + t;
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

struct WgradGrid {
  int64_t splits, channel_tiles, tap_groups;

  int64_t blocks() const { return splits * channel_tiles * tap_groups; }
};

template <class Tile>
WgradGrid wgrad_grid(const CudaRuntime& runtime, const PreactConvWgrad& op, int64_t bytes,
                     int64_t tiles) {
  const ConvShape& s = op.shape;
  const int64_t k = s.output.channels, c = s.input.channels;
  const int64_t channel_tiles = ceil_div(k, Tile::kOutputs) * ceil_div(c, Tile::kInputs);
  const int64_t tap_groups =
      ceil_div(s.kernel_height, Tile::kRows) * ceil_div(s.kernel_width, Tile::kTaps);
  const int64_t to_fill =
      Tile::kBlocks * multiprocessors(runtime.device) / (channel_tiles * tap_groups);
  const int64_t of_output = op.grad.output ? 2 : 1;  // tensors
  const int64_t moved = (s.input.pixels() * c + of_output * s.output.pixels() * k) * bytes;
  const int64_t partial_bytes =
      k * c * s.kernel_height * s.kernel_width * static_cast<int64_t>(sizeof(float));
  return {choose_splits(to_fill, moved, partial_bytes, tiles), channel_tiles, tap_groups};
}

// Whether larger tiles leave no input channels over and give no multiprocessor an eighth more to
// multiply than square ones: they save more than that.
template <typename T, class Tile, class Square>
bool pays(const CudaRuntime& runtime, const PreactConvWgrad& op) {
  const ConvShape& s = op.shape;
  if (Tile::kInputs > 64 && s.input.channels % Tile::kInputs != 0) return false;
  const int64_t tiles = ceil_div(s.output.pixels(), Square::kPixels);
  const auto of_busiest = [&]<class Any>(const Any&) {
    const WgradGrid grid = wgrad_grid<Any>(runtime, op, sizeof(T), tiles);
    const int64_t blocks = ceil_div(grid.blocks(), multiprocessors(runtime.device));
    return blocks * ceil_div(tiles, grid.splits) * Any::kOutputs * Any::kInputs * Any::kTaps *
           Any::kRows;
  };
  return 8 * of_busiest(Tile()) <= 9 * of_busiest(Square());
}

template <typename T, class Tile>
void run(const CudaRuntime& runtime, const PreactConvWgrad& op) {
  const ConvShape s = flattened(op.shape);
  const int64_t k = s.output.channels, c = s.input.channels;
  const int64_t taps = s.kernel_height * s.kernel_width;
  const auto axis = [](int64_t input, int64_t output, int64_t taps, int most, int64_t stride) {
    return forward_axis(input, output, 0, static_cast<int>(std::min<int64_t>(taps, most)), stride,
                        0);
  };
  const Axis rows =
      axis(s.input.height, s.output.height, s.kernel_height, Tile::kRows, s.stride_height);
  const Axis columns =
      axis(s.input.width, s.output.width, s.kernel_width, Tile::kTaps, s.stride_width);

  constexpr int64_t kBytes = sizeof(T);
  constexpr int64_t kPixelBytes = pitch<T>(Tile::kInputs, true) * kBytes;
  constexpr int64_t kGradBytes = Tile::kPixels * pitch<T>(Tile::kOutputs, true) * kBytes;
  const auto lay_out = [&](WgradTiling tiling, int64_t window, int stages) {
    tiling.stages = stages;
    tiling.window_pixels = kPixelsAt + table_bytes(Tile::kPixels);
    tiling.inside = tiling.window_pixels + table_bytes(window);
    tiling.grads =
        tiling.inside + 2 * Tile::kThreads * stages * static_cast<int64_t>(sizeof(uint32_t));
    tiling.second = tiling.grads + stages * kGradBytes;
    tiling.windows = tiling.second + (op.grad.output ? stages - 1 : 0) * kGradBytes;
    tiling.window_bytes = window * kPixelBytes;
    tiling.shared_bytes = tiling.windows + stages * tiling.window_bytes;
    return tiling;
  };
  const int64_t fixed = lay_out({}, 0, 2).shared_bytes;
  using Inputs = Window<T, Activated<T, true>, Tile::kInputs / kPiece, true, Tile::kThreads>;
  const int64_t most_window =
      std::min<int64_t>((most_shared_bytes(runtime.device) - fixed - kTableRounding) /
                            (2 * kPixelBytes + static_cast<int64_t>(sizeof(RegionPixel))),
                        Inputs::kMostPixels);
  WgradTiling tiling{};
  tiling.patch =
      choose_patch(s.input.images, rows, columns, Tile::kPixels, static_cast<int>(most_window));
  const int64_t window = tiling.patch.window(rows, columns);
  const auto kernel = preact_conv_wgrad_kernel<T, Tile>;
  const int stages = choose_stages(runtime, kernel, Tile::kThreads, Tile::kBlocks, [&](int stages) {
    return lay_out(tiling, window, stages).shared_bytes;
  });
  tiling = lay_out(tiling, window, stages);

  const WgradGrid blocks = wgrad_grid<Tile>(runtime, op, kBytes, tiling.patch.tiles);
  tiling.splits = static_cast<int>(blocks.splits);
  const int64_t partial_bytes = k * c * taps * static_cast<int64_t>(sizeof(float));
  float* const partial =
      static_cast<float*>(runtime.allocate_partial(tiling.splits * partial_bytes, runtime.context));

  const Activated<T, true> input{channels_of(c, {op.input, op.affine}),
                                 static_cast<const T*>(op.input),
                                 static_cast<const float*>(op.affine), op.activation};
  const Grid grid{static_cast<unsigned>(blocks.splits), static_cast<unsigned>(blocks.channel_tiles),
                  static_cast<unsigned>(blocks.tap_groups)};
  launch("preact_conv_wgrad", kernel, grid, Tile::kThreads, tiling.shared_bytes, runtime.device,
         runtime.stream, tiling, s, Gradient<T>(op.grad, s.output), input, partial);
  runtime.sum_partial({partial, static_cast<float*>(op.dweight), blocks.splits, taps, k, c},
                      runtime.context);
}

template <typename T>
void choose_tile_of_1x1(const CudaRuntime& runtime, const PreactConvWgrad& op) {
  using Square = SquareTile<1>;
  if constexpr (sizeof(T) == 2) {
    const bool room = most_shared_bytes(runtime.device) >= kWideBytes;
    if (room && pays<T, WidestTile, Square>(runtime, op)) return run<T, WidestTile>(runtime, op);
    if (room && pays<T, WideTile, Square>(runtime, op)) return run<T, WideTile>(runtime, op);
  }
  run<T, Square>(runtime, op);
}

template <typename T>
void choose_tile(const CudaRuntime& runtime, const PreactConvWgrad& op) {
  using Square = SquareTile<3>;
  if constexpr (!std::is_same_v<T, float>)
    if (op.shape.output.channels <= NarrowTile::kOutputs &&
        op.shape.input.channels <= NarrowTile::kInputs)
      return run<T, NarrowTile>(runtime, op);
  if constexpr (sizeof(T) == 2)
    if (pays<T, TallTile, Square>(runtime, op)) return run<T, TallTile>(runtime, op);
  run<T, Square>(runtime, op);
}

}  // namespace
}  // namespace cuda

void preact_conv_wgrad(const CudaRuntime& runtime, const PreactConvWgrad& op) {
#ifdef PREACT_SM90
  if (cuda::wgrad_by_warpgroups(runtime, op)) return;
#endif
  cuda::dispatch_conv_dtype(op, [&]<typename T>() {
    if (op.shape.kernel_width == 1)
      cuda::choose_tile_of_1x1<T>(runtime, op);
    else
      cuda::choose_tile<T>(runtime, op);
  });
}

}  // namespace preact
