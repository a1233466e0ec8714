"""PreActStage: units that run together do what each of them does alone."""

import copy

import pytest
import torch
from eager_models import WIRING, EagerBlock, EagerBottleneck, assert_same, randomise
from torch import nn

from fused_preact import PreActBlock, PreActBottleneck, functional
from fused_preact.blocks import PreActStage

IMAGES = 3, 8, 6, 5


def make(count, block=PreActBottleneck, eager_block=EagerBottleneck, **options):
    """A stage whose first unit halves the image, the same in plain layers, and an input."""
    shapes = [(8, 4, 2)] + [(4 * block.expansion, 4)] * (count - 1)
    eager = nn.Sequential(*(randomise(eager_block(*shape, **options)) for shape in shapes))
    fused = PreActStage(*(block(*shape, **options) for shape in shapes))
    fused.load_state_dict(eager.state_dict())
    images = torch.randn(IMAGES, dtype=WIRING).contiguous(memory_format=torch.channels_last)
    return fused.to(WIRING), eager.to(WIRING), images


@pytest.fixture
def calls(monkeypatch):
    """How many units ran together, call by call."""
    counts, run = [], functional._run_units

    def counted(input, units, *args):
        counts.append(len(units))
        return run(input, units, *args)

    monkeypatch.setattr(functional, "_run_units", counted)
    return counts


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("unit", ["basic", "bottleneck"])
def test_stage_equals_plain_layers(backend_name, unit, training, activation):
    """Output, gradients and running statistics of more units than one call takes."""
    blocks = {
        "basic": (PreActBlock, EagerBlock),
        "bottleneck": (PreActBottleneck, EagerBottleneck),
    }
    fused, eager, images = make(10, *blocks[unit], activation=activation)
    assert_same(fused.train(training), eager.train(training), images)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_unit_that_comes_twice(backend_name, momentum, calls):
    """Counts both, one after the other: without a momentum the second weighs less."""
    fused, eager, images = make(3)
    for model in (fused, eager):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
    repeated = PreActStage(*fused, fused[2], fused[1])
    assert_same(repeated, nn.Sequential(*eager, eager[2], eager[1]), images)
    assert calls == [3, 2]


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_bits_of_units_called_one_by_one(mode, calls):
    """On the CPU kernels; mixed: some BatchNorms are frozen."""
    together = make(11)[0].float()
    if mode != "train":
        for i, module in enumerate(together.modules()):
            module.train(mode == "mixed" and i % 3 > 0)
    alone = copy.deepcopy(together)
    results = []
    for model in (together, alone):
        torch.manual_seed(0)
        x = torch.randn(IMAGES).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = x
        for unit in [model] if model is together else model:
            y = unit(y)
        y.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([y, x.grad, *gradients, *model.buffers()])
    assert calls == [8, 3] + [1] * 11
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_backward_twice(backend_name, training):
    """The same bits, and the gradient that came in, and what was saved, are as they were."""
    stage = make(4)[0].float().train(training)
    x = torch.randn(IMAGES).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = stage(x)
    dy = torch.randn_like(y)
    given = [x.detach().clone(), y.detach().clone(), dy.clone()]
    leaves = [x, *stage.parameters()]
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    for one, other in zip([*first, *given], [*second, x, y, dy], strict=True):
        assert torch.equal(one, other)


def _replaced(model):
    model[3] = nn.Sequential(model[3], nn.Tanh())


def _hook(model):
    model[3].register_forward_hook(lambda module, args, output: output * 2)


def _backward_hook(model):
    model[3].register_full_backward_hook(lambda module, grads, _: (grads[0] * 0.5,))


def _pre_hook(model):
    model[3].register_forward_pre_hook(lambda module, args: args[0].sub(1))


def _replaced_child(model):
    model[3].bn2 = nn.Identity()


def _subclass(model):
    original = model[3]

    class Doubled(type(original)):
        def forward(self, input):
            return 2 * super().forward(input)

    original.__class__ = Doubled


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_replaced, [3, 1, 2]),
        (_hook, [3, 1, 2]),
        (_pre_hook, [3, 1, 2]),
        (_backward_hook, [3, 1, 2]),
        (_subclass, [3, 1, 2]),
        (_replaced_child, [3, 2]),
    ],
)
def test_what_keeps_a_unit_apart(change, expected, calls):
    """It is called by itself, its neighbours together, and all see what it did."""
    fused, eager, images = make(6)
    for model in (fused, eager):
        change(model)
    assert_same(fused, eager, images)
    assert calls == expected


def test_units_of_another_activation_run_apart(calls):
    fused, eager, images = make(4)
    fused[2].activation, eager[2].act = "silu", torch.nn.functional.silu
    assert_same(fused, eager, images)
    assert calls == [2, 1, 1]


def test_large_weights_share_no_call(calls, monkeypatch):
    """As many as fit, at least one; the first has fewer values than the others."""
    fused, eager, images = make(4)
    of_units = [sum(conv.weight.numel() for conv in unit._read().convs) for unit in fused]
    for most, expected in (2 * of_units[1], [2, 2]), (1, [1] * 4), (sum(of_units), [4]):
        calls.clear()
        monkeypatch.setattr(functional, "WEIGHTS_PER_CALL", most)
        assert_same(fused, eager, images)
        assert calls == expected


def test_unit_that_reads_its_input_raw_starts_a_call(calls):
    fused, eager, images = make(4)
    fused[2] = PreActBottleneck(16, 4, preact="no_preact").to(WIRING)
    eager[2] = randomise(EagerBottleneck(16, 4, preact="no_preact")).to(WIRING)
    fused[2].load_state_dict(eager[2].state_dict())
    assert_same(fused, eager, images)
    assert calls == [2, 2]


def test_error_names_the_unit():
    stage = PreActStage(PreActBlock(8, 8), PreActBlock(16, 16))
    with pytest.raises(
        ValueError, match=r"^units\[1\]\.bns\[0\]\.bn_weight: expected shape \(8,\)"
    ):
        stage(torch.randn(2, 8, 4, 4))


def test_empty_stage():
    x = torch.randn(IMAGES)
    assert PreActStage()(x) is x
