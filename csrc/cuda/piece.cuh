// Eight neighbouring channels, the unit that every kernel loads, computes and stores.
#pragma once

#include "ptx.cuh"

namespace preact::cuda {

constexpr int kPiece = 8;
using Piece = float[kPiece];

// How a tensor's channels are cut into pieces.
struct Channels {
  int64_t count;
  bool vectors;  // every piece is whole and lies at a multiple of 16 bytes

  __host__ __device__ int pieces() const { return static_cast<int>((count + kPiece - 1) / kPiece); }
  // how many channels the piece from `first` has, at most 8; may be negative beyond the last one
  __host__ __device__ int valid(int64_t first) const {
    const int64_t left = count - first;
    return left < kPiece ? static_cast<int>(left) : kPiece;
  }
};

PREACT_DEVICE void widen_piece(const Bytes16& raw, Piece& v, bf16) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    v[2 * j] = widen(bf16{static_cast<uint16_t>(raw.word[j])});
    v[2 * j + 1] = widen(bf16{static_cast<uint16_t>(raw.word[j] >> 16)});
  }
}
PREACT_DEVICE void widen_piece(const Bytes16& raw, Piece& v, f16) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    v[2 * j] = widen(f16{static_cast<uint16_t>(raw.word[j])});
    v[2 * j + 1] = widen(f16{static_cast<uint16_t>(raw.word[j] >> 16)});
  }
}

template <typename T>
PREACT_DEVICE Bytes16 narrow_piece(const Piece& v) {
  Bytes16 raw;
#pragma unroll
  for (int j = 0; j < 4; ++j) raw.word[j] = narrow_pair(v[2 * j], v[2 * j + 1], T{});
  return raw;
}

// Likewise, 0 for what is negative: at no cost beside the rounding.
template <typename T>
PREACT_DEVICE Bytes16 narrow_not_negative(const Piece& v) {
  Bytes16 raw;
#pragma unroll
  for (int j = 0; j < 4; ++j) raw.word[j] = narrow_pair_not_negative(v[2 * j], v[2 * j + 1], T{});
  return raw;
}

template <typename T>
PREACT_DEVICE T narrow(float x) {
  return {static_cast<uint16_t>(narrow_pair(x, x, T{}))};
}
template <>
PREACT_DEVICE float narrow<float>(float x) {
  return x;
}
template <>
PREACT_DEVICE tf32 narrow<tf32>(float x) {
  return {x};
}

// As a kernel that reads v again will see it.
template <typename T>
PREACT_DEVICE void round_piece(Piece& v) {
  if constexpr (sizeof(T) == 2) widen_piece(narrow_piece<T>(v), v, T{});
}

// A piece as it lies in memory: half the registers of one in float32, while it is on its way.
template <typename T>
struct RawPiece {
  Bytes16 part[sizeof(T) / 2];

  PREACT_DEVICE void widen(Piece& v) const {
    if constexpr (sizeof(T) == 2) {
      widen_piece(part[0], v, T{});
    } else {
#pragma unroll
      for (int j = 0; j < kPiece; ++j) v[j] = __uint_as_float(part[j / 4].word[j % 4]);
    }
  }
};

template <typename T>
PREACT_DEVICE RawPiece<T> raw_piece(const Piece& v) {
  RawPiece<T> raw;
  if constexpr (sizeof(T) == 2) {
    raw.part[0] = narrow_piece<T>(v);
  } else {
#pragma unroll
    for (int j = 0; j < kPiece; ++j) raw.part[j / 4].word[j % 4] = __float_as_uint(v[j]);
  }
  return raw;
}

// A piece in global memory; channels that are not there read as 0.
template <typename T>
PREACT_DEVICE RawPiece<T> load_raw_piece(const T* p, int valid, bool vectors) {
  RawPiece<T> raw;
  if (vectors) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i)
      raw.part[i] = load16(p + i * 16 / static_cast<int>(sizeof(T)));
    return raw;
  }
  Piece v;
#pragma unroll
  for (int j = 0; j < kPiece; ++j) v[j] = j < valid ? widen(load(p + j)) : 0.f;
  return raw_piece<T>(v);
}
template <typename T>
PREACT_DEVICE void load_piece(const T* p, int valid, bool vectors, Piece& v) {
  load_raw_piece(p, valid, vectors).widen(v);
}

template <typename T>
PREACT_DEVICE void store_raw_piece(T* p, int valid, bool vectors, const RawPiece<T>& raw) {
  if (vectors) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i)
      store16(p + i * 16 / static_cast<int>(sizeof(T)), raw.part[i]);
    return;
  }
  Piece v;
  raw.widen(v);
#pragma unroll
  for (int j = 0; j < kPiece; ++j)
    if (j < valid) store(p + j, narrow<T>(v[j]));
}
template <typename T>
PREACT_DEVICE void store_piece(T* p, int valid, bool vectors, const Piece& v) {
  store_raw_piece(p, valid, vectors, raw_piece<T>(v));
}

// A whole, aligned piece in shared memory.
template <typename T>
PREACT_DEVICE void read_piece(const T* shared, Piece& v) {
  const Bytes16* const from = reinterpret_cast<const Bytes16*>(shared);
  RawPiece<T> raw;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) raw.part[i] = load_shared(from + i);
  raw.widen(v);
}

// Where channel c lies in a row of floats there that is read in pieces: 4 are left free after each
// 32, so that neither the layout of mma nor pieces that are 32 channels apart meet in a bank.
__host__ __device__ constexpr int spaced(int c) { return c + c / 32 * 4; }

template <typename T>
PREACT_DEVICE void write_raw_piece(T* shared, const RawPiece<T>& raw) {
  Bytes16* const to = reinterpret_cast<Bytes16*>(shared);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) store_shared(to + i, raw.part[i]);
}
template <typename T>
PREACT_DEVICE void write_piece(T* shared, const Piece& v) {
  write_raw_piece(shared, raw_piece<T>(v));
}

}  // namespace preact::cuda
