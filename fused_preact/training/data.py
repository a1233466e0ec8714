"""Images and labels; what a sample looks like depends on (seed, epoch, index) alone."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import TrainingError, require

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS_SIZE, DIGITS_SHIFT = 16, 2  # enlarged from 8 x 8; pixels moved at most
DIGITS_MEAN, DIGITS_STD = 0.305, 0.318
TINY = 64  # images up to this size are trained as CIFAR's are, larger ones as ImageNet's


@dataclass(frozen=True)
class Data:
    """Training and held-out samples, and the kind of recipe and stem they call for."""

    kind: str  # "digits", "cifar" or "imagenet"
    train: "Samples"
    test: "Samples"
    classes: list[str]
    image_size: int

    @property
    def stem(self) -> str:
        """The stem that create_model is to give the network."""
        return "imagenet" if self.kind == "imagenet" else "cifar"


class Samples(Dataset):
    """Transformed images; a key is (epoch, index), so that every epoch augments anew."""

    def __init__(self, source: Sequence, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image, label = self.source[index]
        with seeded(self.seed, epoch, index):
            return self.transform(image), label


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Inside, torch's CPU generator is a function of the numbers; after, it is as before."""
    generator = torch.default_generator
    before = generator.get_state()
    # torch keeps 32 bits of a seed, so they must depend on all the numbers.
    generator.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
    try:
        yield
    finally:
        generator.set_state(before)


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch goes through count samples."""
    with seeded(seed, epoch):
        return torch.randperm(count).tolist()


def batches(
    samples: Samples, order: Sequence[int], epoch: int, batch_size: int, workers: int
) -> DataLoader:
    """(images, labels) of the samples in that order; the same for any number of workers."""
    keys = [(epoch, index) for index in order]
    return DataLoader(
        samples,
        batch_sampler=[keys[i : i + batch_size] for i in range(0, len(keys), batch_size)],
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_interrupts_to_the_parent,
        generator=torch.Generator(),  # else each loader would draw from the global one
    )


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load_data(name: str, data_dir: str, image_size: int | None, seed: int) -> Data:
    """The data of that name: digits, cifar10, cifar100 or folder:PATH."""
    if name.startswith("folder:"):
        return _folder(Path(name.removeprefix("folder:")), image_size, seed)
    if image_size is not None:
        raise TrainingError("--image-size is for --data folder:PATH only")
    if name == "digits":
        return _digits(seed)
    if name in ("cifar10", "cifar100"):
        return _cifar(name, data_dir, seed)
    raise TrainingError(f"--data {name}: expected digits, cifar10, cifar100 or folder:PATH")


def _digits(seed: int) -> Data:
    """scikit-learn's 1,797 handwritten digits, every fifth of each class held out."""
    digits = require("sklearn.datasets", "scikit-learn").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=DIGITS_SIZE, mode="bilinear").expand(-1, 3, -1, -1)
    held_out = torch.zeros(len(images), dtype=torch.bool)
    for label in range(10):
        held_out[np.flatnonzero(digits.target == label)[::5]] = True

    def split(mask: Tensor, transform: Callable) -> Samples:
        labels = digits.target[mask.numpy()].tolist()
        return Samples(list(zip(images[mask], labels, strict=True)), transform, seed)

    return Data(
        "digits",
        split(~held_out, _shifted_digit),
        split(held_out, _digit),
        [str(label) for label in range(10)],
        DIGITS_SIZE,
    )


def _digit(image: Tensor) -> Tensor:
    return (image - DIGITS_MEAN) / DIGITS_STD


def _shifted_digit(image: Tensor) -> Tensor:
    """The digit moved by up to DIGITS_SHIFT pixels each way, zeros coming in."""
    size, shift = image.shape[-1], DIGITS_SHIFT
    top, left = torch.randint(2 * shift + 1, (2,)).tolist()
    return _digit(F.pad(image, (shift,) * 4)[:, top : top + size, left : left + size])


def _cifar(name: str, data_dir: str, seed: int) -> Data:
    """CIFAR-10 or CIFAR-100, downloaded into data_dir unless it is there."""
    datasets = require("torchvision.datasets", "torchvision")
    make = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train, test = (make(data_dir, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise TrainingError(f"cannot load {name} into {data_dir}: {error}") from error
    training, evaluation = _tiny_transforms(32)
    return Data(
        "cifar",
        Samples(train, training, seed),
        Samples(test, evaluation, seed),
        list(train.classes),
        32,
    )


def _folder(path: Path, image_size: int | None, seed: int) -> Data:
    """path/train/CLASS/IMAGE with path/test or path/val of the same classes."""
    if not path.is_dir():
        raise TrainingError(f"no such folder: {path}")
    train_path = path / "train"
    if not train_path.is_dir():
        raise TrainingError(f"{path}: no train/ in it")
    test_path = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if test_path is None:
        raise TrainingError(f"{path}: neither test/ nor val/ in it")
    train, test = _image_folder(train_path), _image_folder(test_path)
    if train.classes != test.classes:
        odd = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
        raise TrainingError(f"{train_path} and {test_path} differ in their classes: {odd}")

    size = image_size or min(train[0][0].size)
    if size <= TINY:
        kind, (training, evaluation) = "cifar", _tiny_transforms(size)
    else:
        size = image_size or 224
        kind, (training, evaluation) = "imagenet", _imagenet_transforms(size)
    return Data(
        kind,
        Samples(train, training, seed),
        Samples(test, evaluation, seed),
        list(train.classes),
        size,
    )


def _image_folder(path: Path) -> Any:
    """torchvision's ImageFolder, every class of which has an image."""
    datasets = require("torchvision.datasets", "torchvision")
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    if not folders:
        raise TrainingError(f"{path}: no class folders in it")
    for folder in folders:
        if not any(datasets.folder.is_image_file(file.name) for file in folder.rglob("*")):
            raise TrainingError(f"empty class folder: {folder}")
    return datasets.ImageFolder(str(path), loader=_open_image)


def _open_image(path: str) -> Any:
    """The RGB image of that file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # broken files make Pillow raise nearly anything
        raise TrainingError(f"corrupt image: {path} ({error})") from error


def _tiny_transforms(size: int) -> tuple[Callable, Callable]:
    """Pad, crop and flip, as on CIFAR; and the plain image."""
    v2 = require("torchvision.transforms.v2", "torchvision")
    resize = v2.Resize((size, size))  # leaves an image of that size as it is
    augment = [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]
    finish = _to_tensor(v2, CIFAR_MEAN, CIFAR_STD)
    return v2.Compose([resize, *augment, *finish]), v2.Compose([resize, *finish])


def _imagenet_transforms(size: int) -> tuple[Callable, Callable]:
    """Crop of random scale and aspect, and flip; and the centre crop at 7/8 of the image."""
    v2 = require("torchvision.transforms.v2", "torchvision")
    augment = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    centre = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
    finish = _to_tensor(v2, IMAGENET_MEAN, IMAGENET_STD)
    return v2.Compose([*augment, *finish]), v2.Compose([*centre, *finish])


def _to_tensor(v2: Any, mean: Sequence[float], std: Sequence[float]) -> list:
    scale = v2.ToDtype(torch.float32, scale=True)
    return [v2.ToImage(), scale, v2.Normalize(mean, std), v2.ToPureTensor()]
