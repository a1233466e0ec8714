"""What a launch of a CUDA kernel should take on a GPU that is not here.

A launch is predicted to take the largest of
    bytes      its tensors, each once, at the device's bandwidth
    tensor     the multiplications of the busiest multiprocessor, at the rate of mma.sync
    issue      the instructions of the busiest multiprocessor's loops: each of its four schedulers
               issues one a clock, or where too few warps are resident, one of a warp every
               WAIT_CLOCKS; loops that do the same (copy windows, copy weights, ...) count as
               their mean
    banks      what its warps read and write in shared memory, 128 bytes a clock
    latency    the steps that a block takes one after the other, each waiting for memory, shared
               among those that wait at the same time, times the waves of blocks
and then what the last block takes for its two merges of others' sums; never less than a launch.

Warps of the kernels in csrc/cuda/sm90 have roles, and their launch takes no less than
    roles      what the slowest warp of a block does: fill windows, copy weights, or multiply at
               the rate of wgmma and then store; an instruction every WAIT_CLOCKS, or steps that
               wait for memory if these take longer
"""

import math
from collections import defaultdict
from dataclasses import dataclass

from cuda_emulator.emulator import (
    COPIED,
    MATRIX_READ,
    READ,
    SHARED_READ,
    SHARED_WRITTEN,
    WRITTEN,
    Launch,
    Warp,
)
from machine_code import Kernel


@dataclass(frozen=True)
class Device:
    """Figures a second, bytes and clocks; where from is said in SOURCES."""

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    bandwidth: float
    tensor_flops: float  # of mma.sync on bfloat16
    shared_bytes: int  # of a multiprocessor
    most_shared_bytes: int  # of a block
    warpgroup_flops: float = 0  # of wgmma on bfloat16, where kernels have it


DEVICES = [
    Device("A100", "80", 108, 1.41e9, 0.9 * 2.04e12, 312e12, 164 << 10, 163 << 10),
    Device("H100", "90a", 132, 1.83e9, 3.0e12, 0.629 * 989e12, 228 << 10, 227 << 10, 798e12),
    Device("B200", "100", 148, 1.86e9, 0.9 * 8.0e12, 148 * 1.86e9 * 2576, 228 << 10, 227 << 10),
]
SOURCES = """
- Multiprocessors, shared memory: NVIDIA's architecture white papers and tuning guides. Clock: the
  one that dense bfloat16 peaks of 312, 989 and 2250 TFLOP/s stand for.
- Bandwidth: on H100 3.0 TB/s, as a copy measured there; on A100 and B200 the same 0.9 of the data
  sheets' 2.04 and 8.0 TB/s.
- Tensor cores by mma.sync: all of A100's peak; on Hopper 62.9% of the peak (arXiv:2402.13499); on
  B200 nobody has published it: as many a clock and multiprocessor as on Hopper, an assumption.
- The floor takes 798 TFLOP/s on H100, measured with wgmma, and 0.81 of the peak on the others;
  kernels that multiply with wgmma take 798 as well.
- 7.5 clocks from one instruction of a warp to its next: between 5.9 and 10.1 in ten launches of
  these kernels on an H200, by its counters; before that was counted, convolutions took two to
  nine times as long as predicted.
- Assumptions: 2 us a launch in a graph; 0.5 us from asking memory to its answer.
"""
PEAK_FLOPS = {"A100": 0.81 * 312e12, "H100": 798e12, "B200": 0.81 * 2250e12}
LAUNCH, LATENCY, WAIT_CLOCKS = 2e-6, 0.5e-6, 7.5
REGISTERS, MOST_WARPS, MOST_BLOCKS, RESERVED_SHARED = 65536, 64, 32, 1024
MULTIPLICATION_FLOPS = 2 * 16 * 8 * 16  # of mma.m16n8k16
OVERLAPPING = ("bytes", "tensor", "issue", "banks", "latency", "roles")  # the largest counts


def resident_blocks(device: Device, kernel: Kernel, threads: int, shared_bytes: int) -> int:
    """Blocks that a multiprocessor holds at once."""
    warps = threads // 32
    registers = math.ceil(kernel.registers * 32 / 256) * 256 * warps
    shared = kernel.shared_bytes + shared_bytes + RESERVED_SHARED
    return min(
        MOST_BLOCKS, MOST_WARPS // warps, REGISTERS // registers, device.shared_bytes // shared
    )


def instructions(kernel: Kernel, launch: Launch) -> float:
    """That a block issues in its loops, in warps' instructions."""
    accesses = defaultdict(int, launch.accesses)
    if launch.multiplications:
        loop = kernel.main_loop
        total = launch.multiplications * len(loop.instructions) / loop.multiplications
        if copied := accesses[COPIED, 16] - launch.weight_copies:
            total += copied * kernel.per_copy(weights=False)
        if launch.weight_copies:
            total += launch.weight_copies * kernel.per_copy(weights=True)
        if stored := accesses[WRITTEN, 16]:
            total += stored * kernel.pieces_stored[0]
        if kernel.by_warpgroups:
            return total + sum(map(filled, launch.warps)) * kernel.pieces_filled[0]
        if transformed := sum(warp.transformed for warp in launch.warps):
            total += transformed * kernel.per_unit("STS", 128, beside="LDS")
        return total
    if kernel.name in ("bn_affine_kernel", "bn_update_running_kernel"):
        return 0.0  # a thread has one channel: no loop over data
    size = 16 if accesses[READ, 16] else 4
    return accesses[READ, size] * kernel.per_unit("LDG", 8 * size)


def bank_clocks(launch: Launch) -> float:
    """That a block's warps keep shared memory busy, no bank wanted twice."""
    in_shared = (SHARED_READ, SHARED_WRITTEN, MATRIX_READ)
    return sum(
        count * max(1, size * 32 / 128)
        for (access, size), count in launch.accesses.items()
        if access in in_shared
    )


def slowest_role(device: Device, kernel: Kernel, launch: Launch) -> float:
    """Seconds of a block's slowest warp, where warps have roles."""

    def loop(pieces: int, of_loop: tuple[float, float]) -> float:
        instructions, of_turn = of_loop
        return max(pieces * instructions * WAIT_CLOCKS / device.clock, pieces / of_turn * LATENCY)

    # a warpgroup's four warps multiply at once
    products = 4 * MULTIPLICATION_FLOPS * device.multiprocessors / device.warpgroup_flops

    def seconds(warp: Warp) -> float:
        if copied := warp.accesses.get((COPIED, 16)):
            return loop(copied, (kernel.per_copy(weights=True), copied / steps(warp)))
        # windows are filled while products are under way
        taken = max(warp.multiplications * products, loop(filled(warp), kernel.pieces_filled))
        if stored := warp.accesses.get((WRITTEN, 16)):
            taken += loop(stored, kernel.pieces_stored)
        return taken

    return max(map(seconds, launch.warps))


def filled(warp: Warp) -> int:
    """Pieces of windows, where warps have roles: what copies weights writes zeros besides."""
    return 0 if (COPIED, 16) in warp.accesses else warp.transformed


def steps(warp: Warp) -> float:
    """In which it waits for copies, one after the other."""
    return sum(n / (1 + newest) for newest, n in enumerate(warp.waits))


def predict(
    device: Device, kernel: Kernel, launch: Launch, moved: float, flops: float
) -> dict[str, float]:
    """Seconds of each term of the model, for tensors of `moved` bytes."""
    blocks = math.prod(launch.grid)
    of_one = math.ceil(blocks / device.multiprocessors)  # blocks of the busiest multiprocessor
    resident = resident_blocks(device, kernel, launch.threads, launch.shared_bytes)
    waves = blocks / (resident * device.multiprocessors)
    multiplications = launch.multiplications * of_one * MULTIPLICATION_FLOPS
    warps = launch.threads // 32
    per_scheduler = min(resident, of_one) * warps / 4
    accesses = defaultdict(float, launch.accesses)
    # a convolution waits at each step, a pointwise kernel at each turn of its loop
    size = 16 if accesses[READ, 16] else 4
    loads = max((loop.count("LDG", 8 * size) for loop in kernel.loops), default=0)
    turns = steps(launch.warps[0]) or accesses[READ, size] / warps / max(loads, 1)
    roles, tensor_flops = 0.0, device.tensor_flops
    waiting = max(1, WAIT_CLOCKS / per_scheduler)  # clocks from one instruction to the next
    if kernel.by_warpgroups:
        roles = math.ceil(waves) * slowest_role(device, kernel, launch)
        turns, waiting, tensor_flops = 0, 1, device.warpgroup_flops
    merge = 0.0
    if kernel.by_warpgroups or "preact_conv" in kernel.name or "bn_" in kernel.name:
        issued = accesses[READ, 4] / warps * kernel.merge_instructions
        merge = issued * WAIT_CLOCKS / device.clock
    terms = {
        "bytes": moved / device.bandwidth,
        "tensor": multiplications / (tensor_flops / device.multiprocessors),
        "issue": instructions(kernel, launch) * of_one / 4 * waiting / device.clock,
        "banks": bank_clocks(launch) * of_one / device.clock,
        "latency": math.ceil(waves) * turns * LATENCY,
        "roles": roles,
        "merge": merge,
        "floor": max(moved / device.bandwidth, flops / PEAK_FLOPS[device.name]),
        "waves": waves,
        "resident": resident,
    }
    largest = max(terms[name] for name in OVERLAPPING)
    return terms | {"predicted": max(largest + merge, LAUNCH)}
