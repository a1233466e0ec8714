"""What the CUDA kernels should take on GPUs that are not here: the table by which they are tuned.

    python benchmarks/kernel_report.py [DIR]

Compiles csrc/cuda with nvcc for each architecture, takes every operator call of whole training
steps from the models, and what each would launch from the kernels' own launchers, run by the
emulator of tests/cuda_emulator. Writes DIR/kernels.json, and a Markdown table for each device; DIR
is benchmarks/predicted. Every time in it is a prediction: no GPU gave it.
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
    BY_WARPGROUPS,
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
from cuda_emulator.emulator import Emulator, Launch
from launch_model import (
    DEVICES,
    LAUNCH,
    OVERLAPPING,
    PEAK_FLOPS,
    SOURCES,
    Device,
    predict,
    resident_blocks,
)
from launch_model import __doc__ as the_model

RESULTS = Path(__file__).resolve().parent / "predicted"
FOREACH_TENSORS = 64  # that a multi-tensor kernel of PyTorch takes at once, about


# --- steps ---------------------------------------------------------------------------------------


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
    roles: float
    merge: float
    predicted: float

    @property
    def bound(self) -> str:
        parts = {name: getattr(self, name) for name in OVERLAPPING}
        most = max(parts, key=lambda name: parts[name])
        if self.predicted <= LAUNCH:
            return "launch"
        return f"{most} + merge" if self.merge > 0.1 * self.predicted else most


class Report:
    """What steps launch of the kernels, by architecture and name, as an emulator has them.

    warpgroups: where a device has them, kernels take convolutions that multiply with wgmma.
    """

    def __init__(
        self,
        kernels: dict[str, dict[str, Kernel]],
        emulator: Emulator,
        *,
        warpgroups: bool = False,
    ) -> None:
        self.kernels, self.emulator, self.warpgroups = kernels, emulator, warpgroups
        self._splits: dict[tuple[str, Call], int] = {}

    def launches(self, device: Device, call: Call) -> list[Launch]:
        """Sums of partial results are launches of the units, not of their weight gradients."""
        operator = getattr(self.emulator.operators, call.operator.split("::")[1])
        arguments = [_empty(a) for a in call.arguments]
        of_device = device.multiprocessors, device.most_shared_bytes
        warpgroups = self.warpgroups and device.warpgroup_flops > 0
        kernels = self.kernels.get(device.architecture)

        def resident(name: str, threads: int, shared_bytes: int) -> int:
            return resident_blocks(device, kernels[name], threads, shared_bytes)

        with self.emulator.recording(
            *of_device, warpgroups=warpgroups, resident_blocks=resident if kernels else None
        ) as launches:
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
                if launch.kernel.startswith(("preact_conv_wgrad", "preact_conv_backward", "wgrad_"))
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
        roles=0,
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
        tensor = str(loop.multiplications or "-")
        if kernel.by_warpgroups:
            tensor = f"{tensor} by wgmma"
        elif not loop.multiplications and loop.count("FFMA"):
            tensor = f"{loop.count('FFMA')} FFMA"
        operands = [f"{loop.count('LDSM')} LDSM x4"] if loop.count("LDSM") else []
        others = Counter(
            f"{i.name}.{i.bits}" for i in loop.instructions if i.name in ("LDS", "LDG", "LDGSTS")
        )
        pieces = ["-"] * 3
        if kernel.by_warpgroups or ("preact_conv" in name and "f16" in name):  # bf16 as well
            filled = kernel.by_warpgroups
            per_piece = kernel.pieces_filled[0] if filled else kernel.per_copy(weights=False)
            pieces[0] = f"{per_piece:.0f}"
            if kernel.copies_weights:
                pieces[1] = f"{kernel.per_copy(weights=True):.0f}"
            if "wgrad" not in name:
                pieces[2] = f"{kernel.pieces_stored[0]:.0f}"
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
        " bytes | tensor | issue | banks | latency | roles | merge |"
        " predicted | bound by | share |",
        "|" + "---|" * 20,
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
    ]
    if device.warpgroup_flops:
        lines += [
            f"Steps{BY_WARPGROUPS} take kernels of csrc/cuda/sm90 where they can, which have to be",
            "asked for: no GPU has run them.",
        ]
    lines += [
        "",
        "| training step, bfloat16 | launches | floor, ms | predicted, ms | asked for on an H100 |",
        "|---|---|---|---|---|",
    ]
    for name, rows in steps.items():
        step = STEPS[name.removesuffix(BY_WARPGROUPS)]
        batch, goal = step.shape[0], step.goal
        count, floor = sum(row.count for row in rows), 1e3 * total(rows, "floor")
        predicted = 1e3 * total(rows)
        lines.append(f"| {name}, {batch} | {count} | {floor:.1f} | {predicted:.1f} | {goal} |")
    for name, rows in steps.items():
        lines += ["", f"## {name}", "", "By operator:", "", *operator_table(rows)]
        lines += ["", "By launch; times in microseconds:", "", *step_table(rows)]
    lines += ["", "## The kernels' code", "", *static_table(kernels), "", "## The model", ""]
    lines += [line.strip() for line in (the_model or "").split("\n")[2:]]
    figures = ", ".join(
        f"{key} {value:g}"
        for key, value in asdict(device).items()
        if key not in ("name", "architecture")
    )
    lines += ["", figures, SOURCES]
    return "\n".join(lines)


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
        emulator = Emulator(library, "preact_report")
        report = Report(kernels, emulator)
        by_warpgroups = Report(kernels, emulator, warpgroups=True)
        data: dict[str, Any] = {}
        for device in devices:
            steps = {name: report.step(device, of_step) for name, of_step in calls.items()}
            if device.warpgroup_flops:
                for name, of_step in calls.items():
                    steps[name + BY_WARPGROUPS] = by_warpgroups.step(device, of_step)
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
