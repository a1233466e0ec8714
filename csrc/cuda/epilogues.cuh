// What becomes of a convolution's sums, a piece of channels of one pixel at a time, whichever
// kernel made them: of preact_conv_forward and of preact_conv_dgrad.
//
// A Thread stores pieces of the same channels and reduces what it stores; what it reads for it is
// loaded before, so that several are on their way at once. Vectors is what it needs of the
// channels, which the kernel keeps in registers or in shared memory.
#pragma once

#include "bn.cuh"
#include "launch.cuh"

namespace preact::cuda {

struct NoVectors {};

template <typename T>
struct ForwardEpilogue {
  using Vectors = NoVectors;
  Channels channels;
  const T* residual;  // [M', K] or null
  T* output;          // [M', K]

  explicit ForwardEpilogue(const PreactConvForward& op)
      : channels(channels_of(op.shape.output.channels, {op.residual, op.output})),
        residual(static_cast<const T*>(op.residual)),
        output(static_cast<T*>(op.output)) {}

  PREACT_DEVICE Vectors vectors(int64_t) const { return {}; }

  struct Read {
    RawPiece<T> added;
  };
  struct Thread {
    const ForwardEpilogue& e;
    int valid;
    PieceMoments reduced;

    PREACT_DEVICE Thread(const ForwardEpilogue& e, int64_t channel)
        : e(e), valid(e.channels.valid(channel)) {}
    PREACT_DEVICE void read(int64_t offset, Read& read) const {
      if (e.residual) read.added = load_raw_piece(e.residual + offset, valid, e.channels.vectors);
    }
    PREACT_DEVICE void store(int64_t offset, const Read& read, const Vectors&, Piece& v) {
      if (e.residual) {
        Piece added;
        read.added.widen(added);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) v[j] += added[j];
      }
      store_piece(e.output + offset, valid, e.channels.vectors, v);
      round_piece<T>(v);
      reduced.add(v);
    }
  };
};

template <typename T, bool kSilu>
struct DgradEpilogue {
  using Vectors = Affine;
  Channels channels;
  const T* addend;      // [M, C] or null
  const T* input;       // u [M, C]
  const float* affine;  // [4, C] or null: g = dh + addend
  Activation activation;
  bool frozen;
  const T* residual;  // [M, C] or null
  T* g;               // [M, C]

  explicit DgradEpilogue(const PreactConvDgrad& op)
      : channels(channels_of(op.shape.input.channels,
                             {op.addend, op.input, op.affine, op.residual, op.g})),
        addend(static_cast<const T*>(op.addend)),
        input(static_cast<const T*>(op.input)),
        affine(static_cast<const float*>(op.affine)),
        activation(op.activation),
        frozen(op.frozen),
        residual(static_cast<const T*>(op.residual)),
        g(static_cast<T*>(op.g)) {}

  PREACT_DEVICE Vectors vectors(int64_t channel) const {
    return affine ? Affine(affine, channels, channel) : Affine{};
  }

  struct Read {
    RawPiece<T> added, u;
  };
  struct Thread {
    const DgradEpilogue& e;
    int valid;
    PieceSums reduced;

    PREACT_DEVICE Thread(const DgradEpilogue& e, int64_t channel)
        : e(e), valid(e.channels.valid(channel)) {}
    PREACT_DEVICE void read(int64_t offset, Read& read) const {
      const bool vectors = e.channels.vectors;
      if (e.addend) read.added = load_raw_piece(e.addend + offset, valid, vectors);
      if (e.affine) read.u = load_raw_piece(e.input + offset, valid, vectors);
    }
    PREACT_DEVICE void store(int64_t offset, const Read& read, const Vectors& bn, Piece& v) {
      const bool vectors = e.channels.vectors;
      if (e.addend) {
        Piece added;
        read.added.widen(added);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) v[j] += added[j];
      }
      if (!e.affine) return store_piece(e.g + offset, valid, vectors, v);
      Piece u;
      read.u.widen(u);
      with_activation<kSilu>(e.activation, [&]<Activation kActivation>() {
#pragma unroll
        for (int j = 0; j < kPiece; ++j) v[j] *= slope<kActivation>(bn.z(j, u[j]));
      });
      if (e.frozen) {
        reduced.add(v, u, bn.mean);
        end_frozen(e.residual, offset, valid, vectors, bn, v);
        return store_piece(e.g + offset, valid, vectors, v);
      }
      store_piece(e.g + offset, valid, vectors, v);
      round_piece<T>(v);
      reduced.add(v, u, bn.mean);
    }
  };
};

}  // namespace preact::cuda
