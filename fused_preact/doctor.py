"""What was built and what will run here: build_info(), and the command fused-preact doctor."""

import argparse
import importlib
import platform
from importlib import metadata
from typing import Any

MIN_TORCH = (2, 11)


def require_torch() -> None:
    """Raises ImportError, in words, where torch is missing or older than the package can use."""
    minimum = ".".join(map(str, MIN_TORCH))
    advice = f"fused_preact needs torch >= {minimum}: pip install --upgrade 'torch>={minimum}'"
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError(f"No torch found. {advice}") from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < MIN_TORCH:
        raise ImportError(f"Found torch {torch.__version__}. {advice}")


def build_info() -> dict[str, Any]:
    """How the extension was compiled.

    version        of fused_preact
    compiler       name and version
    flags          given to the compiler, without warnings and include paths
    cplusplus      the C++ standard, as in __cplusplus
    torch_headers  the torch that it was compiled against
    torch_target   the oldest torch that it runs with
    cuda           "built", or why not
    """
    from . import _C

    return {"version": metadata.version("fused_preact"), **_C.build_info()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The doctor needs none."""


def run(args: argparse.Namespace) -> int:
    """Prints versions, compiler, instruction sets and backends; 1 where no kernel can run."""
    import torch

    from . import _C, ops

    built = build_info()
    status = ops.backend_status()
    rows = {
        "fused_preact": built["version"],
        "python": platform.python_version(),
        "torch": f"{torch.__version__} ({torch.get_num_threads()} threads)",
        "triton": _version("triton"),
        "compiler": f"{built['compiler']}, C++ {built['cplusplus']}",
        "flags": built["flags"],
        "built with": f"torch {built['torch_headers']}, for {built['torch_target']} and later",
        "built CUDA": built["cuda"],
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "matrix tiles": ", ".join(_C.tile_providers()),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    for name, value in rows.items():
        print(f"{name:<14}{value}")
    print("\nbackends")
    for name, reason in status.items():
        print(f"  {name:<12}{'ready' if reason is None else f'absent: {reason}'}")
    return 0 if status["cpu"] is None else 1


def _version(package: str) -> str:
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError as error:
        return f"none ({error})"
