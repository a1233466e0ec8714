"""fused-preact bench: who is measured, what is run, and that reports say what the files say."""

import json
from pathlib import Path

import pytest
import torch
from cases import all_cases
from check import check, comparable, errors
from contenders import EAGER, REFERENCE, Contender, contenders
from machine import processor_name
from measure import Traffic
from operators import OPERATORS, OperatorCase

from fused_preact import cli
from fused_preact.bench import command, tables
from fused_preact.bench.results import load, speedups

ROOT = Path(__file__).resolve().parent.parent


def row(case, contender, seconds, *, group="step", dtype="float32", batch=8, speedups=None):
    """A row as the benchmarks write it; speedups as {other: median}."""
    ratios = {
        f"speedup over {other}": {"median": median, "quartiles": [median - 0.1, median + 0.1]}
        for other, median in (speedups or {}).items()
    }
    return {
        "case": case,
        "group": group,
        "passes": "forward+backward",
        "dtype": f"torch.{dtype}",
        "shape": [batch, 3, 32, 32],
        "seconds": [seconds, seconds, seconds],
        "contender": contender,
        "peak_bytes": (1 if ratios else 2) << 20,
        "saved_bytes": 1 << 20,
        "launches": 7,
        "bytes": 10**9,
        "flops": 10**10,
        "floor_seconds": 1e-3,
        "of_floor": 1e-3 / seconds,
        **ratios,
    }


@pytest.fixture
def results(tmp_path):
    """A GPU's results file: networks of two depths, a unit and an operator."""
    rows = []
    for case, group, batch in (
        ("R-164", "step", 8),
        ("R-1001", "step", 8),
        ("basic-64x32", "unit", 8),
        ("bn_stats-64x32", "operator", 8),
    ):
        kind = {"group": group, "batch": batch}
        rows += [
            row(case, "eager", 2e-2, **kind),
            row(case, "eager graph", 1e-2, **kind),
            row(case, "auto", 8e-3, speedups={"eager": 2.5, "eager graph": 1.25}, **kind),
            row(case, "auto graph", 2.5e-2, speedups={"eager": 0.8, "eager graph": 0.4}, **kind),
        ]
        rows.append(row(case, "triton", 1e-2, speedups={"eager": 2.0}, **kind))
        # what runs in a graph is not seen
        rows[-2] |= {"contender is": "captured", "peak_bytes": None, "saved_bytes": None}
    rows[-1]["eager is"] = "what eager runs"
    machine = {
        "device": "NVIDIA GPU",
        "capability": "AVX2",
        "threads": 4,
        "torch": "2.11.0",
        "cuda": "13.0",
        "commit": "abc",
        "copy_bytes_per_second": 1e12,
        "matmul_flops_per_second": {"torch.float32": 1e13, "torch.bfloat16": 1e14},
    }
    path = tmp_path / "nvidia-gpu" / "cuda.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"machine": machine, "rows": rows}))
    return path


def test_readme_shows_the_committed_results():
    """Else: fused-preact bench report --into README.md benchmarks/results/*/*.json"""
    files = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
    assert files
    text = (ROOT / "README.md").read_text()
    assert tables.with_figures(text, tables.figures(map(load, files), ROOT)) == text


def test_figures_say_the_ratio_the_rival_and_the_memory(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    assert cli.main(["bench", "report", "--into", str(readme), str(results)]) == 0
    lines = readme.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert "NVIDIA GPU, torch 2.11.0, commit abc ([all figures](nvidia-gpu/cuda.json)):" in lines
    for line in (
        "| R-164, batch 8 | auto | 2.50 (2.40-2.60), 1.25 over eager graph; memory 0.50 |",
        "| basic-64x32, batch 8 | auto graph | **0.80** (0.70-0.90), **0.40** over eager graph |",
    ):
        assert line in lines
    # neither operators nor, beside the planner's choice, single backends
    assert not any("bn_stats" in line or "triton" in line for line in lines)


def test_report_writes_table_and_pictures(results, tmp_path, capsys):
    out = tmp_path / "report"
    assert cli.main(["bench", "report", "--out", str(out), str(results)]) == 0
    table = (out / "report.md").read_text()
    cells = "| 8 (8-8) | 2.50 (2.40-2.60) | 1.25 (1.15-1.35), eager graph | 1.0 | 1.0 | 7 | 0.12 |"
    assert f"| R-1001, batch 8 | forward+backward | float32 | auto {cells}" in table
    assert "- bn_stats, eager: what eager runs." in table
    assert "- auto graph: captured." in table
    titles = [f"speed-up-per-{group}" for group in ("operator", "unit", "step")]
    titles += ["step-time-against-depth", "memory-against-depth", "roofline"]
    files = {f"nvidia-gpu-cuda-{title}.{suffix}" for title in titles for suffix in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == files | {"report.md"}
    assert "nothing measured for 'speed-up per attack'" in capsys.readouterr().out


@pytest.mark.parametrize("contender", [EAGER, Contender("cpu", "cpu")], ids=lambda c: c.name)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_pass_the_check(name, contender):
    """Each operator and its counterpart give results that the harness can compare, and times."""
    case, device = OperatorCase(name, "", (2, 8, 6, 6), 8, 3, True, True), torch.device("cpu")

    def results(contender, dtype):
        return comparable(case, case.step(contender, dtype, device)(0))

    true = results(REFERENCE, torch.float64)
    baseline = errors(results(REFERENCE, torch.float32), true)
    check(case, contender, errors(results(contender, torch.float32), true), baseline, torch.float32)


def test_floor_counts_what_moves():
    """Each tensor of an operator once; a view and an empty tensor like another move nothing."""
    tensor = torch.ones(4, 5)
    with Traffic(bandwidth=2.0, rate=1e9) as traffic:
        tensor.new_empty(0)
        torch.empty_like(tensor).view(20)
        tensor + tensor
    assert (traffic.bytes, traffic.seconds) == (160, 80.0)


def test_processors_without_a_number_have_their_family_and_model():
    cpuinfo = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {}\n"
    assert processor_name(cpuinfo.format("AMD EPYC") * 2) == "AMD EPYC family 25 model 17"
    assert processor_name(cpuinfo.format("AMD EPYC 9354")) == "AMD EPYC 9354"
    assert processor_name("model name\t: Neoverse-V\n") == "Neoverse-V"
    assert processor_name("Features\t: fp asimd\n") is None


def test_bench_measures_a_selection(tmp_path, monkeypatch):
    """The harness itself, on one small operator: checked, timed, written, read again."""
    path = tmp_path / "results.json"
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # beside others nothing is timed
    arguments = ["-k", "bn_affine and float32", "--results", str(path)]
    assert cli.main(["bench", *arguments]) == 0
    result = load(path)
    eager, *ours = result.rows
    assert (eager["contender"], len(speedups(eager))) == ("eager", 0)
    assert ours and all(speedups(row).keys() == {"eager"} for row in ours)
    assert all(row["seconds"] and row["floor_seconds"] > 0 for row in result.rows)
    assert "bn_affine-32x16" in tables.full_table(result)


@pytest.mark.parametrize("content", [None, "no JSON", "{}"])
def test_what_is_no_results_file_is_refused_in_words(content, tmp_path, capsys):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["bench", "report", str(path)]) == 1
    assert f"{path} is not a results file" in capsys.readouterr().err


def test_a_file_without_place_for_figures_is_left_alone(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("no comments\n")
    assert cli.main(["bench", "report", "--into", str(readme), str(results)]) == 1
    assert tables.BEGIN in capsys.readouterr().err
    assert readme.read_text() == "no comments\n"


def test_bench_outside_a_checkout_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench"]) == 1
    assert "clone the repository" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ([], ["--results", str(ROOT / "benchmarks" / "results")]),
        (["--full"], ["--full", "--results", str(ROOT / "benchmarks" / "results")]),
        (["--networks", "-k", "R-164"], ["--networks", "-k", "R-164"]),
        (["-k", "R-164"], ["-k", "R-164"]),  # a selection does not replace the whole
        (["-k", "R-164", "--results", "/r.json"], ["-k", "R-164", "--results", "/r.json"]),
    ],
)
def test_bench_runs_the_checkout_around_it(given, passed, monkeypatch):
    ran = []

    def run(command, **options):
        ran.append((command[command.index("--benchmark-only") + 1 :], options["cwd"]))
        return type("Completed", (), {"returncode": 5})

    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.chdir(ROOT / "tests" / "ops")
    assert cli.main(["bench", *given]) == 5
    assert ran == [(passed, ROOT)]


def names(case, device, full):
    found = [c for c in all_cases(device) if (c.name, c.group) == case]
    backends = ("cpu",) if device == "cpu" else ("cuda", "triton")
    return [contender.name for contender in contenders(found[0], device, backends, full)]


ON_GPU = ["auto", "cuda", "triton", "auto graph", "cuda graph", "triton graph"]


@pytest.mark.parametrize(
    ("case", "device", "full", "expected"),
    [
        (("bn_stats-64x8", "operator"), "cpu", True, ["eager", "cpu"]),
        (("basic-64x32", "unit"), "cpu", False, ["eager", "eager NCHW", "compile", "auto"]),
        (("R-1001", "step"), "cpu", False, ["eager", "auto"]),
        (("R-1001", "step"), "cpu", True, ["eager", "eager NCHW", "compile units", "auto", "cpu"]),
        (("WRN-28-10", "step"), "cpu", True, ["eager", "eager NCHW", "compile", "auto", "cpu"]),
        (("bn_stats-64x8", "operator"), "cuda", True, ["eager", "cuda", "triton"]),
        (("R-164", "attack"), "cuda", False, ["eager", "eager graph", "auto", "auto graph"]),
        (
            ("WRN-28-10", "step"),
            "cuda",
            True,
            ["eager", "eager NCHW", "compile", "eager graph", "compile max-autotune", *ON_GPU],
        ),
        (
            ("R-1001", "step"),
            "cuda",
            True,
            [
                *("eager", "eager NCHW", "compile units", "eager graph"),
                *("compile max-autotune units", *ON_GPU),
            ],
        ),
    ],
)
def test_contenders(case, device, full, expected):
    assert names(case, device, full) == expected
