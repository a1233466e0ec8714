// Per-channel sums over all pixels: each thread over its own, a block over its threads, the last of
// kMergedAtOnce blocks to arrive over these, the last of those over all. Every merge has a fixed
// order, so that reruns are bit-identical.
#pragma once

#include "piece.cuh"

namespace preact::cuda {

// How many of the parts first, first + step, ... there are. Loops count up to it, since only a loop
// whose end is known before has its loads unrolled, none of them waiting for another.
PREACT_DEVICE int parts_of_slice(int first, int parts, int step) {
  return first < parts ? (parts - first + step - 1) / step : 0;
}

constexpr int kMergedPerThread = 4;  // parts whose values a thread loads at once

// Count, mean and squared deviations of some values. The mean is shift + rest, shift being one of
// the values, so that a mean far from 0 keeps its last digits. The squares are about the mean:
// nothing cancels.
struct Moments {
  static constexpr int kValues = 4;
  float count = 0, shift = 0, rest = 0, squares = 0;

  PREACT_DEVICE float mean() const { return shift + rest; }
  PREACT_DEVICE void get(float (&values)[kValues]) const {
    values[0] = count;
    values[1] = shift;
    values[2] = rest;
    values[3] = squares;
  }
  // Takes the values of more of them, which may be empty; each is merged as Chan, Golub and LeVeque
  // have it, all of `more` at once.
  PREACT_DEVICE void add(const float (&more)[kMergedPerThread][kValues]) {
    float n = 0, first = shift;
#pragma unroll
    for (int i = kMergedPerThread - 1; i >= 0; --i) {
      n += more[i][0];
      if (count == 0.f && more[i][0] > 0.f) first = more[i][1];
    }
    if (n == 0.f) return;
    shift = first;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kMergedPerThread; ++i)
      sum = fmaf(more[i][0], more[i][1] - shift + more[i][2], sum);
    const float mean = sum / n;  // about the shift
#pragma unroll
    for (int i = 0; i < kMergedPerThread; ++i) {
      const float d = more[i][1] - shift + more[i][2] - mean;
      squares += fmaf(more[i][0] * d, d, more[i][3]);
    }
    const float apart = mean - rest, share = n / (count + n);
    squares = fmaf(apart * apart, count * share, squares);
    rest = fmaf(apart, share, rest);
    count += n;
  }
};

// Of a thread's values in each channel of its piece, about the first of them: it is one of the
// values, so that what its distance to the mean costs the squares in digits, it adds to them.
struct PieceMoments {
  using Total = Moments;
  float count = 0;
  Piece shift{}, sum{}, squares{};

  PREACT_DEVICE void add(const Piece& x) {
    if (count == 0.f) [[unlikely]] {
#pragma unroll
      for (int j = 0; j < kPiece; ++j) shift[j] = x[j];
    }
    count += 1.f;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      const float centred = x[j] - shift[j];
      sum[j] += centred;
      squares[j] = fmaf(centred, centred, squares[j]);
    }
  }
  PREACT_DEVICE void get(int j, float (&values)[Total::kValues]) const {
    values[0] = count;
    values[1] = shift[j];
    values[2] = count > 0.f ? sum[j] / count : 0.f;
    values[3] = not_negative(fmaf(-values[2], sum[j], squares[j]));
  }
};

// S1 = sum g and sum g * (u - mean)
struct Sums {
  static constexpr int kValues = 2;
  float s1 = 0, s2 = 0;

  PREACT_DEVICE void get(float (&values)[kValues]) const {
    values[0] = s1;
    values[1] = s2;
  }
  PREACT_DEVICE void add(const float (&more)[kMergedPerThread][kValues]) {
#pragma unroll
    for (int i = 0; i < kMergedPerThread; ++i) {
      s1 += more[i][0];
      s2 += more[i][1];
    }
  }
};

struct PieceSums {
  using Total = Sums;
  Piece s1{}, s2{};

  PREACT_DEVICE void add(const Piece& g, const Piece& u, const Piece& mean) {
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      s1[j] += g[j];
      s2[j] = fmaf(g[j], u[j] - mean[j], s2[j]);
    }
  }
  PREACT_DEVICE void get(int j, float (&values)[Total::kValues]) const {
    values[0] = s1[j];
    values[1] = s2[j];
  }
};

// Channels whose values lie together: 128 bytes of each, whole sectors for a warp.
constexpr int kLine = 32;

// Blocks whose sums one block merges: of hundreds, its few threads would have too many to load.
constexpr int kMergedAtOnce = 16;

// Of all blocks that is one merge each, and then, where there are several, one of their results:
// each has a ticket.
__host__ __device__ constexpr int merges_of(int64_t parts) {
  return static_cast<int>((parts + kMergedAtOnce - 1) / kMergedAtOnce);
}
__host__ __device__ constexpr int tickets_of(int64_t parts) { return 1 + merges_of(parts); }

// What one launch reduces: `parts` blocks share the channels [first, first + width) of `channels`.
struct Reduction {
  float* partial;  // [parts, channels / kLine, kValues, kLine]
  int* tickets;    // [tickets_of(parts)], 0 at launch, for each group of channels
  int64_t channels;
  int parts, part;  // blocks that merge, and which one this is
  int64_t first;    // channels of this block
  int width;        // how many, rounded up to whole pieces
};

// Floats of shared memory that reduce() takes, for kValues values.
__host__ __device__ constexpr int64_t reduce_floats(int values, int rows, int width, int threads) {
  return int64_t{values} * (int64_t{rows} * width + (threads > width ? threads : width));
}

// The parts first, first + step, ..., of which load(part, i) is value i; empty where there is none.
template <class Total, typename Load>
PREACT_DEVICE Total merged(int first, int parts, int step, const Load& load) {
  Total total;
#pragma unroll 1
  for (; first < parts; first += kMergedPerThread * step) {
    float values[kMergedPerThread][Total::kValues] = {};
#pragma unroll
    for (int i = 0; i < kMergedPerThread; ++i)
      if (first + i * step < parts)
#pragma unroll
        for (int v = 0; v < Total::kValues; ++v) values[i][v] = load(first + i * step, v);
    total.add(values);
  }
  return total;
}

// Merges parts of which load(part, i, c) is value i of the block's channel c: the threads share the
// parts of each channel, then one adds up what they have, and finish(c, merged) is called for it.
// shared: [kValues][max(threads / width, 1)][width].
template <class Total, typename Load, typename Finish>
PREACT_DEVICE void merge_parts(const Reduction& r, int parts, float* shared, const Load& load,
                               const Finish& finish) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int slices = threads > r.width ? threads / r.width : 1, size = slices * r.width;
  for (int i = thread; i < size; i += threads) {
    const int c = i % r.width;
    if (r.first + c >= r.channels) continue;
    float values[Total::kValues];
    merged<Total>(i / r.width, parts, slices, [&](int part, int v) {
      return load(part, v, c);
    }).get(values);
#pragma unroll
    for (int v = 0; v < Total::kValues; ++v) store_shared(shared + v * size + i, values[v]);
  }
  __syncthreads();
  for (int c = thread; c < r.width && r.first + c < r.channels; c += threads)
    finish(c, merged<Total>(0, slices, 1, [&](int slice, int v) {
             return load_shared(shared + v * size + slice * r.width + c);
           }));
}

// `mine` are a thread's sums for piece `column` of its block, one of `rows` threads with that
// piece; threads with row >= rows have none. finish(channel, merged) is called once for each
// channel, by the last block to arrive. shared: reduce_floats().
template <class PiecePartial, typename Finish>
PREACT_DEVICE void reduce(const Reduction& r, const PiecePartial& mine, int column, int row,
                          int rows, float* shared, Finish finish) {
  using Total = typename PiecePartial::Total;
  constexpr int kValues = Total::kValues;
  const auto at = [&](int value, int row, int c) {
    // The threads that write the same channel of their pieces find it in different banks.
    const int i = row * r.width + c;
    return shared + value * rows * r.width + (i ^ (i / 32 + i / 256) % kPiece);
  };
  float* const merged = shared + kValues * rows * r.width;

  __syncthreads();  // shared may still be read for something else
  if (row < rows) {
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      float values[kValues];
      mine.get(j, values);
#pragma unroll
      for (int v = 0; v < kValues; ++v) store_shared(at(v, row, column * kPiece + j), values[v]);
    }
  }
  __syncthreads();
  const int64_t of_part = (r.channels + kLine - 1) / kLine * kLine * kValues;
  const auto partial = [&](int part, int value, int c) {
    const int64_t channel = r.first + c;
    return r.partial + part * of_part + (channel / kLine * kValues + value) * kLine +
           channel % kLine;
  };
  const auto store_part = [&](int part, int c, const Total& total) {
    float values[kValues];
    total.get(values);
#pragma unroll
    for (int v = 0; v < kValues; ++v) store(partial(part, v, c), values[v]);
  };
  merge_parts<Total>(
      r, rows, merged, [&](int row, int v, int c) { return load_shared(at(v, row, c)); },
      [&](int c, const Total& total) { store_part(r.part, c, total); });

  // One thread's fences are the block's: the barriers order what the others have stored and load.
  const auto is_last = [&](int* ticket, int blocks) {
    __syncthreads();
    int* const last = reinterpret_cast<int*>(shared);
    if (threadIdx.x == 0) {
      __threadfence();
      store_shared(last, int{arrives_last(ticket, blocks)});
      __threadfence();
    }
    __syncthreads();
    return load_shared(last) != 0;
  };
  int parts = r.parts, step = 1;
  if (parts > kMergedAtOnce) {
    const int merge = r.part / kMergedAtOnce, begin = merge * kMergedAtOnce;
    const int mine = parts - begin < kMergedAtOnce ? parts - begin : kMergedAtOnce;
    if (!is_last(r.tickets + 1 + merge, mine)) return;
    merge_parts<Total>(
        r, mine, merged,
        [&](int part, int v, int c) { return load_fresh(partial(begin + part, v, c)); },
        [&](int c, const Total& total) { store_part(begin, c, total); });
    parts = merges_of(parts);
    step = kMergedAtOnce;
  }
  if (!is_last(r.tickets, parts)) return;
  merge_parts<Total>(
      r, parts, merged,
      [&](int part, int v, int c) { return load_fresh(partial(part * step, v, c)); },
      [&](int c, const Total& total) { finish(r.first + c, total); });
}

}  // namespace preact::cuda
