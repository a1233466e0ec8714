// The convolutions that have kernels of their own on compute capability 9.0: 16 bits, ReLU, an odd
// square kernel, stride 1 and results as large as the source or stride 2 and half as large,
// channels in whole, aligned pieces.
#pragma once

#include "../../preact.h"

namespace preact::cuda {

// Whether they are used where they can be, for the rest of the process; at first not.
void use_warpgroups(bool use);

// False, and nothing done, if they are not used, or have nothing for this device or convolution.
bool forward_by_warpgroups(const CudaRuntime& runtime, const PreactConvForward& op);
bool dgrad_by_warpgroups(const CudaRuntime& runtime, const PreactConvDgrad& op);
bool wgrad_by_warpgroups(const CudaRuntime& runtime, const PreactConvWgrad& op);

}  // namespace preact::cuda
