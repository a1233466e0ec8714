"""fused-preact train: from the command line to a trained network in a run folder."""

import argparse
import math
import os
import platform
import shlex
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fused_preact
from fused_preact.resnet import create_model

from . import checkpoint
from .data import Data, load_data
from .errors import Interrupted, TrainingError, require
from .loop import PRECISIONS, Options, Training, train
from .recipe import PRESETS, Recipe, preset_lr
from .run_folder import RunFolder

# A resumed run keeps these; where the data lies and how it is loaded may be another.
FIXED = ("arch", "epochs", "batch_size", "lr", "precision", "backend", "seed", "image_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of fused-preact train."""
    add = parser.add_argument
    add("--data", help="digits (default), cifar10, cifar100, or folder:PATH of train/CLASS/IMAGE "
        "and test/CLASS/IMAGE or val/CLASS/IMAGE")  # fmt: skip
    add("--data-dir", help="where CIFAR is, or is downloaded to (default: data)")
    add("--image-size", type=int, help="side that the images of a folder are brought to (default: "
        "the first image's if at most 64, else 224); up to 64 trains as on CIFAR")  # fmt: skip
    add("--arch", help="preact_resnet18, preact_resnet164, wide_resnet28_10, ... "
        "(default: by the data)")  # fmt: skip
    add("--epochs", type=float, help="the preset's schedule scales in proportion")
    add("--batch-size", type=int)
    add("--lr", type=float, help="the highest learning rate")
    add("--precision", help="fp32 (default), bf16 or fp16")
    add("--backend", help="auto (default), reference, cpu, cuda or triton")
    add("--seed", type=int, help="of weights, order and augmentation (default: 0)")
    add("--workers", type=int, help="processes that load images (default: by the data)")
    add("--out", type=Path, help="folder for the new run's folder (default: runs)")
    add("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    add("--save-seconds", type=float, help="save at least this often within an epoch (default: 60)")
    add("--tensorboard", action="store_true", default=None, help="log to RUN/tensorboard as well")


def run(args: argparse.Namespace) -> int:
    """Train as the arguments say; 0, 2 after a mistake of the user's, 130 when stopped."""
    folder = None
    try:
        _check(args)
        if args.resume:
            folder = RunFolder.open(args.resume)
            config = _stored_config(args, folder)
        else:
            config = _new_config(args)
        _require_packages(config)
        data = _load(config)
        recipe = _recipe(args, config, data)
        with ExitStack() as stack:
            model = _model(config, recipe, data, stack)
            training = Training(model, recipe, data, Options(**config["options"]))
            identity = {"arch": recipe.arch, "classes": data.classes}
            name = config["data"].split(":")[0]
            if folder is None:
                folder = RunFolder.create(args.out or Path("runs"), f"{name}-{recipe.arch}")
                folder.write_config(_described(config, training))
            elif folder.checkpoint.exists():
                _restore(training, folder, identity)
            train(training, folder, identity, f"{recipe.arch} on {name}")
        _print_result(training, folder)
    except TrainingError as error:
        print(f"fused-preact train: error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        print(f"stopped; {_how_to_go_on(folder)}", file=sys.stderr)
        return 130
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise for a number or word that no training could use."""
    for name, least in (("batch_size", 1), ("image_size", 8), ("seed", 0), ("workers", 0),
                        ("save_seconds", 0)):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise TrainingError(f"{_flag(name)} {value}: must be at least {least}")
    for name in ("epochs", "lr"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise TrainingError(f"{_flag(name)} {value:g}: must be more than 0")
    if args.precision is not None and args.precision not in PRECISIONS:
        raise TrainingError(f"--precision {args.precision}: expected {', '.join(PRECISIONS)}")


def _new_config(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration of a new run, as far as the arguments tell."""
    data = args.data or "digits"
    if data.startswith("folder:"):  # the run can be resumed from elsewhere
        data = f"folder:{os.path.abspath(data.removeprefix('folder:'))}"
    options = Options(workers=0 if data == "digits" else min(4, os.cpu_count() or 1))
    given = {name: value for name, value in vars(args).items() if value is not None}
    options = replace(options, **{name: given[name] for name in asdict(options) if name in given})
    return {
        "data": data,
        "data_dir": args.data_dir or "data",
        "image_size": args.image_size,
        "backend": args.backend or "auto",
        "options": asdict(options),
    }


def _stored_config(args: argparse.Namespace, folder: RunFolder) -> dict[str, Any]:
    """The configuration of an earlier run, with the arguments that a resumed run may change."""
    config = folder.read_config()
    try:
        stored = {**config, **config["recipe"], **config["options"]}
        for name in FIXED:
            value = getattr(args, name)
            if value is not None and value != stored[name]:
                flag = _flag(name)
                raise TrainingError(f"{flag} {value}: {folder.path} was begun with {stored[name]}")
        if args.data is not None:
            if args.data.split(":")[0] != config["data"].split(":")[0]:
                raise TrainingError(
                    f"--data {args.data}: {folder.path} was begun with {config['data']}"
                )
            config["data"] = args.data
        if args.data_dir is not None:
            config["data_dir"] = args.data_dir
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{folder.config} is no run's configuration: {error}") from error
    for name in ("workers", "save_seconds", "tensorboard"):
        if getattr(args, name) is not None:
            config["options"][name] = getattr(args, name)
    return config


def _require_packages(config: dict[str, Any]) -> None:
    """Miss a package now rather than when the run comes to need it."""
    require("rich", "rich")
    require("matplotlib", "matplotlib")
    if config["options"]["tensorboard"]:
        require("torch.utils.tensorboard", "tensorboard")


def _load(config: dict[str, Any]) -> Data:
    """The data, which must be that of the first time if the run was begun before."""
    seed = config["options"]["seed"]
    data = load_data(config["data"], config["data_dir"], config["image_size"], seed)
    if "classes" in config:
        if data.classes != config["classes"]:
            odd = ", ".join(sorted(set(data.classes) ^ set(config["classes"])))
            raise TrainingError(f"{config['data']} has other classes than the run: {odd}")
        if [len(data.train), len(data.test)] != config["images"]:
            was, now = config["images"], [len(data.train), len(data.test)]
            raise TrainingError(f"{config['data']} had {was} images as the run began, now {now}")
    return data


def _recipe(args: argparse.Namespace, config: dict[str, Any], data: Data) -> Recipe:
    """The stored recipe, or the preset for the data with what the arguments change of it."""
    if "recipe" in config:
        return Recipe(**config["recipe"])
    preset = PRESETS[data.kind]
    batch_size = args.batch_size or preset.batch_size
    if batch_size > len(data.train):
        raise TrainingError(
            f"--batch-size {batch_size}: there are only {len(data.train)} training images"
        )
    return replace(
        preset,
        arch=args.arch or preset.arch,
        epochs=args.epochs or preset.epochs,
        batch_size=batch_size,
        lr=args.lr or preset_lr(preset, data.kind, batch_size),
    )


def _model(config: dict[str, Any], recipe: Recipe, data: Data, stack: ExitStack) -> nn.Module:
    """The network with the seed's weights, and the backend chosen for as long as the stack."""
    backend = config["backend"]
    on_gpu = torch.cuda.is_available() and backend != "cpu"
    torch.backends.cudnn.deterministic = True  # else a resumed run goes another way
    checkpoint.seed_random_states(config["options"]["seed"])
    try:
        if backend != "auto":
            stack.enter_context(fused_preact.backend(backend))
    except ValueError as error:
        raise TrainingError(f"--backend {backend}: {error}") from error
    try:
        model = create_model(recipe.arch, len(data.classes), stem=data.stem)
    except ValueError as error:
        raise TrainingError(f"--arch {recipe.arch}: {error}") from error
    return model.to("cuda" if on_gpu else "cpu")


def _described(config: dict[str, Any], training: Training) -> dict[str, Any]:
    """config.json: all that made the run what it is."""
    data = training.data
    return {
        **config,
        "recipe": asdict(training.recipe),
        "classes": data.classes,
        "images": [len(data.train), len(data.test)],
        "steps": training.total_steps,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "device": str(training.device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def _restore(training: Training, folder: RunFolder, identity: dict[str, Any]) -> None:
    """Go on from the folder's checkpoint."""
    path = folder.checkpoint
    state = checkpoint.load(path, training.device)
    for name, value in identity.items():
        if state.get(name) != value:
            raise TrainingError(f"{path} is of another run: {name} {state.get(name)}, not {value}")
    try:
        training.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise TrainingError(f"{path} does not fit: {str(error).splitlines()[0]}") from error
    folder.write_metrics(training.history)


def _print_result(training: Training, folder: RunFolder) -> None:
    """What was reached, how fast, and where it lies, in a line."""
    history = training.history
    seconds = sum(record["seconds"] for record in history)
    images = training.total_steps * training.recipe.batch_size
    print(
        f"{100 * history[-1]['test_accuracy']:.2f}% of {len(training.data.test):,} held-out images "
        f"right after {len(history)} epochs; {seconds:.0f} s of training at "
        f"{images / seconds:,.0f} images/s; all in {folder.path}"
    )


def _how_to_go_on(folder: RunFolder | None) -> str:
    if folder is None:
        return "no run was begun"
    return f"go on with: fused-preact train --resume {shlex.quote(str(folder.path))}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
