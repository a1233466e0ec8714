// bn_update_running: running = (1 - momentum) * running + momentum * batch, for mean and variance.
#include "common.h"

namespace preact {
namespace {

template <typename S>
void approach(S& running, double batch, double momentum) {
  const double value = widen(running), step = batch - value;
  const double next = momentum < 0.5 ? value + momentum * step : batch - (1 - momentum) * step;
  narrow(static_cast<Accumulator<S>>(next), running);
}

}  // namespace

void bn_update_running(Dtype accumulator, int64_t count, const RunningStats* updates) {
  const auto run = [&]<typename A>(const RunningStats& update, A) {
    const A* const stats = static_cast<const A*>(update.stats);
    dispatch(update.dtype, [&]<typename S>(S) {
      for (int64_t c = 0; c < update.channels; ++c) {
        approach(static_cast<S*>(update.mean)[c * update.mean_stride], stats[c], update.momentum);
        approach(static_cast<S*>(update.var)[c * update.var_stride],
                 stats[update.channels + c] * update.unbiased, update.momentum);
      }
    });
  };
  for (const RunningStats* update = updates; update != updates + count; ++update)
    accumulator == Dtype::kFloat64 ? run(*update, double{}) : run(*update, float{});
}

}  // namespace preact
