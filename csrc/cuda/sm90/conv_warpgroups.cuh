// The kernel body of convolutions that multiply with wgmma, in 16 bits: tiles of positions on a
// line (line.cuh) by 64, 128 or 256 channels.
//
// Warps have roles. Source warps load what a tile reads, transform it once, and store it where
// every tap finds it: a window, in planes of eight channels, one 16-byte row for each position.
// Eight rows are a core matrix wherever they begin, so that a tap is an address. Weight warps copy
// weights, likewise in planes. Two warpgroups or four multiply, each its own positions or channels,
// and store results. Windows and weights lie in rings of slots; of each slot one barrier says that
// it is full, one that it is empty, and nobody waits for anybody else.
#pragma once

#include "../epilogues.cuh"
#include "window.cuh"

namespace preact::cuda {

constexpr int kMostChunk = 64;     // source channels of a step
constexpr int kSourceSlots = 2;    // windows
constexpr int kWeightSlots = 4;    // steps of weights, where not all of them stay
constexpr int kMostResident = 16;  // steps of weights that stay
constexpr int64_t kResidentWeights = 96 * 1024;
constexpr int kCopiesAtOnce = 4;  // of a thread, of weights
// Pieces of a thread that fills windows; those of a gradient have two tensors.
template <bool kDgrad>
constexpr int kSourcesAtOnce = kDgrad ? 2 : 4;
constexpr int kWeightsBehind = 2;  // steps whose copies are under way while others are begun
static_assert(kWeightsBehind < kWeightSlots);

// What a tile is made of.
struct GroupShape {
  int down = 2, across = 1;  // warpgroups that multiply: along positions, along channels
  int blocks = 1;            // of 64 positions, of each of them
  int group_channels = 64;   // of each of them
  int source_warps = 6, weight_warps = 2;
  int resident = 1;                     // blocks of a multiprocessor
  int registers, other_registers = 64;  // of a thread that multiplies, of one that does not
  bool pointwise = false;               // of a 1x1 that moves no pixel alone
};

template <GroupShape kShape>
struct GroupTile {
  static constexpr int kDown = kShape.down, kAcross = kShape.across;
  static constexpr int kBlocks = kShape.blocks, kGroupChannels = kShape.group_channels;
  static constexpr int kGroupPieces = kGroupChannels / kPiece;
  static constexpr int kChannels = kAcross * kGroupChannels;
  // Stride 2 alone where registers are left for it.
  static constexpr bool kStrided = kBlocks > 1;
  // Known here, a 1x1 has no code for gaps, and stride 1 none for phases.
  PREACT_DEVICE static ConvLine conv(ConvLine conv) {
    if constexpr (!kStrided) conv.stride = 1;
    if constexpr (kShape.pointwise) {
      conv.line.gap = 0;
      conv.kernel = 1;
    }
    return conv;
  }
  static constexpr int kWarpsDown = kDown * kWarpgroup / 32;
  static constexpr int kWarps = kWarpsDown * kAcross;  // that multiply
  // Of a warp that multiplies: where it is along the positions, and its warpgroup's pieces.
  PREACT_DEVICE static int down(int warp) { return kAcross == 1 ? warp : warp % kWarpsDown; }
  PREACT_DEVICE static int first_piece(int warp) {
    return kAcross == 1 ? 0 : warp / kWarpsDown * kGroupPieces;
  }
  static constexpr int kSourceWarps = kShape.source_warps, kWeightWarps = kShape.weight_warps;
  static constexpr int kWeightThreads = 32 * kWeightWarps;
  static constexpr int kThreads = 32 * (kWarps + kSourceWarps + kWeightWarps);
  static_assert(kThreads % kWarpgroup == 0);
  static constexpr int kPixels = kDown * kBlocks * kProductRows;
  static constexpr int kResident = kShape.resident;
  // Of a warp, the results that are on their way, in a pitch with which neither the products'
  // layout nor pieces meet in a bank. In the end a warp's sums for the reduction lie there.
  static constexpr int kStageRows = 1024 / kGroupChannels;
  static constexpr int kStagePitch = spaced(kGroupChannels) + (kGroupChannels == 64 ? 0 : 8);
  static constexpr int kStageBytes = kStageRows * kStagePitch * 4;
  static constexpr int kMeanBytes = spaced(kChannels) * 4;
  static constexpr int kRegisters = kShape.registers, kOtherRegisters = kShape.other_registers;
  static_assert(registers_suffice(kThreads, kResident, 32 * kWarps, kRegisters, kOtherRegisters));
  static constexpr int64_t kReduceBytes =
      reduce_floats(Moments::kValues, kThreads / (kChannels / kPiece), kChannels, kThreads) *
      static_cast<int64_t>(sizeof(float));
};
// Types of their own, so that a kernel's name says which one is its.
struct SlimGroups
    : GroupTile<GroupShape{.source_warps = 3, .weight_warps = 1, .resident = 2, .registers = 88}> {
};
struct TallGroups : GroupTile<GroupShape{.blocks = 2, .registers = 184, .other_registers = 72}> {};
struct WideGroups : GroupTile<GroupShape{.blocks = 2, .group_channels = 128, .registers = 192}> {};
struct PointGroups
    : GroupTile<GroupShape{
          .group_channels = 128, .source_warps = 10, .registers = 144, .pointwise = true}> {};
struct BroadGroups
    : GroupTile<GroupShape{.down = 1, .across = 4, .registers = 88, .pointwise = true}> {};

struct GroupBarriers {
  Barrier source_full[kSourceSlots], source_empty[kSourceSlots];
  Barrier weights_full[kMostResident], weights_empty[kMostResident];
};
constexpr int kBarrierBytes = 512;
static_assert(sizeof(GroupBarriers) <= kBarrierBytes);

// Shared memory, in bytes from its start, behind the barriers.
struct GroupLayout {
  int source, source_slot, source_plane;
  int weights, weight_slot, weight_plane;
  int means, stages;
  int64_t total;
};

struct GroupTiling {
  ConvLine conv;
  int tiles;  // of positions
  int source_count, result_count;
  int chunk_pieces;  // 2, 4 or 8: a step has as many pieces of source channels
  int source_share;  // positions of a window that a warp fills at a time
  int chunks;
  int weight_slots;  // of steps; all steps of a tile if `resident`
  bool resident;
  GroupLayout shared;

  __host__ __device__ int chunk() const { return chunk_pieces * kPiece; }
  __host__ __device__ int taps() const { return conv.kernel * conv.kernel; }
  // Positions of a window.
  template <class Tile>
  __host__ __device__ int window() const {
    return Tile::kPixels + conv.line.diagonal(conv.before() + conv.behind());
  }
  // Pieces of channels of a chunk that are multiplied: what is beyond the last channel is zero.
  __host__ __device__ int live_pieces(int chunk_index) const {
    const int left = (source_count - chunk_index * chunk() + kProductDepth - 1) / kProductDepth * 2;
    return left < chunk_pieces ? left : chunk_pieces;
  }
};

// Weights of a step: forward, chunk() channels of kChannels filters; dgrad, kChannels channels of
// chunk() filters.
template <bool kDgrad, class Tile>
__host__ __device__ constexpr int weight_rows(const GroupTiling& t) {
  return kDgrad ? t.chunk() : Tile::kChannels;
}
template <bool kDgrad, class Tile>
__host__ __device__ constexpr int weight_pieces(const GroupTiling& t) {
  return kDgrad ? Tile::kChannels / kPiece : t.chunk_pieces;
}

template <bool kDgrad, class Tile>
GroupTiling tile_line(const ConvShape& shape, int64_t source_channels, int64_t result_channels) {
  GroupTiling t{};
  t.conv = line_of(shape);
  t.tiles = static_cast<int>(ceil_div(positions_of(shape), Tile::kPixels));
  t.source_count = static_cast<int>(source_channels);
  t.result_count = static_cast<int>(result_channels);
  t.chunk_pieces = source_channels <= 16 ? 2 : source_channels <= 32 ? 4 : kMostChunk / kPiece;
  t.chunks = static_cast<int>(ceil_div(source_channels, t.chunk()));
  t.source_share =
      share_of_warp(t.window<Tile>(), t.chunk_pieces, Tile::kSourceWarps, kSourcesAtOnce<kDgrad>);

  GroupLayout& at = t.shared;
  const int pieces = weight_pieces<kDgrad, Tile>(t);
  at.weight_plane = plane_bytes(weight_rows<kDgrad, Tile>(t), pieces);
  at.weight_slot = at.weight_plane * pieces;
  const int steps = t.chunks * t.taps();
  t.resident = steps <= kWeightSlots ||
               (steps <= kMostResident && int64_t{steps} * at.weight_slot <= kResidentWeights);
  t.weight_slots = t.resident ? steps : kWeightSlots;
  at.source_plane = plane_bytes(t.window<Tile>(), t.chunk_pieces);
  at.source_slot = at.source_plane * t.chunk_pieces;

  at.means = kBarrierBytes;
  at.stages = at.means + (kDgrad ? Tile::kMeanBytes : 0);
  const int64_t source = at.stages + Tile::kWarps * Tile::kStageBytes;
  const int64_t weights = source + int64_t{kSourceSlots} * at.source_slot;
  at.source = static_cast<int>(source);
  at.weights = static_cast<int>(weights);
  // The reduction comes when nobody needs the rest any more.
  at.total = std::max<int64_t>(weights + int64_t{t.weight_slots} * at.weight_slot,
                               at.stages + Tile::kReduceBytes);
  return t;
}

// What a block works on.
struct GroupWork {
  const GroupTiling& t;
  GroupBarriers& barriers;
  int first_channel;  // of the results
  int first, step;    // tiles

  PREACT_DEVICE float* means(int channel) const {
    return reinterpret_cast<float*>(shared_memory() + t.shared.means) + spaced(channel);
  }
  PREACT_DEVICE unsigned char* window(int slot) const {
    return shared_memory() + t.shared.source + slot * t.shared.source_slot;
  }
  PREACT_DEVICE unsigned char* weights(int slot) const {
    return shared_memory() + t.shared.weights + slot * t.shared.weight_slot;
  }
};

// Windows of a block's tiles; `warp` counts those with this role. They take turns, so that none of
// them has more shares to fill in the end.
template <typename T, bool kDgrad, class Tile, class Source>
PREACT_DEVICE void fill_windows(const GroupWork& work, const Source& source, int warp) {
  const GroupTiling& t = work.t;
  const ConvLine conv = Tile::conv(t.conv);
  const int lead = conv.line.diagonal(kDgrad ? conv.behind() : conv.before());
  const int shares = (t.window<Tile>() + t.source_share - 1) / t.source_share;
  const int turn = shares % Tile::kSourceWarps;
  Ring ring;
  for (int tile = work.first; tile < t.tiles; tile += work.step)
    for (int phase = 0; phase < conv.phases(); ++phase) {
      if (!conv.has_taps(phase)) continue;
      const Run run(conv.line, kDgrad ? conv.results() : conv.input(phase),
                    tile * Tile::kPixels - lead);
      for (int chunk = 0; chunk < t.chunks; ++chunk, ring.advance(kSourceSlots)) {
        barrier_wait(&work.barriers.source_empty[ring.slot], ring.phase ^ 1);
        fill_window<T, Tile::kSourceWarps, kSourcesAtOnce<kDgrad>>(
            source, [&](int channel) { return source.vectors(channel); }, run, t.window<Tile>(),
            t.source_share, chunk * t.chunk(), t.chunk_pieces, t.live_pieces(chunk),
            work.window(ring.slot), t.shared.source_plane, warp);
        warp_arrives(&work.barriers.source_full[ring.slot]);
        warp = warp < turn ? warp - turn + Tile::kSourceWarps : warp - turn;
      }
    }
}

// Weights of all steps, once if they stay, else for every tile.
template <typename T, bool kDgrad, class Tile>
PREACT_DEVICE void fill_weights(const GroupWork& work, const Weight& weight, int thread) {
  const GroupTiling& t = work.t;
  const int pieces = weight_pieces<kDgrad, Tile>(t), rows = weight_rows<kDgrad, Tile>(t);
  // Where there are few rows, some threads have none.
  const int all_steps = Tile::kWeightThreads / pieces;
  const int step = all_steps * kCopiesAtOnce <= rows ? all_steps : rows / kCopiesAtOnce;
  const int piece = thread % pieces, first = thread / pieces < step ? thread / pieces : rows;
  const int64_t row_step = step * weight.stride_k;
  Ring ring, full;
  int begun = 0;
  const auto arrive = [&] {
    operands_written();
    warp_arrives(&work.barriers.weights_full[full.slot]);
    full.advance(t.weight_slots);
  };
  const ConvLine conv = Tile::conv(t.conv);
  for (int tile = work.first; tile < t.tiles; tile += work.step) {
    for (int phase = 0; phase < conv.phases(); ++phase) {
      const int first_r = conv.first_tap(ConvLine::row_of(phase));
      const int first_s = conv.first_tap(ConvLine::column_of(phase));
      for (int chunk = 0; chunk < t.chunks; ++chunk)
        for (int r = first_r; r < conv.kernel; r += conv.stride)
          for (int s = first_s; s < conv.kernel; s += conv.stride) {
            if (!t.resident) barrier_wait(&work.barriers.weights_empty[ring.slot], ring.phase ^ 1);
            const int first_row = kDgrad ? chunk * t.chunk() : work.first_channel;
            const int column = (kDgrad ? work.first_channel : chunk * t.chunk()) + piece * kPiece;
            const int rows_left = (kDgrad ? t.source_count : t.result_count) - first_row;
            const bool there = column < (kDgrad ? t.result_count : t.source_count);
            const T* from = static_cast<const T*>(weight.data) + r * weight.stride_r +
                            s * weight.stride_s + (first_row + first) * weight.stride_k + column;
            SharedAddress to = shared_address(work.weights(ring.slot) +
                                              piece * t.shared.weight_plane + first * kCoreRow);
#pragma unroll 1
            for (int row = first; row < rows; row += kCopiesAtOnce * step)
#pragma unroll
              for (int i = 0; i < kCopiesAtOnce; ++i, from += row_step, to += step * kCoreRow)
                copy16(to, from, there && row + i * step < rows_left);
            copies_commit();
            ring.advance(t.weight_slots);
            if (++begun <= kWeightsBehind) continue;
            copies_wait(kWeightsBehind);
            arrive();
          }
    }
    if (t.resident) break;
  }
  copies_wait(0);
  for (int i = begun < kWeightsBehind ? begun : kWeightsBehind; i > 0; --i) arrive();
}

// A thread's sums for the reduction on their way through its warp's stage: from where it has many
// registers to where all threads have as many.
template <class Sums>
PREACT_DEVICE void park(const Sums& sums, float* stage) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Sums) / sizeof(float)); ++i)
    store_shared(stage + i * 32 + threadIdx.x % 32, reinterpret_cast<const float*>(&sums)[i]);
}
template <class Sums>
PREACT_DEVICE Sums parked(const float* stage) {
  Sums sums;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Sums) / sizeof(float)); ++i)
    reinterpret_cast<float*>(&sums)[i] = load_shared(stage + i * 32 + threadIdx.x % 32);
  return sums;
}

// Which of its warpgroup's `pieces` of a row a lane stores, and in which of a warp's `rows` rows:
// from `rows` on, in none.
struct StoringLane {
  int column, row, rows;

  PREACT_DEVICE explicit StoringLane(int pieces)
      : column(lane_number() % pieces), row(lane_number() / pieces), rows(32 / pieces) {}
};

// Of `pieces` that a warpgroup stores; the last one may have less.
template <class Tile>
PREACT_DEVICE StoringLane storing_lane(const GroupWork& work, int pieces, int warp) {
  StoringLane lane(pieces);
  if constexpr (Tile::kAcross > 1) {
    const int left = (work.t.result_count - work.first_channel) / kPiece - Tile::first_piece(warp);
    if (lane.column >= left) lane.row = lane.rows;
  }
  return lane;
}

// Multiplies and stores a block's tiles, as a warp that multiplies; `pieces` of each position.
template <typename T, bool kDgrad, class Tile, class Epilogue>
PREACT_DEVICE void multiply_tiles(const GroupWork& work, const Channels& result,
                                  const Epilogue& epilogue, float* stage, int pieces) {
  constexpr int kBlocks = Tile::kBlocks, kSums = Tile::kGroupChannels / 2;
  constexpr int kReads = kDgrad ? 1 : 2;         // rows that are read at once
  constexpr int kHalves = Tile::kStageRows / 8;  // of 16 rows of the sums, at once in the stage
  const GroupTiling& t = work.t;
  const int warp = warp_number(), first_piece = Tile::first_piece(warp);
  const int group_position = Tile::down(warp) / 4 * kBlocks * kProductRows;
  typename Epilogue::Thread mine(epilogue, work.first_channel);  // whose pieces are all whole
  const ConvLine conv = Tile::conv(t.conv);
  const Line& line = conv.line;
  const LineDivisors by(line);
  const int lead = line.diagonal(kDgrad ? conv.behind() : conv.before());
  Ring windows, weights;
  // Adds the products of a phase.
  const auto multiply_phase = [&](float (&sums)[kBlocks][kSums], bool add, int phase) {
    Barrier *weights_before = nullptr, *window_before = nullptr;
    const auto release = [&] {
      if (weights_before) warp_arrives(weights_before);
      if (window_before) warp_arrives(window_before);
      weights_before = window_before = nullptr;
    };
    constexpr int kOn = kDgrad ? -1 : 1;  // from tap to tap
    const int row = ConvLine::row_of(phase), column = ConvLine::column_of(phase);
    const int first_r = conv.first_tap(row), first_s = conv.first_tap(column);
    const int first_position =
        group_position + lead - kOn * (conv.reach(row) * line.pitch() + conv.reach(column));
    for (int chunk = 0; chunk < t.chunks; ++chunk, windows.advance(kSourceSlots)) {
      barrier_wait(&work.barriers.source_full[windows.slot], windows.phase);
      const int depth = t.live_pieces(chunk) / 2;
      int of_row = first_position;
      for (int r = first_r; r < conv.kernel; r += conv.stride, of_row += kOn * line.pitch()) {
        int position = of_row;
        for (int s = first_s; s < conv.kernel;
             s += conv.stride, position += kOn, weights.advance(t.weight_slots)) {
          barrier_wait(&work.barriers.weights_full[weights.slot], t.resident ? 0 : weights.phase);
          const Operand a(work.window(windows.slot) + position * kCoreRow, t.shared.source_plane,
                          kCore);
          const Operand b(
              work.weights(weights.slot) + first_piece * (kDgrad ? t.shared.weight_plane : kCore),
              kDgrad ? kCore : t.shared.weight_plane, kDgrad ? t.shared.weight_plane : kCore);
          const auto multiply = [&](int k) {
            products_begin();
            const Operand b_k = b.moved(k * (kDgrad ? 2 * kCore : 2 * t.shared.weight_plane));
#pragma unroll
            for (int i = 0; i < kBlocks; ++i)
              warpgroup_multiply<false, kDgrad>(
                  sums[i], a.moved(2 * k * t.shared.source_plane + i * kProductRows * kCoreRow),
                  b_k, add, T{});
            add = true;
          };
#pragma unroll 1
          for (int k = 0; k < depth - 1; ++k) multiply(k);
          // Where a group ends in a loop, ptxas ends it by an empty product behind the loop, and
          // nothing stays under way while the next step is waited for.
          multiply(depth - 1);
          products_commit();
          products_wait<1>();
          release();
          if (!t.resident) weights_before = &work.barriers.weights_empty[weights.slot];
          if (r + conv.stride >= conv.kernel && s + conv.stride >= conv.kernel)
            window_before = &work.barriers.source_empty[windows.slot];
        }
      }
    }
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) products_done(sums[i]);
    release();
  };
  const auto store_phase = [&](int tile, const float (&sums)[kBlocks][kSums], const Phase& phase) {
    const Run run(line, phase, tile * Tile::kPixels + group_position + warp % 4 * 16);
    const int lane = lane_number();
    const auto [column, row, rows] = storing_lane<Tile>(work, pieces, warp);
    const int my_channel = work.first_channel + (first_piece + column) * kPiece;
    // Unsigned: a product of 32 bits by 32 is one instruction then.
    const auto start_of = [&](int pixel) {
      return static_cast<int64_t>(uint64_t{static_cast<uint32_t>(result.count)} *
                                  static_cast<uint32_t>(pixel)) +
             my_channel;
    };
    // This lane's, of 16 rows of each block.
    static_assert(kBlocks <= 2);
    const int pixel_of_row = run.pixel(lane / 16 % kBlocks * kProductRows + lane % 16, by);
    typename Epilogue::Vectors vectors;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int h0 = 0; h0 < 2; h0 += kHalves) {
        __syncwarp();  // the rows before have been read
        // anew: over the rows, its register would be spilled
        const int storing = lane_number();
        float* const to = stage + storing / 4 * Tile::kStagePitch + storing % 4 * 2;
#pragma unroll
        for (int h = h0; h < h0 + kHalves; ++h)
#pragma unroll
          for (int j = 0; j < kSums / 4; ++j)
            store_shared(
                reinterpret_cast<float2*>(to + 8 * (h - h0) * Tile::kStagePitch + spaced(8 * j)),
                make_float2(sums[i][4 * j + 2 * h], sums[i][4 * j + 2 * h + 1]));
        __syncwarp();
        // not before: their registers are those of the sums
        if (i == 0 && h0 == 0) vectors = epilogue.vectors(my_channel);
#pragma unroll 1
        for (int first = 0; first < Tile::kStageRows; first += kReads * rows) {
          const int at = first + row;
          int pixels[kReads];
#pragma unroll
          for (int j = 0; j < kReads; ++j) {
            const int pixel = of_lane(pixel_of_row, 16 * i + 8 * h0 + at + j * rows);
            pixels[j] = row < rows && at + j * rows < Tile::kStageRows ? pixel : -1;
          }
          typename Epilogue::Read reads[kReads];
#pragma unroll
          for (int j = 0; j < kReads; ++j)
            if (pixels[j] >= 0) mine.read(start_of(pixels[j]), reads[j]);
#pragma unroll
          for (int j = 0; j < kReads; ++j) {
            if (pixels[j] < 0) continue;
            Piece v;
            read_piece(stage + (at + j * rows) * Tile::kStagePitch + spaced(column * kPiece), v);
            // read for each piece: kept over them, its registers would be spilled
            if constexpr (kDgrad)
              read_piece(work.means((first_piece + column) * kPiece), vectors.mean);
            mine.store(start_of(pixels[j]), reads[j], vectors, v);
          }
        }
      }
    }
  };
  for (int tile = work.first; tile < t.tiles; tile += work.step) {
    if constexpr (kDgrad) {
      for (int phase = 0; phase < conv.phases(); ++phase) {
        float sums[kBlocks][kSums] = {};
        if (conv.has_taps(phase)) multiply_phase(sums, false, phase);
        store_phase(tile, sums, conv.input(phase));
      }
    } else {
      float sums[kBlocks][kSums] = {};
      for (int phase = 0; phase < conv.phases(); ++phase)
        if (conv.has_taps(phase)) multiply_phase(sums, phase > 0, phase);
      store_phase(tile, sums, conv.results());
    }
  }
  __syncwarp();
  static_assert(sizeof(mine.reduced) * 32 <= Tile::kStageBytes);
  park(mine.reduced, stage);
}

// Runs the tiles of one block; Source, Epilogue and reduced() are those of conv_tiles().
template <typename T, bool kDgrad, class Tile, class Source, class Epilogue, typename Reduced>
PREACT_DEVICE void conv_warpgroups(const GroupTiling& t, Source source, const Weight& weight,
                                   Epilogue epilogue, const ReductionMemory& memory,
                                   const Reduced& reduced) {
  // As the host has made sure; known here, it spares the code of single numbers.
  source.channels.vectors = epilogue.channels.vectors = true;
  const Channels& result = epilogue.channels;
  const int thread = static_cast<int>(threadIdx.x), warp = warp_number();
  const int tiles_across = (t.result_count + Tile::kChannels - 1) / Tile::kChannels;
  const int group = static_cast<int>(blockIdx.x) % tiles_across;
  const int block = static_cast<int>(blockIdx.x) / tiles_across;
  const int blocks = static_cast<int>(gridDim.x) / tiles_across;
  const GroupWork work{t, *reinterpret_cast<GroupBarriers*>(shared_memory()),
                       group * Tile::kChannels, block, blocks};
  if (thread == 0) {
    for (int i = 0; i < kSourceSlots; ++i) {
      barrier_begin(&work.barriers.source_full[i], Tile::kSourceWarps);
      barrier_begin(&work.barriers.source_empty[i], Tile::kWarps);
    }
    for (int i = 0; i < t.weight_slots; ++i) {
      barrier_begin(&work.barriers.weights_full[i], Tile::kWeightWarps);
      barrier_begin(&work.barriers.weights_empty[i], Tile::kWarps);
    }
  }
  if constexpr (kDgrad)
    if (thread < Tile::kChannels / kPiece)
      write_piece(work.means(thread * kPiece),
                  epilogue.vectors(work.first_channel + thread * kPiece).mean);
  __syncthreads();

  const int channels_left = t.result_count - work.first_channel;
  const int live_pieces =
      (channels_left < Tile::kChannels ? channels_left : Tile::kChannels) / kPiece;
  const int pieces =
      Tile::kAcross > 1 && live_pieces > Tile::kGroupPieces ? Tile::kGroupPieces : live_pieces;
  float* const stage =
      reinterpret_cast<float*>(shared_memory() + t.shared.stages + warp * Tile::kStageBytes);
  if (warp < Tile::kWarps) {
    take_registers<Tile::kRegisters>();
    multiply_tiles<T, kDgrad, Tile>(work, result, epilogue, stage, pieces);
  } else {
    give_registers<Tile::kOtherRegisters>();
    if (warp < Tile::kWarps + Tile::kSourceWarps)
      fill_windows<T, kDgrad, Tile>(work, source, warp - Tile::kWarps);
    else
      fill_weights<T, kDgrad, Tile>(work, weight,
                                    thread - 32 * (Tile::kWarps + Tile::kSourceWarps));
  }

  if (!memory.partial) return;
  const Reduction reduction{memory.partial,
                            memory.tickets + group * tickets_of(blocks),
                            result.count,
                            blocks,
                            block,
                            work.first_channel,
                            live_pieces * kPiece};
  const auto [column, row, rows] = storing_lane<Tile>(work, pieces, warp);
  const int all_rows = Tile::kWarpsDown * rows;
  const bool has_sums = warp < Tile::kWarps && row < rows;
  decltype(Epilogue::Thread::reduced) mine;
  if (has_sums) mine = parked<decltype(mine)>(stage);
  reduce(reduction, mine, Tile::first_piece(warp) + column,
         has_sums ? Tile::down(warp) * rows + row : all_rows, all_rows,
         reinterpret_cast<float*>(shared_memory() + t.shared.stages), reduced);
}

}  // namespace preact::cuda
