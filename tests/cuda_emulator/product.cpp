#include "product.h"

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
