// The kernel body of preact_conv_forward and preact_conv_dgrad: tiles of 128 pixels by 64 channels,
// or by 128 where there are as many, so that fewer blocks copy and transform the same pixels.
//
// Blocks stay: each walks over tiles of the same channels, with the weights resident in shared
// memory where they are small. A step is 32 source channels and up to three taps in one row of the
// kernel; while it is multiplied, the copies of the next one are under way. So are the first copies
// of the next tile while each warp, by itself, stores its results of this one.
#pragma once

#include "conv.cuh"

namespace preact::cuda {

constexpr int kTilePixels = 128;
constexpr int kWarpChannels = 64;
constexpr int kChunk = 32;  // source channels of a step
constexpr int kTapsPerStep = 3;

// Where channel c lies in a row of the stage: 4 floats are left free after each 32, so that neither
// mma's layout nor pieces that are 32 channels apart meet in a bank.
__host__ __device__ constexpr int stage_column(int c) { return c + c / 32 * 4; }
constexpr int kStagePitch = stage_column(kWarpChannels);
constexpr int kStageRows = 16;  // of a warp's results that are on their way at once

constexpr int64_t kStageBytes = kStageRows * kStagePitch * static_cast<int64_t>(sizeof(float));
constexpr int64_t kResidentBytes = 48 * 1024;  // of weights that stay

// Shared memory, in bytes from its start; the table of rows comes first.
constexpr int kAxesAt = kTilePixels * static_cast<int>(sizeof(int));
struct SharedLayout {
  int64_t weights, windows, window_bytes, second, streamed, stages, total;
  bool resident;  // all weights at `weights`, else those of two steps at `streamed`
};

// kAcross: warps side by side, each with 64 channels.
template <int kAcross>
struct ConvTile {
  static constexpr int kChannels = kAcross * kWarpChannels;
  static constexpr int kWarpsDown = kTilePixels / 32;
  static constexpr int kThreads = 32 * kWarpsDown * kAcross;
  static constexpr int64_t kStagesBytes = kWarpsDown * kAcross * kStageBytes;
  static constexpr int64_t kReduceBytes =
      reduce_floats(Moments::kValues, kThreads / (kChannels / kPiece), kChannels, kThreads) *
      static_cast<int64_t>(sizeof(float));
};

struct ConvTiling {
  int64_t images;
  Patch patch;
  Channels weights;         // C, and whether weights are copied as vectors
  int64_t output_channels;  // K of the weight
  SharedLayout shared;
};

// Steps that a row of `taps` is cut into, and the taps that each has room for.
__host__ __device__ constexpr int steps_across(int taps) {
  return (taps + kTapsPerStep - 1) / kTapsPerStep;
}
__host__ __device__ constexpr int taps_of_step(int taps) {
  return taps < kTapsPerStep ? taps : kTapsPerStep;
}

// A shared tile of weights for one tap: forward [64 of K, 32 of C], dgrad [32 of K, 64 of C]; or
// 128.
template <typename T, bool kDgrad, int kAcross>
constexpr int kWeightPitch = pitch<T>(kDgrad ? ConvTile<kAcross>::kChannels : kChunk, kDgrad);
template <typename T, bool kDgrad, int kAcross>
constexpr int kWeightTile =
    (kDgrad ? kChunk : ConvTile<kAcross>::kChannels) * kWeightPitch<T, kDgrad, kAcross>;

template <typename T, bool kDgrad, int kAcross>
SharedLayout shared_layout(int window_pixels, bool two, int taps_down, int taps_across,
                           int64_t source_channels) {
  constexpr int64_t kBytes = sizeof(T);
  const int64_t step =
      int64_t{taps_of_step(taps_across)} * kWeightTile<T, kDgrad, kAcross> * kBytes;
  const int64_t all =
      step * taps_down * steps_across(taps_across) * ceil_div(source_channels, kChunk);
  SharedLayout layout{};
  layout.resident = all <= kResidentBytes;
  layout.weights = kAxesAt + 128;
  layout.windows = layout.weights + (layout.resident ? all : 0);
  layout.window_bytes = int64_t{window_pixels} * pitch<T>(kChunk, false) * kBytes;
  layout.second = layout.windows + 2 * layout.window_bytes;
  layout.streamed = layout.second + (two ? layout.window_bytes : 0);
  layout.stages = layout.streamed + (layout.resident ? 0 : 2 * step);
  // The reduction comes when nobody needs the windows any more.
  layout.total = std::max(layout.stages + ConvTile<kAcross>::kStagesBytes,
                          layout.windows + ConvTile<kAcross>::kReduceBytes);
  return layout;
}

// The tiling of a convolution over the axes r and c (with the most taps and outputs of any phase)
// and the grid for it: x the tiles, neighbours with the same pixels, z the phases.
template <typename T, bool kDgrad, int kAcross, class Kernel>
std::pair<ConvTiling, Grid> tile_conv(const CudaRuntime& runtime, Kernel kernel, int64_t images,
                                      const Axis& r, const Axis& c, const Weight& weight,
                                      int64_t input_channels, int64_t output_channels, bool two,
                                      int phases) {
  ConvTiling tiling{images, {}, weight_channels(weight, input_channels), output_channels, {}};
  const int64_t source_channels = kDgrad ? output_channels : input_channels;
  const int64_t result_channels = kDgrad ? input_channels : output_channels;
  const auto layout = [&](int pixels) {
    return shared_layout<T, kDgrad, kAcross>(pixels, two, r.taps, c.taps, source_channels);
  };
  const int64_t free_bytes =
      most_shared_bytes(runtime.device) - layout(0).stages - ConvTile<kAcross>::kStagesBytes;
  const int64_t pixel_bytes =
      (two ? 3 : 2) * pitch<T>(kChunk, false) * static_cast<int64_t>(sizeof(T));
  const int64_t most_window =
      std::min<int64_t>(free_bytes / pixel_bytes,
                        kMostPiecesPerThread * ConvTile<kAcross>::kThreads / (kChunk / kPiece));
  tiling.patch = choose_patch(images, r, c, kTilePixels, static_cast<int>(most_window));
  tiling.shared = layout(tiling.patch.window(r, c));

  const int64_t tiles_across = ceil_div(result_channels, ConvTile<kAcross>::kChannels);
  const int64_t resident =
      resident_blocks(kernel, ConvTile<kAcross>::kThreads, tiling.shared.total, runtime.device) *
      multiprocessors(runtime.device);
  const int64_t blocks =
      std::clamp<int64_t>(resident / (tiles_across * phases), 1, tiling.patch.tiles(images, r, c));
  return {tiling, {static_cast<unsigned>(blocks * tiles_across), 1, static_cast<unsigned>(phases)}};
}

// Calls run.operator()<kAcross>(): tiles of 128 channels in 16 bits, where none is left over,
// enough blocks remain to fill the device, and its shared memory has room for them.
template <typename T, typename F>
void choose_tile(const CudaRuntime& runtime, int64_t pixels, int64_t result_channels, F&& run) {
  using Wide = ConvTile<2>;
  constexpr int64_t kWideBytes = 160 * 1024;
  if constexpr (sizeof(T) == 2) {
    const int64_t tiles = pixels / kTilePixels * (result_channels / Wide::kChannels);
    if (result_channels % Wide::kChannels == 0 && tiles >= multiprocessors(runtime.device) &&
        most_shared_bytes(runtime.device) >= kWideBytes)
      return run.template operator()<2>();
  }
  run.template operator()<1>();
}

// Runs the tiles of one block. An Epilogue::Thread stores one piece of channels of one pixel of the
// result, [N, height, width, channels], at a time, and reduces what it stores.
template <typename T, bool kDgrad, int kAcross, class Source, class Epilogue, typename Reduced>
PREACT_DEVICE void conv_tiles(const ConvTiling& tiling, const Axis& r, const Axis& c,
                              const Source& source, const Weight& weight, const Channels& result,
                              int64_t height, int64_t width, const Epilogue& epilogue,
                              const ReductionMemory& memory, const Reduced& reduced) {
  constexpr int kPitch = pitch<T>(kChunk, false);
  constexpr int kM = 2, kN = 8;  // a warp has 32 pixels by 64 channels
  using Tile = ConvTile<kAcross>;
  const SharedLayout& layout = tiling.shared;
  unsigned char* const shared = shared_memory();
  int* const table = reinterpret_cast<int*>(shared);
  T* const all_weights = reinterpret_cast<T*>(shared + layout.weights);
  T* const streamed = reinterpret_cast<T*>(shared + layout.streamed);
  T* const second = reinterpret_cast<T*>(shared + layout.second);
  const auto window_at = [&](int chunk) {
    return reinterpret_cast<T*>(shared + layout.windows + chunk % 2 * layout.window_bytes);
  };

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int warp_pixel = thread / 32 % Tile::kWarpsDown * 32;
  const int warp_channel = thread / 32 / Tile::kWarpsDown * kWarpChannels;
  const int tiles_across = static_cast<int>((result.count + Tile::kChannels - 1) / Tile::kChannels);
  const int64_t first_channel = int64_t{blockIdx.x} % tiles_across * Tile::kChannels;
  const int block = static_cast<int>(blockIdx.x) / tiles_across;
  const int blocks = static_cast<int>(gridDim.x) / tiles_across;
  // A tile of 128 channels has them all.
  const int64_t channels_left = result.count - first_channel;
  const int live = kAcross == 1 && channels_left < kWarpChannels ? static_cast<int>(channels_left)
                                                                 : kWarpChannels;
  const int live_pieces = (live + kPiece - 1) / kPiece;
  const int chunks = static_cast<int>((source.channels.count + kChunk - 1) / kChunk);
  const int across = steps_across(c.taps), steps_of_chunk = r.taps * across;
  const int steps = chunks * steps_of_chunk;

  const auto fetch_step_weights = [&](int step, T* to) {
    const int64_t chunk = int64_t{step / steps_of_chunk} * kChunk;
    const int row = r.weight_first + step % steps_of_chunk / across * r.weight_step;
    const int first = step % across * kTapsPerStep;
    for (int t = first; t < c.taps && t < first + kTapsPerStep; ++t) {
      const int column = c.weight_first + t * c.weight_step;
      T* const tile = to + (t - first) * kWeightTile<T, kDgrad, kAcross>;
      if constexpr (kDgrad)
        fetch_weights<T, kChunk, Tile::kChannels, kWeightPitch<T, true, kAcross>, Tile::kThreads>(
            weight, tiling.output_channels, tiling.weights, chunk, first_channel, row, column,
            tile);
      else
        fetch_weights<T, Tile::kChannels, kChunk, kWeightPitch<T, false, kAcross>, Tile::kThreads>(
            weight, tiling.output_channels, tiling.weights, first_channel, chunk, row, column,
            tile);
    }
  };
  // Steps and chunks are counted on from tile to tile, so that each takes turns with its
  // neighbours.
  int steps_before = 0, chunks_before = 0;
  const auto step_weights = [&](int step) {
    const int slot = layout.resident ? step % steps : step % 2;
    return (layout.resident ? all_weights : streamed) +
           slot * taps_of_step(c.taps) * kWeightTile<T, kDgrad, kAcross>;
  };

  fill_row_table(table, kTilePixels, tiling.patch, r, c, kPitch);
  if (layout.resident)
    for (int step = 0; step < steps; ++step) fetch_step_weights(step, step_weights(step));

  Window<T, Source, kChunk / kPiece, false, Tile::kThreads> window(source, r, c, tiling.patch,
                                                                   tiling.images);
  const int column = lane % live_pieces, row = lane / live_pieces, rows = 32 / live_pieces;
  const int64_t my_channel = first_channel + warp_channel + column * kPiece;
  float* const stage = reinterpret_cast<float*>(shared + layout.stages + thread / 32 * kStageBytes);
  typename Epilogue::Thread mine(epilogue, my_channel);

  const int64_t tiles = tiling.patch.tiles(tiling.images, r, c);
  // Starts the copies of a step of a tile; the step may be the first of the next one.
  const auto fetch = [&](int64_t tile, int step, int chunk) {
    if (step % steps_of_chunk == 0) {
      const Origin origin(tile, tiling.patch, r, c);
      window.fetch(origin, int64_t{chunk} % chunks * kChunk, window_at(chunk), second);
    }
    if (!layout.resident) fetch_step_weights(step % steps, step_weights(step));
  };
  if (steps > 0 && block < tiles) fetch(block, 0, 0);
  for (int64_t tile = block; tile < tiles; tile += blocks) {
    const Origin origin(tile, tiling.patch, r, c);
    float sums[kM][kN][4] = {};
    for (int i = 0; i < steps; ++i) {
      const int step = steps_before + i, chunk = chunks_before + i / steps_of_chunk;
      const int64_t first_source = int64_t{i} / steps_of_chunk * kChunk;
      const int tap_row = i % steps_of_chunk / across, first_tap = i % across * kTapsPerStep;
      copies_wait();
      if (i % steps_of_chunk == 0) window.transform(first_source, window_at(chunk), second);
      __syncthreads();
      const bool last = i + 1 == steps;
      if (!last || tile + blocks < tiles)
        fetch(last ? tile + blocks : tile, step + 1, chunks_before + (i + 1) / steps_of_chunk);

      const int64_t source_left = source.channels.count - first_source;
      const T* const taps =
          window_at(chunk) + (tap_row * window.window_columns + first_tap) * kPitch;
      for (int t = 0; t < kTapsPerStep && first_tap + t < c.taps; ++t) {
        constexpr int kRow = kWeightPitch<T, kDgrad, kAcross>;
        const T* const weights = step_weights(step) + t * kWeightTile<T, kDgrad, kAcross>;
#pragma unroll
        for (int k0 = 0; k0 < kChunk; k0 += 16) {
          if (k0 >= source_left) break;
          multiply<T, false, kDgrad>(
              sums, live,
              [&](int m, int k) {
                return taps + load_shared(table + warp_pixel + m) + t * kPitch + k0 + k;
              },
              [&](int n, int k) {
                return kDgrad ? weights + (k0 + k) * kRow + warp_channel + n
                              : weights + (warp_channel + n) * kRow + k0 + k;
              });
        }
      }
    }
    steps_before += steps;
    chunks_before += chunks;

    mine.begin_tile(my_channel);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      __syncwarp();  // the rows before have been read
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float2* const at = reinterpret_cast<float2*>(stage + (8 * h + lane / 4) * kStagePitch +
                                                       stage_column(8 * n) + lane % 4 * 2);
          store_shared(at, make_float2(sums[m][n][2 * h], sums[m][n][2 * h + 1]));
        }
      __syncwarp();
      if (row < rows)
#pragma unroll 1
        for (int i = row; i < kStageRows; i += rows) {
          const int pixel = warp_pixel + m * kStageRows + i;
          if (pixel >= tiling.patch.pixels()) break;
          const int64_t n = origin.image + pixel / (tiling.patch.rows * tiling.patch.columns);
          const int64_t p = origin.row + pixel / tiling.patch.columns % tiling.patch.rows;
          const int64_t q = origin.column + pixel % tiling.patch.columns;
          if (n >= tiling.images || p >= r.outputs || q >= c.outputs) continue;
          const int64_t y = r.out_first + p * r.out_step, x = c.out_first + q * c.out_step;
          Piece v;
          read_piece(stage + i * kStagePitch + stage_column(column * kPiece), v);
          mine.store(((n * height + y) * width + x) * result.count + my_channel, v);
        }
    }
  }

  if (!memory.partial) return;
  const Reduction reduction{memory.partial,
                            memory.tickets + blockIdx.x % tiles_across,
                            result.count,
                            blocks * static_cast<int>(gridDim.z),
                            block + blocks * static_cast<int>(blockIdx.z),
                            first_channel,
                            kAcross * live_pieces * kPiece};
  const int all_rows = Tile::kWarpsDown * rows;
  const int my_row = thread / 32 % Tile::kWarpsDown * rows + row;
  reduce(reduction, mine.reduced, warp_channel / kPiece + column, row < rows ? my_row : all_rows,
         all_rows, reinterpret_cast<float*>(shared + layout.windows), reduced);
}

}  // namespace preact::cuda
