"""bn_update_running: running = (1 - momentum) * running + momentum * batch, mean and variance.

Reads and writes a few vectors [C], in one launch for all BatchNorms of a unit.
"""

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, operator

BLOCK = 128


@triton.jit
def bn_update_running_kernel(
    means,  # of each BatchNorm [C]
    variances,  # [C]
    stats,  # [2, C]: mean, variance of the batch
    channels,  # C
    mean_strides,
    variance_strides,
    momenta,
    unbiased,  # M / (M - 1)
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(means)):
        mask = c < channels[i]
        mean, variance = means[i] + c * mean_strides[i], variances[i] + c * variance_strides[i]
        approach(mean, tl.load(stats[i] + c, mask=mask), momenta[i], mask)
        batch = tl.load(stats[i] + channels[i] + c, mask=mask) * unbiased[i]
        approach(variance, batch, momenta[i], mask)


@triton.jit
def approach(running, batch, momentum, mask):
    value = tl.load(running, mask=mask).to(tl.float32)
    step = batch - value
    near, far = value + momentum * step, batch - (1 - momentum) * step
    tl.store(running, tl.where(momentum < 0.5, near, far), mask=mask)


@partial(operator, mutates_args=("running_mean", "running_var"))
def bn_update_running(
    running_mean: list[Tensor],
    running_var: list[Tensor],
    stats: list[Tensor],
    momentum: list[float],
    counts: list[int],
) -> None:
    channels = tuple(mean.shape[0] for mean in running_mean)
    launch(
        bn_update_running_kernel,
        (cdiv(max(channels), BLOCK),),
        tuple(running_mean),
        tuple(running_var),
        tuple(batch.contiguous() for batch in stats),
        channels,
        tuple(mean.stride(0) for mean in running_mean),
        tuple(var.stride(0) for var in running_var),
        tuple(momentum),
        tuple(count / (count - 1) for count in counts),
        BLOCK=BLOCK,
    )
