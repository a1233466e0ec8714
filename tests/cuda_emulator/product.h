// The arithmetic of the tensor cores' twins, in a file of its own: much of the emulator's time goes
// there, so it is optimised however the kernels are built. Test equipment.
#pragma once

namespace emulator {

// c[rows, columns] += a[rows, depth] b[depth, columns], each sum in the order of its terms.
void add_product(float* c, const float* a, const float* b, int rows, int columns, int depth);

}  // namespace emulator
