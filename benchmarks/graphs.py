"""A step captured into a CUDA graph by hand, and how many kernels a step launches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

WARMUP = 3  # what libraries choose and allocate once must be done before the capture


class Captured:
    """A step as one graph launch; it reads images from a buffer that each call fills first.

    It keeps the step, since a graph reads the memory of what the step holds: a model that nobody
    else holds would be freed, and its memory given to others.
    """

    def __init__(self, step: Callable[[Tensor], list[Tensor]], images: Tensor) -> None:
        self.step, self.images = step, images.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                step(self.images)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = step(self.images)

    def __call__(self, images: Tensor) -> list[Tensor]:
        self.images.copy_(images)
        self.graph.replay()
        return self.results


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
