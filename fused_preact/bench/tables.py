"""Markdown of results: every figure of a file, and the few that the README shows."""

import os
from collections.abc import Iterable
from pathlib import Path

from .results import (
    BenchError,
    Result,
    Row,
    Spread,
    dtype,
    eager_of,
    fastest_other,
    seconds,
    speedups,
)

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
# In the README, and what is said there of them.
SHOWN = {"step": "", "attack": ", gradient of the images alone", "host": ", 8x8 images", "unit": ""}
PASSES = "forward+backward", "attack"
MIB = 1 << 20


def full_table(result: Result) -> str:
    """Each contender of each case: time, ratios, memory, launches and the floor it reaches."""
    columns = ["case", "passes", "dtype", "contender", "ms", "over eager", "over the fastest other"]
    columns += ["peak MiB", "saved MiB", "launches", "of floor"]
    rows = []
    for row in result.rows:
        middle, low, high = (1e3 * value for value in seconds(row))
        ratios, other = speedups(row), fastest_other(row)
        rows.append(
            [
                _case(row),
                row["passes"],
                dtype(row),
                row["contender"],
                f"{middle:.3g} ({low:.3g}-{high:.3g})",
                _spread(ratios["eager"]) if ratios else "",
                f"{_spread(other[1])}, {other[0]}" if other else "",
                _mib(row["peak_bytes"]),
                _mib(row["saved_bytes"]),
                str(row.get("launches") or ""),
                f"{row['of_floor']:.2f}",
            ]
        )
    explained = {
        row["contender"]: row["contender is"] for row in result.rows if "contender is" in row
    }
    explained |= {
        f"{row['case'].split('-')[0]}, eager": row["eager is"]
        for row in result.rows
        if "eager is" in row
    }
    notes = [f"- {name}: {text}." for name, text in explained.items()]
    parts = [f"## {_machine(result)}", _grid(columns, rows), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def figures(results: Iterable[Result], folder: Path) -> str:
    """The README's tables: networks, attacks and units over eager, one table a file.

    folder is the README's, from where the links lead to the files.
    """
    return "\n\n".join(_figures(result, folder) for result in results)


def with_figures(text: str, new: str) -> str:
    """text with new between its two comments; raises BenchError where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise BenchError(f"expected the lines {BEGIN} and {END} to write between")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def _figures(result: Result, folder: Path) -> str:
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in _shown(result.rows):
        name = _case(row) + SHOWN[row["group"]]
        cells.setdefault((name, row["contender"]), {})[dtype(row)] = _cell(row, result.rows)
    dtypes = sorted({name for row in cells.values() for name in row}, reverse=True)
    table = [
        [name, contender, *(found.get(column, "") for column in dtypes)]
        for (name, contender), found in cells.items()
    ]
    link = os.path.relpath(result.path, folder)
    return f"{_machine(result)} ([all figures]({link})):\n\n" + _grid(
        ["forward and backward", "backend", *dtypes], table
    )


def _shown(rows: list[Row]) -> list[Row]:
    """Those of ours that the README shows: networks, attacks, units that keep their shape.

    What users get, the planner's choice ("auto"); every backend where a file has no such rows.
    """
    shown = [
        row
        for row in rows
        if row["group"] in SHOWN
        and row["passes"] in PASSES
        and speedups(row)
        and not row["case"].startswith("projection")
    ]
    shown = [row for row in shown if row["contender"].startswith("auto")] or shown
    return sorted(shown, key=lambda row: list(SHOWN).index(row["group"]))


def _cell(row: Row, rows: list[Row]) -> str:
    ratio, eager = speedups(row)["eager"], eager_of(row, rows)
    bold = "**" if ratio.median < 1 else ""
    text = f"{bold}{ratio.median:.2f}{bold} ({ratio.low:.2f}-{ratio.high:.2f})"
    other = fastest_other(row)
    if other is not None and other[1].median < ratio.median:
        bold = "**" if other[1].median < 1 else ""
        text += f", {bold}{other[1].median:.2f}{bold} over {other[0]}"
    if row["peak_bytes"] is None:
        return text
    return f"{text}; memory {row['peak_bytes'] / eager['peak_bytes']:.2f}"


def _case(row: Row) -> str:
    return f"{row['case']}, batch {row['shape'][0]}"


def _machine(result: Result) -> str:
    machine = result.machine
    parts = [machine["device"]]
    if "threads" in machine and "cuda" not in machine:
        parts.append(f"{machine['capability']}, {machine['threads']} threads")
    return ", ".join([*parts, f"torch {machine['torch']}, commit {machine['commit']}"])


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:.1f}"


def _spread(value: Spread) -> str:
    return f"{value.median:.2f} ({value.low:.2f}-{value.high:.2f})"


def _grid(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
