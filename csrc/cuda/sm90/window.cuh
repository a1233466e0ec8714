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

// Fills a window, `count` positions of a run and `pieces` planes of channels from `first_channel`
// on, with what source makes of them, zeros where there is none. Of the planes beyond the last
// channel those below `live` are zeros, and the rest is left. By kThreads threads, of which this is
// one.
template <typename T, int kThreads, class Source>
PREACT_DEVICE void fill_window(const Source& source, const Run& run, const LineDivisors& by,
                               int count, int first_channel, int pieces, int live,
                               unsigned char* window, int plane, int thread) {
  constexpr int kAtOnce = Source::kTwo ? 2 : 4;  // pieces that are on their way
  const int piece = thread % pieces, first = thread / pieces, step = kThreads / pieces;
  const int64_t channels = source.channels.count;
  const int channel = first_channel + piece * kPiece;
  Bytes16* const to = reinterpret_cast<Bytes16*>(window + piece * plane);
  const auto each = [&](const auto& function) {
#pragma unroll 1
    for (int w = first; w < count; w += kAtOnce * step) {
      RawPiece<T> v[kAtOnce], u[kAtOnce];
      bool there[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int at = w + j * step;
        const int pixel = at < count ? run.pixel(at, by) : -1;
        there[j] = pixel >= 0;
        if (!there[j]) continue;
        const int64_t offset = pixel * channels + channel;
        v[j] = load_raw_piece(source.first + offset, kPiece, true);
        if constexpr (Source::kTwo)
          if (source.output) u[j] = load_raw_piece(source.output + offset, kPiece, true);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int at = w + j * step;
        if (at < count) store_operand(to + at, there[j] ? function(v[j], u[j]) : Bytes16{});
      }
    }
  };
  if (channel >= channels) {
    if (piece < live)
      for (int w = first; w < count; w += step) store_operand(to + w, Bytes16{});
  } else if (source.plain()) {
    each([](const RawPiece<T>& v, const RawPiece<T>&) { return v.part[0]; });
  } else {
    source.with_function(channel, [&](const auto& function) {
      each([&](const RawPiece<T>& raw, const RawPiece<T>& raw_output) {
        Piece v, u{};
        raw.widen(v);
        if constexpr (Source::kTwo) raw_output.widen(u);
        function(v, u);
        return narrow_piece<T>(v);
      });
    });
  }
  operands_written();
}

}  // namespace preact::cuda
