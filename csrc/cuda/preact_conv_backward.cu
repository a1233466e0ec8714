// preact_conv_backward: both gradients of one convolution, wgrad and dgrad one after the other.
// Each reads g', u' and u for itself; see there.
#include "../preact.h"

namespace preact {

void preact_conv_backward(const CudaRuntime& runtime, const PreactConvDgrad& dgrad,
                          const PreactConvWgrad& wgrad) {
  preact_conv_wgrad(runtime, wgrad);
  preact_conv_dgrad(runtime, dgrad);
}

}  // namespace preact
