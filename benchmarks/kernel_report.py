"""What the CUDA kernels should take on GPUs that are not here: the table by which they are tuned.

    python benchmarks/kernel_report.py [DIR]

Compiles csrc/cuda with nvcc for each architecture, takes every operator call of whole training
steps from the models, and what each would launch from the kernels' own launchers, run by the
emulator of tests/cuda_emulator. Writes DIR/kernels.json, and a Markdown table for each device; DIR
is benchmarks/predicted. Every time in it is a prediction: no GPU gave it.

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
"""

import json
import math
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine_code import (
    ARCHITECTURES,
    KERNELS,
    Kernel,
    compile_cubins,
    cuobjdump,
    known_architectures,
    nvcc,
    read_kernels,
)
from step_calls import (
    STEPS,
    Call,
    Spec,
    by_kernel,
    call_bytes,
    call_flops,
    shape_class,
    step_calls,
    weight_gradient,
)

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from cuda_emulator.build import build
from cuda_emulator.emulator import (
    COPIED,
    MATRIX_READ,
    READ,
    SHARED_READ,
    SHARED_WRITTEN,
    WRITTEN,
    Emulator,
    Launch,
)

RESULTS = Path(__file__).resolve().parent / "predicted"


# --- devices -------------------------------------------------------------------------------------


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


DEVICES = [
    Device("A100", "80", 108, 1.41e9, 0.9 * 2.04e12, 312e12, 164 << 10, 163 << 10),
    Device("H100", "90a", 132, 1.83e9, 3.0e12, 0.629 * 989e12, 228 << 10, 227 << 10),
    Device("B200", "100", 148, 1.86e9, 0.9 * 8.0e12, 148 * 1.86e9 * 2576, 228 << 10, 227 << 10),
]
SOURCES = """
- Multiprocessors, shared memory: NVIDIA's architecture white papers and tuning guides. Clock: the
  one that dense bfloat16 peaks of 312, 989 and 2250 TFLOP/s stand for.
- Bandwidth: on H100 3.0 TB/s, as a copy measured there; on A100 and B200 the same 0.9 of the data
  sheets' 2.04 and 8.0 TB/s.
- Tensor cores by mma.sync: all of A100's peak; on Hopper 62.9% of the peak (arXiv:2402.13499); on
  B200 nobody has published it: as many a clock and multiprocessor as on Hopper, an assumption.
- The floor takes 798 TFLOP/s on H100, measured with wgmma, and 0.81 of the peak on the others.
- 7.5 clocks from one instruction of a warp to its next: between 5.9 and 10.1 in ten launches of
  these kernels on an H200, by its counters; before that was counted, convolutions took two to
  nine times as long as predicted.
- Assumptions: 2 us a launch in a graph; 0.5 us from asking memory to its answer.
"""
PEAK_FLOPS = {"A100": 0.81 * 312e12, "H100": 798e12, "B200": 0.81 * 2250e12}
LAUNCH, LATENCY, WAIT_CLOCKS = 2e-6, 0.5e-6, 7.5
REGISTERS, MOST_WARPS, MOST_BLOCKS, RESERVED_SHARED = 65536, 64, 32, 1024
MULTIPLICATION_FLOPS = 2 * 16 * 8 * 16  # of mma.m16n8k16
OVERLAPPING = ("bytes", "tensor", "issue", "banks", "latency")  # of which the largest counts
FOREACH_TENSORS = 64  # that a multi-tensor kernel of PyTorch takes at once, about


# --- the model -----------------------------------------------------------------------------------


@dataclass
class Row:
    """A launch of one shape class on one device; seconds."""

    operator: str
    shape: str
    kernel: str
    count: int  # in the step
    grid: tuple[int, int, int]
    shared_bytes: int
    resident_blocks: int
    waves: float
    megabytes: float
    gflops: float
    floor: float
    bytes: float
    tensor: float
    issue: float
    banks: float
    latency: float
    merge: float
    predicted: float

    @property
    def bound(self) -> str:
        parts = {name: getattr(self, name) for name in OVERLAPPING}
        most = max(parts, key=lambda name: parts[name])
        if self.predicted <= LAUNCH:
            return "launch"
        return f"{most} + merge" if self.merge > 0.1 * self.predicted else most


def resident_blocks(device: Device, kernel: Kernel, launch: Launch) -> int:
    """Blocks of a launch that a multiprocessor holds at once."""
    warps = launch.threads // 32
    registers = math.ceil(kernel.registers * 32 / 256) * 256 * warps
    shared = kernel.shared_bytes + launch.shared_bytes + RESERVED_SHARED
    return min(
        MOST_BLOCKS, MOST_WARPS // warps, REGISTERS // registers, device.shared_bytes // shared
    )


def instructions(kernel: Kernel, launch: Launch) -> float:
    """That a block issues in its loops, in warps' instructions."""
    accesses = defaultdict(int, launch.accesses)
    if launch.multiplications:
        loop = kernel.main_loop
        total = launch.multiplications * len(loop.instructions) / loop.count("HMMA")
        copied, of_weights = accesses[COPIED, 16], launch.weight_copies
        total += (copied - of_weights) * kernel.per_copy(weights=False)
        if of_weights:
            total += of_weights * kernel.per_copy(weights=True)
        if transformed := accesses[SHARED_WRITTEN, 16] - copied:
            total += transformed * kernel.per_unit("STS", 128, beside="LDS")
        if stored := accesses[WRITTEN, 16]:
            total += stored * kernel.per_unit("STG", 128)
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


def predict(
    device: Device, kernel: Kernel, launch: Launch, moved: float, flops: float
) -> dict[str, float]:
    """Seconds of each term of the model, for tensors of `moved` bytes."""
    blocks = math.prod(launch.grid)
    of_one = math.ceil(blocks / device.multiprocessors)  # blocks of the busiest multiprocessor
    resident = resident_blocks(device, kernel, launch)
    waves = blocks / (resident * device.multiprocessors)
    multiplications = launch.multiplications * of_one * MULTIPLICATION_FLOPS
    warps = launch.threads // 32
    per_scheduler = min(resident, of_one) * warps / 4
    accesses = defaultdict(float, launch.accesses)
    # a convolution waits at each step, a pointwise kernel at each turn of its loop
    size = 16 if accesses[READ, 16] else 4
    loads = max((loop.count("LDG", 8 * size) for loop in kernel.loops), default=0)
    turns = sum(n / (1 + newest) for newest, n in enumerate(launch.waits))
    turns = turns or accesses[READ, size] / warps / max(loads, 1)
    merge = 0.0
    if "preact_conv" in kernel.name or "bn_" in kernel.name:
        issued = accesses[READ, 4] / warps * kernel.merge_instructions
        merge = issued * WAIT_CLOCKS / device.clock
    terms = {
        "bytes": moved / device.bandwidth,
        "tensor": multiplications / (device.tensor_flops / device.multiprocessors),
        "issue": instructions(kernel, launch)
        * of_one
        / 4
        * max(1, WAIT_CLOCKS / per_scheduler)
        / device.clock,
        "banks": bank_clocks(launch) * of_one / device.clock,
        "latency": math.ceil(waves) * turns * LATENCY,
        "merge": merge,
        "floor": max(moved / device.bandwidth, flops / PEAK_FLOPS[device.name]),
        "waves": waves,
        "resident": resident,
    }
    largest = max(terms[name] for name in OVERLAPPING)
    return terms | {"predicted": max(largest + merge, LAUNCH)}


class Report:
    """What steps launch of the kernels, by architecture and name, as an emulator has them."""

    def __init__(self, kernels: dict[str, dict[str, Kernel]], emulator: Emulator) -> None:
        self.kernels, self.emulator = kernels, emulator
        self._splits: dict[tuple[str, Call], int] = {}

    def launches(self, device: Device, call: Call) -> list[Launch]:
        """Sums of partial results are launches of the units, not of their weight gradients."""
        operator = getattr(self.emulator.operators, call.operator.split("::")[1])
        arguments = [_empty(a) for a in call.arguments]
        with self.emulator.recording(device.multiprocessors, device.most_shared_bytes) as launches:
            operator(*arguments)
        sums = bool(call.weight_gradients)
        return [launch for launch in launches if ("add_splits" in launch.kernel) == sums]

    def by_kernel(self, device: Device, calls: list[Call]) -> list[Call]:
        """Calls of several gradients as those of single ones where they have no common kernel."""

        def has_kernel(call: Call) -> bool:
            return len(self.launches(device, call)) == 1

        return [one for call in calls for one in by_kernel(call, has_kernel)]

    def partial_bytes(self, device: Device, call: Call) -> int:
        """Of the weight gradient's partial results."""
        if (device.name, call) not in self._splits:
            of_weights = next(
                launch
                for launch in self.launches(device, call)
                if launch.kernel.startswith(("preact_conv_wgrad", "preact_conv_backward"))
            )
            self._splits[device.name, call] = of_weights.grid[0]
        return self._splits[device.name, call] * weight_gradient(call).bytes

    def step(self, device: Device, calls: list[Call]) -> list[Row]:
        """A row for each launch of each distinct call; PyTorch's own operators by their name."""
        rows = []
        kernels = self.kernels[device.architecture]
        for call, count in Counter(self.by_kernel(device, calls)).items():
            if call.operator.startswith("aten::"):
                rows.append(_own_row(device, call, count))
                continue
            launches = self.launches(device, call)
            moved, flops = float(call_bytes(call)), float(call_flops(call))
            for launch in launches:
                kernel = kernels[launch.kernel]
                here = moved
                if dweight := weight_gradient(call):
                    here += self.partial_bytes(device, call) - dweight.bytes
                for wgrad in call.weight_gradients:
                    here += self.partial_bytes(device, wgrad)
                here /= len(launches)
                terms = predict(device, kernel, launch, here, flops)
                rows.append(
                    Row(
                        operator=call.operator.split("::")[1],
                        shape=shape_class(call),
                        kernel=launch.kernel,
                        count=count,
                        grid=launch.grid,
                        shared_bytes=launch.shared_bytes,
                        resident_blocks=int(terms.pop("resident")),
                        megabytes=here / 1e6,
                        gflops=flops / 1e9,
                        **terms,
                    )
                )
        return rows


def _empty(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_empty(one) for one in value]
    return value.empty() if isinstance(value, Spec) else value


def _own_row(device: Device, call: Call, count: int) -> Row:
    moved = sum(spec.bytes for spec in call.specs())
    # a multi-tensor kernel of PyTorch takes some of its list at once
    tensors = max((len(a) for a in call.arguments if isinstance(a, tuple)), default=1)
    foreach = call.operator.startswith("aten::_foreach")
    launches = math.ceil(tensors / FOREACH_TENSORS) if foreach else 1
    floor = max(moved / device.bandwidth, call.flops / PEAK_FLOPS[device.name])
    return Row(
        operator=f"PyTorch {call.operator.split('::')[1]}",
        shape=shape_class(call),
        kernel="",
        count=count * launches,
        grid=(0, 0, 0),
        shared_bytes=0,
        resident_blocks=0,
        waves=0,
        megabytes=moved / launches / 1e6,
        gflops=call.flops / 1e9,
        floor=floor / launches,
        bytes=floor / launches,
        tensor=0,
        issue=0,
        banks=0,
        latency=0,
        merge=0,
        predicted=max(floor / launches, LAUNCH),
    )


# --- tables --------------------------------------------------------------------------------------


def total(rows: Iterable[Row], of: str = "predicted") -> float:
    return sum(row.count * getattr(row, of) for row in rows)


def static_table(kernels: dict[str, Kernel]) -> list[str]:
    lines = [
        "| kernel | registers | spilled bytes | main loop: instructions | tensor | operands |"
        " other loads | instructions a piece: window | weights | stored |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, kernel in sorted(kernels.items()):
        loop = kernel.main_loop
        tensor = loop.count("HMMA") or "-"
        if not loop.count("HMMA") and loop.count("FFMA"):
            tensor = f"{loop.count('FFMA')} FFMA"
        operands = [f"{loop.count('LDSM')} LDSM x4"] if loop.count("LDSM") else []
        others = Counter(
            f"{i.name}.{i.bits}" for i in loop.instructions if i.name in ("LDS", "LDG", "LDGSTS")
        )
        pieces = ["-"] * 3
        if "preact_conv" in name and "f16" in name:  # bf16 as well
            pieces[0] = f"{kernel.per_copy(weights=False):.0f}"
            if kernel.copies_weights:
                pieces[1] = f"{kernel.per_copy(weights=True):.0f}"
            if "wgrad" not in name:
                pieces[2] = f"{kernel.per_unit('STG', 128):.0f}"
        short = name.replace("(preact::Activation)0", "relu")
        short = short.replace("(preact::Activation)1", "silu")
        short = short.replace("preact::cuda::", "").replace("preact::", "")
        cells = [
            f"`{short}`",
            kernel.registers,
            kernel.spill_bytes,
            len(loop.instructions),
            tensor,
            ", ".join(operands) or "-",
            ", ".join(f"{n} {what}" for what, n in sorted(others.items())) or "-",
            *pieces,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def step_table(rows: list[Row]) -> list[str]:
    whole = total(rows)
    lines = [
        "| operator | shape | launches | grid | shared | resident | waves | MB | GFLOP | floor |"
        " bytes | tensor | issue | banks | latency | merge | predicted | bound by | share |",
        "|" + "---|" * 19,
    ]
    ours = [row for row in rows if row.kernel]
    for row in sorted(ours, key=lambda row: -row.count * row.predicted):
        name = "add_splits" if "add_splits" in row.kernel else row.operator
        parts = (getattr(row, name) for name in OVERLAPPING)
        times = (row.floor, *parts, row.merge, row.predicted)
        cells = [
            name,
            row.shape,
            row.count,
            "x".join(map(str, row.grid)),
            row.shared_bytes,
            row.resident_blocks,
            f"{row.waves:.2f}",
            f"{row.megabytes:.1f}",
            f"{row.gflops:.2f}",
            *(f"{1e6 * seconds:.1f}" for seconds in times),
            row.bound,
            f"{100 * row.count * row.predicted / whole:.1f}%",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def operator_table(rows: list[Row]) -> list[str]:
    lines = [
        "| operator | launches | floor, ms | predicted, ms | of it merges, ms |",
        "|---|---|---|---|---|",
    ]
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.operator].append(row)
    for name, group in sorted(groups.items(), key=lambda item: -total(item[1])):
        cells = [name, sum(row.count for row in group)]
        cells += [f"{1e3 * total(group, of):.2f}" for of in ("floor", "predicted", "merge")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def markdown(device: Device, kernels: dict[str, Kernel], steps: dict[str, list[Row]]) -> str:
    lines = [
        f"# {device.name}: predicted times of the CUDA kernels",
        "",
        "Every time here is a prediction by `benchmarks/kernel_report.py`; no GPU gave any. It is",
        f"of the kernels as of commit {kernels_commit()}.",
        "How a launch is predicted, and what is assumed, stands at the end. Every convolution is",
        'by our kernels, as under `backend("cuda")`; the planner gives wide ones to PyTorch.',
        "",
        "| training step, bfloat16 | launches | floor, ms | predicted, ms | asked for on an H100 |",
        "|---|---|---|---|---|",
    ]
    for name, rows in steps.items():
        batch, goal = STEPS[name].shape[0], STEPS[name].goal
        count, floor = sum(row.count for row in rows), 1e3 * total(rows, "floor")
        predicted = 1e3 * total(rows)
        lines.append(f"| {name}, {batch} | {count} | {floor:.1f} | {predicted:.1f} | {goal} |")
    for name, rows in steps.items():
        lines += ["", f"## {name}", "", "By operator:", "", *operator_table(rows)]
        lines += ["", "By launch; times in microseconds:", "", *step_table(rows)]
    lines += ["", "## The kernels' code", "", *static_table(kernels), "", "## The model", ""]
    lines += [line.strip() for line in (__doc__ or "").split("A launch is")[1:]]
    figures = ", ".join(
        f"{key} {value:g}"
        for key, value in asdict(device).items()
        if key not in ("name", "architecture")
    )
    lines += ["", figures, SOURCES]
    text = "\n".join(lines)
    return text.replace("predicted to take", "A launch is predicted to take", 1)


def kernels_commit() -> str:
    """The last commit that changed csrc/cuda."""
    command = ["git", "log", "-1", "--format=%h", "--", "csrc/cuda"]
    folder = Path(__file__).resolve().parent.parent
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def main(folder: Path) -> None:
    missing = [name for name, found in (("nvcc", nvcc()), ("cuobjdump", cuobjdump())) if not found]
    if missing:
        raise SystemExit(f"kernel_report.py needs {' and '.join(missing)}")
    known = known_architectures()
    devices = [device for device in DEVICES if device.architecture in known]
    for architecture in set(ARCHITECTURES) - set(known):
        print(f"not in the report: this nvcc does not know sm_{architecture}")
    folder.mkdir(parents=True, exist_ok=True)
    calls = {name: step_calls(step.build, step.shape) for name, step in STEPS.items()}
    with tempfile.TemporaryDirectory() as temporary:
        kernels: dict[str, dict[str, Kernel]] = defaultdict(dict)
        for (architecture, file), built in compile_cubins(Path(temporary), KERNELS, known).items():
            kernels[architecture] |= read_kernels(file, *built)
        library = build(Path(temporary) / "emulator", "preact_report")
        report = Report(kernels, Emulator(library, "preact_report"))
        data: dict[str, Any] = {}
        for device in devices:
            steps = {name: report.step(device, calls[name]) for name in calls}
            of_device = kernels[device.architecture]
            path = folder / f"{device.name.lower()}.md"
            path.write_text(markdown(device, of_device, steps))
            data[device.name] = {
                "device": asdict(device),
                "steps": {
                    name: {
                        "launches": sum(row.count for row in rows),
                        "predicted_seconds": total(rows),
                        "floor_seconds": total(rows, "floor"),
                        "rows": [_rounded(asdict(row)) for row in rows],
                    }
                    for name, rows in steps.items()
                },
                "kernels": {
                    name: {"registers": k.registers, "spill_bytes": k.spill_bytes}
                    for name, k in of_device.items()
                },
            }
            for name, rows in steps.items():
                print(f"{device.name} {name}: predicted {1e3 * total(rows):.1f} ms")
    text = json.dumps({"predictions": data}).replace('{"operator"', '\n{"operator"')
    (folder / "kernels.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
