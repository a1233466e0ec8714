"""residual_grad: du = grad + scale * g + B * (u - mean) + C, the end of BatchNorm's backward pass.

    B = -scale * rstd * S2 / M, C = -scale * S1 / M.

Reads grad, g and u [M, C], writes du [M, C]; 6 * M * C FLOPs.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import activations, cdiv, launch, nhwc, operator, row_tiles
from .tile import batch_norm_grad, cast, tile_of


@triton.jit
def residual_grad_kernel(
    grad,  # [M, C], or None
    g,  # [M, C]
    input,  # u [M, C]
    affine,  # [4, C]
    sums,  # [2, C]
    dinput,  # du [M, C]
    M,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _, m, c = tile_of(C, BLOCK_M, BLOCK_C)
    mask = (m < M)[:, None] & (c < C)[None, :]
    offsets = m[:, None] * C + c[None, :]
    u = tl.load(input + offsets, mask=mask, other=0.0)
    du = batch_norm_grad(tl.load(g + offsets, mask=mask, other=0.0), u, affine, sums, c, C, M)
    if grad is not None:
        du += tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(dinput + offsets, cast(du, u.dtype), mask=mask)


@operator
def residual_grad(
    grad: Tensor | None, g: Tensor, input: Tensor, affine: Tensor, sums: Tensor
) -> Tensor:
    g, input = nhwc(g), nhwc(input)
    dinput = activations(input, input.shape)
    channels = input.shape[1]
    tiles, options = row_tiles("residual_grad", input)
    launch(
        residual_grad_kernel,
        (tiles * cdiv(channels, options["BLOCK_C"]),),
        None if grad is None else nhwc(grad),
        g,
        input,
        affine,
        sums,
        dinput,
        input.numel() // channels,
        channels,
        **options,
    )
    return dinput
