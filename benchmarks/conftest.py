"""Options, the machine's figures, and the measurements that the benchmarks report."""

import json
from pathlib import Path
from typing import Any

import machine
import pytest
import torch
from cases import Case, contender
from check import check
from measure import Measured, Traffic, alternate, ratios

ROUNDS_SECONDS = 8.0  # of measuring a case, warm-up left out
BASELINES = ("eager NCHW", "eager", "compile")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused_preact")
    group.addoption("--full", action="store_true", help="all shapes, dtypes and contenders")
    group.addoption("--results", type=Path, help="a JSON file to write the results to")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def bandwidth(device: torch.device) -> float:
    return machine.copy_bandwidth(device)


class Measurements:
    """What has been measured so far, each case once with all its contenders side by side."""

    def __init__(self, device: torch.device, bandwidth: float) -> None:
        self.device, self.bandwidth = device, bandwidth
        self.rates = {t: machine.matmul_rate(device, t) for t in (torch.float32, torch.bfloat16)}
        self._cases: dict[Any, tuple[dict[str, Measured], Traffic]] = {}
        self.rows: list[dict[str, Any]] = []

    def of(
        self, case: Case, dtype: torch.dtype, names: tuple[str, ...]
    ) -> tuple[dict[str, Measured], Traffic]:
        key = case, dtype
        if key not in self._cases:
            steps = {name: self._contender(case, name, dtype) for name in names}
            check(case, steps, self._contender(case, "eager", torch.float64), dtype)
            ours = next(name for name in names if name not in BASELINES)
            with Traffic(self.bandwidth, self.rates[dtype]) as traffic:
                steps[ours]()
            self._cases[key] = alternate(steps, self.device, ROUNDS_SECONDS), traffic
        return self._cases[key]

    def _contender(self, case: Case, name: str, dtype: torch.dtype) -> Any:
        layout = torch.contiguous_format if name == "eager NCHW" else torch.channels_last
        backend = "eager" if name in BASELINES else name
        return contender(case, backend, dtype, self.device, layout, compiled=name == "compile")


@pytest.fixture(scope="session")
def measurements(request, device, bandwidth):
    measured = Measurements(device, bandwidth)
    yield measured
    path = request.config.getoption("--results")
    if path is not None and measured.rows:
        rates = {str(dtype): rate for dtype, rate in measured.rates.items()}
        figures = {"copy_bytes_per_second": bandwidth, "matmul_flops_per_second": rates}
        result = {"machine": machine.describe(device) | figures, "rows": measured.rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


@pytest.fixture
def report(measurements, benchmark):
    """Hands a contender's seconds to pytest-benchmark, with its ratios, memory and floor."""

    def replay(case: Case, dtype: torch.dtype, name: str, names: tuple[str, ...]) -> None:
        measured, traffic = measurements.of(case, dtype, names)
        own = measured[name]
        info = {
            "contender": name,
            "peak_bytes": own.peak_bytes,
            "saved_bytes": own.saved_bytes,
            "floor_seconds": traffic.seconds,
            "of_floor": traffic.seconds / own.median,
        }
        for other in names:
            if other in BASELINES and name not in BASELINES:
                middle, low, high = ratios(measured[other], own)
                info[f"speedup over {other}"] = {"median": middle, "quartiles": [low, high]}
        clock, seconds = benchmark._timer, iter(own.seconds)

        def step() -> None:
            clock.now += next(seconds)

        benchmark.group = f"{case.group} {case.name} {case.passes} {str(dtype)[6:]}"
        benchmark.extra_info.update(info)
        benchmark.pedantic(step, rounds=len(own.seconds), iterations=1)
        row = {"case": case.name, "group": case.group, "passes": case.passes}
        row |= {"dtype": str(dtype), "shape": case.shape, "seconds": own.seconds}
        measurements.rows.append(row | info)

    return replay
