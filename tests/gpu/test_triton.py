"""The Triton kernels on a GPU: the tolerance rule, reruns, CUDA graphs, tuning."""

import pytest
import torch
from gpu import test_cuda
from numerics import assert_rule, fused, make_case, run

import fused_preact
from fused_preact import tune

block = test_cuda.block
test_graph_replays_a_training_step = test_cuda.test_graph_replays_a_training_step
test_nothing_synchronises = test_cuda.test_nothing_synchronises


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """These kernels, with float32 multiplied exactly, as the rule's floor has it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with fused_preact.backend("triton"):
        yield


@pytest.mark.parametrize("dtype", test_cuda.DTYPES, ids=str)
@pytest.mark.parametrize("unit", test_cuda.UNITS)
def test_units_keep_the_tolerance_rule(unit, dtype):
    assert_rule(test_cuda.on_gpu(make_case(dtype, **test_cuda.UNITS[unit])), dtype)


@pytest.mark.parametrize("dtype", test_cuda.DTYPES, ids=str)
@pytest.mark.parametrize("unit", test_cuda.UNITS)
def test_reruns(unit, dtype):
    """Two runs have the same bits: partial results are merged in a fixed order."""
    case = test_cuda.on_gpu(make_case(dtype, **test_cuda.UNITS[unit]))
    first, second = (run(case, dtype, fused) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tune(monkeypatch):
    """Of its candidates, here the first ones, one at least is right for every operator."""
    from triton.testing import do_bench

    candidates = tune.candidates
    monkeypatch.setattr(tune, "candidates", lambda operator: candidates(operator)[:3])
    layer = tune.Layer(batch=8, C=64, size=16, K=64, kernel=3, stride=1)
    found = list(tune.tune(layer, torch.bfloat16, "cuda", do_bench))
    assert [entry[0] for entry in found] == list(tune.OPERATORS)
    assert all(milliseconds > 0 for *_, milliseconds in found)
