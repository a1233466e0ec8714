// The host twin of what csrc/cuda/ptx.cuh has for TF32; see emulator.h.
#pragma once

namespace preact::cuda {

inline float widen(tf32 x) { return x.value; }

inline void round_to_tf32(uint32_t& bits) {
  if (std::isfinite(std::bit_cast<float>(bits))) bits = (bits + 0x1000) & ~0x1fffu;
}

// The tensor core ignores the bits that TF32 lacks: what nobody rounded is cut off.
template <>
inline void multiply_all_matrices<tf32>(void* (&lanes)[32]) {
  const auto cut = [](uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); };
  float a[16][8], b[8][8];
  for (int l = 0; l < 32; ++l) {
    const auto* lane = static_cast<MatrixMultiply*>(lanes[l]);
    for (int j = 0; j < 4; ++j) a[l / 4 + j % 2 * 8][l % 4 + j / 2 * 4] = cut(lane->a[j]);
    for (int j = 0; j < 2; ++j) b[l % 4 + j * 4][l / 4] = cut(lane->b[j]);
  }
  add_to_lanes(lanes, a[0], b[0], 8);
}

}  // namespace preact::cuda
