"""PreActBlock and PreActBottleneck against the same unit in plain PyTorch layers.

Wiring is held in float64, where only roundings of 1e-16 separate right results (WIRING; float32 on
the Triton kernels); precision is held in float32 by the tolerance rule.
"""

import collections
import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from eager_models import (
    CLOSE,
    WIRING,
    EagerBlock,
    EagerBottleneck,
    assert_rule,
    assert_same,
    clear_images,
    randomise,
)
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint

import fused_preact
from fused_preact import PreActBlock, PreActBottleneck, functional, ops
from fused_preact.blocks import PreActUnit

UNITS = {"basic": (PreActBlock, EagerBlock), "bottleneck": (PreActBottleneck, EagerBottleneck)}
KINDS = ("normal", "both_preact", "no_preact")


def make(unit="bottleneck", in_planes=8, planes=None, stride=1, dtype=WIRING, **options):
    """A unit, the same unit eager, and an input; with an identity shortcut where that can be."""
    fused_class, eager_class = UNITS[unit]
    if planes is None:
        planes = in_planes // fused_class.expansion
    eager = randomise(eager_class(in_planes, planes, stride, **options)).to(dtype)
    fused = fused_class(in_planes, planes, stride, **options).to(dtype)
    fused.load_state_dict(eager.state_dict())
    images = torch.randn(4, in_planes, 6, 7, dtype=dtype)
    return fused, eager, images.contiguous(memory_format=torch.channels_last)


@pytest.fixture
def runs_fused(monkeypatch):
    """Counts the units that ran as one function instead of child by child."""
    ran = []
    original = functional.preact_units

    def counted(input, units, **kwargs):
        ran.extend(units)
        return original(input, units, **kwargs)

    monkeypatch.setattr(functional, "preact_units", counted)
    return lambda: len(ran)


# --- arithmetic ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("shape", ["identity", "wider", "stride2"])
@pytest.mark.parametrize("preact", KINDS)
@pytest.mark.parametrize("unit", UNITS)
def test_unit_equals_plain_layers(backend_name, unit, preact, shape, activation, training):
    """Output, gradients and running statistics, for every kind of unit and shortcut."""
    planes = 4 if shape == "wider" else None
    stride = 2 if shape == "stride2" else 1
    fused, eager, images = make(unit, 8, planes, stride, preact=preact, activation=activation)
    assert_same(fused.train(training), eager.train(training), images)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("preact", KINDS)
@pytest.mark.parametrize("unit", UNITS)
def test_unit_keeps_the_tolerance_rule(backend_name, unit, preact, stride, training):
    """float32: each result is at most 1.5x as far from float64 truth as eager's, plus a floor."""
    fused, eager, _ = make(unit, 16, None, stride, torch.float32, preact=preact)
    images = clear_images(eager.train(training), 4, 16, 6, 7)
    assert_rule(fused.train(training), eager, images)


@pytest.mark.parametrize("settings", [{"stride": 1}, {"padding": 1}, {"padding": 2, "dilation": 2}])
def test_settings_of_a_convolution_may_be_ints(settings, runs_fused):
    """As nn.Conv2d takes them when they are set later."""
    fused, eager, images = make("basic")
    for unit in (fused, eager):
        vars(unit.conv1).update(settings)
    assert_same(fused, eager, images)
    assert runs_fused() == 1


@pytest.mark.parametrize("stride_at", ["conv1", "conv2"])
def test_stride_at(backend_name, stride_at):
    fused, eager, images = make(stride=2, stride_at=stride_at)
    assert fused.conv1.stride == ((2, 2) if stride_at == "conv1" else (1, 1))
    assert_same(fused, eager, images)


@pytest.mark.parametrize(
    ("unit", "in_planes", "planes", "stride", "kind"),
    [
        (PreActBlock, 8, 8, 1, "normal"),
        (PreActBlock, 8, 8, 2, "both_preact"),
        (PreActBlock, 8, 16, 1, "both_preact"),
        (PreActBottleneck, 8, 2, 1, "normal"),
        (PreActBottleneck, 8, 8, 1, "both_preact"),
    ],
)
def test_kind_by_default(unit, in_planes, planes, stride, kind):
    """A projection reads the activated input, an identity shortcut the raw one."""
    block = unit(in_planes, planes, stride)
    assert block.preact == kind
    assert (len(block.shortcut) == 1) == (kind == "both_preact")
    shape = (2, planes * unit.expansion, -(-7 // stride), -(-5 // stride))
    input = torch.randn(2, in_planes, 7, 5).contiguous(memory_format=torch.channels_last)
    assert block(input).shape == shape


def test_units_hand_on_statistics(backend_name, monkeypatch):
    """In a row of units only the first reads its input for statistics; results stay the same."""
    pairs = [make(seed_unit) for seed_unit in ("bottleneck", "basic", "bottleneck")]
    fused = nn.Sequential(*(pair[0] for pair in pairs))
    eager = nn.Sequential(*(pair[1] for pair in pairs))
    counts = count_operators(monkeypatch)
    assert_same(fused, eager, pairs[0][2])
    assert counts["bn_stats"] == 1


def test_statistics_are_of_what_the_output_holds(backend_name):
    """Not of memory that it held before."""
    (first, _, images), (second, *_) = make(), make("basic")
    output = first(images)
    output.data = output.data * 3 + 1
    assert torch.equal(second(output), second(output.detach().clone()))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_recomputed_unit_sees_each_batch_once(momentum, backend_name):
    """A checkpointed forward pass runs twice; statistics and their count agree all the same."""
    fused, _, images = make("basic")
    once = copy.deepcopy(fused)
    for unit in (fused, once):
        both(unit, unit, lambda bn: setattr(bn, "momentum", momentum))
    for step in range(3):
        batch = (images + step).requires_grad_()
        checkpoint(fused, batch, use_reentrant=False).sum().backward()
        once(batch).sum().backward()
    for name, buffer in once.named_buffers():
        assert torch.equal(dict(fused.named_buffers())[name], buffer), name


def test_bfloat16_autocast(backend_name):
    """The tolerance rule, which also compares dtypes: gradients are float32 as the parameters."""
    fused, eager, images = make("bottleneck", 16, None, 2, torch.float32, activation="silu")
    assert_rule(fused, eager, images, autocast=torch.bfloat16)
    assert fused(images).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(images).dtype == torch.bfloat16


# --- BatchNorm's settings ------------------------------------------------------------------------


def both(fused, eager, change):
    for model in (fused, eager):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                change(module)


SETTINGS = {
    "momentum": dict(momentum=0.3),
    "cumulative average": dict(momentum=None),
    "eps": dict(eps=0.1),
    "no affine": dict(affine=False),
    "no running statistics": dict(track_running_stats=False),
    "nothing": dict(affine=False, track_running_stats=False),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("unit", UNITS)
def test_batch_norm_settings(backend_name, unit, setting, runs_fused):
    """Three training steps, then evaluation."""
    fused, eager, images = make(unit)
    for model in (fused, eager):
        for name, child in list(model.named_children()):
            if name.startswith("bn"):
                bn = nn.BatchNorm2d(child.num_features, **SETTINGS[setting]).to(WIRING)
                setattr(model, name, bn)
    for step in range(3):
        assert_same(fused, eager, images * (step + 1))
    assert_same(fused.eval(), eager.eval(), images)
    assert runs_fused() == 4


def test_statistics_tracked_only_where_asked(backend_name):
    """track_running_stats switched off: training leaves the statistics, evaluation uses them."""
    fused, eager, images = make()
    both(fused, eager, lambda bn: setattr(bn, "track_running_stats", False))
    before = fused.bn2.running_mean.clone()
    assert_same(fused, eager, images)
    assert torch.equal(fused.bn2.running_mean, before)
    assert_same(fused.eval(), eager.eval(), images)


@pytest.mark.parametrize("frozen", ["bn1", "bn2", "bn3", "all"])
def test_frozen_batch_norm(backend_name, frozen):
    """Single BNs in eval mode with frozen parameters, in a unit that trains."""
    fused, eager, images = make()
    for model in (fused, eager):
        for name in ["bn1", "bn2", "bn3"] if frozen == "all" else [frozen]:
            getattr(model, name).eval().requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in fused.named_buffers()}
    assert_same(fused, eager, images)
    for name, buffer in fused.named_buffers():
        assert torch.equal(buffer, before[name]) == (frozen in ("all", name.split(".")[0])), name


def test_one_value_per_channel():
    fused, _, _ = make()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fused(torch.randn(1, 8, 1, 1, dtype=WIRING))
    assert fused.eval()(torch.randn(1, 8, 1, 1, dtype=WIRING)).shape == (1, 8, 1, 1)


# --- children that somebody changed --------------------------------------------------------------


class Adapted(nn.Conv2d):
    """A convolution with an update beside it, as adapters make them."""

    def forward(self, input):
        return super().forward(input) + super().forward(input.flip(3)).sigmoid()


def _double_output(module, args, output):
    return output * 2


def _with_child(name, child):
    return lambda model: model.set_submodule(name, child(model.get_submodule(name)))


def _copied(kind, **options):
    """The child as another class or with other options, same weight."""

    def copied(conv):
        new = kind(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            **{"padding": conv.padding, "bias": False, **options},
        )
        torch.manual_seed(2)
        if new.bias is not None:
            nn.init.normal_(new.bias)
        new.weight = conv.weight
        return new.to(conv.weight)

    return copied


def _patched(model):
    original = model.conv2.forward
    model.conv2.forward = lambda input: original(input) * 3


CHANGES = {
    "forward hook": lambda model: model.conv2.register_forward_hook(_double_output),
    "forward pre-hook": lambda m: m.bn1.register_forward_pre_hook(lambda m, args: args[0] * 2),
    "backward hook": lambda model: model.conv1.register_full_backward_hook(
        lambda module, grads, outputs: (grads[0] * 2,)
    ),
    "hook on the shortcut": lambda model: model.shortcut.register_forward_hook(_double_output),
    "patched forward": _patched,
    "spectral norm": lambda model: spectral_norm(model.conv1),
    "subclass": _with_child("conv2", _copied(Adapted)),
    "bias": _with_child("conv3", _copied(nn.Conv2d, bias=True)),
    "padding mode": _with_child("conv2", _copied(nn.Conv2d, padding_mode="reflect")),
    "BatchNorm replaced": _with_child("bn2", lambda bn: nn.GroupNorm(2, 4).to(WIRING)),
    "shortcut replaced": _with_child(
        "shortcut", lambda old: nn.Sequential(nn.AvgPool2d(1), *old, nn.Tanh())
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_child_is_called(backend_name, change, runs_fused):
    """A child that is not plain any more does what its owner wants, forward and backward."""
    fused, eager, images = make(planes=4)
    plain, _ = fused(images), eager(images)
    for model in (fused, eager):
        torch.manual_seed(3)
        CHANGES[change](model)
    assert_same(fused, eager, images)
    assert runs_fused() == 1
    if change != "backward hook":
        assert not torch.allclose(fused(images), plain)


def test_hook_comes_and_goes(backend_name, runs_fused):
    """The children are looked at in each forward pass."""
    fused, eager, images = make()
    seen = []
    for expected in (1, 2):
        handle = fused.conv1.register_forward_hook(lambda m, args, out: seen.append(out))
        assert_same(fused, eager, images)
        assert len(seen) == expected
        handle.remove()
        assert_same(fused, eager, images)
        assert runs_fused() == expected


def test_global_hook_sees_every_child(backend_name):
    fused, _, images = make()
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(m))
    try:
        fused(images)
    finally:
        handle.remove()
    assert {fused.bn1, fused.conv1, fused.bn3, fused.conv3} <= seen


def test_parametrized_weights_stay_fused(backend_name, runs_fused):
    """A parametrization only changes what conv.weight reads."""
    fused, eager, images = make()
    for model in (fused, eager):
        parametrizations.weight_norm(model.conv2)
    assert_same(fused, eager, images)
    assert runs_fused() == 1


@pytest.mark.parametrize("options", [dict(dilation=2, padding=2), dict(padding=2)])
def test_geometry_is_the_childs(backend_name, options, runs_fused):
    """A 3x3 with another dilation or padding than the unit was built with."""
    fused, eager, images = make(planes=4)
    for model in (fused, eager):
        _with_child("conv2", _copied(nn.Conv2d, **options))(model)
        if options["padding"] == 2 and "dilation" not in options:
            _with_child("shortcut.0", _copied(nn.Conv2d, padding=1))(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dilated convolutions run on the reference
        assert_same(fused, eager, images)
    assert runs_fused() == 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_sync_batch_norm_is_called(backend_name, training, runs_fused):
    """Units converted to SyncBatchNorm run child by child; without processes, as before."""
    fused, eager, images = make()
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert_same(fused.train(training), eager.train(training), images)
    assert runs_fused() == 0


def test_sync_batch_norm_never_uses_local_statistics(backend_name):
    """Among processes, SyncBatchNorm's own error says that it trains on GPUs only."""
    fused, _, images = make()
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
            fused(images)
    finally:
        torch.distributed.destroy_process_group()


def test_backend_eager(backend_name):
    fused, eager, images = make()
    with fused_preact.backend("eager"):
        assert_same(fused, eager, images)


@pytest.mark.parametrize("preact", [None, *KINDS])
@pytest.mark.parametrize("planes", [None, 6], ids=["identity", "projection"])
@pytest.mark.parametrize("unit", UNITS)
def test_dropout(backend_name, unit, planes, preact, runs_fused, monkeypatch):
    """Before the last convolution, in training only: what lies around it runs fused."""
    monkeypatch.delattr(PreActUnit, "_call_children")
    fused, eager, images = make(unit, planes=planes, preact=preact)
    fused.dropout = 0.3
    last = eager.conv2 if unit == "basic" else eager.conv3
    handle = last.register_forward_pre_hook(lambda m, args: F.dropout(args[0], 0.3, True))
    assert_same(fused, eager, images)
    assert runs_fused() == 0
    handle.remove()
    assert_same(fused.eval(), eager.eval(), images)
    assert runs_fused() == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_have_their_parameters_strides(layout):
    """As autograd's layout contract has it, and DistributedDataParallel expects."""
    fused, _, images = make(planes=6, dtype=torch.float32)
    fused.to(memory_format=layout)
    fused(images).sum().backward()
    for name, parameter in fused.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


# --- hooks on units ------------------------------------------------------------------------------


def _in_place(module, args, output):
    output.mul_(0.5).add_(3)


def _replace(module, args, output):
    return torch.cat([output[:2] * 3, output[2:]])


@pytest.mark.parametrize("hook", [_in_place, _replace])
def test_hook_that_changes_a_units_output(backend_name, hook):
    """The next unit sees, and normalises by, what the hook left."""
    pairs = [make() for _ in range(3)]
    fused, eager = (nn.Sequential(*(pair[i] for pair in pairs)) for i in range(2))
    for model in (fused, eager):
        model[0].register_forward_hook(hook)
        model[2].register_forward_pre_hook(lambda module, args: args[0].sub(1))
    assert_same(fused, eager, pairs[0][2])


# --- gradients that nobody asked for -------------------------------------------------------------


def count_operators(monkeypatch):
    """How often each operator ran, by name, whatever the backend."""
    counts = collections.Counter()

    class Counting:
        def __init__(self, operators):
            self.operators = operators

        def __getattr__(self, name):
            counts[name] += 1
            return getattr(self.operators, name)

    plan = ops.plan
    monkeypatch.setattr(ops, "plan", lambda *args, **kwargs: Counting(plan(*args, **kwargs)))
    return counts


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("unit", UNITS)
def test_attack_runs_no_wgrad(backend_name, unit, training, monkeypatch):
    """torch.autograd.grad for the input alone, with weights that require gradients themselves."""
    fused, eager, images = make(unit, planes=4)
    images.requires_grad_()
    counts = count_operators(monkeypatch)
    (ours,) = torch.autograd.grad(fused.train(training)(images).square().sum(), images)
    (theirs,) = torch.autograd.grad(eager.train(training)(images).square().sum(), images)
    torch.testing.assert_close(ours, theirs)
    assert counts["preact_conv_wgrad"] == counts["preact_conv_backward"] == 0
    assert counts["preact_conv_dgrad"] == fused.depth + 1


def test_frozen_weights_run_no_wgrad(backend_name, monkeypatch):
    """Frozen weights and BNs: nothing but input gradients, although backward() is called."""
    fused, eager, images = make(planes=4)
    for model in (fused, eager):
        model.requires_grad_(False)
        model.bn2.bias.requires_grad_()
    counts = count_operators(monkeypatch)
    assert_same(fused, eager, images)
    assert counts["preact_conv_wgrad"] == counts["preact_conv_backward"] == 0


def test_first_layers_run_no_dgrad(backend_name, monkeypatch):
    """An input that requires no gradient: the last convolutions' weights alone take no dgrad."""
    fused, eager, images = make(planes=4)
    for model in (fused, eager):
        model.requires_grad_(False)
        model.conv3.weight.requires_grad_()
        model.shortcut[0].weight.requires_grad_()
    counts = count_operators(monkeypatch)
    for model in (fused, eager):
        model(images).square().sum().backward()
    for name in ("conv3", "shortcut.0"):
        ours, theirs = (model.get_submodule(name).weight.grad for model in (fused, eager))
        torch.testing.assert_close(ours, theirs, rtol=CLOSE, atol=CLOSE)
    assert counts["preact_conv_dgrad"] == counts["preact_conv_backward"] == 0
    assert counts["preact_conv_wgrad"] == 2


def test_no_grad_and_inference_mode(backend_name):
    fused, eager, images = make()
    for mode in (torch.no_grad, torch.inference_mode):
        for training in (True, False):
            with mode():
                ours, theirs = fused.train(training)(images), eager.train(training)(images)
            torch.testing.assert_close(ours, theirs)
            assert not ours.requires_grad


# --- copies and compilation ----------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(backend_name, duplicate):
    fused, eager, images = make()
    fused(images)  # a pass leaves nothing behind that a copy would share
    eager(images)
    other = duplicate(fused)
    assert_same(other, eager, images)
    with torch.no_grad():
        other.conv1.weight.zero_()
    assert fused.conv1.weight.abs().sum() > 0


@pytest.mark.parametrize("unit", UNITS)
def test_compiles_without_graph_break(backend_name, unit):
    """Two units of one graph, in training and evaluation, behind an uncompiled one."""
    torch._dynamo.reset()
    first = make()[0]
    pairs = [make(unit), make(unit, planes=4)]
    fused, eager = (nn.Sequential(*(pair[i] for pair in pairs)) for i in range(2))
    fused.compile(fullgraph=True, backend="aot_eager")
    for training in (True, False):
        ours, theirs = (nn.Sequential(copy.deepcopy(first), units) for units in (fused, eager))
        assert_same(ours.train(training), theirs.train(training), pairs[0][2])


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_unit", "message"),
    [
        (lambda: PreActBlock(8, 8, preact="both"), "preact: expected one of normal, both_preact"),
        (lambda: PreActBlock(8, 8, activation="gelu"), "activation: expected one of relu, silu"),
        (lambda: PreActBlock(8, 8, dropout=1.5), "dropout: expected a probability, got 1.5"),
        (lambda: PreActBottleneck(8, 2, stride_at="conv3"), "stride_at: expected one of conv1"),
    ],
)
def test_bad_arguments(make_unit, message):
    with pytest.raises(ValueError, match=message):
        make_unit()


def test_bad_input():
    with pytest.raises(ValueError, match=r"input: expected \(N, C, H, W\)"):
        PreActBlock(8, 8)(torch.randn(8, 4, 4))
