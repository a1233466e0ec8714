// The CUDA kernels behind the operators fused_preact::*; nothing where there was no nvcc.
#ifdef PREACT_CUDA

#include "cuda_device.h"
#include "operators.h"
#include "units.h"

namespace preact {

STABLE_TORCH_LIBRARY_IMPL(fused_preact, CUDA, m) {
  implement_operators<CudaDevice>(m);
  implement_unit_operators<CudaDevice>(m);
}

}  // namespace preact

#endif
