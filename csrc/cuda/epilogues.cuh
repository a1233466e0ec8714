// What becomes of a convolution's sums, a piece of channels of one pixel at a time, whichever
// kernel made them: of preact_conv_forward and of preact_conv_dgrad.
//
// A Thread stores pieces of the same channels and reduces what it stores; what it reads for it is
// loaded before, so that several are on their way at once.
#pragma once

#include "bn.cuh"
#include "launch.cuh"

namespace preact::cuda {

// Where channel c lies in a row of the stage: 4 floats are left free after each 32, so that neither
// mma's layout nor pieces that are 32 channels apart meet in a bank.
__host__ __device__ constexpr int stage_column(int c) { return c + c / 32 * 4; }

template <typename T>
struct ForwardEpilogue {
  Channels channels;
  const T* residual;  // [M', K] or null
  T* output;          // [M', K]

  explicit ForwardEpilogue(const PreactConvForward& op)
      : channels(channels_of(op.shape.output.channels, {op.residual, op.output})),
        residual(static_cast<const T*>(op.residual)),
        output(static_cast<T*>(op.output)) {}

  struct Read {
    RawPiece<T> added;
  };
  struct Thread {
    const ForwardEpilogue& e;
    int valid;
    PieceMoments reduced;

    PREACT_DEVICE Thread(const ForwardEpilogue& e, int64_t channel)
        : e(e), valid(e.channels.valid(channel)) {}
    PREACT_DEVICE void begin_tile(int64_t) {}
    PREACT_DEVICE void read(int64_t offset, Read& read) const {
      if (e.residual) read.added = load_raw_piece(e.residual + offset, valid, e.channels.vectors);
    }
    PREACT_DEVICE void store(int64_t offset, const Read& read, Piece& v) {
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

  struct Read {
    RawPiece<T> added, u;
  };
  struct Thread {
    const DgradEpilogue& e;
    int valid;
    Affine bn;
    PieceSums reduced;

    PREACT_DEVICE Thread(const DgradEpilogue& e, int64_t channel)
        : e(e), valid(e.channels.valid(channel)) {}
    PREACT_DEVICE void begin_tile(int64_t channel) {
      if (e.affine) bn = Affine(e.affine, e.channels, channel);
    }
    PREACT_DEVICE void read(int64_t offset, Read& read) const {
      const bool vectors = e.channels.vectors;
      if (e.addend) read.added = load_raw_piece(e.addend + offset, valid, vectors);
      if (e.affine) read.u = load_raw_piece(e.input + offset, valid, vectors);
    }
    PREACT_DEVICE void store(int64_t offset, const Read& read, Piece& v) {
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
