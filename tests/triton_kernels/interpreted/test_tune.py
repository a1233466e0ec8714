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


@pytest.fixture
def tune_with(monkeypatch):
    """Runs the command on two small layers in float32 and bfloat16, timed by a clock."""
    layers = tune.Layer(2, 5, 4, 6, kernel=3, stride=2), tune.Layer(1, 7, 2, 6, kernel=1, stride=1)
    on_gpu = tune.tune
    monkeypatch.setattr(tune, "NETWORKS", {"small": layers})
    monkeypatch.setattr(tune, "candidates", _candidates)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def run(clock):
        def on_cpu(layer, dtype, device, timer):
            return on_gpu(layer, dtype, "cpu", lambda call: (call(), next(clock))[1])

        monkeypatch.setattr(tune, "tune", on_cpu)
        return cli.main(["tune", "--network", "small", "--precision", "fp32", "bf16"])

    return run


def test_command(tune_with, own_table, capsys):
    """All operators run with both candidates, and from then on with the faster."""
    assert tune_with(itertools.cycle((2.0, 1.0))) == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == f"interpreter: 4 layers; what is fastest goes to {own_table}"
    assert last == f"{own_table}: what was measured is used from now on"
    assert len(lines) == 4 * (1 + len(tune.OPERATORS))
    assert lines[1].split()[0] == "preact_conv_forward" and "1.000 ms" in lines[1]
    for operator in tune.OPERATORS:
        shape = "3x3 stride 2, 5 to 6, 2^3 pixels"
        if operator in tune.POINTWISE:
            shape = "5 channels, 2^5 pixels"
        for dtype in torch.float32, torch.bfloat16:
            found = config.best(operator, "interpreter", dtype, shape)
            assert found == _candidates(operator)[1], operator
            assert config.best(operator, "interpreter", dtype, "another class") != found


@pytest.mark.parametrize("finished", [0, 3])
def test_stopped(finished, tune_with, own_table, capsys):
    """Ctrl-C leaves the operators that were finished, used from then on, and nothing else."""

    def clock():
        yield from (2.0, 1.0) * finished
        yield 2.0
        raise KeyboardInterrupt

    assert tune_with(clock()) == 130
    assert capsys.readouterr().err == f"stopped; {own_table} keeps what was measured\n"
    table = config.read(own_table)
    assert list(table) == sorted(tune.OPERATORS[:finished])
    for operator in table:
        shape = "3x3 stride 2, 5 to 6, 2^3 pixels"
        found = config.best(operator, "interpreter", torch.float32, shape)
        assert found == _candidates(operator)[1]
    assert [file.name for file in own_table.parent.iterdir()] == [own_table.name]


def test_layer_too_large(tune_with, own_table, monkeypatch, capsys):
    """Is passed over, in one line; the others are measured."""
    calls = tune._calls

    def some(layer, dtype, device):
        if layer.C == 5:
            raise torch.OutOfMemoryError
        return calls(layer, dtype, device)

    monkeypatch.setattr(tune, "_calls", some)
    assert tune_with(itertools.cycle((2.0, 1.0))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("  passed over: too large for this GPU's memory") == 2
    assert "5 channels" not in own_table.read_text()
    assert len(config.read(own_table)["bn_stats"]["interpreter"]) == 2
