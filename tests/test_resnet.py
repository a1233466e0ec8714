"""PreActResNet and its factories: topology, published sizes, and what models have to survive."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from eager_models import (
    CLOSE,
    WIRING,
    EagerBlock,
    EagerBottleneck,
    EagerResNet,
    assert_rule,
    assert_same,
    eager_stages,
    randomise,
    results,
)
from torch import nn

import fused_preact
from fused_preact import PreActBlock, PreActBottleneck, PreActResNet, resnet


def small(block="bottleneck", activation="relu", **options):
    """Two stages of two units, fused and eager with the same weights, in WIRING."""
    fused_class, eager_class = {
        "basic": (PreActBlock, EagerBlock),
        "bottleneck": (PreActBottleneck, EagerBottleneck),
    }[block]
    widths = (4, 8)
    stages = eager_stages(eager_class, (2, 2), widths, widths[0], activation=activation)
    eager = randomise(EagerResNet(widths[0], stages, activation=activation, **options)).to(WIRING)
    fused = PreActResNet(fused_class, (2, 2), widths=widths, activation=activation, **options)
    fused.to(WIRING).load_state_dict(eager.state_dict())
    return fused, eager


def images(batch=4, size=8, dtype=WIRING):
    return torch.randn(batch, 3, size, size, dtype=dtype)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


# --- topology ------------------------------------------------------------------------------------

# What is published is rounded; each exact number follows from the topology alone. Convolutions
# carry no bias and projections no BN. The final BN is counted except where final_bn is False:
# the CIFAR implementation whose 11,171,146 everybody quotes lacks it. fb.resnet.torch counts a
# bias in each of ResNet-200's four projections and ResNet-110's 1.73 M goes with projections
# instead of zero padding; neither changes a published digit.
PARAMETERS = {
    "preact_resnet164": (lambda: fused_preact.preact_resnet164(), 1_703_258, 1.7),
    "preact_resnet1001": (lambda: fused_preact.preact_resnet1001(), 10_327_706, 10.3),
    "preact_resnet110": (lambda: fused_preact.preact_resnet110(), 1_730_522, 1.7),
    "preact_resnet200": (lambda: fused_preact.preact_resnet200(), 64_666_152, 64.7),
    "preact_resnet50": (lambda: fused_preact.preact_resnet50(), 25_549_352, 25.5),
    "preact_resnet18 cifar": (
        lambda: fused_preact.preact_resnet18(10, stem="cifar"),
        11_172_170,
        11.17,
    ),
    "preact_resnet18 cifar, no final BN": (
        lambda: fused_preact.preact_resnet18(10, stem="cifar", final_bn=False),
        11_171_146,
        11.17,
    ),
    "wide_resnet28_10": (lambda: fused_preact.wide_resnet(28, 10), 36_479_194, 36.5),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    factory, exact, published = PARAMETERS[name]
    with torch.device("meta"):
        model = factory()
    assert count(model) == exact
    decimals = len(str(published).partition(".")[2])
    assert round(exact / 1e6, decimals) == published


@pytest.mark.parametrize(
    ("factory", "convolutions"),
    [
        (fused_preact.preact_resnet18, 18),
        (fused_preact.preact_resnet34, 34),
        (fused_preact.preact_resnet50, 50),
        (fused_preact.preact_resnet101, 101),
        (fused_preact.preact_resnet152, 152),
        (fused_preact.preact_resnet200, 200),
        (fused_preact.preact_resnet110, 110),
        (fused_preact.preact_resnet164, 164),
        (fused_preact.preact_resnet1001, 1001),
        (lambda: fused_preact.wide_resnet(28, 10), 26),  # 28 counts the projections of stages 2, 3
    ],
)
def test_depth(factory, convolutions):
    """Convolutions outside the shortcuts, and the classifier."""
    with torch.device("meta"):
        model = factory()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sum("shortcut" not in name for name in names) == convolutions


def test_where_the_strides_are():
    """On the first 1x1 in the paper's CIFAR networks, on the 3x3 in those for ImageNet."""
    with torch.device("meta"):
        cifar, imagenet = fused_preact.preact_resnet164(), fused_preact.preact_resnet50()
    assert (cifar.layer2[0].conv1.stride, cifar.layer2[0].conv2.stride) == ((2, 2), (1, 1))
    assert (imagenet.layer2[0].conv1.stride, imagenet.layer2[0].conv2.stride) == ((1, 1), (2, 2))


def test_first_unit():
    """Raw after the ImageNet stem, both_preact in the paper's CIFAR networks."""
    with torch.device("meta"):
        kinds = {
            "imagenet": fused_preact.preact_resnet50(),
            "paper": fused_preact.preact_resnet110(),
            "basic": fused_preact.preact_resnet18(stem="cifar"),
            "asked": fused_preact.preact_resnet18(stem="cifar", first_unit="both_preact"),
        }
    kinds = {name: model.layer1[0].preact for name, model in kinds.items()}
    assert kinds == {
        "imagenet": "no_preact",
        "paper": "both_preact",
        "basic": "normal",
        "asked": "both_preact",
    }


@pytest.mark.parametrize(
    ("arch", "block", "num_blocks"),
    [
        ("preact_resnet18", PreActBlock, (2, 2, 2, 2)),
        ("preact_resnet152", PreActBottleneck, (3, 8, 36, 3)),
        ("preact_resnet20", PreActBlock, (3, 3, 3)),
        ("preact_resnet29", PreActBottleneck, (3, 3, 3)),
        ("preact_resnet56", PreActBlock, (9, 9, 9)),
        ("preact_resnet110", PreActBlock, (18, 18, 18)),
        ("preact_resnet164", PreActBottleneck, (18, 18, 18)),
        ("preact_resnet1001", PreActBottleneck, (111, 111, 111)),
        ("preact_resnet1202", PreActBlock, (200, 200, 200)),
        ("wide_resnet28_10", PreActBlock, (4, 4, 4)),
    ],
)
def test_create_model(arch, block, num_blocks):
    with torch.device("meta"):
        model = fused_preact.create_model(arch, 7)
    stages = [getattr(model, f"layer{i + 1}") for i in range(len(num_blocks))]
    assert [len(stage) for stage in stages] == list(num_blocks)
    assert all(type(unit) is block for stage in stages for unit in stage)
    assert model.linear.out_features == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fused_preact.create_model("preact_resnet165", 10), "depth: expected .* got 165"),
        (lambda: fused_preact.create_model("preact_resnet2", 10), "depth: expected .* got 2"),
        (lambda: fused_preact.create_model("resnet50", 10), "arch: expected preact_resnet18|34"),
        (
            lambda: fused_preact.create_model("wide_resnet27_10", 10),
            r"depth: expected 6n \+ 4, got 27",
        ),
        (lambda: fused_preact.create_model("wide_resnet28_0", 10), "widen_factor: expected at"),
        (lambda: fused_preact.create_model("preact_resnet18", 10, "mnist"), "stem: expected"),
        (lambda: fused_preact.preact_resnet_cifar(164, block=PreActBlock, widths=(1,)), "num_bl"),
        (lambda: PreActResNet(PreActBlock, ()), "num_blocks, widths: expected one of each"),
        (lambda: PreActResNet(PreActBlock, (1, 0), widths=(8, 8)), "num_blocks, widths: expected"),
    ],
)
def test_bad_settings_are_one_clear_line(make, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [(32, 32), (5, 9), (1, 1)])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_any_image_size(stem, size):
    model = fused_preact.preact_resnet18(5, stem, widths=(4, 8, 8, 8)).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


def test_initialisation():
    """He's normal distribution over fan_out, BN 1 and 0, the classifier's bias 0."""
    model = fused_preact.preact_resnet18(10, "cifar")
    weight = model.layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert weight.mean().abs() < 1e-3
    assert (model.bn.weight == 1).all() and (model.bn.bias == 0).all()
    assert (model.linear.bias == 0).all() and model.linear.weight.std() > 0


def test_options_reach_every_unit():
    model = fused_preact.wide_resnet(10, 1, dropout=0.3, activation="silu")
    units = [m for m in model.modules() if isinstance(m, PreActBlock)]
    assert len(units) == 3
    assert all(unit.dropout == 0.3 and unit.activation == "silu" for unit in units)
    with pytest.raises(TypeError, match="stride_at"):
        PreActResNet(PreActBlock, (1,), widths=(8,), stride_at="conv1")


# --- arithmetic ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("final_bn", [True, False], ids=["bn", "no bn"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_model_equals_plain_layers(backend_name, block, activation, final_bn, training):
    """Logits, all gradients, all statistics; the last BN and activation are in it or not."""
    fused, eager = small(block, activation, final_bn=final_bn)
    assert_same(fused.train(training), eager.train(training), images())


class EagerImageNet(nn.Module):
    """The ImageNet stem, stages of eager units, and the head."""

    def __init__(self, stages):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1, self.layer2 = (nn.Sequential(*units) for units in stages)
        self.bn = nn.BatchNorm2d(64)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        x = self.layer2(self.layer1(x))
        return self.linear(self.bn(x).relu().mean((2, 3)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_imagenet_stem(backend_name, training):
    """The first unit reads the pooled, activated stem as it is."""
    stages = eager_stages(EagerBottleneck, (2, 1), (8, 16), 8)
    stages[0][0] = EagerBottleneck(8, 8, preact="no_preact")
    eager = randomise(EagerImageNet(stages)).to(WIRING)
    fused = PreActResNet(PreActBottleneck, (2, 1), stem="imagenet", widths=(8, 16)).to(WIRING)
    fused.load_state_dict(eager.state_dict())
    assert_same(fused.train(training), eager.train(training), images(2, 33))


def test_resnet_1001(backend_name):
    """333 units forward and backward on 8x8 images: output, every gradient, all statistics."""
    stages = eager_stages(EagerBottleneck, (111,) * 3, (16, 32, 64), 16, stride_at="conv1")
    eager = EagerResNet(16, stages)
    fused = fused_preact.preact_resnet1001()
    eager.load_state_dict(fused.state_dict())
    assert_same(
        fused.double(), eager.double(), images(2).double(), tolerance=1e-6
    )  # depth amplifies


def test_deep_model_keeps_the_tolerance_rule(backend_name):
    """float32 through 18 units. SiLU: in so many activations some lie where ReLU is a coin."""
    stages = eager_stages(
        EagerBottleneck, (6,) * 3, (16, 32, 64), 16, stride_at="conv1", activation="silu"
    )
    eager = EagerResNet(16, stages, activation="silu")
    fused = fused_preact.preact_resnet_cifar(56, block=PreActBottleneck, activation="silu")
    eager.load_state_dict(fused.state_dict())
    assert_rule(fused, eager, images(2, dtype=torch.float32))


def test_five_steps_of_training(backend_name):
    """Weights and statistics after five steps of SGD are eager's."""
    fused, eager = small()
    batches, targets = images(40).split(8), torch.randint(10, (40,)).split(8)
    for model in (fused, eager):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        for batch, target in zip(batches, targets, strict=True):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(batch), target).backward()
            optimiser.step()
    torch.testing.assert_close(fused.state_dict(), eager.state_dict(), rtol=10 * CLOSE, atol=CLOSE)
    assert_same(fused.eval(), eager.eval(), images())


# --- what models have to survive -----------------------------------------------------------------


def test_switching_modes_and_frozen_batch_norms(backend_name):
    fused, eager = small()
    for training in (True, False, True):
        assert_same(fused.train(training), eager.train(training), images())
    for model in (fused, eager):
        for name in ("layer1.0.bn1", "layer1.1.bn3", "layer2.0.bn2", "bn"):
            model.get_submodule(name).eval().requires_grad_(False)
    assert_same(fused, eager, images())


def test_hooks_between_units(backend_name):
    """A hook may replace a unit's output or write to it in place."""
    fused, eager = small()
    for model in (fused, eager):
        model.layer1[0].register_forward_hook(lambda module, args, output: output * 2 + 1)
        model.layer1[1].register_forward_hook(lambda module, args, output: output.add_(1))
        model.layer2.register_forward_hook(lambda module, args, output: output.mul_(-1))
        model.bn.register_forward_hook(lambda module, args, output: output + 0.5)
    assert_same(fused, eager, images())


def test_backward_hooks_on_units(backend_name):
    fused, eager = small()
    for model in (fused, eager):
        for unit in (*model.layer1, *model.layer2):
            unit.register_full_backward_hook(lambda module, grads, _: (grads[0] * 0.5,))
    assert_same(fused, eager, images())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(backend_name, how):
    fused, eager = small()
    batch = images()
    fused(batch)
    eager(batch)
    if how == "deepcopy":
        other = copy.deepcopy(fused)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(fused))
    else:
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert_same(other, eager, batch)


def test_data_parallel(backend_name):
    """Passes through on a CPU; what its replicas are made of, copies of __dict__, works too."""
    fused, eager = small()
    batch = images()
    torch.testing.assert_close(nn.DataParallel(fused)(batch), eager(batch))
    replica = fused.layer1[0]._replicate_for_data_parallel()
    for name, child in fused.layer1[0].named_children():
        setattr(replica, name, child)
    x = torch.randn(2, 4, 8, 8, dtype=WIRING)
    torch.testing.assert_close(replica(x), eager.layer1[0](x))


def test_sync_batch_norm(backend_name):
    fused, eager = small()
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert isinstance(fused.bn, nn.SyncBatchNorm)
    assert_same(fused.eval(), eager.eval(), images())


def test_half(monkeypatch):
    """float16 runs on the reference operators, and says so once."""
    monkeypatch.setattr(fused_preact.ops, "_warned", set())
    fused, eager = small()
    batch = images()
    truth = eager.eval()(batch)
    with warnings.catch_warnings(record=True) as caught, fused_preact.backend("cpu"):
        warnings.simplefilter("always")
        output = fused.eval().half()(batch.half())
        fused.train()(batch.half()).float().square().mean().backward()
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.double(), truth, rtol=0.02, atol=0.02)
    assert all(p.grad.dtype == torch.float16 for p in fused.parameters())
    assert sum("torch.float16" in str(warning.message) for warning in caught) == 1


def test_memory_formats_and_dtypes(backend_name):
    """.to() of every kind; images in any layout give no warning."""
    fused, eager = small()
    batch = images()
    expected = results(copy.deepcopy(eager), batch)["output"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # That of Triton 3.6 takes an array of one value for a number, which NumPy deprecates.
        warnings.filterwarnings("ignore", module=r"triton\.runtime\.interpreter")
        for model in (fused, copy.deepcopy(fused).to(memory_format=torch.channels_last)):
            for layout in (batch, batch.contiguous(memory_format=torch.channels_last), flip(batch)):
                torch.testing.assert_close(copy.deepcopy(model)(layout), expected)
    single = copy.deepcopy(fused).to(torch.float32)(batch.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected.double(), rtol=1e-3, atol=1e-4)


def flip(batch):
    """The same values, stored with N and C exchanged."""
    return batch.transpose(0, 1).contiguous().transpose(0, 1)


def test_attack_leaves_weights_alone(backend_name):
    """An input gradient in eval mode: no parameter's .grad, no statistic changes."""
    fused, eager = small()
    batch = images().requires_grad_()
    before = copy.deepcopy(fused.state_dict())
    (ours,) = torch.autograd.grad(fused.eval()(batch).logsumexp(1).sum(), batch)
    (theirs,) = torch.autograd.grad(eager.eval()(batch).logsumexp(1).sum(), batch)
    torch.testing.assert_close(ours, theirs)
    assert all(parameter.grad is None for parameter in fused.parameters())
    torch.testing.assert_close(fused.state_dict(), before, rtol=0, atol=0)


def test_compiles_without_graph_break(backend_name):
    """The whole model as one graph, and back in training after an evaluation."""
    torch._dynamo.reset()
    fused, eager = small()
    fused.compile(fullgraph=True, backend="aot_eager")
    for training in (True, False, True):
        assert_same(fused.train(training), eager.train(training), images())


def test_public_names():
    for name in fused_preact.__all__:
        assert hasattr(fused_preact, name), name
    assert resnet.create_model is fused_preact.create_model
