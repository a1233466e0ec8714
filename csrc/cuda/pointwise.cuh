// How the pointwise kernels walk over [M, C]: a thread keeps its piece of channels and steps from
// pixel to pixel; neighbouring threads have neighbouring pieces.
#pragma once

#include "launch.cuh"
#include "reduce.cuh"

namespace preact::cuda {

constexpr int kPointwiseThreads = 256;

struct Pointwise {
  int64_t pixels;
  Channels channels;
  int columns;  // pieces of a block
  int rows;     // threads of a block with the same piece
  Grid grid;    // x splits the pixels, y the channels

  Pointwise(const ImageShape& shape, const CudaRuntime& runtime,
            std::initializer_list<const void*> pointers)
      : pixels(shape.pixels()), channels(channels_of(shape.channels, pointers)) {
    constexpr int kMostColumns = 64, kPixelsPerThread = 4, kBlocksPerMultiprocessor = 4;
    const int64_t pieces = channels.pieces(), groups = ceil_div(pieces, kMostColumns);
    columns = static_cast<int>(ceil_div(pieces, groups));
    rows = kPointwiseThreads / columns;
    const int64_t resident = kBlocksPerMultiprocessor * multiprocessors(runtime.device);
    const int64_t parts = std::min(ceil_div(pixels, rows * kPixelsPerThread),
                                   std::max<int64_t>(ceil_div(resident, groups), 1));
    grid = {static_cast<unsigned>(parts), static_cast<unsigned>(groups)};
  }

  int64_t shared_bytes(int values) const {  // of reduce()
    return reduce_floats(values, rows, columns * kPiece, kPointwiseThreads) *
           static_cast<int64_t>(sizeof(float));
  }
};

// A thread's place in a Pointwise grid.
struct PointwiseThread {
  int column, row;
  int64_t channel;  // the first of the piece
  int valid;
  bool works;

  PREACT_DEVICE explicit PointwiseThread(const Pointwise& p)
      : column(static_cast<int>(threadIdx.x) % p.columns),
        row(static_cast<int>(threadIdx.x) / p.columns),
        channel((int64_t{blockIdx.y} * p.columns + column) * kPiece),
        valid(p.channels.valid(channel)),
        works(row < p.rows && valid > 0) {}

  // body(offset of the piece in [M, C]) for each pixel of this thread
  template <typename F>
  PREACT_DEVICE void for_each(const Pointwise& p, F body) const {
    if (!works) return;
    const int64_t step = int64_t{gridDim.x} * p.rows;
#pragma unroll 2
    for (int64_t pixel = int64_t{blockIdx.x} * p.rows + row; pixel < p.pixels; pixel += step)
      body(pixel * p.channels.count + channel);
  }

  PREACT_DEVICE Reduction reduction(const Pointwise& p, const ReductionMemory& memory) const {
    return {memory.partial,
            memory.tickets + blockIdx.y * tickets_of(gridDim.x),
            p.channels.count,
            static_cast<int>(gridDim.x),
            static_cast<int>(blockIdx.x),
            int64_t{blockIdx.y} * p.columns * kPiece,
            p.columns * kPiece};
  }
};

}  // namespace preact::cuda
