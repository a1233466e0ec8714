// The CUDA kernels as operators on CPU tensors, by the same checks and launchers as on a GPU. In a
// namespace that is chosen when a library is linked: this file takes longer than kernels do.
#include "../../csrc/cuda/ptx.cuh"
#include "../../csrc/cuda/sm90/warpgroups.h"
#include "../../csrc/torch/operators.h"
#include "../../csrc/torch/units.h"
#include "../../csrc/torch/units_call.h"

extern const char* const emulator_namespace;

namespace preact {
namespace {

class EmulatedDevice : public Lender<EmulatedDevice> {
 public:
  static constexpr char kDtypes[] = "float32, bfloat16 or float16";
  static constexpr bool kResidualGradInPlace = false;  // kernels read by __ldg
  static bool runs(Dtype dtype) { return dtype != Dtype::kFloat64; }

  explicit EmulatedDevice(const Tensor& tensor) : device_(tensor.device()) {}

  CudaRuntime runtime() { return lend(0, nullptr); }
  torch::stable::Device where() const { return device_; }
  void* allocate(int64_t bytes) {
    void* memory = nullptr;  // aligned as a device's allocator does
    if (posix_memalign(&memory, 256, static_cast<size_t>(bytes))) throw std::bad_alloc();
    memory_.emplace_back(static_cast<unsigned char*>(memory), &std::free);
    if (!emulator::recording) std::memset(memory, 0xff, static_cast<size_t>(bytes));  // poison
    return memory;
  }
  void* allocate_zeros(int64_t bytes) {
    return std::memset(allocate(bytes), 0, static_cast<size_t>(bytes));
  }

 private:
  torch::stable::Device device_;
  std::vector<std::unique_ptr<unsigned char, void (*)(void*)>> memory_;
};

using torch::stable::detail::StableLibrary;
using torch::stable::detail::StableTorchLibraryInit;

void define(StableLibrary& m) {
  define_operators(m);
  define_unit_operators(m);
}
void implement(StableLibrary& m) {
  implement_operators<EmulatedDevice>(m);
  implement_unit_operators<EmulatedDevice>(m);
}

// As STABLE_TORCH_LIBRARY and STABLE_TORCH_LIBRARY_IMPL do.
const StableTorchLibraryInit kDefined(StableLibrary::Kind::DEF, &define, emulator_namespace,
                                      nullptr, __FILE__, __LINE__);
const StableTorchLibraryInit kImplemented(StableLibrary::Kind::IMPL, &implement, emulator_namespace,
                                          "CPU", __FILE__, __LINE__);

}  // namespace
}  // namespace preact

// Whether launches from now on are those for compute capability 9.0.
extern "C" __attribute__((visibility("default"))) void emulator_warpgroups(int on) {
  preact::cuda::use_warpgroups(on != 0);
}
