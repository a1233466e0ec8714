"""Units, whole training steps and attack steps, each contender beside the others.

    pytest benchmarks/ --benchmark-only [--full] [--results FILE.json]

A group is a case; its rows are PyTorch's own layers in channels_last ("eager"), for units also in
NCHW and under torch.compile, and our backends. All were timed in alternating rounds; the table
replays those times. The JSON holds the ratios, peak and saved memory, and the machine's floor.
"""

import pytest
import torch
from cases import CASES, Case
from measure import Clock

OURS = ("triton",) if torch.cuda.is_available() else ("cpu",)


def _names(case: Case) -> tuple[str, ...]:
    # Units only: compiling a deep network takes minutes, and our models turn to channels_last.
    others = ("eager NCHW", "compile") if case.group == "unit" else ()
    return ("eager", *others, *OURS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    parameters = [
        pytest.param(case, dtype, name, id=f"{case.group}-{case.name}-{case.passes}-{dtype}-{name}")
        for case in CASES
        for dtype in (torch.float32, torch.bfloat16)
        if full or (case.quick and (dtype == torch.float32 or case.group == "unit"))
        for name in _names(case)
    ]
    metafunc.parametrize(("case", "dtype", "name"), parameters)


@pytest.mark.benchmark(timer=Clock(), warmup=False)
def test_step(case, dtype, name, report):
    report(case, dtype, name, _names(case))
