// The kernel body of preact_conv_forward and preact_conv_dgrad: tiles of 128 pixels by 64 channels,
// by 32 where there is less, or larger ones where there is as much, so that fewer blocks copy and
// transform the same pixels.
//
// Blocks stay: each walks over tiles of the same channels, with the weights resident in shared
// memory where they are small. A step is 16 or 32 source channels and up to three taps in one row
// of the kernel; while it is multiplied, the copies of the next one to three are under way. So are
// the first copies of the next tiles while each warp, by itself, stores its results of this one.
#pragma once

#include "conv.cuh"
#include "epilogues.cuh"

namespace preact::cuda {

constexpr int kTapsPerStep = 3;
constexpr int kStageRows = 16;                 // of a warp's results that are on their way at once
constexpr int64_t kResidentBytes = 48 * 1024;  // of weights that stay

// Where a tile's window and results lie.
struct TilePlaces {
  Place source, result;
};

// What a block has: results of kPixels pixels and kAcross times kWarpChannels channels. A warp has
// kWarpPixels of them and kWarpChannels; the more pixels, the less often all warps read the same
// weights. A step has kChunk channels of the source.
template <int kPixels_, int kAcross_, int kWarpPixels_, int kWarpChannels_ = 64, int kChunk_ = 32>
struct ConvTile {
  static constexpr int kPixels = kPixels_, kAcross = kAcross_, kWarpPixels = kWarpPixels_;
  static constexpr int kWarpChannels = kWarpChannels_, kChunk = kChunk_;
  static constexpr int kChannels = kAcross * kWarpChannels;
  static constexpr bool kSilu = kWarpPixels == 32;  // or ReLU alone: SiLU's registers would spill
  static constexpr int kWarpsDown = kPixels / kWarpPixels;
  static constexpr int kThreads = 32 * kWarpsDown * kAcross;
  // Of a multiprocessor, for which registers are spared: a warp waits most of its time, and others
  // have to work meanwhile.
  static constexpr int kBlocks = kWarpPixels == 16 ? 2 : 1;
  // Rows whose epilogue reads at once, where registers are left for it.
  static constexpr int kReads = kWarpPixels == 16 || kPixels == 256 ? 1 : 2;
  // Rows 8 banks apart, for the products' layout.
  static constexpr int kStagePitch = kWarpChannels + 8;
  static_assert(spaced(kWarpChannels) <= kStagePitch);
  static constexpr int64_t kStageBytes =
      kStageRows * kStagePitch * static_cast<int64_t>(sizeof(float));
  // Of a warp: its stage, and where in the result tensor each of its pixels goes.
  static constexpr int64_t kWarpBytes =
      kStageBytes + kWarpPixels * static_cast<int64_t>(sizeof(int64_t));
  static_assert(kWarpBytes % 128 == 0);
  static constexpr int64_t kStagesBytes = kWarpsDown * kAcross * kWarpBytes;
  static constexpr int64_t kReduceBytes =
      reduce_floats(Moments::kValues, kThreads / (kChannels / kPiece), kChannels, kThreads) *
      static_cast<int64_t>(sizeof(float));

  // Shared memory, in bytes from its start; the table of rows comes first, those of the result's
  // and the window's pixels before what SharedLayout has.
  static constexpr int kAxesAt = kPixels * static_cast<int>(sizeof(int));
  static constexpr int kPlacesAt = kAxesAt + 128;
  static constexpr int kResultsAt = kPlacesAt + kPlaces * static_cast<int>(sizeof(TilePlaces));
  static constexpr int kPixelsAt = kResultsAt + kPixels * static_cast<int>(sizeof(RegionPixel));
  static_assert(kPixelsAt % 128 == 0);
};
using SmallTile = ConvTile<128, 1, 32>;
using BusyTile = ConvTile<128, 1, 16>;
using WideTile = ConvTile<128, 2, 32>;
using LargeTile = ConvTile<256, 2, 64>;
using WidestTile = ConvTile<128, 4, 64>;
using NarrowTile = ConvTile<128, 1, 16, 32, 16>;

// Windows, weights, the second tensors and what is inside of windows are rings: slots are used in
// turn.
struct SharedLayout {
  int64_t weights, inside, windows, window_bytes, second, stages, total;
  int windows_count, waiting;  // windows in all; of those, the most that wait for their transform
  bool resident;               // all weights stay, else those of as many steps as there are stages
};

struct ConvTiling {
  int stages;  // steps that are copied or multiplied at the same time
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

// A shared tile of weights for one tap: forward [kChannels of K, kChunk of C], dgrad [kChunk of K,
// kChannels of C].
template <typename T, bool kDgrad, class Tile>
constexpr int kWeightPitch = pitch<T>(kDgrad ? Tile::kChannels : Tile::kChunk, kDgrad);
template <typename T, bool kDgrad, class Tile>
constexpr int kWeightTile =
    (kDgrad ? Tile::kChunk : Tile::kChannels) * kWeightPitch<T, kDgrad, Tile>;

// steps_of_chunk are the fewest that any phase has.
template <typename T, bool kDgrad, class Tile>
SharedLayout shared_layout(int window_pixels, bool two, const Axis& r, const Axis& c,
                           int64_t source_channels, int steps_of_chunk, int stages) {
  constexpr int64_t kBytes = sizeof(T);
  const int64_t step = int64_t{taps_of_step(c.taps)} * kWeightTile<T, kDgrad, Tile> * kBytes;
  const int64_t all =
      step * r.taps * steps_across(c.taps) * ceil_div(source_channels, Tile::kChunk);
  SharedLayout layout{};
  layout.resident = all <= kResidentBytes;
  layout.waiting = static_cast<int>(ceil_div(stages - 1, steps_of_chunk));
  layout.windows_count = layout.waiting + 1;
  layout.weights = Tile::kPixelsAt + table_bytes(window_pixels);
  layout.inside = layout.weights + (layout.resident ? all : stages * step);
  layout.windows =
      layout.inside + layout.waiting * Tile::kThreads * static_cast<int64_t>(sizeof(uint32_t));
  layout.window_bytes = int64_t{window_pixels} * pitch<T>(Tile::kChunk, false) * kBytes;
  layout.second = layout.windows + layout.windows_count * layout.window_bytes;
  layout.stages = layout.second + (two ? layout.waiting * layout.window_bytes : 0);
  // The reduction comes when nobody needs the windows any more.
  layout.total = std::max(layout.stages + Tile::kStagesBytes, layout.windows + Tile::kReduceBytes);
  return layout;
}

// The tiling of a convolution over the axes r and c (with the most taps and outputs of any phase)
// and the grid for it: x the tiles, neighbours with the same pixels, z the phases.
template <typename T, bool kDgrad, class Tile, class Kernel>
std::pair<ConvTiling, Grid> tile_conv(const CudaRuntime& runtime, Kernel kernel, int64_t images,
                                      const Axis& r, const Axis& c, const Weight& weight,
                                      int64_t input_channels, int64_t output_channels, bool two,
                                      int phases) {
  ConvTiling tiling{2, images, {}, weight_channels(weight, input_channels), output_channels, {}};
  const int64_t source_channels = kDgrad ? output_channels : input_channels;
  const int64_t result_channels = kDgrad ? input_channels : output_channels;
  const int steps_of_chunk = phases > 1 ? 1 : r.taps * steps_across(c.taps);
  const auto layout = [&](int pixels, int stages) {
    return shared_layout<T, kDgrad, Tile>(pixels, two, r, c, source_channels, steps_of_chunk,
                                          stages);
  };
  const SharedLayout empty = layout(0, 2);
  const int64_t free_bytes = most_shared_bytes(runtime.device) - empty.stages - Tile::kStagesBytes;
  const int64_t pixel_bytes = (empty.windows_count + (two ? empty.waiting : 0)) *
                                  pitch<T>(Tile::kChunk, false) * static_cast<int64_t>(sizeof(T)) +
                              static_cast<int64_t>(sizeof(RegionPixel));
  const int64_t most_window =
      std::min<int64_t>((free_bytes - kTableRounding) / pixel_bytes,
                        kMostPiecesPerThread * Tile::kThreads / (Tile::kChunk / kPiece));
  tiling.patch = choose_patch(images, r, c, Tile::kPixels, static_cast<int>(most_window));
  const int window = tiling.patch.window(r, c);
  const auto total = [&](int stages) { return layout(window, stages).total; };
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  tiling.stages = choose_stages(runtime, kernel, Tile::kThreads, kAny, total);
  tiling.shared = layout(window, tiling.stages);

  const int64_t tiles_across = ceil_div(result_channels, Tile::kChannels);
  const int64_t resident =
      resident_blocks(kernel, Tile::kThreads, tiling.shared.total, runtime.device) *
      multiprocessors(runtime.device);
  const int64_t blocks =
      std::clamp<int64_t>(resident / (tiles_across * phases), 1, tiling.patch.tiles);
  return {tiling, {static_cast<unsigned>(blocks * tiles_across), 1, static_cast<unsigned>(phases)}};
}

// Calls run.operator()<Tile>(): in 16 bits the largest tile that leaves nothing over, with blocks
// enough to fill the device and room in its shared memory, and that gives no multiprocessor more to
// multiply than WideTile does; of few source channels the busy one in its place, since most of the
// work is to store. The narrow one where channels are few, so that two blocks have room in a
// multiprocessor, or pixels, so that twice as many multiprocessors have one.
template <typename T, typename F>
void choose_tile(const CudaRuntime& runtime, Activation activation, int64_t pixels,
                 int64_t channels, int64_t source_channels, F&& run) {
  if constexpr (sizeof(T) == 2) {
    const int64_t all = multiprocessors(runtime.device);
    const auto tiles = [&]<class Tile>(const Tile&) {
      return pixels / Tile::kPixels * (channels / Tile::kChannels);
    };
    const auto of_busiest = [&]<class Tile>(const Tile& tile) {
      return ceil_div(tiles(tile), all) * Tile::kPixels * Tile::kChannels;
    };
    const auto fills = [&]<class Tile>(const Tile& tile, int64_t shared_bytes) {
      return channels % Tile::kChannels == 0 && tiles(tile) >= all &&
             most_shared_bytes(runtime.device) >= shared_bytes &&
             (Tile::kSilu || activation == Activation::kRelu) &&
             of_busiest(tile) <= of_busiest(WideTile());
    };
    if (fills(WidestTile(), kWidestBytes)) return run.template operator()<WidestTile>();
    if (fills(LargeTile(), kWidestBytes)) return run.template operator()<LargeTile>();
    const bool few_sources =
        activation == Activation::kRelu && source_channels <= NarrowTile::kChannels;
    if (!few_sources && fills(WideTile(), kWideBytes)) return run.template operator()<WideTile>();
    if (activation == Activation::kRelu) {
      const bool few_channels = std::max(channels, source_channels) <= NarrowTile::kChannels;
      const bool few_blocks =
          ceil_div(pixels, NarrowTile::kPixels) * ceil_div(channels, NarrowTile::kChannels) <= all;
      if (few_channels || few_blocks) return run.template operator()<NarrowTile>();
      return run.template operator()<BusyTile>();
    }
  }
  run.template operator()<SmallTile>();
}

// A step of a tile, counted in the kernel's taps and the source's channels: where its weights are
// and which part of the window it reads. `tile` counts those of a block.
struct Step {
  int tile = 0, channel = 0, row = 0, first_tap = 0;

  PREACT_DEVICE bool begins_chunk() const { return row == 0 && first_tap == 0; }
  template <int kChunk>
  PREACT_DEVICE void advance(int taps_down, int taps_across, int channels) {
    first_tap += kTapsPerStep;
    if (first_tap < taps_across) return;
    first_tap = 0;
    if (++row < taps_down) return;
    row = 0;
    channel += kChunk;
    if (channel < channels) return;
    channel = 0;
    ++tile;
  }
};

// Which slot of each ring is next.
struct Slots {
  int weights = 0, window = 0, waiting = 0;
};

// Runs the tiles of one block. An Epilogue::Thread stores one piece of channels of one pixel of the
// result, [N, height, width, channels], at a time, and reduces what it stores; what it reads for it
// is on its way for several at once.
template <typename T, bool kDgrad, class Tile, class Source, class Epilogue, typename Reduced>
PREACT_DEVICE void conv_tiles(const ConvTiling& tiling, const Axis& r, const Axis& c,
                              const Source& source, const Weight& weight, const Channels& result,
                              int64_t height, int64_t width, const Epilogue& epilogue,
                              const ReductionMemory& memory, const Reduced& reduced) {
  constexpr int kPitch = pitch<T>(Tile::kChunk, false);
  constexpr int kChunk = Tile::kChunk, kWarpChannels = Tile::kWarpChannels;
  constexpr int kStagePitch = Tile::kStagePitch;
  constexpr int kM = Tile::kWarpPixels / 16, kN = kWarpChannels / 8;
  const SharedLayout& layout = tiling.shared;
  unsigned char* const shared = shared_memory();
  int* const table = reinterpret_cast<int*>(shared);
  TilePlaces* const places = reinterpret_cast<TilePlaces*>(shared + Tile::kPlacesAt);
  const auto window_at = [&](int slot) {
    return reinterpret_cast<T*>(shared + layout.windows + slot * layout.window_bytes);
  };
  const auto second_at = [&](int slot) {
    return reinterpret_cast<T*>(shared + layout.second + slot * layout.window_bytes);
  };
  const auto weights_at = [&](int slot) {
    return reinterpret_cast<T*>(shared + layout.weights) +
           slot * taps_of_step(c.taps) * kWeightTile<T, kDgrad, Tile>;
  };
  // of this thread's pieces alone
  const auto inside_at = [&](int slot) {
    return reinterpret_cast<uint32_t*>(shared + layout.inside) + slot * Tile::kThreads +
           threadIdx.x;
  };

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int warp_pixel = thread / 32 % Tile::kWarpsDown * Tile::kWarpPixels;
  const int warp_channel = thread / 32 / Tile::kWarpsDown * kWarpChannels;
  const int tiles_across = static_cast<int>((result.count + Tile::kChannels - 1) / Tile::kChannels);
  const int first_channel = static_cast<int>(blockIdx.x) % tiles_across * Tile::kChannels;
  const int block = static_cast<int>(blockIdx.x) / tiles_across;
  const int blocks = static_cast<int>(gridDim.x) / tiles_across;
  // A tile of more than 64 channels has them all.
  const int64_t channels_left = result.count - first_channel;
  const int live = Tile::kAcross == 1 && channels_left < kWarpChannels
                       ? static_cast<int>(channels_left)
                       : kWarpChannels;
  const int live_pieces = (live + kPiece - 1) / kPiece;
  const int source_channels = static_cast<int>(source.channels.count);
  const int steps = (source_channels + kChunk - 1) / kChunk * r.taps * steps_across(c.taps);
  const int tiles = (tiling.patch.tiles - block + blocks - 1) / blocks;

  const Window<T, Source, kChunk / kPiece, false, Tile::kThreads> window(
      source, r, c, tiling.patch, tiling.images,
      reinterpret_cast<RegionPixel*>(shared + Tile::kPixelsAt), tiling.patch.window(r, c));
  // use(region) of the results; made anew each time, since it would take registers in every loop.
  const auto with_results = [&](const auto& use) {
    const Axis down = r.results(height), across = c.results(width);
    return use(Region(down, across, tiling.patch, tiling.images, result.count));
  };
  // A tile's divisions are made by one thread, a tile before anybody needs them.
  const auto find_places = [&](int tile) {
    const Origin origin(block + tile * blocks, tiling.patch);
    places[tile % kPlaces] = {window.region.place(origin), with_results([&](const Region& results) {
                                return results.place(origin);
                              })};
  };
  const auto fetch_step_weights = [&](const Step& step, T* to) {
    const int row = r.weight_first + step.row * r.weight_step;
    const int tap = c.weight_first + step.first_tap * c.weight_step;
    const int left = c.taps - step.first_tap, taps = left < kTapsPerStep ? left : kTapsPerStep;
    constexpr int kRows = kDgrad ? kChunk : Tile::kChannels;
    constexpr int kColumns = kDgrad ? Tile::kChannels : kChunk;
    fetch_weights<T, kRows, kColumns, kWeightPitch<T, kDgrad, Tile>, kWeightTile<T, kDgrad, Tile>,
                  Tile::kThreads>(
        weight, tiling.output_channels, tiling.weights, kDgrad ? step.channel : first_channel,
        kDgrad ? first_channel : step.channel, row, tap, taps, c.weight_step, to);
  };
  // Starts the copies of the next step that has none, be it of another tile: one group for each
  // step, empty behind the last one.
  const int weight_slots = layout.resident ? steps : tiling.stages;
  Step ahead;
  Slots ahead_slots;
  const auto fetch = [&] {
    if (ahead.tile < tiles) {
      if (ahead.begins_chunk()) {
        const uint32_t inside =
            window.fetch(places[ahead.tile % kPlaces].source, ahead.channel,
                         window_at(ahead_slots.window), second_at(ahead_slots.waiting));
        store_shared(inside_at(ahead_slots.waiting), inside);
        ahead_slots.window = next_slot(ahead_slots.window, layout.windows_count);
        ahead_slots.waiting = next_slot(ahead_slots.waiting, layout.waiting);
      }
      if (!layout.resident) {
        fetch_step_weights(ahead, weights_at(ahead_slots.weights));
        ahead_slots.weights = next_slot(ahead_slots.weights, tiling.stages);
      }
      ahead.template advance<kChunk>(r.taps, c.taps, source_channels);
    }
    copies_commit();
  };

  fill_row_table(table, Tile::kPixels, tiling.patch, r, c, kPitch);
  window.fill_table();
  RegionPixel* const results = reinterpret_cast<RegionPixel*>(shared + Tile::kResultsAt);
  with_results([&](const Region& region) {
    fill_pixel_table<Tile::kThreads>(region, Tile::kPixels, results);
  });
  if (layout.resident) {
    Step step;
    for (int i = 0; i < steps; ++i, step.template advance<kChunk>(r.taps, c.taps, source_channels))
      fetch_step_weights(step, weights_at(i));
  }
  if (thread == 0)
    for (int tile = 0; tile < tiling.stages; ++tile) find_places(tile);
  __syncthreads();
  if (steps > 0)
    for (int i = 1; i < tiling.stages; ++i) fetch();

  const int column = lane % live_pieces, row = lane / live_pieces, rows = 32 / live_pieces;
  const int my_channel = first_channel + warp_channel + column * kPiece;
  unsigned char* const of_warp = shared + layout.stages + thread / 32 * Tile::kWarpBytes;
  float* const stage = reinterpret_cast<float*>(of_warp);
  int64_t* const pixel_starts = reinterpret_cast<int64_t*>(of_warp + Tile::kStageBytes);
  typename Epilogue::Thread mine(epilogue, my_channel);
  typename Epilogue::Vectors vectors;

  // Of the rows that ldmatrix has from this lane: where in the window they are, in every tile.
  int row_starts[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) row_starts[m] = load_shared(table + warp_pixel + 16 * m + lane % 16);

  Step now;
  Slots slots;
  for (int tile = 0; tile < tiles; ++tile) {
    if (thread == 0) find_places(tile + tiling.stages);
    if (steps == 0) __syncthreads();  // else there is one in each step
    float sums[kM][kN][4] = {};
    for (int i = 0; i < steps; ++i) {
      copies_wait(tiling.stages - 2);
      if (now.begins_chunk()) {
        window.transform(now.channel, load_shared(inside_at(slots.waiting)),
                         window_at(slots.window), second_at(slots.waiting));
        slots.waiting = next_slot(slots.waiting, layout.waiting);
      }
      __syncthreads();
      fetch();

      const int source_left = source_channels - now.channel;
      const T* const taps =
          window_at(slots.window) + (now.row * window.region.columns() + now.first_tap) * kPitch;
      for (int t = 0; t < kTapsPerStep && now.first_tap + t < c.taps; ++t) {
        constexpr int kRow = kWeightPitch<T, kDgrad, Tile>;
        const T* const weights = weights_at(slots.weights) + t * kWeightTile<T, kDgrad, Tile>;
#pragma unroll
        for (int k0 = 0; k0 < kChunk; k0 += 16) {
          if (k0 >= source_left) break;
          multiply<T, false, kDgrad>(
              sums, live,
              [&](int m, int i, int k) {
                const int start = std::is_same_v<T, float>
                                      ? load_shared(table + warp_pixel + 16 * m + i)
                                      : row_starts[m];
                return taps + start + t * kPitch + k0 + k;
              },
              [&](int n, int k) {
                return kDgrad ? weights + (k0 + k) * kRow + warp_channel + n
                              : weights + (warp_channel + n) * kRow + k0 + k;
              });
        }
      }
      slots.weights = next_slot(slots.weights, weight_slots);
      now.template advance<kChunk>(r.taps, c.taps, source_channels);
      if (now.begins_chunk()) slots.window = next_slot(slots.window, layout.windows_count);
    }

    __syncwarp();  // the starts of the tile before have been read
    const Place& to = places[tile % kPlaces].result;
#pragma unroll
    for (int m = lane; m < Tile::kWarpPixels; m += 32) {
      const RegionPixel pixel = load_shared(results + warp_pixel + m);
      store_shared(pixel_starts + m,
                   pixel.inside(to) ? pixel.element(to, result.count) : int64_t{-1});
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      __syncwarp();  // the rows before have been read
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float2* const at = reinterpret_cast<float2*>(stage + (8 * h + lane / 4) * kStagePitch +
                                                       spaced(8 * n) + lane % 4 * 2);
          store_shared(at, make_float2(sums[m][n][2 * h], sums[m][n][2 * h + 1]));
        }
      __syncwarp();
      // not before: their registers are those of the sums
      if (m == 0) vectors = epilogue.vectors(my_channel);
      if (row < rows)
#pragma unroll 1
        for (int i = row; i < kStageRows; i += Tile::kReads * rows) {
          int64_t starts[Tile::kReads];
          typename Epilogue::Read reads[Tile::kReads];
#pragma unroll
          for (int j = 0; j < Tile::kReads; ++j) {
            const int of_stage = i + j * rows;
            starts[j] = of_stage < kStageRows
                            ? load_shared(pixel_starts + m * kStageRows + of_stage)
                            : int64_t{-1};
            if (starts[j] >= 0) mine.read(starts[j] + my_channel, reads[j]);
          }
#pragma unroll
          for (int j = 0; j < Tile::kReads; ++j) {
            if (starts[j] < 0) continue;
            Piece v;
            read_piece(stage + (i + j * rows) * kStagePitch + spaced(column * kPiece), v);
            mine.store(starts[j] + my_channel, reads[j], vectors, v);
          }
        }
    }
  }

  if (!memory.partial) return;
  const int parts = blocks * static_cast<int>(gridDim.z);
  const Reduction reduction{memory.partial,
                            memory.tickets + blockIdx.x % tiles_across * tickets_of(parts),
                            result.count,
                            parts,
                            block + blocks * static_cast<int>(blockIdx.z),
                            first_channel,
                            Tile::kAcross * live_pieces * kPiece};
  const int all_rows = Tile::kWarpsDown * rows;
  const int my_row = thread / 32 % Tile::kWarpsDown * rows + row;
  reduce(reduction, mine.reduced, warp_channel / kPiece + column, row < rows ? my_row : all_rows,
         all_rows, reinterpret_cast<float*>(shared + layout.windows), reduced);
}

}  // namespace preact::cuda
