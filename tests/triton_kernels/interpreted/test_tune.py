"""fused-preact tune from its command line to the table that the kernels read.

The kernels run in the interpreter, with a clock made up: of two candidates the second is faster.
"""

import itertools

import pytest
import torch

from fused_preact import cli, tune
from fused_preact.triton import config

POINTWISE = [{"TILE": tile, "BLOCK_C": 8} for tile in (64, 32)]
CONVOLUTION = [{"BLOCK_M": block, "BLOCK_N": 16, "BLOCK_K": 16} for block in (32, 16)]
WGRAD = [{"BLOCK_P": 16, "BLOCK_K": 16, "BLOCK_C": 16, "PROGRAMS": many} for many in (2, 64)]


@pytest.fixture(autouse=True)
def own_table(monkeypatch, tmp_path):
    """An empty user's table."""
    path = tmp_path / "table.json"
    monkeypatch.setenv("FUSED_PREACT_TUNED", str(path))
    config.forget()
    yield path
    config.forget()


def _candidates(operator):
    if operator == "preact_conv_wgrad":
        return WGRAD
    return CONVOLUTION if operator in tune.CONVOLUTIONS else POINTWISE


def test_command(own_table, monkeypatch, capsys):
    """All operators run with both candidates, and from then on with the faster."""
    layer = tune.Layer(batch=2, C=5, size=4, K=6, kernel=3, stride=2)
    on_gpu, clock = tune.tune, itertools.cycle((2.0, 1.0))

    def on_cpu(layer, dtype, device, timer):
        return on_gpu(layer, dtype, "cpu", lambda call: (call(), next(clock))[1])

    monkeypatch.setattr(tune, "tune", on_cpu)
    monkeypatch.setattr(tune, "NETWORKS", {"small": (layer,)})
    monkeypatch.setattr(tune, "candidates", _candidates)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main(["tune", "--network", "small", "--precision", "fp32", "bf16"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(tune.OPERATORS) + 1
    for operator in tune.OPERATORS:
        shape = "3x3 stride 2, 5 to 6, 2^3 pixels"
        if operator in tune.POINTWISE:
            shape = "5 channels, 2^5 pixels"
        for dtype in torch.float32, torch.bfloat16:
            found = config.best(operator, "interpreter", dtype, shape)
            assert found == _candidates(operator)[1], operator
            assert config.best(operator, "interpreter", dtype, "another class") != found
