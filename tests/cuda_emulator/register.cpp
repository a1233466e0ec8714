// The CUDA kernels as operators fused_preact_emulator::* on CPU tensors, by the same checks and
// launchers as on a GPU, and the emulator's controls.
#include "../../csrc/cuda/ptx.cuh"
#include "../../csrc/torch/operators.h"

namespace preact {
namespace {

class EmulatedDevice {
 public:
  static constexpr char kDtypes[] = "float32, bfloat16 or float16";
  static bool runs(Dtype dtype) { return dtype != Dtype::kFloat64; }

  explicit EmulatedDevice(const Tensor&) {}
  CudaRuntime runtime() { return {0, nullptr, &allocate, this}; }

 private:
  static void* allocate(int64_t bytes, void* context) {
    auto* const self = static_cast<EmulatedDevice*>(context);
    self->memory_.emplace_back(new unsigned char[static_cast<size_t>(bytes)]);
    std::memset(self->memory_.back().get(), 0xff, static_cast<size_t>(bytes));  // poison
    return self->memory_.back().get();
  }

  std::vector<std::unique_ptr<unsigned char[]>> memory_;
};

}  // namespace

STABLE_TORCH_LIBRARY(PREACT_EMULATOR, m) { define_operators(m); }
STABLE_TORCH_LIBRARY_IMPL(PREACT_EMULATOR, CPU, m) { implement_operators<EmulatedDevice>(m); }

}  // namespace preact

extern "C" {
__attribute__((visibility("default"))) void emulator_seed(uint64_t value) { emulator::seed(value); }

// [read, written, conflicts] since the last call
__attribute__((visibility("default"))) void emulator_traffic(int64_t* out) {
  out[0] = emulator::traffic.read;
  out[1] = emulator::traffic.written;
  out[2] = emulator::traffic.conflicts;
  emulator::traffic = {};
}
}
