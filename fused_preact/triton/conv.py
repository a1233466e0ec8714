"""The shape of a convolution, as its kernels take it."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Conv(NamedTuple):
    """Sizes of input, output and kernel; a kernel's arguments in this order."""

    N: int
    H: int
    W: int
    C: int
    P: int
    Q: int
    K: int

    @property
    def input_pixels(self) -> int:
        return self.N * self.H * self.W

    @property
    def output_pixels(self) -> int:
        return self.N * self.P * self.Q


def shape_of(
    input_shape: Sequence[int],
    channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Conv, tuple[int, int], dict[str, Any]]:
    """The shape, the output's height and width, and the compile-time arguments.

    A 1x1 convolution that leaves the size as it is becomes one of N*H*W images of one pixel.
    """
    if groups != 1 or tuple(dilation) != (1, 1):
        raise NotImplementedError("the Triton kernels have no grouped and no dilated convolutions")
    n, c, height, width = input_shape
    (r, s), (down, across), (top, bottom, left, right) = kernel_size, stride, padding
    p = (height + top + bottom - r) // down + 1
    q = (width + left + right - s) // across + 1
    geometry = {"R": r, "S": s, "DOWN": down, "ACROSS": across, "TOP": top, "LEFT": left}
    if (r, s, down, across, *padding) == (1, 1, 1, 1, 0, 0, 0, 0):
        return Conv(n * height * width, 1, 1, c, 1, 1, channels), (p, q), geometry
    return Conv(n, height, width, c, p, q, channels), (p, q), geometry
