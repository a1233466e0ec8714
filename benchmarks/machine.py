"""What the machine can do: its name, versions, copy bandwidth and matrix product rate."""

import platform
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fused_preact

COPY_BYTES = 256 << 20  # far beyond any cache
MATRIX = 1024
MOST_SECONDS = 2.0  # for one figure of the machine
CONV_IMAGES, CONV_FILTERS = (64, 256, 16, 16), (256, 256, 3, 3)


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit: what a reader of a result must know."""
    cuda = {"cuda": torch.version.cuda} if device.type == "cuda" else {}
    matrices = " AMX" if _has("amx_bf16") else ""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "capability": torch.backends.cpu.get_cpu_capability() + matrices,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_preact": fused_preact.__version__,
        "commit": _commit(),
        **cuda,
    }


def slug(device: torch.device) -> str:
    """A folder's name for this kind of machine: amd-epyc-avx512, nvidia-h100-80gb-hbm3."""
    described = describe(device)
    words = described["device"]
    if device.type == "cpu":
        words = f"{words} {described['capability']}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _median_seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a large matrix product, as matmul or convolution.

    On some processors matmul's library falls behind the convolutions', and is no floor for them.
    """
    a = torch.randn(MATRIX, MATRIX, device=device).to(dtype)
    b = torch.randn(MATRIX, MATRIX, device=device).to(dtype)
    matmul = 2 * MATRIX**3 / _median_seconds(lambda: a @ b, device)
    images, filters = (
        torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        for shape in (CONV_IMAGES, CONV_FILTERS)
    )
    operations = 2 * images.numel() * filters.numel() // CONV_FILTERS[0]
    convolution = operations / _median_seconds(lambda: F.conv2d(images, filters, padding=1), device)
    return max(matmul, convolution)


def multiplies_bfloat16(device: str) -> bool:
    """Whether it has instructions for that; torch emulates them where a processor has none."""
    return device != "cpu" or _has("avx512_bf16")


def _has(instructions: str) -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and instructions in info.read_text()


def _median_seconds(run: Any, device: torch.device) -> float:
    """Of nine runs after two others; fewer where they take seconds."""
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < 11 and sum(seconds) < MOST_SECONDS):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = processor_name(info.read_text()) if info.exists() else None
    return found or platform.processor() or platform.machine()


def processor_name(cpuinfo: str) -> str | None:
    """The first processor's; where a virtual machine hides the number, with family and model."""
    found = re.findall(r"^(model name|cpu family|model)\s*: (.+)$", cpuinfo, re.MULTILINE)
    said = dict(reversed(found))
    name = said.get("model name")
    if name is None or re.search(r"\d", name) or not {"cpu family", "model"} <= said.keys():
        return name
    return f"{name} family {said['cpu family']} model {said['model']}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    folder = Path(__file__).parent
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
