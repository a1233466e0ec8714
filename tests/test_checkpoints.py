"""state_dicts of the widely used CIFAR implementation load with strict=True, and ours there."""

import io

import pytest
import torch
from eager_models import (
    EagerBlock,
    EagerBottleneck,
    EagerResNet,
    assert_rule,
    assert_same,
    clear_images,
    eager_stages,
    randomise,
)

import fused_preact

WIDTHS = (64, 128, 256, 512)
# The four networks that checkpoints come in; the last lacks its BN in all of them.
NETWORKS = {
    "preact_resnet18": (fused_preact.preact_resnet18, EagerBlock, (2, 2, 2, 2)),
    "preact_resnet34": (fused_preact.preact_resnet34, EagerBlock, (3, 4, 6, 3)),
    "preact_resnet50": (fused_preact.preact_resnet50, EagerBottleneck, (3, 4, 6, 3)),
    "preact_resnet101": (fused_preact.preact_resnet101, EagerBottleneck, (3, 4, 23, 3)),
}


def pair(name, widths=WIDTHS):
    factory, block, num_blocks = NETWORKS[name]
    fused = factory(10, stem="cifar", widths=widths, final_bn=False)
    return fused, EagerResNet(
        widths[0], eager_stages(block, num_blocks, widths, widths[0]), final_bn=False
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_are_the_same(name):
    with torch.device("meta"):
        fused, eager = pair(name)
    ours, theirs = fused.state_dict(), eager.state_dict()
    assert list(ours) == list(theirs)  # in order, too: an optimiser's state goes by position
    assert [t.shape for t in ours.values()] == [t.shape for t in theirs.values()]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["preact_resnet18", "preact_resnet50"])
def test_their_checkpoint_here(backend_name, name, training):
    """Outputs, gradients and statistics are those of the network that wrote the checkpoint."""
    fused, eager = pair(name, (4, 8, 8, 16))
    randomise(eager)
    file = io.BytesIO()
    torch.save(eager.state_dict(), file)
    file.seek(0)
    fused.load_state_dict(torch.load(file, weights_only=True), strict=True)
    images = clear_images(eager.train(training), 4, 3, 8, 8)
    assert_rule(fused.train(training), eager, images)
    assert_same(fused.double(), eager.double(), images.double())


@pytest.mark.parametrize("name", ["preact_resnet18", "preact_resnet50"])
def test_our_checkpoint_there(backend_name, name):
    """After a training step here."""
    fused, eager = pair(name, (4, 8, 8, 16))
    fused(torch.randn(4, 3, 16, 16)).square().mean().backward()
    torch.optim.SGD(fused.parameters(), lr=0.1).step()
    eager.load_state_dict(fused.state_dict(), strict=True)
    assert_same(fused.double().eval(), eager.double().eval(), torch.randn(2, 3, 16, 16).double())


def test_real_width(backend_name):
    """The robustness papers' PreActResNet-18 as it is."""
    fused, eager = pair("preact_resnet18")
    eager.load_state_dict(fused.state_dict(), strict=True)
    assert_same(fused.double(), eager.double(), torch.randn(2, 3, 8, 8).double())


def test_final_bn_is_what_an_old_checkpoint_lacks():
    model = fused_preact.preact_resnet18(10, stem="cifar", widths=(4, 4, 4, 4))
    old = fused_preact.preact_resnet18(10, stem="cifar", widths=(4, 4, 4, 4), final_bn=False)
    with pytest.raises(RuntimeError, match=r'Missing key.*"bn.weight"'):
        model.load_state_dict(old.state_dict(), strict=True)
