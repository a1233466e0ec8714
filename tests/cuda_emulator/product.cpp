#include "product.h"

#include "ptx.cuh"

namespace emulator {

void add_product(float* c, const float* a, const float* b, int rows, int columns, int depth) {
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < depth; ++k) {
      const float factor = a[row * depth + k];
      for (int column = 0; column < columns; ++column)
        c[row * columns + column] += factor * b[k * columns + column];
    }
}

}  // namespace emulator

namespace preact::cuda {
namespace {

// Adds a[16, depth] b[depth, 8] to what the lanes have.
void add_to_lanes(void* (&lanes)[32], const float* a, const float* b, int depth) {
  float c[16][8];
  const auto each = [&](const auto& function) {
    for (int l = 0; l < 32; ++l)
      for (int j = 0; j < 4; ++j)
        function(static_cast<MatrixMultiply*>(lanes[l])->c[j],
                 c[l / 4 + j / 2 * 8][l % 4 * 2 + j % 2]);
  };
  each([](float of_lane, float& sum) { sum = of_lane; });
  emulator::add_product(c[0], a, b, 16, 8, depth);
  each([](float& of_lane, float sum) { of_lane = sum; });
}

}  // namespace

template <typename T>
void multiply_all_matrices(void* (&lanes)[32]) {
  const auto half = [](uint32_t pair, int i) {
    return widen(T{static_cast<uint16_t>(pair >> 16 * i)});
  };
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    const auto* lane = static_cast<MatrixMultiply*>(lanes[l]);
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j)
        a[l / 4 + j % 2 * 8][l % 4 * 2 + i + j / 2 * 8] = half(lane->a[j], i);
      for (int j = 0; j < 2; ++j) b[l % 4 * 2 + i + j * 8][l / 4] = half(lane->b[j], i);
    }
  }
  add_to_lanes(lanes, a[0], b[0], 16);
}
template void multiply_all_matrices<bf16>(void* (&)[32]);
template void multiply_all_matrices<f16>(void* (&)[32]);

// The tensor core ignores the bits that TF32 lacks: what nobody rounded is cut off.
template <>
void multiply_all_matrices<tf32>(void* (&lanes)[32]) {
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
