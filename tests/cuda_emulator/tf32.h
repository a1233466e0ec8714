// The host twin of what csrc/cuda/ptx.cuh has for TF32; see emulator.h.
#pragma once

namespace preact::cuda {

inline float widen(tf32 x) { return x.value; }

inline void round_to_tf32(uint32_t& bits) {
  if (std::isfinite(std::bit_cast<float>(bits))) bits = (bits + 0x1000) & ~0x1fffu;
}

}  // namespace preact::cuda
