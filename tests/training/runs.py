"""What the tests of training share: a small run, image folders, and how to compare runs."""

import argparse
import os
import re
from pathlib import Path

import pytest

# The smallest network of the CIFAR topology, five steps an epoch: a run of seconds.
SMALL = ("--arch", "preact_resnet8", "--batch-size", "256")


def torchvision_or_skip():
    """torchvision, where it is installed and fits the torch beside it."""
    try:
        import torchvision
    except Exception as error:  # an unfit one raises RuntimeError
        pytest.skip(f"needs torchvision ({error})")
    return torchvision


def make_image_folder(root: Path, size: int) -> Path:
    """Noise, darker in one class than in the other; 12 images a class to train on, 4 held out."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for name, low in (("dark", 0), ("light", 128)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(low, low + 128, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return root


def run_training(*argv) -> int:
    """The exit code of fused-preact train with those arguments."""
    from fused_preact.training import command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(arg) for arg in argv]))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {os.path.relpath(path, folder): path.read_bytes() for path in files}


def metrics(folder: Path) -> list[str]:
    """The lines of metrics.jsonl without the times, which no two runs share."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [re.sub(r', "seconds".*', "", line) for line in lines]
