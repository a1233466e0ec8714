"""The predictions of kernel_report.py beside what this machine's GPU takes.

    python benchmarks/predicted_and_measured.py [NETWORK] [--warpgroups] [--results FILE.md]

Every operator call of a training step of a network of the report (R-1001), on random operands, in a
CUDA graph of several calls; the operands stay in the caches where they fit. The Markdown table has
the slowest first. With --warpgroups convolutions multiply with wgmma where they can, on compute
capability 9.0. Needs nothing but PyTorch and the CUDA kernels.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from step_calls import BY_WARPGROUPS, STEPS, Call, Spec, by_kernel, shape_class, step_calls

from fused_preact import _C

PREDICTED = Path(__file__).resolve().parent / "predicted" / "kernels.json"
# An H200 is an H100 whose memory is 1.4 times as fast.
ALIKE = {"H200": "H100"}
CALLS, REPLAYS = 10, 5  # in a graph; of it


class Row(NamedTuple):
    operator: str
    shape: str
    count: int  # in the step
    predicted: float  # seconds of a call
    measured: float


def predictions(step: str, gpu: str) -> dict[tuple[str, str], float]:
    """Seconds of a call by operator and shape class, of the report's device that gpu names, or of
    the one that is like it.

    Raises LookupError where the report has no such device, or no such step of it.
    """
    report = json.loads(PREDICTED.read_text())["predictions"]
    for name, other in ALIKE.items():
        gpu = gpu.replace(name, other)
    for name, device in report.items():
        if name in gpu and step in device["steps"]:
            return _of_calls(device["steps"][step]["rows"])
    raise LookupError(f"the report predicts {', '.join(report)}, and this is {step} on {gpu}")


def _of_calls(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """The kernels of a call added up; of calls that differ by less than their shape, the mean."""
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0])
    for row in rows:
        one = sums[row["operator"], row["shape"], row["kernel"]]
        one[0] += row["count"] * row["predicted"]
        one[1] += row["count"]
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for (operator, shape, _), (total, count) in sums.items():
        seconds[operator, shape] += total / count
    return dict(seconds)


def measure(calls: list[Call], predicted: dict[tuple[str, str], float]) -> list[Row]:
    """A row for each distinct call of our operators, slowest of the step first.

    Units are measured layer by layer: the sum of partial results that they take together is a part
    of each weight gradient here, and of no prediction.
    """
    rows = []
    layers: list[Call] = []
    for call in calls:
        if not call.weight_gradients:
            layers += by_kernel(call, lambda one: _key(one) in predicted)
    for call, count in Counter(layers).items():
        if call.operator.startswith("fused_preact::") and _key(call) in predicted:
            rows.append(Row(*_key(call), count, predicted[_key(call)], _seconds(call)))
    return sorted(rows, key=lambda row: -row.count * row.measured)


def _key(call: Call) -> tuple[str, str]:
    return call.operator.split("::")[1], shape_class(call)


def table(step: str, gpu: str, rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        f"# {step} on {gpu}: predicted and measured",
        "",
        "| operator | shape | calls | predicted, us | measured, us | measured / predicted |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row.measured / row.predicted
        times = f"{1e6 * row.predicted:.1f} | {1e6 * row.measured:.1f} | {ratio:.2f}"
        lines.append(f"| {row.operator} | {row.shape} | {row.count} | {times} |")
    whole = [sum(row.count * getattr(row, of) for row in rows) for of in ("predicted", "measured")]
    lines += [
        "",
        "Our operators in a step: {:.2f} ms predicted, {:.2f} ms measured.".format(
            *(1e3 * seconds for seconds in whole)
        ),
    ]
    return "\n".join(lines) + "\n"


def _seconds(call: Call) -> float:
    """The median of a call's time in a graph."""
    operator = getattr(torch.ops.fused_preact, call.operator.split("::")[1])
    arguments = [_operand(argument) for argument in call.arguments]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        operator(*arguments)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            operator(*arguments)
    seconds = []
    for _ in range(REPLAYS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / CALLS)
    return sorted(seconds[1:])[REPLAYS // 2]


def _operand(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_operand(one) for one in value]
    if not isinstance(value, Spec):
        return value
    tensor = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="cuda")
    return tensor.uniform_(0.5, 1.5) if tensor.is_floating_point() else tensor.zero_()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("network", nargs="?", default="R-1001", choices=list(STEPS))
    parser.add_argument("--warpgroups", action="store_true", help="measure the wgmma kernels")
    parser.add_argument("--results", type=Path, metavar="FILE.md", help="write the table there")
    args = parser.parse_args()
    if args.warpgroups:
        _C.use_warpgroups(True)
    if not torch.cuda.is_available():
        raise SystemExit("predicted_and_measured.py needs a GPU, and this torch sees none")
    gpu = torch.cuda.get_device_name()
    name = args.network + (BY_WARPGROUPS if args.warpgroups else "")
    try:
        predicted = predictions(name, gpu)
    except LookupError as error:
        raise SystemExit(str(error)) from error
    step = STEPS[args.network]
    text = table(name, gpu, measure(step_calls(step.build, step.shape), predicted))
    print(text)
    if args.results:
        args.results.write_text(text)


if __name__ == "__main__":
    main()
