"""A library of build.py in Python: its operators, what they move, what they launch."""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from machine_code import kernel_name
from torch import Tensor

READ, WRITTEN, COPIED, SHARED_READ, SHARED_WRITTEN, MATRIX_READ = range(6)


@dataclass(frozen=True)
class Point:
    """What warps did at one access in the kernels' code: sums over all of them."""

    place: str  # "conv.cuh:240"
    access: int
    lane_bytes: int
    requests: int
    sectors: int  # of 32 bytes of global memory
    used_bytes: int  # of those sectors
    passes: int  # over the banks of shared memory
    fewest_passes: int

    @property
    def unused_bytes(self) -> int:
        return 32 * self.sectors - self.used_bytes

    @property
    def conflicts(self) -> int:
        return self.passes - self.fewest_passes


@dataclass(frozen=True)
class Launch:
    kernel: str  # "preact_conv_forward_kernel<preact::cuda::bf16, (preact::Activation)0>"
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    # Of its first block, in instructions of warps, as if it came last and merged all blocks.
    multiplications: int  # mma.m16n8k16
    waits: tuple[int, ...]  # of each warp for copies, by how many groups may be under way
    accesses: dict[tuple[int, int], int]  # by access and bytes of a lane


class Counts:
    """What was moved under Emulator.counting()."""

    def __init__(self, controls: ctypes.CDLL):
        self._controls = controls
        self.points: list[Point] = []

    def bytes(self, tensor: Tensor) -> tuple[int, int]:
        """Read and written of a tensor in global memory; where lanes of a warp share, once."""
        return self._bytes(tensor.data_ptr(), tensor.numel() * tensor.element_size())

    def all_bytes(self) -> tuple[int, int]:
        """Read and written of all global memory."""
        return self._bytes(0, 2**62)

    def _bytes(self, begin: int, size: int) -> tuple[int, int]:
        out = (ctypes.c_int64 * 2)()
        self._controls.emulator_bytes(ctypes.c_void_p(begin), ctypes.c_int64(size), out)
        return tuple(out)


class Emulator:
    """The operators of a library, and the emulator's controls."""

    def __init__(self, library: Path, namespace: str):
        torch.ops.load_library(library)
        self.library = library
        self.operators = getattr(torch.ops, namespace)
        self._controls = ctypes.CDLL(str(library))
        for name in ("emulator_points", "emulator_launches"):
            getattr(self._controls, name).restype = ctypes.c_char_p
        self._kernels: dict[int, str] = {}

    def seed(self, value: int) -> None:
        """Draw the order of threads and blocks anew."""
        self._controls.emulator_seed(ctypes.c_uint64(value))

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Counts, until the next time, what runs inside."""
        counts = Counts(self._controls)
        self._controls.emulator_count(1)
        try:
            yield counts
        finally:
            self._controls.emulator_count(0)
        rows = [[int(v) for v in row.split()] for row in self._lines("emulator_points")]
        # The place is where the access returns to: one byte before is still the call.
        places = self._places([row[0] - 1 for row in rows])
        counts.points = [Point(place, *row[1:]) for place, row in zip(places, rows, strict=True)]

    @contextmanager
    def device(self, multiprocessors: int, most_shared_bytes: int) -> Iterator[None]:
        """Launches inside are those for such a device."""
        self._controls.emulator_device(multiprocessors, ctypes.c_int64(most_shared_bytes))
        try:
            yield
        finally:
            self._controls.emulator_device(0, ctypes.c_int64(0))

    @contextmanager
    def recording(self, multiprocessors: int, most_shared_bytes: int) -> Iterator[list[Launch]]:
        """Launches as on such a device. None is run: tensors are not touched."""
        launches: list[Launch] = []
        with self.device(multiprocessors, most_shared_bytes), self._recorded():
            yield launches
            for line in self._lines("emulator_launches"):
                place, x, y, z, threads, shared_bytes, *counts = map(int, line.split())
                *accesses, multiplications = counts[:-3]
                by_kind = {(i // 5, 2 ** (i % 5)): n for i, n in enumerate(accesses) if n}
                launch = Launch(
                    self._kernel(place),
                    (x, y, z),
                    threads,
                    shared_bytes,
                    multiplications,
                    tuple(n // (threads // 32) for n in counts[-3:]),
                    by_kind,
                )
                launches.append(launch)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        self._controls.emulator_record(1)
        try:
            yield
        finally:
            self._controls.emulator_record(0)

    def _lines(self, control: str) -> list[str]:
        return getattr(self._controls, control)().decode().splitlines()

    def _places(self, offsets: list[int]) -> list[str]:
        """File and line of code that was inlined into a kernel: outside the helpers of memory."""
        command = ["addr2line", "-i", "-a", "-e", str(self.library), *map(hex, offsets)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        places = []
        for chunk in said.split("0x")[1:]:
            frames = [Path(line.split(" ")[0]).name for line in chunk.splitlines()[1:]]
            helpers = ("emulator.h", "piece.cuh")
            outside = [frame for frame in frames if not frame.startswith(helpers)]
            places.append((outside or frames)[0])
        return places

    def _kernel(self, offset: int) -> str:
        if not self._kernels:
            command = ["nm", "-C", str(self.library)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for line in said.splitlines():
                address, _, name = line.partition(" ")
                if address and "_kernel" in name:
                    self._kernels[int(address, 16)] = kernel_name(name)
        return self._kernels[offset]
