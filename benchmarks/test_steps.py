"""Operators, units, whole training steps and attack steps, each contender beside the others.

    pytest benchmarks/ --benchmark-only [--networks] [--full] [--results FILE.json]

A group is a case; its rows are PyTorch's own layers in channels_last ("eager"), in NCHW and under
torch.compile (deep networks unit by unit, "compile units"), and our backends; on a GPU also as
CUDA graphs; see contenders.py. All were timed in alternating rounds; the table replays those times.
The JSON holds the ratios, peak and saved memory, and the machine's floor.
"""

import pytest
import torch
from cases import all_cases
from contenders import EAGER, contenders, our_backends
from machine import multiplies_bfloat16
from measure import Clock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full, networks = map(metafunc.config.getoption, ("--full", "--networks"))
    parameters = []
    for case in all_cases(DEVICE):
        everybody = contenders(case, DEVICE, our_backends(DEVICE), full)
        for dtype in torch.float32, torch.bfloat16:
            # without instructions for bfloat16 PyTorch takes ten times as long in it
            slow = dtype == torch.bfloat16 and not multiplies_bfloat16(DEVICE)
            beside = everybody
            if slow and not full:
                beside = tuple(one for one in everybody if one.ours or one == EAGER)
            network = case.group in ("step", "attack", "host")
            quick = case.quick and not (slow and case.group != "operator")
            wanted = full or quick or (networks and (case.quick or (network and not slow)))
            for contender in beside if wanted else ():
                name = f"{case.group}-{case.name}-{case.passes}-{dtype}-{contender.name}"
                parameters.append(pytest.param(case, dtype, contender, beside, id=name))
    metafunc.parametrize(("case", "dtype", "contender", "everybody"), parameters)


@pytest.mark.benchmark(timer=Clock(), warmup=False)
def test_step(case, dtype, contender, everybody, report):
    report(case, dtype, contender, everybody)
