"""bn_affine: z = scale * (u - mean) + shift, rstd = (var + eps)^-1/2, scale = gamma * rstd.

Reads stats [2, C], gamma and beta [C]; writes [4, C]: mean, rstd, scale, shift = beta.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, operator, vectors

BLOCK = 128


@triton.jit
def bn_affine_kernel(
    stats,  # [2, C]: mean, variance
    weight,  # gamma [C], or None for 1
    bias,  # beta [C], or None for 0
    affine,  # [4, C]
    C,
    eps,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.load(stats + c, mask=c < C)
    variance = tl.load(stats + C + c, mask=c < C, other=1.0)
    store_affine(mean, variance, weight, bias, affine, c, C, eps)


@triton.jit
def store_affine(mean, variance, weight, bias, affine, c, C, eps):
    """The rows of affine [4, C] at the channels c, from their mean and variance."""
    mask = c < C
    rstd = 1 / tl.sqrt_rn(variance + eps)
    scale = rstd
    if weight is not None:
        scale *= tl.load(weight + c, mask=mask)
    shift = tl.zeros_like(mean)
    if bias is not None:
        shift = tl.load(bias + c, mask=mask)
    tl.store(affine + c, mean, mask=mask)
    tl.store(affine + C + c, rstd, mask=mask)
    tl.store(affine + 2 * C + c, scale, mask=mask)
    tl.store(affine + 3 * C + c, shift, mask=mask)


@operator
def bn_affine(stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    channels = stats.shape[1]
    affine = vectors(stats, 4, channels)
    launch(
        bn_affine_kernel,
        (cdiv(channels, BLOCK),),
        stats.contiguous(),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        affine,
        channels,
        eps,
        BLOCK=BLOCK,
    )
    return affine
