"""A step captured into a CUDA graph by hand, and how many kernels a step launches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

WARMUP = 3  # what libraries choose and allocate once must be done before the capture


def captured(step: Callable[[Tensor], list[Tensor]], images: Tensor) -> Callable[[Tensor], Any]:
    """step as one graph launch; it reads images from a buffer that each call fills first."""
    static = images.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            step(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(static)

    def replay(images: Tensor) -> list[Tensor]:
        static.copy_(images)
        graph.replay()
        return results

    return replay


def launches(step: Callable[[int], Any]) -> int:
    """Kernels that the GPU runs in one step, those of a replayed graph among them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step(0)
        torch.cuda.synchronize()
    copies = ("Memcpy", "Memset")
    return sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith(copies)
        for event in profile.events()
    )
