"""Pictures of a results file: speed-up per shape, time and memory against depth, roofline."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .results import BenchError, Result, Row, depth, dtype, seconds, speedups

MIB = 1 << 20
DTYPE_COLORS = {"float32": "tab:blue", "bfloat16": "tab:orange", "float16": "tab:green"}


def draw(result: Result, folder: Path) -> tuple[list[Path], list[str]]:
    """Write each picture as PNG and SVG; returns the files, and what nothing was measured for."""
    name = f"{result.path.parent.name}-{result.path.stem}"
    folder.mkdir(parents=True, exist_ok=True)
    written, missing = [], []
    for title, picture, rows in _pictures(result):
        if not rows:
            missing.append(title)
            continue
        figure = _figure()
        picture(figure, rows, result.machine)
        figure.suptitle(f"{title}: {result.machine['device']}, commit {result.machine['commit']}")
        for suffix in "png", "svg":
            path = folder / f"{name}-{title.replace(' ', '-')}.{suffix}"
            figure.savefig(path, dpi=120)
            written.append(path)
    return written, missing


Picture = Callable[[Any, list[Row], dict[str, Any]], None]


def _pictures(result: Result) -> Iterator[tuple[str, Picture, list[Row]]]:
    rows = result.rows
    for group in "operator", "unit", "step", "attack":
        ours = [row for row in rows if row["group"] == group and speedups(row)]
        yield f"speed-up per {group}", _speedups, ours
    networks = [
        row
        for row in rows
        if row["group"] in ("step", "depth") and (speedups(row) or row["contender"] == "eager")
    ]
    yield "step time against depth", _time_against_depth, networks
    yield "memory against depth", _memory_against_depth, networks
    yield "roofline", _roofline, [row for row in rows if row.get("flops")]


def _speedups(figure: Any, rows: list[Row], machine: dict[str, Any]) -> None:
    """A bar a case, dtype and contender of ours: median over eager, whiskers at the quartiles."""
    figure.set_size_inches(9, 1.5 + 0.25 * len(rows))
    axes = figure.subplots()
    rows = rows[::-1]  # the first on top
    ratios = [speedups(row)["eager"] for row in rows]
    whiskers = [
        [ratio.median - ratio.low for ratio in ratios],
        [ratio.high - ratio.median for ratio in ratios],
    ]
    colors = [DTYPE_COLORS[dtype(row)] for row in rows]
    medians = [ratio.median for ratio in ratios]
    axes.barh(range(len(rows)), medians, xerr=whiskers, color=colors, ecolor="0.3")
    names = [f"{row['case']} {row['passes']}, {dtype(row)}, {row['contender']}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize="small")
    axes.axvline(1, color="0.3", linestyle="--")
    axes.set(xlabel="times as fast as eager in channels_last", ylim=(-1, len(rows)))
    _finish(axes)


def _time_against_depth(figure: Any, rows: list[Row], machine: dict[str, Any]) -> None:
    axes = figure.subplots()
    _lines(axes, rows, lambda row: 1e3 * seconds(row).median)
    axes.set(ylabel="ms an image")
    _finish(axes)
    axes.legend(frameon=False, fontsize="x-small")


def _memory_against_depth(figure: Any, rows: list[Row], machine: dict[str, Any]) -> None:
    figure.set_size_inches(13, 5)
    left, right = figure.subplots(1, 2)
    rows = [row for row in rows if row["peak_bytes"] is not None]
    _lines(left, rows, lambda row: row["peak_bytes"] / MIB)
    _lines(right, rows, lambda row: row["saved_bytes"] / MIB)
    left.set(ylabel="peak MiB an image")
    right.set(ylabel="saved MiB an image")
    _finish(left)
    _finish(right)
    right.legend(frameon=False, fontsize="x-small")


def _lines(axes: Any, rows: list[Row], value: Callable[[Row], float]) -> None:
    """value an image against depth; a line a family of networks, batch, dtype and contender."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        family, batch = row["case"].split("-")[0], row["shape"][0]
        name = f"{family}, batch {batch}, {dtype(row)}, {row['contender']}"
        series.setdefault(name, []).append((depth(row), value(row) / batch))
    for name, points in series.items():
        eager = name.endswith("eager")
        axes.plot(*zip(*sorted(points), strict=True), "o--" if eager else "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="layers")


def _roofline(figure: Any, rows: list[Row], machine: dict[str, Any]) -> None:
    """What each contender attains where its case stands, under the roof of this machine."""
    axes = figure.subplots()
    bandwidth = machine["copy_bytes_per_second"]
    intensities = [row["flops"] / row["bytes"] for row in rows]
    ends = min(intensities) / 2, max(intensities) * 2
    for name, rate in machine["matmul_flops_per_second"].items():
        kind = name.removeprefix("torch.")
        ridge = rate / bandwidth
        xs = sorted({*ends, min(max(ridge, ends[0]), ends[1])})
        roof = [min(bandwidth * x, rate) for x in xs]
        axes.plot(xs, roof, color=DTYPE_COLORS[kind], label=f"floor, {kind}")
    for ours, marker, label in (False, "x", "PyTorch"), (True, "o", "fused_preact"):
        chosen = [
            (x, r) for x, r in zip(intensities, rows, strict=True) if bool(speedups(r)) == ours
        ]
        axes.scatter(
            [x for x, _ in chosen],
            [row["flops"] / seconds(row).median for _, row in chosen],
            c=[DTYPE_COLORS[dtype(row)] for _, row in chosen],
            marker=marker,
            s=18,
            label=label,
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s")
    _finish(axes)
    axes.legend(frameon=False)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError(
            f"pictures need matplotlib ({error}): pip install 'fused_preact[bench]'"
        ) from error
    return Figure(figsize=(8, 5), layout="constrained")


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3, which="both")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
