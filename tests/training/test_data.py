"""What is held out, and that a sample depends on (seed, epoch, index) alone."""

import numpy as np
import pytest
import torch
from training.runs import make_image_folder, torchvision_or_skip

from fused_preact.training.data import batches, epoch_order, load_data


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", "data", None, seed=0)


def test_digits_split_is_disjoint_and_whole(digits):
    """Every image of scikit-learn's is in exactly one part."""
    parts = [{image.numpy().tobytes() for image, _ in part.source}
             for part in (digits.train, digits.test)]  # fmt: skip
    assert len(digits.train) + len(digits.test) == 1797
    assert not parts[0] & parts[1]


def test_digits_split_is_stratified(digits):
    """A fifth of each class is held out, to the image."""
    train, test = (np.bincount([label for _, label in part.source], minlength=10)
                   for part in (digits.train, digits.test))  # fmt: skip
    assert (test == np.ceil((train + test) / 5)).all()


def test_digits_are_normalised(digits):
    """Mean 0 and deviation 1 to two digits over the held-out images."""
    images = torch.stack([digits.test[0, index][0] for index in range(len(digits.test))])
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05


def all_images(samples, order, epoch, workers):
    return torch.cat([images for images, _ in batches(samples, order, epoch, 64, workers)])


def test_batches_do_not_depend_on_workers(digits):
    """No process, two processes: the same bits."""
    order = epoch_order(len(digits.train), seed=0, epoch=3)[:256]
    alone, shared = (all_images(digits.train, order, 3, workers) for workers in (0, 2))
    assert torch.equal(alone, shared)


def test_folder_batches_do_not_depend_on_workers(image_folder):
    """The same for torchvision's transforms, which draw from a global generator."""
    data = load_data(f"folder:{image_folder}", "data", None, seed=0)
    order = epoch_order(len(data.train), seed=0, epoch=3)
    alone, shared = (all_images(data.train, order, 3, workers) for workers in (0, 2))
    assert torch.equal(alone, shared)


def test_batches_do_not_depend_on_where_they_begin(digits):
    """The last batch of an epoch is the same for who has seen the others and who has not."""
    order = epoch_order(len(digits.train), seed=0, epoch=1)[:256]
    whole, rest = (all_images(digits.train, part, 1, 0) for part in (order, order[192:]))
    assert torch.equal(whole[192:], rest)


def test_loading_leaves_the_global_generator_alone(digits):
    before = torch.get_rng_state()
    all_images(digits.train, range(128), 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_epoch_has_its_own_order_and_augmentation(digits):
    orders = [epoch_order(1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    images = [digits.train[epoch, 0][0] for epoch in range(8)]
    assert any(not torch.equal(images[0], image) for image in images[1:])


@pytest.mark.parametrize(
    ("side", "image_size", "kind", "stem", "size"),
    [(32, None, "cifar", "cifar", 32), (80, None, "imagenet", "imagenet", 224),
     (80, 24, "cifar", "cifar", 24), (32, 96, "imagenet", "imagenet", 96)],
)  # fmt: skip
def test_folder_is_trained_by_the_size_of_its_images(tmp_path, side, image_size, kind, stem, size):
    """Up to 64 pixels as on CIFAR, above as on ImageNet, unless --image-size says else."""
    torchvision_or_skip()
    root = make_image_folder(tmp_path / "images", side)
    data = load_data(f"folder:{root}", "data", image_size, seed=0)
    assert (data.kind, data.stem, data.image_size) == (kind, stem, size)
    for samples in (data.train, data.test):
        image, label = samples[0, 0]
        assert image.shape == (3, size, size) and image.dtype == torch.float32
        assert label == 0 and data.classes == ["dark", "light"]


def test_cifar_comes_from_torchvision(monkeypatch):
    """--data cifar100 asks torchvision for both parts, and gives 32 x 32 tensors."""
    torchvision = torchvision_or_skip()
    from PIL import Image

    class Fake(list):
        def __init__(self, root, train, download):
            assert (root, download) == ("somewhere", True)
            super().__init__([(Image.new("RGB", (32, 32)), 7)] * (5 if train else 2))
            self.classes = [f"class{i}" for i in range(100)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Fake)
    data = load_data("cifar100", "somewhere", None, seed=0)
    assert (len(data.train), len(data.test), len(data.classes)) == (5, 2, 100)
    image, label = data.train[0, 3]
    assert (image.shape, label, data.stem) == ((3, 32, 32), 7, "cifar")
