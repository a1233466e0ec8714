// Per-channel sums over all pixels: each thread over its own, a block over its threads, the last
// block to arrive over the blocks. Every merge has a fixed order, so that reruns are bit-identical.
#pragma once

#include "piece.cuh"

namespace preact::cuda {

// sum - carry += x, with what rounding loses kept in carry (Kahan)
PREACT_DEVICE void add_exactly(float& sum, float& carry, float x) {
  const float y = x - carry, total = sum + y;
  carry = (total - sum) - y;
  sum = total;
}

// Count, sum and squared deviations of some values. The sum is that of x - shift, shift being one
// of the values, so that a mean far from 0 keeps its last digits. The squares are about the mean
// (Welford, Chan): nothing cancels.
struct Moments {
  static constexpr int kValues = 5;
  float count = 0, shift = 0, sum = 0, carry = 0, squares = 0;

  PREACT_DEVICE float mean() const { return shift + (sum - carry) / count; }
  PREACT_DEVICE void get(float (&values)[kValues]) const {
    values[0] = count;
    values[1] = shift;
    values[2] = sum;
    values[3] = carry;
    values[4] = squares;
  }
  PREACT_DEVICE void merge(const float (&values)[kValues]) {
    const float n = values[0];
    if (n == 0.f) return;
    if (count == 0.f) {
      count = n, shift = values[1], sum = values[2], carry = values[3], squares = values[4];
      return;
    }
    const float moved = values[1] - shift, d = moved + values[2] / n - sum / count;
    squares += fmaf(d * d, count * (n / (count + n)), values[4]);
    const float product = n * moved;
    add_exactly(sum, carry, product);
    add_exactly(sum, carry, fmaf(n, moved, -product));
    add_exactly(sum, carry, values[2]);
    carry += values[3];
    count += n;
  }
};

// Of a thread's values in each channel of its piece.
struct PieceMoments {
  using Total = Moments;
  float count = 0, share = 0;  // 1 / count
  Piece shift{}, sum{}, carry{}, squares{};

  PREACT_DEVICE void add(const Piece& x) {
    const bool first = count == 0.f;
    const float share_before = share;
    count += 1.f;
    share = 1.f / count;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      if (first) shift[j] = x[j];
      const float centred = x[j] - shift[j], d = fmaf(-share_before, sum[j], centred);
      add_exactly(sum[j], carry[j], centred);
      squares[j] = fmaf(d, fmaf(-share, sum[j], centred), squares[j]);
    }
  }
  PREACT_DEVICE void get(int j, float (&values)[Total::kValues]) const {
    values[0] = count;
    values[1] = shift[j];
    values[2] = sum[j];
    values[3] = carry[j];
    values[4] = squares[j];
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
  PREACT_DEVICE void merge(const float (&values)[kValues]) {
    s1 += values[0];
    s2 += values[1];
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

// What one launch reduces: `parts` blocks share the channels [first, first + width) of `channels`.
struct Reduction {
  float* partial;  // [parts, kValues, channels]
  int* ticket;     // 0 at launch, one for each group of channels
  int64_t channels;
  int parts, part;  // blocks that merge, and which one this is
  int64_t first;    // channels of this block
  int width;        // how many, rounded up to whole pieces
};

// `mine` are a thread's sums for piece `column` of its block, one of `rows` threads with that
// piece; threads with row >= rows have none. finish(channel, merged) is called once for each
// channel, by the last block to arrive. shared: [kValues][max(rows, threads / width, 1)][width].
template <class PiecePartial, typename Finish>
PREACT_DEVICE void reduce(const Reduction& r, const PiecePartial& mine, int column, int row,
                          int rows, float* shared, Finish finish) {
  using Partial = typename PiecePartial::Total;
  constexpr int kValues = Partial::kValues;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const auto at = [&](int value, int slice, int slices, int c) {
    // The threads that write the same channel of their pieces find it in different banks.
    const int i = slice * r.width + c;
    return shared + value * slices * r.width + (i ^ i / 32 % kPiece);
  };
  const auto merged = [&](int slices, int c) {
    Partial total;
    for (int slice = 0; slice < slices; ++slice) {
      float values[kValues];
#pragma unroll
      for (int v = 0; v < kValues; ++v) values[v] = load_shared(at(v, slice, slices, c));
      total.merge(values);
    }
    return total;
  };

  __syncthreads();  // shared may still be read for something else
  if (row < rows) {
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      float values[kValues];
      mine.get(j, values);
#pragma unroll
      for (int v = 0; v < kValues; ++v)
        store_shared(at(v, row, rows, column * kPiece + j), values[v]);
    }
  }
  __syncthreads();
  for (int c = thread; c < r.width && r.first + c < r.channels; c += threads) {
    float values[kValues];
    merged(rows, c).get(values);
#pragma unroll
    for (int v = 0; v < kValues; ++v)
      store(r.partial + (int64_t{r.part} * kValues + v) * r.channels + r.first + c, values[v]);
  }

  __threadfence();
  __syncthreads();
  int* const last = reinterpret_cast<int*>(shared);
  if (thread == 0) store_shared(last, int{count_arrival(r.ticket) == r.parts - 1});
  __syncthreads();
  if (!load_shared(last)) return;
  __threadfence();
  __syncthreads();

  const int slices = threads / r.width > 1 ? threads / r.width : 1;
  for (int i = thread; i < slices * r.width; i += threads) {
    const int slice = i / r.width, c = i % r.width;
    if (r.first + c >= r.channels) continue;
    Partial total;
#pragma unroll 8
    for (int part = slice; part < r.parts; part += slices) {
      float values[kValues];
#pragma unroll
      for (int v = 0; v < kValues; ++v)
        values[v] =
            load_fresh(r.partial + (int64_t{part} * kValues + v) * r.channels + r.first + c);
      total.merge(values);
    }
    float values[kValues];
    total.get(values);
#pragma unroll
    for (int v = 0; v < kValues; ++v) store_shared(at(v, slice, slices, c), values[v]);
  }
  __syncthreads();
  for (int c = thread; c < r.width && r.first + c < r.channels; c += threads)
    finish(r.first + c, merged(slices, c));
}

}  // namespace preact::cuda
