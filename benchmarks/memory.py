"""How far a step's memory rises above where it starts, and what its forward pass saves.

On a CPU the peak is that of a process of its own, in which freed memory goes back to the system at
once: what is alive counts, not the holes in a heap that many contenders have used. A GPU's
allocator counts what is alive.
"""

import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from cases import Case, all_cases
from contenders import Contender
from malloc import return_freed_memory
from operators import OperatorCase

Step = Callable[[int], object]


class Peaks:
    """Measures peaks; a context manager, for the process that it may keep."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=return_freed_memory
        )

    def __enter__(self) -> "Peaks":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.shutdown()

    def of(
        self, case: Case | OperatorCase, contender: Contender, dtype: torch.dtype, step: Step
    ) -> int:
        """Bytes; step is what contender does in dtype."""
        if self._device.type == "cuda":
            return _gpu_peak(step, self._device)
        wanted = case.group, case.name, case.passes
        return self._process.submit(_cpu_peak, wanted, contender, dtype).result()


def saved_bytes(step: Step) -> int:
    """Bytes that a step's forward pass saves for its backward pass, each storage once."""
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(0)
    return sum(saved.values())


def _gpu_peak(step: Step, device: torch.device) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(wanted: tuple[str, str, str], contender: Contender, dtype: torch.dtype) -> int:
    (case,) = (c for c in all_cases("cpu") if (c.group, c.name, c.passes) == wanted)
    torch._dynamo.reset()
    step = case.step(contender, dtype, torch.device("cpu"))
    step(0)  # what is allocated once
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status_bytes("VmRSS")
    step(0)
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
