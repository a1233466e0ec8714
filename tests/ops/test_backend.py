"""The planner: which backend runs what, and what is said where one cannot."""

import os
import subprocess
import sys

import pytest
import torch
from numerics import eager, fused, make_case, run
from torch._subclasses import FakeTensorMode

import fused_preact
from fused_preact import ops, reference
from fused_preact.functional import Conv

X3 = [(8, (3, 3), (1, 1), (1, 1, 1, 1))]


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch):
    """Warnings come once per process; here, once per test."""
    monkeypatch.setattr(ops, "_warned", set())


@pytest.fixture
def without_cuda(monkeypatch):
    """A machine where the cuda backend cannot run, whatever this one has."""
    status = ops.backend_status() | {"cuda": "no GPU here"}
    monkeypatch.setattr(ops, "backend_status", lambda: status)


def test_status_lists_all_backends():
    """Every name has a status; what always runs has no reason against it."""
    status = ops.backend_status()
    assert tuple(status) == ops.BACKENDS
    assert all(status[name] is None for name in ("auto", "composed", "eager", "reference", "cpu"))


def test_unknown_backend(without_cuda):
    """The error lists what there is, and for what cannot run, why."""
    with pytest.raises(ValueError) as error, fused_preact.backend("opencl"):
        pass
    message = str(error.value)
    assert message.startswith(
        "backend: 'opencl' is unknown; there are: auto, composed, eager, reference, cpu"
    )
    assert "cuda (no GPU here)" in message


def test_unavailable_backend(without_cuda):
    """Likewise for one that is known but cannot run here."""
    before = ops.current_backend()
    with pytest.raises(ValueError, match=r"^backend: 'cuda' is not available; .*\(no GPU here\)"):
        fused_preact.backend("cuda").__enter__()
    assert ops.current_backend() == before


def _in_subprocess(name):
    code = "import fused_preact.ops as ops; print(ops.current_backend())"
    environment = os.environ | {"FUSED_PREACT_BACKEND": name}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name,current", [("reference", "reference"), ("cpu", "cpu"), ("", "auto")])
def test_environment_variable(name, current):
    """FUSED_PREACT_BACKEND chooses for the process; empty is as good as unset."""
    result = _in_subprocess(name)
    assert result.stdout.strip() == current, result.stderr


def test_environment_variable_with_an_unknown_name():
    """Importing the package fails with an error that names the variable."""
    result = _in_subprocess("opencl")
    assert result.returncode != 0
    assert "ValueError: FUSED_PREACT_BACKEND: 'opencl' is unknown; there are: auto" in result.stderr


def test_backend_is_restored():
    """Statements nest, and an exception inside leaves none of them behind."""
    before = ops.current_backend()
    with fused_preact.backend("reference"):
        with pytest.raises(KeyError), fused_preact.backend("cpu"):
            assert ops.current_backend() == "cpu"
            raise KeyError
        assert ops.current_backend() == "reference"
    assert ops.current_backend() == before


@pytest.mark.parametrize("name", ["auto", "cpu", "reference"])
def test_plan(name):
    """On CPU tensors "auto" is "cpu"; reference is itself."""
    input = torch.zeros(1, 1, 1, 1)
    with fused_preact.backend(name):
        planned = ops.plan(input)
    assert planned is (reference if name == "reference" else torch.ops.fused_preact)


def test_plan_is_traceable(compiled):
    """torch.compile takes what the planner asks about GPUs and Triton as constants."""
    statuses = ops.backend_status()

    def seen(x):
        return x + (ops.backend_status() == statuses)

    assert compiled(seen)(torch.zeros(1)) == 1


FALLBACKS = {
    "torch.float16 on cpu": (torch.float16, {}),
    "dilated convolutions": (torch.float32, {"dilation": (2, 2)}),
    "grouped convolutions": (torch.float32, {"groups": 2}),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_fallback_warns_once(reason):
    """What the kernels cannot do runs on reference: its bits, and one warning, not two."""
    dtype, options = FALLBACKS[reason]
    case = make_case(dtype, convs=X3)
    (conv,) = case.convs
    weight = conv.weight[:, :: options.get("groups", 1)].contiguous()
    case.convs = [conv._replace(weight=weight, **options)]
    case.grad_output = torch.randn(eager(case.to(torch.float64)).shape)
    warning = f"'cpu' does not run {reason}; using"
    with fused_preact.backend("cpu"), pytest.warns(UserWarning, match=warning) as warned:
        first, second = run(case, dtype, fused), run(case, dtype, fused)
    assert len(warned) == 1
    with fused_preact.backend("reference"):
        expected = run(case, dtype, fused)
    for name, value in expected.items():
        assert torch.equal(first[name], value) and torch.equal(second[name], value), name


def test_cuda_refuses_large_kernels(monkeypatch):
    """What does not fit into shared memory goes to reference, with one warning; "auto" composes."""
    monkeypatch.setattr(ops, "_cuda_status", lambda: None)
    with FakeTensorMode():
        input = torch.empty(1, 3, 32, 32, device="cuda")
        small, large = (Conv(torch.empty(3, 3, 7, side, device="cuda")) for side in (7, 8))
    monkeypatch.setattr(ops, "_forced", "cuda")
    assert ops.plan(input, [small]) is torch.ops.fused_preact
    with pytest.warns(UserWarning, match="'cuda' does not run kernels of more than 49 values"):
        assert ops.plan(input, [small, large]) is reference
    monkeypatch.setattr(ops, "_forced", "auto")
    operators = ops.plan(input, [small, large])
    assert operators is torch.ops.fused_preact
    assert ops.plan_convs(operators, [small, large], input) == [False, True]


@pytest.mark.parametrize(
    ("channels", "side", "composed"),
    [(64, 16, False), (64, 32, True), (512, 8, True)],
    ids=["R-164, last stage", "PreActResNet-18, first stage", "PreActResNet-18, last stage"],
)
def test_cuda_composes_what_is_much_work(channels, side, composed):
    """Images of 32x32 at batch 128; side is that of the input of a stage."""
    with FakeTensorMode():
        conv = Conv(torch.empty(channels, channels, 3, 3, device="cuda"))
        input = torch.empty(128, channels, side, side, device="cuda")
    assert ops.plan_convs(torch.ops.fused_preact, [conv], input) == [composed]


def test_layout_warns_once():
    """An NCHW input is converted, with one warning."""
    case = make_case(torch.float32, convs=X3)
    case.input = case.input.contiguous()
    with pytest.warns(UserWarning, match="channels_last") as warned:
        run(case, torch.float32, fused)
        run(case, torch.float32, fused)
    assert len(warned) == 1


@pytest.mark.parametrize("forward,backward", [("cpu", "reference"), ("reference", "cpu")])
def test_backward_stays_with_forwards_backend(forward, backward, called):
    """A backward pass outside the with statement runs on the backend inside it, bit for bit."""
    case = make_case(torch.float32, convs=X3)
    with fused_preact.backend(forward):
        expected = run(case, torch.float32, fused)
        leaves = case.to(torch.float32)
        output = fused(leaves)
    plans = len(called)
    with fused_preact.backend(backward):
        output.backward(leaves.grad_output)
    assert called[plans:] == ["preact_conv_backward", "residual_grad"]
    for name, leaf in leaves.leaves().items():
        assert torch.equal(leaf.grad, expected[f"grad {name}"]), name


def test_backend_holds_in_other_threads():
    """DataParallel runs replicas in threads: they see the same backend."""
    import threading

    seen = []
    with fused_preact.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(ops.current_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"]
