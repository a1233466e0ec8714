"""A library of build.py in Python: its operators, what they move, what they launch."""

import ctypes
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from machine_code import kernel_name
from torch import Tensor

# Of a kernel by name, threads and bytes of shared memory of a block: blocks that a multiprocessor
# has room for at once.
ResidentBlocks = Callable[[str, int, int], int]
_RESIDENT_BLOCKS = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int64)

_RECORDED = 6 * 5 + 1 + 3  # accesses of five sizes, multiplications, waits
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
class Warp:
    """What a warp did in a launch's first block, as if that came last and merged all blocks."""

    accesses: dict[tuple[int, int], int]  # instructions, by access and bytes of a lane
    multiplications: int  # mma.m16n8k16, or as many of a warpgroup's
    waits: tuple[int, ...]  # for copies, by how many groups may be under way

    @property
    def transformed(self) -> int:
        """Pieces that it stored in shared memory, not by copies."""
        return self.accesses.get((SHARED_WRITTEN, 16), 0) - self.accesses.get((COPIED, 16), 0)


@dataclass(frozen=True)
class Launch:
    kernel: str  # "preact_conv_forward_kernel<preact::cuda::bf16, (preact::Activation)0>"
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    warps: tuple[Warp, ...]
    weight_copies: int  # of their accesses, asynchronous copies of weights

    @property
    def multiplications(self) -> int:
        return sum(warp.multiplications for warp in self.warps)

    @property
    def accesses(self) -> dict[tuple[int, int], int]:
        """Of all warps."""
        return dict(sum((Counter(warp.accesses) for warp in self.warps), Counter()))


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
        self._of_weights: dict[int, bool] = {}  # by a copy's place

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
    def device(
        self,
        multiprocessors: int,
        most_shared_bytes: int,
        *,
        warpgroups: bool = False,
        resident_blocks: ResidentBlocks | None = None,
    ) -> Iterator[None]:
        """Launches inside are those for such a device; warpgroups: of compute capability 9.0."""
        # of none: a null pointer
        known = _RESIDENT_BLOCKS()
        if resident_blocks is not None:
            known = _RESIDENT_BLOCKS(
                lambda place, threads, shared: resident_blocks(self._kernel(place), threads, shared)
            )
        self._controls.emulator_device(multiprocessors, ctypes.c_int64(most_shared_bytes), known)
        self._controls.emulator_warpgroups(int(warpgroups))
        try:
            yield
        finally:
            self._controls.emulator_device(0, ctypes.c_int64(0), _RESIDENT_BLOCKS())
            self._controls.emulator_warpgroups(0)

    @contextmanager
    def recording(
        self,
        multiprocessors: int,
        most_shared_bytes: int,
        *,
        warpgroups: bool = False,
        resident_blocks: ResidentBlocks | None = None,
    ) -> Iterator[list[Launch]]:
        """Launches as on such a device. None is run: tensors are not touched."""
        launches: list[Launch] = []
        device = self.device(
            multiprocessors,
            most_shared_bytes,
            warpgroups=warpgroups,
            resident_blocks=resident_blocks,
        )
        with device, self._recorded():
            yield launches
            for line in self._lines("emulator_launches"):
                place, x, y, z, threads, shared_bytes, *values = map(int, line.split())
                ends = range(_RECORDED, (threads // 32 + 1) * _RECORDED, _RECORDED)
                copies = values[ends[-1] :]
                launch = Launch(
                    self._kernel(place),
                    (x, y, z),
                    threads,
                    shared_bytes,
                    tuple(_warp(values[end - _RECORDED : end]) for end in ends),
                    self._weight_copies(dict(zip(copies[::2], copies[1::2], strict=True))),
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
        places = []
        for frames in self._frames(offsets):
            files = [place for _, place in frames]
            outside = [file for file in files if not file.startswith(("emulator.h", "piece.cuh"))]
            places.append((outside or files)[0])
        return places

    def _weight_copies(self, copies: dict[int, int]) -> int:
        """Of copies, a number at each place, those by functions that fetch weights."""
        new = [place for place in copies if place not in self._of_weights]
        for place, frames in zip(new, self._frames([place - 1 for place in new]), strict=True):
            self._of_weights[place] = any(
                "fetch_weights<" in name or "fill_weights<" in name for name, _ in frames
            )
        return sum(count for place, count in copies.items() if self._of_weights[place])

    def _frames(self, offsets: list[int]) -> list[list[tuple[str, str]]]:
        """Of each place: function, file and line of it and of what it was inlined into."""
        command = ["addr2line", "-i", "-a", "-f", "-C", "-e", str(self.library)]
        command += map(hex, offsets)
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found: list[list[str]] = []
        for line in said.splitlines():
            if re.fullmatch("0x[0-9a-f]+", line):
                found.append([])
            else:
                found[-1].append(line)
        return [
            [
                (name, Path(place.split(" ")[0]).name)
                for name, place in zip(lines[::2], lines[1::2], strict=True)
            ]
            for lines in found
        ]

    def _kernel(self, offset: int) -> str:
        if not self._kernels:
            command = ["nm", "-C", str(self.library)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for line in said.splitlines():
                address, _, name = line.partition(" ")
                # some lambdas inside of kernels have names that nm cannot read
                if address and "_kernel" in name and "_Z" not in name:
                    self._kernels[int(address, 16)] = kernel_name(name)
        return self._kernels[offset]


def _warp(counts: list[int]) -> Warp:
    *accesses, multiplications, _, _, _ = counts
    by_kind = {(i // 5, 2 ** (i % 5)): n for i, n in enumerate(accesses) if n}
    return Warp(by_kind, multiplications, tuple(counts[-3:]))
