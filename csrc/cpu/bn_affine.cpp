// bn_affine: what BatchNorm applies, z = scale * (u - mean) + shift, from its statistics.
//   rstd = (var + eps)^-1/2, scale = gamma * rstd, shift = beta
#include <cmath>

#include "common.h"

namespace preact {
namespace {

template <typename A>
void affine_of(int64_t channels, const A* stats, const A* weight, const A* bias, double eps,
               A* affine) {
  for (int64_t c = 0; c < channels; ++c) {
    const A rstd = A(1) / std::sqrt(stats[channels + c] + static_cast<A>(eps));
    affine[c] = stats[c];
    affine[channels + c] = rstd;
    affine[2 * channels + c] = weight ? weight[c] * rstd : rstd;
    affine[3 * channels + c] = bias ? bias[c] : A(0);
  }
}

}  // namespace

void bn_affine(Dtype accumulator, int64_t channels, const void* stats, const void* weight,
               const void* bias, double eps, void* affine) {
  const auto run = [&]<typename A>(A) {
    affine_of(channels, static_cast<const A*>(stats), static_cast<const A*>(weight),
              static_cast<const A*>(bias), eps, static_cast<A*>(affine));
  };
  accumulator == Dtype::kFloat64 ? run(double{}) : run(float{});
}

}  // namespace preact
