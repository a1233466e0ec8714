"""Options, the machine's figures, and the measurements that the benchmarks report."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import pytest
import torch
from cases import Case
from check import AnyCase, check, comparable, errors
from contenders import EAGER, REFERENCE, Contender
from graphs import launches
from malloc import keep_freed_memory
from measure import Measured, Traffic, alternate, ratios
from memory import Peaks, saved_bytes

from fused_preact import _C

# A rounding may flip a ReLU of a unit, which changes its gradients by far more than roundings do;
# one input in several has such an activation. What is wrong is wrong for each of these seeds.
SEEDS = 3
ROUNDS_SECONDS = {
    "operator": 1.0,
    "unit": 4.0,
    "step": 8.0,
    "attack": 8.0,
    "host": 4.0,
    "depth": 8.0,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused_preact")
    group.addoption("--networks", action="store_true", help="all networks too, beside eager")
    group.addoption("--full", action="store_true", help="all shapes, dtypes and contenders")
    group.addoption(
        "--warpgroups",
        action="store_true",
        help="on compute capability 9.0, convolutions of our CUDA kernels multiply with wgmma",
    )
    group.addoption(
        "--results",
        type=Path,
        help="a JSON file to write the results to, or a folder: then MACHINE/DEVICE.json in it, "
        "with --full MACHINE/DEVICE-full.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # the better eager
    if config.getoption("--warpgroups"):
        if not hasattr(_C, "use_warpgroups"):
            raise pytest.UsageError("--warpgroups: no kernels for 9.0a are built here")
        _C.use_warpgroups(True)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Measurements:
    """What has been measured so far, each case once with all its contenders side by side."""

    def __init__(self, device: torch.device, peaks: Peaks) -> None:
        self.device, self.peaks = device, peaks
        self.bandwidth = machine.copy_bandwidth(device)
        self.rates = {t: machine.matmul_rate(device, t) for t in (torch.float32, torch.bfloat16)}
        self.rows: list[dict[str, Any]] = []
        self._cases: dict[Any, tuple[dict[str, Measured | Exception], Traffic]] = {}

    def of(
        self, case: AnyCase, dtype: torch.dtype, contenders: tuple[Contender, ...]
    ) -> tuple[dict[str, Measured | Exception], Traffic]:
        """Each contender's measurements, or why it has none; and the floor of the case."""
        key = case, dtype
        if key not in self._cases:
            self._cases[key] = self._measure(case, dtype, contenders)
            torch._dynamo.reset()  # nobody compiles, or keeps, what an earlier case compiled
            gc.collect()
            torch.cuda.empty_cache()
        return self._cases[key]

    def _measure(
        self, case: AnyCase, dtype: torch.dtype, contenders: tuple[Contender, ...]
    ) -> tuple[dict[str, Measured | Exception], Traffic]:
        definition = EAGER if isinstance(case, Case) else REFERENCE
        expected = self._expect(case, dtype, definition)
        steps, failed = {}, {}
        for contender in contenders:
            try:  # one that fails does not keep the others from being timed
                step = case.step(contender, dtype, self.device)
                self._check(case, contender, dtype, step, expected)
            except Exception as error:
                failed[contender.name] = error.with_traceback(None)  # which would hold tensors
            else:
                steps[contender.name] = step
        ours = next(c for c in contenders if c.ours and not c.captured)
        if ours.name in failed:  # and the floor is that of ours
            return dict.fromkeys((c.name for c in contenders), failed[ours.name]), Traffic(1, 1)
        with Traffic(self.bandwidth, self.rates[dtype]) as traffic:
            steps[ours.name](0)
        measured = alternate(steps, self.device, ROUNDS_SECONDS[case.group])
        for contender in contenders:
            if contender.name in failed:
                continue
            own, step = measured[contender.name], steps[contender.name]
            if not contender.graphs:
                own.peak_bytes = self.peaks.of(case, contender, dtype, step)
                own.saved_bytes = saved_bytes(step)
            if self.device.type == "cuda":
                own.launches = launches(step)
        return measured | failed, traffic

    def _expect(
        self, case: AnyCase, dtype: torch.dtype, definition: Contender
    ) -> tuple[list[torch.Tensor | None], list[float | None]]:
        """The truth, and how far from it the definition is in dtype."""
        true = self._truth(case, dtype, definition)
        step = case.step(definition, dtype, self.device)
        return true, errors(comparable(case, step(0)), true)

    def _check(
        self, case: AnyCase, contender: Contender, dtype: torch.dtype, step: Any, expected: Any
    ) -> None:
        true, baseline = expected
        try:
            check(case, contender, errors(comparable(case, step(0)), true), baseline, dtype)
        except AssertionError:
            if case.group != "unit" or case.seed + 1 == SEEDS:
                raise
            case = replace(case, seed=case.seed + 1)
            step = case.step(contender, dtype, self.device)
            self._check(case, contender, dtype, step, self._expect(case, dtype, EAGER))

    def _truth(
        self, case: AnyCase, dtype: torch.dtype, definition: Contender
    ) -> list[torch.Tensor | None]:
        """In float64; beside bfloat16 float32 is truth enough for a network, and fits."""
        network = isinstance(case, Case) and case.group != "unit"
        exact = torch.float32 if network and dtype == torch.bfloat16 else torch.float64
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return comparable(case, case.step(definition, exact, self.device)(0))


@pytest.fixture(scope="session")
def measurements(request, device):
    with Peaks(device) as peaks:
        measured = Measurements(device, peaks)
        yield measured
    path = request.config.getoption("--results")
    if path is None or not measured.rows:
        return
    if path.suffix != ".json":
        full = "-full" if request.config.getoption("--full") else ""
        path = path / machine.slug(device) / f"{device.type}{full}.json"
    rates = {str(dtype): rate for dtype, rate in measured.rates.items()}
    figures = {"copy_bytes_per_second": measured.bandwidth, "matmul_flops_per_second": rates}
    if request.config.getoption("--warpgroups"):
        figures["warpgroups"] = True
    result = {"machine": machine.describe(device) | figures, "rows": measured.rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nresults in {path}")


@pytest.fixture
def report(measurements, benchmark):
    """Hands a contender's seconds to pytest-benchmark, with its ratios, memory and floor."""

    def replay(
        case: AnyCase, dtype: torch.dtype, contender: Contender, contenders: tuple[Contender, ...]
    ) -> None:
        measured, traffic = measurements.of(case, dtype, contenders)
        own = measured[contender.name]
        if isinstance(own, torch.cuda.OutOfMemoryError):
            pytest.skip(f"{contender.name} does not fit into the GPU's memory beside the others")
        if isinstance(own, Exception):
            if contender.ours or contender == contenders[0]:
                raise own
            pytest.skip(str(own))  # a peer that fails is no defect of ours
        info: dict[str, Any] = {
            "contender": contender.name,
            "peak_bytes": own.peak_bytes,
            "saved_bytes": own.saved_bytes,
            "launches": own.launches,
            "bytes": traffic.bytes,
            "flops": traffic.flops,
            "floor_seconds": traffic.seconds,
            "of_floor": traffic.seconds / own.median,
        }
        for other in contenders:
            theirs = measured[other.name]
            if contender.ours and not other.ours and isinstance(theirs, Measured):
                middle, low, high = ratios(theirs, own)
                info[f"speedup over {other.name}"] = {"median": middle, "quartiles": [low, high]}
        if contender.note:
            info["contender is"] = contender.note
        if not isinstance(case, Case):
            info["eager is"] = case.counterpart
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
