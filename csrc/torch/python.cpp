// The extension module fused_preact._C. Importing it loads this library, whose static
// initialisers register the operators; the module itself says how it was built and lets tests
// choose the matrix tile. In a file of its own, since pybind11's headers take longer to compile
// than everything else.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <optional>
#include <string>

#ifdef PREACT_SM90
#include "../cuda/sm90/warpgroups.h"
#endif
#include "runtime.h"

namespace {

#ifdef __clang__
constexpr char kCompiler[] = "clang " __clang_version__;
#else
constexpr char kCompiler[] = "gcc " __VERSION__;
#endif

pybind11::dict build_info() {
  constexpr unsigned long long target = TORCH_TARGET_VERSION;
  pybind11::dict info;
  info["compiler"] = kCompiler;
  info["flags"] = PREACT_FLAGS;
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["torch_headers"] = TORCH_VERSION;
  info["torch_target"] = std::to_string(target >> 56) + "." + std::to_string(target >> 48 & 0xff);
  info["cuda"] = PREACT_CUDA_BUILD;
  return info;
}

std::optional<std::string> cuda_unavailable() {
#ifdef PREACT_CUDA
  const char* const problem = preact::cuda_unavailable();
  return problem ? std::optional<std::string>(problem) : std::nullopt;
#else
  return PREACT_CUDA_BUILD;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The operators of torch.ops.fused_preact: importing this module registers them.";
  module.def("build_info", &build_info, "How this library was compiled, and against which torch.");
  module.def(
      "tile_providers", &preact::tile_providers,
      "The matrix tiles that run here, the faster first: 'portable', and 'brgemm' where torch "
      "lends its own.");
  module.def("multiplies_bfloat16", &preact::multiplies_bfloat16,
             "Whether the CPU kernels multiply bfloat16 as it is, else as float32.");
  module.def("use_tile_provider", &preact::use_tile_provider, pybind11::arg("name"),
             "Take one of tile_providers() for the rest of this process.");
#ifdef PREACT_SM90
  module.def(
      "use_warpgroups", &preact::cuda::use_warpgroups, pybind11::arg("use"),
      "On GPUs of compute capability 9.0, whether convolutions in 16 bits multiply with wgmma "
      "where they can, for the rest of this process.");
#endif
  module.def("cuda_unavailable", &cuda_unavailable,
             "Why no CUDA kernel can run here, or None where they can.");
}
