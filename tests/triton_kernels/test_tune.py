"""fused-preact tune without a GPU: enumeration, choice and the table, with a clock made up.

The whole command, with the kernels themselves: interpreted/test_tune.py.
"""

import json

import pytest
import torch

from fused_preact import backend, cli, tune
from fused_preact.resnet import create_model

pytest.importorskip("triton", reason="triton is not installed (a CPU build of torch)")

import triton
from compiled import TARGETS, AbsentGpu

from fused_preact.triton import config


@pytest.fixture(autouse=True)
def own_table(monkeypatch, tmp_path):
    """An empty user's table."""
    path = tmp_path / "folder" / "table.json"
    monkeypatch.setenv("FUSED_PREACT_TUNED", str(path))
    config.forget()
    yield path
    config.forget()


def test_no_gpu(capsys, monkeypatch):
    """One line and exit code 2."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "fused-preact tune: needs a GPU to measure on, and there is none"
    ]


def test_fastest_right_candidate_is_chosen():
    """Not what is wrong, however fast, nor what does not run."""
    options = [{"BLOCK_M": m} for m in (16, 32, 64, 128, 256)]
    clock = {16: 3.0, 32: 1.0, 64: 2.0, 128: 0.5, 256: 0.1}

    def function(x):
        m = config.best("preact_conv_forward", "sm_90", torch.float32)["BLOCK_M"]
        timed.append(m)
        if m == 256:
            raise RuntimeError("out of shared memory")
        return x + 1 if m == 128 else x

    timed = []
    x = torch.ones(3)
    with pytest.warns(UserWarning, match="wrong with {'BLOCK_M': 128}"):
        found = tune.choose(
            "preact_conv_forward",
            function,
            (x,),
            x,
            lambda call: (call(), clock[timed[-1]])[1],
            options,
        )
    assert found == ({"BLOCK_M": 32}, 1.0)
    with pytest.warns(UserWarning, match="^preact_conv_forward: no candidate works; it keeps"):
        nothing = tune.choose("preact_conv_forward", function, (x,), x, lambda _: 1.0, options[4:])
    assert nothing is None


def test_candidates():
    """All different, with the names that the kernels read."""
    for operator in tune.OPERATORS:
        found = tune.candidates(operator)
        assert len({json.dumps(options) for options in found}) == len(found) > 20
        default = config.best(operator, "default", torch.bfloat16)
        assert found[0].keys() == default.keys()


def test_table_is_used(own_table):
    """What tune writes comes before the package's entry, for its class and architecture alone."""
    best = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    table = {"preact_conv_forward": {"sm_90": {"bfloat16, a class": best}}}
    tune.write(own_table, table)
    config.forget()
    assert config.read(own_table) == table
    found = [
        config.best("preact_conv_forward", architecture, torch.bfloat16, shape)
        for architecture, shape in (("sm_90", "a class"), ("sm_80", "a class"), ("sm_90", "b"))
    ]
    assert found[0] == best and best not in found[1:]
    assert [file.name for file in own_table.parent.iterdir()] == [own_table.name]


def test_failed_write_leaves_the_old_table(own_table, monkeypatch):
    """Neither half a table nor a temporary file."""
    tune.write(own_table, {"a": {}})
    with pytest.raises(TypeError):
        tune.write(own_table, {"b": object()})
    assert json.loads(own_table.read_text()) == {"a": {}}
    assert [file.name for file in own_table.parent.iterdir()] == [own_table.name]


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"b": {"c": {"d": "x"}}}}'])
def test_spoilt_table(text, own_table, monkeypatch, capsys):
    """Kernels run with the package's table and say so; tune refuses, in one line."""
    own_table.parent.mkdir()
    own_table.write_text(text)
    with pytest.warns(UserWarning, match="not a table of tile sizes"):
        assert config.best("bn_stats", "sm_90", torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main(["tune"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """One line and exit code 2, before anything is measured."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSED_PREACT_TUNED", str(tmp_path / "file" / "table.json"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main(["tune"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "table" in line and str(tmp_path / "file") in line


@pytest.mark.parametrize("target", TARGETS)
def test_architecture(target, monkeypatch):
    """As the table names it: sm_90, gfx942."""
    driver = AbsentGpu(target)
    monkeypatch.setattr(torch.cuda, "current_device", driver.get_current_device)
    triton.runtime.driver.set_active(driver)
    config._architecture.cache_clear()
    assert config.architecture() == target
    config._architecture.cache_clear()


def test_unknown_architecture():
    """Has the package's defaults."""
    for operator in tune.OPERATORS:
        default = config.best(operator, "default", torch.bfloat16, "a class")
        assert config.best(operator, "sm_75", torch.bfloat16, "a class") == default


@pytest.mark.parametrize("name", tune.NETWORKS)
def test_networks_have_these_layers(name):
    """Each is a convolution of the network itself, on images of its size; shapes only."""
    size, stem = (224, "imagenet") if name == "preact_resnet200" else (32, "cifar")
    with torch.device("meta"):
        model, images = create_model(name, 10, stem), torch.empty(2, 3, size, size)
    found = set()

    def see(conv, inputs, _):
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        found.add((conv.in_channels, inputs[0].shape[2], conv.out_channels, kernel, stride))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(see)
    with torch.no_grad(), backend("eager"):
        model(images)
    assert {layer[1:] for layer in tune.NETWORKS[name]} <= found


def test_arguments_fit_together():
    """Of each layer; shapes only, on no device."""
    for layer in {layer for layers in tune.NETWORKS.values() for layer in layers}:
        calls = tune._calls(layer._replace(batch=1), torch.float32, "cpu")
        assert calls["preact_conv_dgrad"][0].shape[1] == layer.K
        assert set(calls) == {"geometry", *tune.OPERATORS}
