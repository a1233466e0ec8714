"""convert() on networks as others write them: the same results, by fewer kernels."""

import argparse
import copy
import enum
import gc
import inspect
import pickle
import random
import types
import weakref

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from eager_models import (
    EagerBlock,
    EagerBottleneck,
    EagerResNet,
    assert_rule,
    assert_same,
    clear_images,
    eager_stages,
    randomise,
    results,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

import fused_preact
from fused_preact.conversion.concatenation import concatenate
from fused_preact.conversion.converted import Converted

# --- networks of others --------------------------------------------------------------------------


class WideUnit(nn.Module):
    """As the WideResNets of adversarial training write it."""

    def __init__(self, in_planes, planes, stride, droprate=0.0, act=nn.ReLU):
        super().__init__()
        self.bn1, self.act1 = nn.BatchNorm2d(in_planes), act(inplace=True)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(planes), act(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.droprate = droprate
        self.same = in_planes == planes
        self.project = None if self.same else nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x):
        if not self.same:
            x = self.act1(self.bn1(x))
        else:
            out = self.act1(self.bn1(x))
        out = self.act2(self.bn2(self.conv1(out if self.same else x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.same else self.project(x), out)


class WideDropoutUnit(nn.Module):
    """With dropout as a layer before the second BatchNorm, and an addition in place."""

    def __init__(self, planes):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.conv1, self.conv2 = (nn.Conv2d(planes, planes, 3, 1, 1, bias=False) for _ in "12")
        self.dropout = nn.Dropout(0.3)
        self.shortcut = nn.Sequential()

    def forward(self, x):
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        out = self.conv2(F.relu(self.bn2(out)))
        out += self.shortcut(x)
        return out


def wide(**options):
    units = [WideUnit(8, 16, 1, **options), WideUnit(16, 16, 1, **options)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Sequential(*units))


def dense():
    return torchvision.models.DenseNet(4, (2, 2), num_init_features=8, num_classes=3)


def preact(block):
    return EagerResNet(8, eager_stages(block, (2, 2), (8, 8), 8))


NETWORKS = {
    "basic": lambda: preact(EagerBlock),
    "bottleneck": lambda: preact(EagerBottleneck),
    "wide": wide,
    "wide, SiLU": lambda: wide(act=nn.SiLU),
    "wide, dropout": lambda: wide(droprate=0.3),
    "dropout between": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), WideDropoutUnit(8)),
    "torchvision DenseNet": dense,
    "torchvision ResNet": lambda: torchvision.models.resnet18(num_classes=3),
    "timm ResNetV2": lambda: timm.create_model("resnetv2_50", num_classes=3, layers=(1, 2, 1, 1)),
    "timm ResNetV2, average": lambda: timm.create_model("resnetv2_18d", num_classes=3),
}


def pair(name):
    """A network as it was, and a converted one."""
    eager = randomise(NETWORKS[name]().train())
    model = copy.deepcopy(eager)
    conversion = fused_preact.convert(model)
    assert conversion.fused
    return eager, model


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_results_are_the_same(name, training):
    """In float64, outputs, gradients and running statistics; and the names of all."""
    eager, model = pair(name)
    eager.double().train(training), model.double().train(training)
    assert list(model.state_dict()) == list(eager.state_dict())
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    # what dropout draws goes by the layout in memory
    assert_same(model, eager, images.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "wide", "wide, SiLU"])
def test_the_tolerance_rule_holds(name, training):
    eager, model = pair(name)
    images = clear_images(eager.train(training), 4, 3, 8, 8)
    assert_rule(model.train(training), eager, images)


def test_what_was_found_is_said():
    network = preact(EagerBlock)
    conversion = fused_preact.convert(network)
    assert conversion.fused["layer1.0"] == ["bn1 relu conv1 bn2 relu conv2 + the input"]
    assert conversion.fused["layer2.0"] == [
        "bn1 relu conv1 bn2 relu conv2 + shortcut.0 of the first activation"
    ]
    assert conversion.fused[""] == ["bn relu"]
    assert conversion.left == {}
    assert "layer1.0: bn1 relu conv1 bn2 relu conv2 + the input\n" in str(conversion)


def test_why_something_was_left_is_said():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.units = nn.ModuleList(
                [EagerBlock(8, 8), torchvision.models.resnet.BasicBlock(8, 8)]
            )
            self.bn = nn.BatchNorm2d(8)
            self.sync = nn.SyncBatchNorm(8)

        def forward(self, x):
            for unit in self.units:
                x = unit(x) if x.mean() > 0 else x
            return F.relu(self.sync(F.relu(self.bn(x))))

    conversion = fused_preact.convert(Network())
    assert list(conversion.fused) == ["units.0", "units.1"]
    assert conversion.left["units.1.bn2"] == "its result does not go to a ReLU or SiLU alone"
    assert conversion.left["bn"].startswith("the forward of the model cannot be read: TraceError")
    assert conversion.left["sync"] == "it is no plain BatchNorm2d, but a SyncBatchNorm"
    assert "\nbn: left, the forward of the model cannot be read" in str(conversion)


def calls(model, images):
    """Operators of ours that a forward pass calls."""
    with torch.profiler.profile() as profile:
        model(images)
    return [e.name for e in profile.events() if e.name.startswith("fused_preact::")]


def test_units_of_a_sequential_share_a_call():
    """As they do in a PreActStage."""
    model = nn.Sequential(*(EagerBlock(8, 8) for _ in range(3)))
    fused_preact.convert(model)
    found = calls(model, torch.randn(2, 8, 6, 6))
    assert [name for name in found if "units" in name] == ["fused_preact::preact_units_forward"]


def test_half_is_saved_for_the_backward_pass():
    """Of a dense layer: its input and one more activation, instead of each normalised as well."""
    layer = torchvision.models.densenet._DenseLayer(32, 8, 4, 0.0)
    fused_preact.convert(layer)
    saved = {}

    def pack(tensor):
        if tensor.dim() == 4 and not isinstance(tensor, nn.Parameter):
            saved[tensor.data_ptr()] = tensor.shape[1]
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer([torch.randn(2, 32, 8, 8, requires_grad=True)]).sum()
    weights = {parameter.data_ptr() for parameter in layer.parameters()}
    assert sum(saved[at] for at in saved.keys() - weights) == 32 + 32


# --- lists that grow -----------------------------------------------------------------------------


def parts(concatenated):
    """Into how many its gradient is split."""
    return len(concatenated.grad_fn.next_functions)


def three():
    return [torch.randn(2, c, 3, 3, requires_grad=True) * 1 for c in (3, 4, 5)]


def test_what_was_concatenated_before_is_taken():
    tensors = three()
    before = concatenate(tensors[:2], 1)
    result = concatenate(tensors, 1)
    assert parts(before) == parts(result) == 2 and torch.equal(result, torch.cat(tensors, 1))
    grads = torch.autograd.grad(result.square().sum(), tensors)
    assert all(torch.equal(grad, 2 * tensor) for grad, tensor in zip(grads, tensors, strict=True))


def writes_to_a_part(tensors, before):
    with torch.no_grad():
        tensors[1].add_(1)


def writes_to_the_result(tensors, before):
    with torch.no_grad():
        before.add_(1)


def takes_another_part(tensors, before):
    tensors[0], tensors[1] = tensors[0] * 1, tensors[1] * 1


@pytest.mark.parametrize("change", [writes_to_a_part, writes_to_the_result, takes_another_part])
def test_what_has_changed_is_concatenated_anew(change):
    tensors = three()
    before = concatenate(tensors[:2], 1)
    change(tensors, before)
    result = concatenate(tensors, 1)
    assert parts(result) == 3 and torch.equal(result, torch.cat(tensors, 1))


def test_what_was_concatenated_without_gradients_is_concatenated_anew():
    tensors = three()
    with torch.no_grad():
        before = concatenate(tensors[:2], 1)
    assert parts(concatenate(tensors, 1)) == 3 and not before.requires_grad
    del before
    assert parts(concatenate(tensors, 1)) == 3


def test_parts_can_be_saved_and_are_not_kept():
    tensors = [tensor.detach() for tensor in three()]
    for count in (2, 3):
        concatenate(tensors[:count], 1)
    for tensor in tensors:
        assert torch.equal(pickle.loads(pickle.dumps(tensor)), tensor)
    alive = weakref.ref(tensors[2])
    del tensor, tensors
    gc.collect()
    assert alive() is None


def test_dense_layers_take_the_concatenation_before(monkeypatch):
    """Channels of what the layers of a block of four concatenate, and of what it returns."""
    network = torchvision.models.DenseNet(4, (4,), num_init_features=8, num_classes=3)
    fused_preact.convert(network)
    cat, found = torch.cat, []

    def spy(tensors, dim):
        found.append([tensor.shape[1] for tensor in tensors])
        return cat(tensors, dim)

    monkeypatch.setattr(torch, "cat", spy)
    network(torch.randn(2, 3, 32, 32))
    assert found == [[8], [8, 4], [12, 4], [16, 4], [8, 4, 4, 4, 4]]


# --- forwards that must not be changed -----------------------------------------------------------


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.last = None


class Writes(Layers):
    def forward(self, x):
        self.last = self.conv(F.relu(self.bn(x)))
        return self.last


class Appends(Layers):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(self.conv(F.relu(self.bn(x))))
        return self.seen[-1]


class Caches(Layers):
    def __init__(self):
        super().__init__()
        self.cache = {"h": None}

    def forward(self, x):
        self.cache["h"] = F.relu(self.bn(x))
        return self.conv(self.cache["h"])


class NoGrad(Layers):
    @torch.no_grad()
    def forward(self, x):
        return self.conv(F.relu(self.bn(x)))


class NoGradInside(Layers):
    def forward(self, x):
        with torch.no_grad():
            h = self.bn(x)
        return self.conv(F.relu(h))


class Draws(Layers):
    """Stochastic depth as some write it."""

    def forward(self, x):
        return self.conv(F.relu(self.bn(x))) if torch.rand(1) < 0.5 else x


class DrawsByPython(Layers):
    def forward(self, x):
        return self.conv(F.relu(self.bn(x))) if random.random() < 0.5 else x


class MakesTensors(Layers):
    def forward(self, x):
        return self.conv(F.relu(self.bn(x))) * torch.ones(1)


class LooksAtValues(Layers):
    def forward(self, x):
        y = self.conv(F.relu(self.bn(x)))
        return y if y.sum() > 0 else -y


class LooksAtABuffer(Layers):
    def __init__(self):
        super().__init__()
        self.register_buffer("doubled", torch.tensor(False))

    def forward(self, x):
        y = self.conv(F.relu(self.bn(x)))
        return 2 * y if self.doubled else y


class Checkpointed(Layers):
    def forward(self, x):
        return checkpoint(lambda x: self.conv(F.relu(self.bn(x))), x, use_reentrant=False) + (
            x if x.requires_grad else 0
        )


class AnyArguments(Layers):
    def forward(self, *inputs):
        return self.conv(F.relu(self.bn(inputs[0])))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Writes, "it writes to attributes"),
        (Appends, "it writes to attributes"),
        (Caches, "it writes to attributes"),
        (NoGrad, "it switches gradients or autocast on or off"),
        (NoGradInside, "it switches gradients or autocast on or off"),
        (Draws, "it draws random numbers by itself"),
        (DrawsByPython, "it draws random numbers by itself"),
        (MakesTensors, "it makes a tensor of its own"),
        (LooksAtValues, "TraceError: symbolically traced variables cannot be used as inputs"),
        (LooksAtABuffer, "TraceError: symbolically traced variables cannot be used as inputs"),
        (Checkpointed, ""),
        (AnyArguments, "it takes *inputs"),
    ],
)
def test_a_forward_that_cannot_be_read_is_left(kind, why):
    """And so are the module's attributes."""
    module = kind()
    before = dict(vars(module))
    conversion = fused_preact.convert(module)
    assert conversion.fused == {} and not isinstance(module, Converted)
    assert conversion.left["bn"].startswith(f"the forward of the model cannot be read: {why}")
    assert vars(module) == before and getattr(module, "seen", []) == []
    assert getattr(module, "cache", {"h": None}) == {"h": None}


class DrawsByNumpy(Layers):
    def forward(self, x):
        return self.conv(F.relu(self.bn(x))) if np.random.rand() < 0.5 else x


class DrawsForATensor(Layers):
    """Which then is looked at, and that alone cannot be read."""

    def forward(self, x):
        return self.conv(F.relu(self.bn(x))) if (x + torch.rand(1)).sum() > 0 else x


@pytest.mark.parametrize("kind", [Draws, DrawsByPython, DrawsByNumpy, DrawsForATensor])
def test_converting_draws_no_random_numbers(kind):
    """Those that follow are the same with it and without."""
    drawn = []
    for convert in (fused_preact.convert, lambda module: None):
        module = kind()
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        convert(module)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("compiled", "why"),
    [
        (torch.fx.symbolic_trace, "the forward of 0 cannot be read: it is a graph already"),
        (torch.jit.script, "it is no plain BatchNorm2d, but a RecursiveScriptModule"),
        (
            lambda module: torch.jit.trace(module, torch.randn(2, 8, 6, 6)),
            "it is no plain BatchNorm2d, but a TracedModule",
        ),
    ],
    ids=["fx", "scripted", "traced"],
)
def test_graphs_are_left(compiled, why):
    """And what stands beside them is not."""
    unit = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False)).eval()
    eager = copy.deepcopy(unit)
    model = nn.Sequential(compiled(copy.deepcopy(unit)), unit)
    kind = type(model[0])
    conversion = fused_preact.convert(model)
    assert conversion.fused == {"1": ["0 relu 2"]} and list(conversion.left) == ["0.0"]
    assert conversion.left["0.0"].startswith(why)
    assert type(model[0]) is kind and not model[0].training
    images = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(model(images), eager(eager(images)))


def test_a_graph_can_be_compiled_and_copied_again():
    """As feature extractors are in train() and eval()."""
    extractor = create_feature_extractor(randomise(preact(EagerBlock)), ["layer2", "linear"])
    eager = copy.deepcopy(extractor)
    fused_preact.convert(extractor)
    extractor.recompile()
    images = torch.randn(2, 3, 8, 8)
    expected = eager.eval()(images)
    for module in (extractor, copy.deepcopy(extractor), pickle.loads(pickle.dumps(extractor))):
        for name, tensor in module.eval()(images).items():
            assert torch.equal(tensor, expected[name])


class ReadTwice(Layers):
    def forward(self, x):
        h = self.bn(x)
        return self.conv(F.relu(h)) + h


class CalledTwice(Layers):
    def forward(self, x):
        return self.conv(F.relu(self.bn(self.conv(F.relu(self.bn(x))))))


class OtherLayers(Layers):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.conv(F.relu(self.bn(x)))


@pytest.mark.parametrize(
    ("module", "fused"),
    [
        (ReadTwice(), None),
        (CalledTwice(), None),
        (OtherLayers(bn=nn.GroupNorm(2, 8)), None),
        (OtherLayers(bn=nn.InstanceNorm2d(8)), None),
        (OtherLayers(conv=nn.Conv2d(8, 8, 3, padding=1)), "bn relu"),
        (OtherLayers(conv=nn.Conv2d(8, 8, 3, padding="same", bias=False)), "bn relu"),
        (
            OtherLayers(conv=nn.Conv2d(8, 8, 3, 1, 1, bias=False, padding_mode="circular")),
            "bn relu",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_unit_is_left(module, fused):
    eager = copy.deepcopy(module).double()
    conversion = fused_preact.convert(module)
    assert conversion.fused == ({"": [fused]} if fused else {})
    assert_same(module.double(), eager, torch.randn(2, 8, 6, 6, dtype=torch.float64))


class AddsInPlace(Layers):
    """Afterwards the module's input has changed, as its caller may know."""

    def forward(self, x):
        x += self.conv(F.relu(self.bn(x)))
        return x


class AddsRow(Layers):
    """What is added has another shape than the result."""

    def __init__(self):
        super().__init__()
        self.row = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x):
        return self.conv(F.relu(self.bn(x))) + self.row


class Scales(Layers):
    """By a number as np.linspace gives it for stochastic depth."""

    def __init__(self):
        super().__init__()
        self.scale = np.linspace(0, 1, 5)[1]

    def forward(self, x):
        return x + self.conv(F.relu(self.bn(x))) * self.scale


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_numbers_of_numpy(copied):
    eager = Scales().double()
    module = copy.deepcopy(eager)
    assert fused_preact.convert(module).fused == {"": ["bn relu conv"]}
    images = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert calls(copied(module), images)
    assert_same(module, eager, images)


@pytest.mark.parametrize("kind", [AddsInPlace, AddsRow])
def test_other_additions(kind):
    module = kind().double()
    eager = copy.deepcopy(module)
    assert fused_preact.convert(module).fused == {"": ["bn relu conv"]}
    images = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    here, there = images.clone(), images.clone()
    torch.testing.assert_close(module(here), eager(there))
    torch.testing.assert_close(here, there)


class WritesBetween(Layers):
    """Run at the end, a unit would read what was written meanwhile."""

    def forward(self, x):
        h = self.bn(x)
        x.add_(1)
        return self.conv(F.relu(h))


def test_writes_between_layers():
    module = WritesBetween().double()
    eager = copy.deepcopy(module)
    assert fused_preact.convert(module).fused == {}
    images = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(images.clone()), eager(images.clone()))


class Random(nn.Module):
    """Layers in a random order, reading what one of the last three gave; some write in place."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        self.steps = []
        self.layers = nn.ModuleList()
        live = [0]

        def step(kind, layer, *operands):
            self.layers.append(layer or nn.Identity())
            self.steps.append((kind, *operands))
            live.append(len(self.steps))
            return live[-1]

        def conv():
            return nn.Conv2d(4, 4, 3, padding=1, bias=draw.random() < 0.1)

        for _ in range(12):
            u = draw.choice(live[-3:])
            kind = draw.choice(
                ["unit"] * 6 + ["bn", "relu", "conv", "add", "add in place", "scale"]
            )
            if kind == "bn":
                step("layer", nn.BatchNorm2d(4), u)
            elif kind == "relu":
                step("layer", nn.ReLU(inplace=draw.random() < 0.3), u)
            elif kind == "conv":
                step("layer", conv(), u)
            elif kind == "unit":
                start = u
                for _ in range(draw.randint(1, 3)):
                    u = step("layer", nn.BatchNorm2d(4), u)
                    act = draw.choice([nn.ReLU] * 4 + [nn.SiLU])
                    u = step("layer", act(inplace=draw.random() < 0.5), u)
                    u = step("layer", conv(), u)
                if draw.random() < 0.7:
                    step(draw.choice(["add", "add in place"]), None, u, start)
            else:
                step(kind, None, u, draw.choice(live[-3:]))

    def forward(self, x):
        values = [x]
        for (kind, *operands), layer in zip(self.steps, self.layers, strict=True):
            a, *rest = (values[i] for i in operands)
            if kind == "layer":
                values.append(layer(a))
            elif kind == "add":
                values.append(a + rest[0])
            elif kind == "add in place":
                a += rest[0]
                values.append(a)
            else:
                values.append(a * 0.7)
        return values[-1] + values[-2]


def test_random_forwards():
    """Whatever reads, writes and adds what, the results are the same."""
    compared = 0
    for seed in range(40):
        torch.manual_seed(seed)
        eager = Random(seed).double()
        model = copy.deepcopy(eager)
        fused_preact.convert(model)
        images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        for training in (True, False):
            eager.train(training), model.train(training)
            model.load_state_dict(eager.state_dict())
            try:
                theirs = results(nn.Sequential(nn.Identity(), _Times(), eager), images)
            except RuntimeError:  # what it writes to was saved for its backward pass
                continue
            ours = results(nn.Sequential(nn.Identity(), _Times(), model), images)
            scale = max(t.abs().max().item() for n, t in theirs.items() if n.startswith("grad"))
            for name, tensor in ours.items():
                assert (tensor - theirs[name]).abs().max() <= 1e-9 * max(1, scale), (seed, name)
            compared += 1
    assert compared > 30


class _Times(nn.Module):
    """So that what follows may write to its input, which is then no leaf."""

    def forward(self, x):
        return 1 * x


# --- modules that change afterwards --------------------------------------------------------------


def unit_and_images():
    torch.manual_seed(0)
    unit = randomise(WideUnit(8, 16, 1)).double()
    return unit, torch.randn(2, 8, 6, 6, dtype=torch.float64)


def spectral(unit):
    nn.utils.parametrizations.spectral_norm(unit.conv1)


def projects_by_a_sequence(unit):
    unit.project = nn.Sequential(unit.project, nn.BatchNorm2d(16).double())


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        (lambda unit: setattr(unit, "bn2", nn.GroupNorm(4, 16).double()), False),
        (lambda unit: setattr(unit, "act2", nn.GELU()), False),
        (lambda unit: setattr(unit, "conv2", nn.Conv2d(16, 16, 3, padding=1).double()), False),
        (projects_by_a_sequence, False),
        (lambda unit: setattr(unit, "droprate", 0.5), False),
        (lambda unit: unit.add_module("extra", nn.Identity()), False),
        (lambda unit: unit.bn1.eval(), True),
        (lambda unit: unit.bn1.requires_grad_(False), True),
        (spectral, True),
    ],
)
def test_changed_layers_count(change, fused):
    """From the next forward on: by the fused functions, or where they cannot, as before."""
    unit, images = unit_and_images()
    model = copy.deepcopy(unit)
    fused_preact.convert(model)
    for module in (unit, model):
        torch.manual_seed(1)
        change(module)
    assert bool(calls(model, images)) == fused
    unit.load_state_dict(model.state_dict())
    assert_same(model, unit, images)


class Way(enum.Enum):
    SHORT = 1
    LONG = 2


class Switched(nn.Module):
    """Reads what it does from attributes of many kinds."""

    doubled = False
    factors = {"all": 1}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, 1, 1, bias=False) for _ in "12")
        self.more = nn.ModuleList()
        self.act = F.relu
        self.way = Way.SHORT
        self.active = [True, [False]]
        self.options = {"twice": False}
        self.args = argparse.Namespace(twice=False)
        self.shift = 0.0

    @property
    def is_long(self):
        return self.way is Way.LONG

    def branch(self, x):
        return self.conv1(self.act(self.bn1(x)))

    def forward(self, x):
        h = self.branch(x)
        if self.active[1][0] or self.options["twice"] or self.args.twice or self.is_long:
            h = self.conv2(F.relu(self.bn2(h)))
        for layer in self.more:
            h = layer(h)
        if hasattr(self, "scale"):
            h = self.scale * h
        return (2 if self.doubled else self.factors["all"]) * (x + h) + self.shift


def circular(self, input, weight, bias):
    """A convolution for images whose borders meet."""
    return F.conv2d(F.pad(input, (1, 1, 1, 1), mode="circular"), weight, bias)


def replaced(name, value, *path):
    """Of an object, or of its attribute at the path."""

    def change(module, monkeypatch):
        for step in path:
            module = getattr(module, step)
        monkeypatch.setattr(module, name, value, raising=False)

    return change


CHANGES = {
    "a class attribute on the instance": replaced("doubled", True),
    "a class attribute on the class": lambda _, patch: patch.setattr(Switched, "doubled", True),
    "a dict of the class": lambda _, patch: patch.setattr(Switched, "factors", {"all": 3}),
    "in a dict of the class": lambda _, patch: patch.setitem(Switched.factors, "all", 3),
    "a missing attribute": replaced("scale", 2),
    "a function": replaced("act", F.silu),
    "an enum": replaced("way", Way.LONG),
    "a list": replaced("active", [True, [True]]),
    "in a list in a list": lambda module, _: module.active[1].insert(0, True),
    "in a dict": lambda module, _: module.options.update(twice=True),
    "in a Namespace": replaced("twice", True, "args"),
    "in a ModuleList": lambda module, _: module.more.append(nn.ReLU()),
    "a number by a tensor": replaced("shift", torch.ones(8, 1, 1)),
    "a number by tensors": replaced("shift", torch.ones(8, 8, 6, 6)[0]),
    "a method of the instance": lambda module, patch: patch.setattr(
        module, "branch", types.MethodType(lambda self, x: 2 * x, module)
    ),
    "a method of the class": lambda _, patch: patch.setattr(
        Switched, "branch", lambda self, x: 2 * x
    ),
    "forward of the class": lambda _, patch: patch.setattr(
        Switched, "forward", lambda self, x: 3 * x
    ),
    "a property": lambda _, patch: patch.setattr(Switched, "is_long", True),
    "a convolution's method": lambda module, patch: patch.setattr(
        module.conv1, "_conv_forward", types.MethodType(circular, module.conv1), raising=False
    ),
    "forward of nn.Conv2d": lambda _, patch: patch.setattr(
        nn.Conv2d, "forward", lambda self, x: circular(self, x, self.weight, None)
    ),
}


@pytest.mark.parametrize("copied", [lambda m: m, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_forward_reads_counts(change, copied, monkeypatch):
    """Until it changes a module is fused, and so is its pickle; then it runs as PyTorch's do."""
    eager = randomise(Switched())
    module = copy.deepcopy(eager)
    fused_preact.convert(module)
    module = copied(module)
    images = torch.randn(2, 8, 6, 6)
    assert calls(module, images)
    module.load_state_dict(eager.state_dict())
    before = eager(images)
    torch.testing.assert_close(module(images), before)
    for m in (eager, module):
        CHANGES[change](m, monkeypatch)
    after = eager(images)
    assert not calls(module, images) and not torch.allclose(after, before)
    torch.testing.assert_close(module(images), after)
    fused_preact.convert(module)
    torch.testing.assert_close(module(images), after)


def test_another_ones_way_to_read_modules_stays(monkeypatch):
    """convert() watches nn.Module.__getattribute__ for a moment; others watch it for longer."""
    read = set()

    def watched(self, name):
        read.add(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(nn.Module, "__getattribute__", watched)
    model = WideUnit(16, 16, 1)
    fused_preact.convert(model)
    assert isinstance(model, Converted)
    assert vars(nn.Module)["__getattribute__"] is watched
    assert {"droprate", "same"} <= read  # by forward, which convert() has run


def test_what_forward_does_not_read_does_not_count():
    module = Switched()
    module.epoch, module.seen = 0, []
    fused_preact.convert(module)
    module.epoch, module.seen = 3, [torch.ones(2), torch.ones(2)]
    assert calls(module, torch.randn(2, 8, 6, 6))
    assert calls(copy.deepcopy(module), torch.randn(2, 8, 6, 6))


class HoldsTensors(Layers):
    """It looks at how many there are."""

    def __init__(self, tensors):
        super().__init__()
        self.tensors = tensors

    def forward(self, x):
        return len(self.tensors) * self.conv(F.relu(self.bn(x)))


@pytest.mark.parametrize("kind", [list, tuple, lambda tensors: dict(enumerate(tensors))])
def test_attributes_that_hold_tensors(kind):
    """Two of several values cannot be compared: copies run as before."""
    eager = HoldsTensors(kind([torch.zeros(3), torch.ones(3)]))
    module = copy.deepcopy(eager)
    fused_preact.convert(module)
    images = torch.randn(2, 8, 6, 6)
    assert calls(module, images)
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        torch.testing.assert_close(copied(module)(images), copied(eager)(images))
    module.tensors = eager.tensors = kind([torch.ones(3)])
    torch.testing.assert_close(module(images), eager(images))


class Counts(nn.Module):
    """A parametrization that says how often it runs."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, weight):
        self.runs += 1
        return weight


class TwoUnits(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Layers(), Layers()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        h = self.pool(self.first.conv(F.relu(self.first.bn(x))))
        return self.second.conv(F.relu(self.second.bn(h)))


def test_parametrizations_run_once_a_forward():
    """And not as they are converted, nor once more where a later unit is hooked."""
    unit, model = Counts(), Counts()
    row = nn.Sequential(WideUnit(8, 8, 1), WideUnit(8, 8, 1))
    two = TwoUnits()
    parametrize.register_parametrization(row[0].conv1, "weight", unit, unsafe=True)
    parametrize.register_parametrization(two.first.conv, "weight", model, unsafe=True)
    unit.runs = model.runs = 0
    for module in (row, two):
        assert fused_preact.convert(module).fused
        fused_preact.convert(module)
    assert unit.runs == model.runs == 0
    images = torch.randn(2, 8, 6, 6)
    row(images), two(images)
    assert unit.runs == model.runs == 1
    two.second.conv.register_forward_hook(lambda *_: None)
    two(images)
    assert model.runs == 2


def test_converting_leaves_spectral_norms():
    """Their power iterations go on from where they were."""
    model = nn.Sequential(WideUnit(8, 8, 1), WideUnit(8, 8, 1))
    for unit in model:
        parametrizations.spectral_norm(unit.conv1)
    before = copy.deepcopy(model.state_dict())
    fused_preact.convert(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dropout_in_timms_batch_norm_is_heeded():
    """Its own layer for it, which only a few of its networks use."""
    layers = nn.Sequential(timm.layers.BatchNormAct2d(8), nn.Conv2d(8, 8, 3, bias=False))
    assert fused_preact.convert(layers).fused == {"": ["0 relu 1"]}
    layers[0].drop = nn.Dropout(1.0)
    assert layers(torch.randn(2, 8, 6, 6)).abs().max() == 0


@pytest.mark.parametrize("layer", ["bn1", "act1", "conv1", "conv2", "project"])
def test_hooked_layers_are_called(layer):
    unit, images = unit_and_images()
    fused_preact.convert(unit)
    seen = []
    handle = getattr(unit, layer).register_forward_hook(lambda *_: seen.append(layer))
    unit(images)
    assert seen == [layer]
    handle.remove()
    assert calls(unit, images) and seen == [layer]


def test_other_arguments_run_as_before():
    """A dense layer takes a list of tensors, or one."""
    layer = torchvision.models.densenet._DenseLayer(8, 4, 2, 0.0).eval()
    images = torch.randn(2, 8, 6, 6)
    expected = layer([images])
    fused_preact.convert(layer)
    assert calls(layer, [images]) and not calls(layer, images)
    torch.testing.assert_close(layer([images]), expected)
    torch.testing.assert_close(layer(images), expected)
    torch.testing.assert_close(layer(input=images), expected)


def test_modes_differ():
    """Dropout between activation and convolution keeps a unit apart in training alone."""
    unit = WideUnit(16, 16, 1, droprate=0.5).double()
    fused_preact.convert(unit)
    images = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    names = [name.split("::")[1] for name in calls(unit, images)]
    assert "bn_relu_forward" in names
    assert "bn_relu_forward" not in [name.split("::")[1] for name in calls(unit.eval(), images)]


# --- what else people do with modules ------------------------------------------------------------


def test_unconvert():
    """Classes are what they were; what it computes then is PyTorch's to the bit."""
    eager, model = pair("basic")
    kinds = [type(module) for module in eager.modules()]
    assert [type(module) for module in model.modules()] != kinds
    assert all(map(isinstance, model.modules(), kinds))
    fused_preact.unconvert(model)
    assert [type(module) for module in model.modules()] == kinds
    assert [vars(module).keys() for module in model.modules()] == [
        vars(module).keys() for module in eager.modules()
    ]
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(images), eager(images))


def test_converting_again_changes_nothing():
    model = preact(EagerBlock)
    fused_preact.convert(model)
    kinds = [type(module) for module in model.modules()]
    again = fused_preact.convert(model)
    assert again.fused == again.left == {}
    assert [type(module) for module in model.modules()] == kinds


def test_what_has_changed_is_converted_anew():
    """And reported."""
    model = preact(EagerBlock)
    fused_preact.convert(model)
    changed = model.layer1[0]
    changed.bn2 = nn.GroupNorm(2, 8)
    again = fused_preact.convert(model)
    assert again.fused == {"layer1.0": ["bn1 relu conv1"]} and again.left == {}
    assert calls(changed, torch.randn(2, 8, 6, 6))


@pytest.mark.parametrize("name", ["basic", "wide", "torchvision DenseNet"])
def test_slices_of_a_sequential(name):
    """They are new modules, of children that were converted."""
    eager, model = pair(name)
    rows = [
        (ours, theirs)
        for ours, theirs in zip(model.modules(), eager.modules(), strict=True)
        if isinstance(ours, Converted) and type(theirs) is nn.Sequential
    ]
    assert rows
    for ours, theirs in rows:
        channels = next(m.in_channels for m in ours.modules() if isinstance(m, nn.Conv2d))
        images = torch.randn(2, channels, 16, 16)
        torch.testing.assert_close(ours[:-1].eval()(images), theirs[:-1].eval()(images))
        images.requires_grad_()
        assert type(ours)()(images) is images
        fused_preact.convert(ours[:-1])
        fused_preact.unconvert(ours[:-1])


@pytest.mark.parametrize("name", ["basic", "wide", "torchvision DenseNet", "torchvision ResNet"])
def test_symbolically_traced(name):
    """torch.fx sees PyTorch's layers, and so do feature extractors, which are traced by it."""
    eager, model = pair(name)
    graph = torch.fx.symbolic_trace(model)
    theirs = torch.fx.symbolic_trace(eager)
    assert [node.target for node in graph.graph.nodes] == [n.target for n in theirs.graph.nodes]
    assert_same(graph.double(), eager.double(), torch.randn(2, 3, 40, 40, dtype=torch.float64))


def test_features_are_extracted():
    eager, model = pair("torchvision DenseNet")
    images = torch.randn(2, 3, 32, 32)
    nodes = ["features.denseblock1", "classifier"]
    expected = create_feature_extractor(eager, nodes).eval()(images)
    for name, tensor in create_feature_extractor(model, nodes).eval()(images).items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize("name", ["torchvision DenseNet", "torchvision ResNet"])
def test_exported_with_any_batch_size(name):
    """torch.export asks forward for the names of its arguments."""
    eager, model = pair(name)
    assert inspect.signature(model.forward) == inspect.signature(eager.forward)
    batch = ({0: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(model.eval(), (torch.randn(2, 3, 32, 32),), dynamic_shapes=batch)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(exported.module()(images), eager.eval()(images))


def test_a_forward_that_was_kept_works_after_unconvert():
    unit, images = unit_and_images()
    fused_preact.convert(unit)
    kept = unit.forward
    fused_preact.unconvert(unit)
    assert torch.equal(kept(images), unit(images))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ["basic", "torchvision DenseNet"])
def test_copies_are_converted(name, copied):
    _, model = pair(name)
    twin = copied(model)
    images = torch.randn(2, 3, 32, 32)
    assert calls(twin, images) == calls(model, images) != []
    twin.load_state_dict(model.state_dict())
    theirs = results(model, images)
    for name, tensor in results(twin, images).items():
        assert torch.equal(tensor, theirs[name]), name
    assert not {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in twin.parameters()
    }


def test_replicas_have_parameters_of_their_own():
    """As nn.DataParallel makes them: a forward must read those of the module it is called on."""
    unit, images = unit_and_images()
    fused_preact.convert(unit)
    replica = unit._replicate_for_data_parallel()
    for name, child in unit.named_children():
        replica._modules[name] = copy.deepcopy(child)
    nn.init.zeros_(replica.conv2.weight)
    nn.init.zeros_(replica.project.weight)
    assert replica(images).abs().max() == 0


def test_compiles_without_a_graph_break():
    eager, model = pair("wide")
    eager.eval(), model.eval()
    images = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), eager(images))


def test_compiled_code_heeds_what_forward_reads():
    eager = randomise(Switched().eval())
    model = copy.deepcopy(eager)
    fused_preact.convert(model)
    images = torch.randn(2, 8, 6, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), eager(images))
    eager.args.twice = model.args.twice = True
    torch.testing.assert_close(compiled(images), eager(images))


def test_a_class_that_changed_again_is_not_undone():
    model = WideUnit(8, 8, 1)
    fused_preact.convert(model)
    model.__class__ = type("Sharded", (type(model),), {})
    with pytest.raises(RuntimeError, match="unconvert: after its conversion a module became a Sha"):
        fused_preact.unconvert(model)


def test_our_own_modules_are_left_alone():
    model = fused_preact.preact_resnet_cifar(20)
    kinds = [type(module) for module in model.modules()]
    conversion = fused_preact.convert(nn.Sequential(model))
    assert conversion.fused == conversion.left == {}
    assert [type(module) for module in model.modules()] == kinds
