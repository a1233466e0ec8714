"""What each kind of data is trained with, and the learning rate at each step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Architecture and SGD schedule. Schedule times are parts of the whole training."""

    arch: str
    epochs: float
    batch_size: int
    lr: float
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup: float = 0.0  # until here at lr / 10
    drops: tuple[float, ...] | None = None  # lr is divided by 10 at each; None: a half cosine


# He et al. 2016, section 4: 64,000 steps of 128 out of 50,000 images.
CIFAR = Recipe(
    arch="preact_resnet164",
    epochs=64_000 / (50_000 // 128),
    batch_size=128,
    lr=0.1,
    warmup=400 / 64_000,
    drops=(32_000 / 64_000, 48_000 / 64_000),
)
IMAGENET = Recipe(
    arch="preact_resnet50", epochs=90, batch_size=256, lr=0.1, drops=(30 / 90, 60 / 90)
)
DIGITS = Recipe(
    arch="preact_resnet20", epochs=30, batch_size=64, lr=0.1, weight_decay=5e-4, warmup=0.02
)

PRESETS = {"digits": DIGITS, "cifar": CIFAR, "imagenet": IMAGENET}


def preset_lr(recipe: Recipe, kind: str, batch_size: int) -> float:
    """The preset's learning rate; ImageNet's grows with the batch (Goyal et al. 2017)."""
    return recipe.lr * batch_size / recipe.batch_size if kind == "imagenet" else recipe.lr


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> float:
    """The learning rate of step 0 <= step < total_steps."""
    if step < round(recipe.warmup * total_steps):
        return recipe.lr / 10
    if recipe.drops is None:
        return recipe.lr * (1 + math.cos(math.pi * step / total_steps)) / 2
    return recipe.lr / 10 ** sum(step >= round(drop * total_steps) for drop in recipe.drops)
