"""The operators and the planner that chooses who runs them.

Every backend is a namespace that holds the same functions for single layers, LAYER_OPERATORS, with
the signatures of reference.py.

    reference   plain PyTorch, every device and dtype
    cpu         torch.ops.fused_preact on CPU tensors: the C++ kernels of csrc/cpu
    cuda        torch.ops.fused_preact on CUDA tensors: the CUDA kernels of csrc/cuda
    triton      torch.ops.fused_preact_triton on CUDA tensors; on CPU tensors in its interpreter

plan() picks one for units that share a call, forward and backward, plan_convs() then for each of
their convolutions whether its own kernels run it, or PyTorch's convolution between pointwise ones
(composed.py). torch.ops.fused_preact runs the units in one call, for others units.py does it layer
by layer.

Three more names can be asked for: "auto", the planner's own choice; "composed", every convolution
by PyTorch; and "eager", PyTorch's layers under PyTorch's autograd (double backward, export).
"""

import functools
import importlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C, fakes, reference  # _C registers torch.ops.fused_preact
from .units import Chain

BACKENDS = ("auto", "composed", "eager", "reference", "cpu", "cuda", "triton")
LAYER_OPERATORS = (
    "bn_stats",
    "bn_affine",
    "bn_update_running",
    "bn_relu_forward",
    "bn_relu_backward",
    "preact_conv_forward",
    "preact_conv_dgrad",
    "preact_conv_wgrad",
    "preact_conv_backward",
    "residual_conv_backward",
    "residual_grad",
)

_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
# From where on PyTorch's convolution between pointwise kernels is faster. CPU: values of a weight,
# where the kernels multiply by oneDNN's matrix tile; measured at batch 16 on AVX-512, before all
# parts of the work shared a wide dW: in bfloat16 a 3x3 of 128 channels (2^17) was as fast fused and
# one of 256 (2^19) was not. In float32, and in bfloat16 by our own tile, none is slower fused, up
# to 640 channels. CUDA: those times the pixels of the units' input; measured on an H200, where
# ResNet-164 (at most 2^30.2 at batch 128) is faster fused and PreActResNet-18 (2^32.2) is not.
_COMPOSED_FROM = {torch.bfloat16: 2**19}
_COMPOSED_FROM_CUDA = 2**31
# Values of a kernel, on a CPU: in float32 on AVX-512 a 5x5 is as fast by either, a 7x7 that keeps
# the image's size up to 1.2 times, one as large as its image up to four times as fast by PyTorch's.
_MOST_CPU_TAPS = 25
# One pixel's window has to fit into the least shared memory of a GPU that the kernels run on.
_MOST_CUDA_TAPS = 49
_ENVIRONMENT = "FUSED_PREACT_BACKEND"


def backend_status() -> dict[str, str | None]:
    """For each backend None where it can run here, else the reason why not."""
    return {
        "auto": None,
        "composed": None,
        "eager": None,
        "reference": None,
        "cpu": None,
        "cuda": _cuda_status(),
        "triton": _triton_status(),
    }


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run everything inside the with statement on one backend; see BACKENDS.

    A backward pass stays with the backend of its forward pass. What a backend cannot do (a dtype,
    a grouped convolution) goes to "reference", with one warning. Holds for the whole process, so
    that DataParallel's threads see it too.

    Raises ValueError where there is no such backend, or none on this machine.
    """
    global _forced
    previous, _forced = _forced, _checked(name, "backend")
    try:
        yield
    finally:
        _forced = previous


def current_backend() -> str:
    """The name that backend() or FUSED_PREACT_BACKEND asked for, else "auto"."""
    return _forced


def plan(input: Tensor, convs: Sequence[Any] = ()) -> Any:
    """The namespace of operators for units that read input, under the current backend.

    convs are their convolutions, functional.Conv.
    """
    name = _forced
    if name in ("auto", "composed"):
        name, convs = _automatic(input), ()  # what its kernels cannot do is composed
    if name == "reference":
        return reference
    reason = _refusal(name, input, convs)
    if reason is None:
        if name != "triton":
            return torch.ops.fused_preact
        _register_triton()
        return torch.ops.fused_preact_triton
    warn_once(f"backend {name!r} does not run {reason}; using 'reference'")
    return reference


def plan_convs(operators: Any, convs: Sequence[Any], input: Tensor) -> list[bool]:
    """For each convolution of units that plan() gave to operators: whether it is composed.

    convs are functional.Conv, in the order of units.Chain.
    """
    if operators is reference or _forced not in ("auto", "composed"):
        return [False] * len(convs)
    per_value, much = _much_work(input)
    most_taps = _most_taps(input)
    return [
        _forced == "composed"
        or conv.weight.numel() * per_value >= much
        or conv.dilation != (1, 1)
        or conv.groups != 1
        or _taps(conv) > most_taps
        for conv in convs
    ]


def units_of(operators: Any) -> Any:
    """Who has preact_units_forward and _backward for units that plan() gave to operators."""
    return operators if operators is torch.ops.fused_preact else Chain(operators)


def _much_work(input: Tensor) -> tuple[int, float]:
    """What a weight's value counts, and from what sum on PyTorch's convolution is faster."""
    if input.is_cuda:
        return input.shape[0] * input.shape[2] * input.shape[3], _COMPOSED_FROM_CUDA
    if _is_slow_in_pytorch(input.dtype) or not _multiplies_by_onednn():
        return 1, math.inf
    return 1, _COMPOSED_FROM.get(input.dtype, math.inf)


def _most_taps(input: Tensor) -> float:
    """Values of a kernel, beyond which PyTorch's convolution is faster, or the only one."""
    if input.is_cuda:
        return _MOST_CUDA_TAPS
    return math.inf if _is_slow_in_pytorch(input.dtype) else _MOST_CPU_TAPS


def _is_slow_in_pytorch(dtype: torch.dtype) -> bool:
    """On a CPU: float64, and bfloat16 where the processor has no instruction for it."""
    return dtype == torch.float64 or (dtype == torch.bfloat16 and not _multiplies_bfloat16())


def _taps(conv: Any) -> int:
    return conv.weight.shape[2] * conv.weight.shape[3]


def is_transformed() -> bool:
    """Whether only PyTorch's own layers can run: under torch.func, torch.jit.trace, forward AD."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
    )


def channels_last(input: Tensor) -> Tensor:
    """input in channels_last memory, with one warning per process where that takes a copy."""
    if not input.is_contiguous(memory_format=torch.channels_last):
        warn_once(
            "input is not in channels_last memory and is converted at each call; call "
            "model.to(memory_format=torch.channels_last) and pass images in that format"
        )
        input = input.contiguous(memory_format=torch.channels_last)
    return input


def _constant(function: Callable[[], Any]) -> Callable[[], Any]:
    """function; torch.compile takes its result as it is and does not trace how it is found."""

    def call() -> Any:
        return function()

    # What torch.compiler.assume_constant_result sets, at the price of importing torch._dynamo.
    call._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return call


def allow_tf32() -> bool:
    """Whether PyTorch lets convolutions round float32 to TF32, see torch.backends.cudnn.

    torch.compile compiles again where torch.backends.cudnn.allow_tf32 changes. Where precisions
    were set one by one PyTorch has no such flag: a graph then keeps what it was compiled under.
    """
    if torch.compiler.is_compiling() and _has_tf32_flag():
        return torch.backends.cudnn.allow_tf32
    return _tf32_precision()


@_constant
def _has_tf32_flag() -> bool:
    try:
        return torch.backends.cudnn.allow_tf32 in (True, False)
    except RuntimeError:
        return False


@_constant
def _tf32_precision() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def warn_once(message: str) -> None:
    """Warn, once per process and message; silent while torch.compile traces."""
    if torch.compiler.is_compiling() or message in _warned:
        return
    _warned.add(message)
    warnings.warn(message, stacklevel=3)


def _refusal(name: str, input: Tensor, convs: Sequence[Any]) -> str | None:
    if input.device.type != _device(name):
        return f"{input.device.type} tensors"
    if input.dtype not in _DTYPES[name]:
        return f"{input.dtype} on {input.device.type}"
    if any(conv.dilation != (1, 1) for conv in convs):
        return "dilated convolutions"
    if any(conv.groups != 1 for conv in convs):
        return "grouped convolutions"
    if name == "cuda" and any(_taps(conv) > _MOST_CUDA_TAPS for conv in convs):
        return f"kernels of more than {_MOST_CUDA_TAPS} values"
    if name == "triton" and input.shape[2] * input.shape[3] >= 2**31 - 2**16:
        return "images of 2^31 pixels"
    return None


def _automatic(input: Tensor) -> str:
    if input.device.type == "cpu":
        return "cpu"
    if input.device.type == "cuda":
        for name, reason in ("cuda", _cuda_status()), ("triton", _triton_status()):
            if reason is None:
                return name
    return "reference"


def _device(name: str) -> str:
    """The type of the tensors that a backend runs."""
    return "cpu" if name == "cpu" or (name == "triton" and _interpreted()) else "cuda"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@_constant
@functools.cache
def _multiplies_bfloat16() -> bool:
    return _C.multiplies_bfloat16()


@_constant
@functools.cache
def _multiplies_by_onednn() -> bool:
    """Whether the kernels' matrix tile is oneDNN's, unless another is asked for."""
    return _C.tile_providers()[0] == "brgemm"


@_constant
@functools.cache
def _cuda_status() -> str | None:
    built = _C.build_info()["cuda"]
    if built.startswith("not built"):
        return built
    problem = _C.cuda_unavailable()
    return problem if problem or torch.cuda.is_available() else "this torch sees no GPU"


@_constant
@functools.cache
def _triton_status() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if torch.cuda.is_available() or _interpreted():
        return None
    return "no GPU; TRITON_INTERPRET=1 runs it on the CPU, slowly"


@_constant
@functools.cache
def _register_triton() -> None:
    """Fills torch.ops.fused_preact_triton."""
    importlib.import_module("fused_preact.triton")
    _register_fakes("fused_preact_triton")


def _checked(name: str, source: str) -> str:
    status = backend_status()
    if name in status and status[name] is None:
        return name
    known = ", ".join(f"{k} ({reason})" if reason else k for k, reason in status.items())
    problem = "is not available" if name in status else "is unknown"
    raise ValueError(f"{source}: {name!r} {problem}; there are: {known}")


_warned: set[str] = set()
_forced = _checked(os.environ.get(_ENVIRONMENT) or "auto", _ENVIRONMENT)


# --- fake kernels, for torch.compile --------------------------------------------------------------


def _register_fakes(namespace: str) -> None:
    for name in LAYER_OPERATORS:
        torch.library.register_fake(f"{namespace}::{name}", getattr(fakes, name))


def _register_unit_fakes() -> None:
    chain = Chain(fakes)
    for function in chain.preact_units_forward, chain.preact_units_backward:
        torch.library.register_fake(f"fused_preact::{function.__name__}", function)


_register_fakes("fused_preact")
_register_unit_fakes()
