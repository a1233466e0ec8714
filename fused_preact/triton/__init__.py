"""The operators as Triton kernels, with the signatures of reference.py.

Registered as torch.ops.fused_preact_triton.*; importing this package registers them, and needs
triton. One file an operator; shared pieces are

    tile.py      what kernels call: activation, affine, pixel numbering, the matrix product
    reduce.py    merging of per-tile statistics and sums in a fixed order
    conv.py      the shape of a convolution, as its kernels take it
    launch.py    registration, current device, launching
    config.py    tile sizes: the table in configs.json and the user's own
"""

from .bn_affine import bn_affine
from .bn_relu_backward import bn_relu_backward
from .bn_relu_forward import bn_relu_forward
from .bn_stats import bn_stats
from .bn_update_running import bn_update_running
from .preact_conv_backward import preact_conv_backward
from .preact_conv_dgrad import preact_conv_dgrad
from .preact_conv_forward import preact_conv_forward
from .preact_conv_wgrad import preact_conv_wgrad
from .residual_conv_backward import residual_conv_backward
from .residual_grad import residual_grad

__all__ = [
    "bn_affine",
    "bn_relu_backward",
    "bn_relu_forward",
    "bn_stats",
    "bn_update_running",
    "preact_conv_backward",
    "preact_conv_dgrad",
    "preact_conv_forward",
    "preact_conv_wgrad",
    "residual_conv_backward",
    "residual_grad",
]
