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

// The rows mean, scale and shift of an affine [4, C] for the piece from channel `first`.
struct Affine {
  Piece mean, scale, shift;

  Affine() = default;
  PREACT_DEVICE Affine(const float* affine, const Channels& channels, int64_t first) {
    const int valid = channels.valid(first);
    const bool vectors = channels.vectors && valid > 0;
    load_piece(affine + first, valid, vectors, mean);
    load_piece(affine + 2 * channels.count + first, valid, vectors, scale);
    load_piece(affine + 3 * channels.count + first, valid, vectors, shift);
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
struct BnGrad {
  Piece mean, scale, slope, offset;

  BnGrad() = default;
  PREACT_DEVICE BnGrad(const float* affine, const float* sums, float inverse_count,
                       const Channels& channels, int64_t first) {
    const int valid = channels.valid(first);
    const bool vectors = channels.vectors && valid > 0;
    const int64_t row = channels.count;
    // In an order that takes no more registers than stay in use: mean last, after it has held S2.
    load_piece(affine + 2 * row + first, valid, vectors, scale);
    load_piece(sums + first, valid, vectors, offset);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) offset[j] *= -scale[j] * inverse_count;
    load_piece(affine + row + first, valid, vectors, slope);
    load_piece(sums + row + first, valid, vectors, mean);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) slope[j] = -scale[j] * inverse_count * slope[j] * mean[j];
    load_piece(affine + first, valid, vectors, mean);
  }
  PREACT_DEVICE float du(int j, float g, float u) const {
    return fmaf(scale[j], g, fmaf(slope[j], u - mean[j], offset[j]));
  }
};

}  // namespace preact::cuda
