// What the kernels of this folder share: windows of an operand on the line, transformed once, in
// planes; rings of slots and who waits for what.
//
// A plane has eight channels, one 16-byte row for each position. Eight rows are a core matrix of a
// product wherever they begin, so that a tap is an address, and a product may sum over channels, as
// forward and dgrad do, or over positions, as wgrad does.
#pragma once

#include "line.cuh"
#include "ptx.cuh"

namespace preact::cuda {

// A place in a ring of slots, and the phase in which a slot there is full.
struct Ring {
  int slot = 0, phase = 0;

  PREACT_DEVICE void advance(int slots) {
    if (++slot < slots) return;
    slot = 0;
    phase ^= 1;
  }
};

// Everybody of a warp has done what the barrier waits for.
PREACT_DEVICE void warp_arrives(Barrier* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// The bytes from one plane of `rows` rows to the next: threads that follow one another have
// `pieces` of a row each, and write them to different banks.
inline int plane_bytes(int64_t rows, int pieces) {
  const int64_t odd = 128 / std::min(pieces, 8);
  return static_cast<int>(ceil_div(rows * kCoreRow - odd, 128) * 128 + odd);
}

// Positions of a window of `count` of which a warp's lanes find out, each of one, where its pixel
// is: more spare work, fewer leave none of the warps idle.
inline int share_of_warp(int count, int pieces, int warps, int at_once) {
  return std::clamp(at_once * (32 / pieces), count >= 16 * warps ? 16 : 8, 32);
}

// Fills a window, `count` positions of a run and `pieces` planes, a power of 2, from
// `first_channel` on, with what source makes of them and of their vectors(channel), zeros where
// there is none. Of the planes beyond the last channel those below `live` are zeros, and the rest
// is left. By kWarps warps, of which this is one, `positions` at a time; a thread has kAtOnce
// pieces on their way.
template <typename T, int kWarps, int kAtOnce, class Source, typename Vectors>
PREACT_DEVICE void fill_window(const Source& source, const Vectors& vectors, const Run& run,
                               int count, int positions, int first_channel, int pieces, int live,
                               unsigned char* window, int plane, int warp) {
  const int piece = lane_number() & (pieces - 1), rows = 32 / pieces;
  const int channel = first_channel + piece * kPiece;
  const bool has_channels = channel < source.channels.count;
  const bool written = has_channels || piece < live;
  const uint32_t pixel_bytes = static_cast<uint32_t>(source.channels.count * sizeof(T));
  // From an element of the first tensor to that of the second: fewer registers than two pointers.
  uint64_t apart = 0;
  if constexpr (Source::kTwo)
    apart = reinterpret_cast<uint64_t>(source.output) - reinterpret_cast<uint64_t>(source.first);
  Bytes16* const to = reinterpret_cast<Bytes16*>(window + piece * plane);
  const auto each = [&](const auto& function) {
    const LineDivisors by(run.line);
#pragma unroll 1
    for (int w = warp * positions; w < count; w += kWarps * positions) {
      // What is made of a lane's number is made anew, and is in no register meanwhile.
      const T* const from = source.first + first_channel + (lane_number() & (pieces - 1)) * kPiece;
      const int left = count - w < positions ? count - w : positions;
      const int of_mine = run.pixel(w + lane_number(), by);
#pragma unroll 1
      for (int first = 0; first < left; first += kAtOnce * rows) {
        const int row = first + lane_number() * rows / 32;
        RawPiece<T> v[kAtOnce], u[kAtOnce];
        int pixels[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) pixels[j] = of_lane(of_mine, row + j * rows);
        bool there[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          there[j] = has_channels && pixels[j] >= 0 && row + j * rows < left;
          if (!there[j]) continue;
          const T* const at = behind(from, static_cast<uint32_t>(pixels[j]), pixel_bytes);
          v[j] = load_raw_piece(at, kPiece, true);
          if constexpr (Source::kTwo)
            if (source.output)
              u[j] = load_raw_piece(
                  reinterpret_cast<const T*>(reinterpret_cast<uint64_t>(at) + apart), kPiece, true);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          if (written && row + j * rows < left)
            store_operand(to + w + row + j * rows, there[j] ? function(v[j], u[j]) : Bytes16{});
      }
    }
  };
  if (source.plain()) {
    each([](const RawPiece<T>& v, const RawPiece<T>&) { return v.part[0]; });
  } else {
    source.with_function(vectors(channel), [&](const auto& function) {
      each([&](const RawPiece<T>& raw, const RawPiece<T>& raw_output) {
        Piece v, u{};
        raw.widen(v);
        if constexpr (Source::kTwo) raw_output.widen(u);
        return function(v, u).part[0];
      });
    });
  }
  operands_written();
}

}  // namespace preact::cuda
