"""fused-preact bench: runs the benchmarks of the checkout around the current directory.

    fused-preact bench [--networks] [--full] [--results FILE.json] [-k EXPR]
    fused-preact bench report FILES... [--out FOLDER] [--into README.md]

The benchmarks lie in the repository, not in the package; what they write is read here.
"""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

from . import pictures, tables
from .results import BenchError, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--networks", action="store_true", help="all networks too, beside PyTorch's own layers"
    )
    parser.add_argument("--full", action="store_true", help="all shapes, dtypes and contenders")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="where the results go, by default benchmarks/results/MACHINE/DEVICE.json, with --full "
        "DEVICE-full.json; of a selection (-k) nowhere",
    )
    parser.add_argument("-k", metavar="EXPR", help="only cases that match, as for pytest")
    parser.set_defaults(act=_measure)
    actions = parser.add_subparsers(metavar="report")
    summary = "Markdown and pictures of results files"
    report = actions.add_parser("report", help=summary, description=summary)
    report.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results of bench")
    report.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write the table there, with pictures"
    )
    report.add_argument(
        "--into",
        type=Path,
        metavar="README",
        help="only rewrite the figures between two comments of this file",
    )
    report.set_defaults(act=_report)


def run(args: argparse.Namespace) -> int:
    """1 with a line where there is nothing to run or to read, else pytest's exit code."""
    try:
        return args.act(args)
    except BenchError as error:
        print(f"fused-preact bench: {error}", file=sys.stderr)
        return 1


def _measure(args: argparse.Namespace) -> int:
    checkout = find_checkout(Path.cwd())
    missing = [
        name for name in ("pytest", "pytest_benchmark") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise BenchError(f"{', '.join(missing)} not found: pip install 'fused_preact[bench]'")
    # -P: the package that is installed, not the folder beside the benchmarks
    command = [sys.executable, "-P", "-m", "pytest", "benchmarks", "--benchmark-only"]
    command += ["--networks"] if args.networks else []
    command += ["--full"] if args.full else []
    command += ["-k", args.k] if args.k else []
    results = args.results
    if results is None and args.k is None:
        results = checkout / "benchmarks" / "results"
    if results is not None:
        command += ["--results", str(results.absolute())]
    return subprocess.run(command, cwd=checkout, check=False).returncode


def find_checkout(folder: Path) -> Path:
    """The repository that folder lies in; raises BenchError where there is none."""
    for candidate in (folder, *folder.parents):
        if (candidate / "fused_preact" / "bench").is_dir() and (candidate / "benchmarks").is_dir():
            return candidate
    raise BenchError(
        f"no checkout of fused_preact around {folder}: the benchmarks are not part of the "
        "package; clone the repository and run this command inside"
    )


def _report(args: argparse.Namespace) -> int:
    results = [load(path) for path in sorted(args.files)]
    if args.into is not None:
        new = tables.figures(results, args.into.absolute().parent)
        args.into.write_text(tables.with_figures(args.into.read_text(), new))
        return 0
    text = "\n".join(tables.full_table(result) for result in results)
    if args.out is None:
        print(text)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    written = [args.out / "report.md"]
    written[0].write_text(text)
    for result in results:
        drawn, missing = pictures.draw(result, args.out)
        written += drawn
        for title in missing:
            print(f"{result.path}: nothing measured for {title!r}")
    for path in written:
        print(path)
    return 0
