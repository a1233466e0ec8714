// BatchNorm and the activation on a piece of channels, forward and backward.
//
// z is computed by normalise() alone, so that forward, mask and wgrad agree on its sign.
#pragma once

#include "../preact.h"
#include "piece.cuh"

namespace preact::cuda {

PREACT_DEVICE float normalise(float u, float mean, float scale, float shift) {
  return fmaf(scale, u - mean, shift);
}

template <Activation kActivation>
PREACT_DEVICE float activate(float z) {
  if constexpr (kActivation == Activation::kRelu) return not_negative(z);
  return z / (1.f + expf(-z));
}

template <Activation kActivation>
PREACT_DEVICE float slope(float z) {
  if constexpr (kActivation == Activation::kRelu) return z > 0.f ? 1.f : 0.f;
  const float sigmoid = 1.f / (1.f + expf(-z));
  return sigmoid * (1.f + z * (1.f - sigmoid));
}

// Calls f.operator()<activation>(), chosen at run time: a kernel for each would take twice as long
// to build. Without kSilu it is ReLU.
template <bool kSilu, typename F>
PREACT_DEVICE void with_activation(Activation activation, const F& f) {
  if constexpr (kSilu)
    if (activation == Activation::kSilu) return f.template operator()<Activation::kSilu>();
  f.template operator()<Activation::kRelu>();
}

// Where BatchNorm's affine [4, C] goes, and what it is made of beside the statistics.
struct AffineMaker {
  const float* weight;  // [C] or null: 1
  const float* bias;    // [C] or null: 0
  double eps;
  float* affine;  // [4, C] or null

  AffineMaker(const void* weight, const void* bias, double eps, void* affine)
      : weight(static_cast<const float*>(weight)),
        bias(static_cast<const float*>(bias)),
        eps(eps),
        affine(static_cast<float*>(affine)) {}

  PREACT_DEVICE void make(int64_t channels, int64_t c, float mean, float variance) const {
    const float rstd = static_cast<float>(1 / sqrt(variance + eps));
    store(affine + c, mean);
    store(affine + channels + c, rstd);
    store(affine + 2 * channels + c, weight ? load(weight + c) * rstd : rstd);
    store(affine + 3 * channels + c, bias ? load(bias + c) : 0.f);
  }
};

// Pieces of vectors in shared memory, in rows `pitch` apart; the first one is for `row`.
template <int kRows>
PREACT_DEVICE void write_rows(float* row, int pitch, const Piece* const (&pieces)[kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) write_piece(row + i * pitch, *pieces[i]);
}
template <int kRows>
PREACT_DEVICE void read_rows(const float* row, int pitch, Piece* const (&pieces)[kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) read_piece(row + i * pitch, *pieces[i]);
}

// The rows mean, scale and shift of an affine [4, C] for the piece from channel `first`.
struct Affine {
  static constexpr int kRows = 3;
  Piece mean, scale, shift;

  Affine() = default;
  PREACT_DEVICE Affine(const float* affine, const Channels& channels, int64_t first) {
    const int valid = channels.valid(first);
    const bool vectors = channels.vectors;
    // A piece beyond the last one is not used: the first one will do.
    if (vectors && valid <= 0) first = 0;
    load_piece(affine + first, valid, vectors, mean);
    load_piece(affine + 2 * channels.count + first, valid, vectors, scale);
    load_piece(affine + 3 * channels.count + first, valid, vectors, shift);
  }
  PREACT_DEVICE void write(float* row, int pitch) const {
    write_rows(row, pitch, {&mean, &scale, &shift});
  }
  PREACT_DEVICE static Affine read(const float* row, int pitch) {
    Affine bn;
    read_rows(row, pitch, {&bn.mean, &bn.scale, &bn.shift});
    return bn;
  }
  PREACT_DEVICE float z(int j, float u) const { return normalise(u, mean[j], scale[j], shift[j]); }
  // act(z), as it is stored.
  template <Activation kActivation, typename T>
  PREACT_DEVICE RawPiece<T> activated(const Piece& u) const {
    Piece v;
    if constexpr (kActivation == Activation::kRelu && sizeof(T) == 2) {
#pragma unroll
      for (int j = 0; j < kPiece; ++j) v[j] = z(j, u[j]);
      return {narrow_not_negative<T>(v)};
    } else {
#pragma unroll
      for (int j = 0; j < kPiece; ++j) v[j] = activate<kActivation>(z(j, u[j]));
      return raw_piece<T>(v);
    }
  }
};

// The end of BatchNorm's backward pass with frozen statistics: g becomes residual + scale * g.
template <typename T>
PREACT_DEVICE void end_frozen(const T* residual,  // [M, C] or null
                              int64_t offset, int valid, bool vectors, const Affine& bn, Piece& g) {
  Piece joins{};
  if (residual) load_piece(residual + offset, valid, vectors, joins);
#pragma unroll
  for (int j = 0; j < kPiece; ++j) g[j] = fmaf(bn.scale[j], g[j], joins[j]);
}

// The end of BatchNorm's backward pass: du = scale * g + slope * (u - mean) + offset,
// slope = -scale * rstd * S2 / M, offset = -scale * S1 / M.
//
// In 16 bits as scale * g + slope * u + (offset - slope * mean): at a large mean that rounds in
// float32, while u itself has been rounded to 8 or 11 bits, which costs du thousands of times as
// much. z is centred there too: its sign decides.
template <typename T>
struct BnGrad {
  static constexpr bool kCentred = sizeof(T) > 2;
  static constexpr int kRows = 3;    // in shared memory, where it is in 16 bits alone
  Piece scale, slope, offset, mean;  // mean only where kCentred

  BnGrad() = default;
  PREACT_DEVICE BnGrad(const float* affine, const float* sums, float inverse_count,
                       const Channels& channels, int64_t first) {
    const int valid = channels.valid(first);
    const bool vectors = channels.vectors;
    if (vectors && valid <= 0) first = 0;
    const int64_t row = channels.count;
    affine += first;
    sums += first;
    // In an order that takes no more registers than stay in use.
    load_piece(affine + row, valid, vectors, slope);
    load_piece(sums + row, valid, vectors, offset);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) slope[j] *= offset[j];
    load_piece(sums, valid, vectors, offset);
    load_piece(affine, valid, vectors, mean);
    if constexpr (!kCentred) {
#pragma unroll
      for (int j = 0; j < kPiece; ++j) offset[j] = fmaf(-slope[j], mean[j], offset[j]);
    }
    load_piece(affine + 2 * row, valid, vectors, scale);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      slope[j] *= -scale[j] * inverse_count;
      offset[j] *= -scale[j] * inverse_count;
    }
  }
  PREACT_DEVICE void write(float* row, int pitch) const {
    static_assert(!kCentred);
    write_rows(row, pitch, {&scale, &slope, &offset});
  }
  PREACT_DEVICE static BnGrad read(const float* row, int pitch) {
    static_assert(!kCentred);
    BnGrad bn;
    read_rows(row, pitch, {&bn.scale, &bn.slope, &bn.offset});
    return bn;
  }
  PREACT_DEVICE float du(int j, float g, float u) const {
    return fmaf(scale[j], g, fmaf(slope[j], kCentred ? u - mean[j] : u, offset[j]));
  }
};

}  // namespace preact::cuda
