// use_warpgroups: whether the kernels of this folder are used.
#include <atomic>

#include "choose.cuh"

namespace preact::cuda {
namespace {

std::atomic<bool> used = false;

}  // namespace

void use_warpgroups(bool use) { used = use; }
bool warpgroups_used() { return used; }

}  // namespace preact::cuda
