// The operators fused_preact::*: their schemas and the CPU kernels, through LibTorch's stable ABI.
#include "operators.h"
#include "runtime.h"
#include "units.h"

namespace preact {
namespace {

class CpuDevice {
 public:
  static constexpr char kDtypes[] = "float32, bfloat16 or float64";
  static constexpr bool kResidualGradInPlace = true;  // it may write over g
  static bool runs(Dtype dtype) { return dtype != Dtype::kFloat16; }
  struct Call {
    explicit Call(const Tensor&) {}
    void finish() {}
  };

  explicit CpuDevice(const Tensor&) {}
  Runtime runtime() { return torch_runtime(); }
};

}  // namespace

STABLE_TORCH_LIBRARY(fused_preact, m) {
  define_operators(m);
  define_unit_operators(m);
}
STABLE_TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  implement_operators<CpuDevice>(m);
  implement_unit_operators<CpuDevice>(m);
}

}  // namespace preact
