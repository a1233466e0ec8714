"""What the benchmarks wrote: a machine and its rows, one a contender of a case."""

import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SPEEDUP = "speedup over "

Row = dict[str, Any]


class BenchError(Exception):
    """What keeps a benchmark or its report from being made, in words."""


class Spread(NamedTuple):
    """Median and quartiles of the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """A results file."""

    path: Path
    machine: dict[str, Any]
    rows: list[Row]


def load(path: Path) -> Result:
    """Raises BenchError where path is no file that the benchmarks wrote."""
    try:
        content = json.loads(path.read_text())
        return Result(path, content["machine"], content["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path} is not a results file of the benchmarks: {error}") from error


def speedups(row: Row) -> dict[str, Spread]:
    """Over each of PyTorch's contenders, by name; empty for a row of theirs."""
    return {
        name.removeprefix(SPEEDUP): Spread(value["median"], *value["quartiles"])
        for name, value in row.items()
        if name.startswith(SPEEDUP)
    }


def fastest_other(row: Row) -> tuple[str, Spread] | None:
    """Whom a row of ours is least ahead of; None for a row of theirs."""
    return min(speedups(row).items(), key=lambda item: item[1].median, default=None)


def eager_of(row: Row, rows: Iterable[Row]) -> Row:
    """PyTorch's layers in channels_last on the same case."""
    (eager,) = [r for r in rows if r["contender"] == "eager" and same_case(r, row)]
    return eager


def same_case(a: Row, b: Row) -> bool:
    keys = "group", "case", "passes", "dtype", "shape"
    return all(a[key] == b[key] for key in keys)


def seconds(row: Row) -> Spread:
    """Median and quartiles of a step's seconds."""
    values = row["seconds"]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def dtype(row: Row) -> str:
    return row["dtype"].removeprefix("torch.")


def depth(row: Row) -> int:
    """Layers of a network, which are the first number in its name."""
    match = re.search(r"\d+", row["case"])
    assert match is not None
    return int(match[0])
