"""bn_relu_forward: h = act(scale * (u - mean) + shift).

Reads u [M, C], writes h [M, C]; 4 * M * C FLOPs.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import activations, cdiv, launch, nhwc, operator, row_tiles
from .tile import activate, cast, normalise, tile_of


@triton.jit
def bn_relu_forward_kernel(
    input,  # u [M, C]
    affine,  # [4, C]
    output,  # h [M, C]
    M,
    C,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _, m, c = tile_of(C, BLOCK_M, BLOCK_C)
    mask = (m < M)[:, None] & (c < C)[None, :]
    offsets = m[:, None] * C + c[None, :]
    u = tl.load(input + offsets, mask=mask, other=0.0)
    h = activate(normalise(u, affine, c, C), ACTIVATION)
    tl.store(output + offsets, cast(h, u.dtype), mask=mask)


@operator
def bn_relu_forward(input: Tensor, affine: Tensor, activation: str) -> Tensor:
    input = nhwc(input)
    output = activations(input, input.shape)
    channels = input.shape[1]
    tiles, options = row_tiles("bn_relu_forward", input)
    launch(
        bn_relu_forward_kernel,
        (tiles * cdiv(channels, options["BLOCK_C"]),),
        input,
        affine,
        output,
        input.numel() // channels,
        channels,
        ACTIVATION=activation,
        **options,
    )
    return output
