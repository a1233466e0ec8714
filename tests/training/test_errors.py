"""What a user can get wrong: one clear line, exit code 2, earlier runs untouched."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from training.runs import SMALL, contents

from fused_preact.training import checkpoint, command
from fused_preact.training.errors import TrainingError

RUN = Path("runs/digits-preact_resnet8-0001")


@pytest.fixture
def refuse(train):
    """Calls train, which must end in exit code 2 and that line, and change no run."""

    def call(line, *argv):
        before = contents(Path("runs"))
        code, _, error = train(*argv)
        assert error == f"fused-preact train: error: {line}\n"
        assert code == 2
        assert contents(Path("runs")) == before

    return call


@pytest.fixture
def earlier_run(train):
    """A finished run of two steps."""
    assert train(*SMALL, "--epochs", "0.4")[0] == 0
    return RUN


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--data mnist", "--data mnist: expected digits, cifar10, cifar100 or folder:PATH"),
        ("--batch-size 0", "--batch-size 0: must be at least 1"),
        ("--batch-size 2000", "--batch-size 2000: there are only 1433 training images"),
        ("--epochs 0", "--epochs 0: must be more than 0"),
        ("--epochs nan", "--epochs nan: must be more than 0"),
        ("--lr -1", "--lr -1: must be more than 0"),
        ("--seed -1", "--seed -1: must be at least 0"),
        ("--workers -1", "--workers -1: must be at least 0"),
        ("--precision fp8", "--precision fp8: expected fp32, bf16, fp16"),
        ("--image-size 32", "--image-size is for --data folder:PATH only"),
        ("--resume nowhere", "nowhere is no run: it has no config.json"),
    ],
)
def test_argument(refuse, earlier_run, argv, line):
    refuse(line, *argv.split())


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("--arch preact_resnet165", "9n + 2"),
        ("--arch lenet", "preact_resnet18"),
        ("--backend abacus", "reference"),
    ],
)
def test_model_and_backend_say_what_there_is(train, argv, part):
    """The option as it was given, and create_model's or backend's own line on what there is."""
    code, _, error = train(*argv.split())
    assert code == 2
    assert error.startswith(f"fused-preact train: error: {argv}: ") and error.count("\n") == 1
    assert part in error
    assert not Path("runs").exists()


def test_no_such_folder(refuse, tmp_path):
    refuse(f"no such folder: {tmp_path}/absent", "--data", "folder:absent")


def test_folder_without_its_parts(refuse, image_folder):
    shutil.rmtree(image_folder / "test")
    refuse(f"{image_folder}: neither test/ nor val/ in it", "--data", f"folder:{image_folder}")
    shutil.rmtree(image_folder / "train")
    refuse(f"{image_folder}: no train/ in it", "--data", f"folder:{image_folder}")
    (image_folder / "train").mkdir()
    (image_folder / "val").mkdir()
    refuse(f"{image_folder}/train: no class folders in it", "--data", f"folder:{image_folder}")


@pytest.mark.parametrize("part", ["train", "test"])
def test_empty_class_folder(refuse, image_folder, part):
    empty = image_folder / part / "medium"
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    refuse(f"empty class folder: {empty}", "--data", f"folder:{image_folder}")


def test_parts_of_different_classes(refuse, image_folder):
    (image_folder / "test" / "dark").rename(image_folder / "test" / "dim")
    refuse(
        f"{image_folder}/train and {image_folder}/test differ in their classes: dark, dim",
        "--data",
        f"folder:{image_folder}",
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", ["train", "test"])
def test_corrupt_image_is_named(train, image_folder, part, workers):
    """Cut short; read by this process or by a worker, which hands errors on as text."""
    image = image_folder / part / "light" / "0003.png"
    image.write_bytes(image.read_bytes()[:100])
    code, _, error = train("--data", f"folder:{image_folder}", "--arch", "preact_resnet8",
                           "--batch-size", 8, "--epochs", 1, "--workers", workers)  # fmt: skip
    assert code == 2
    assert error.startswith(f"fused-preact train: error: corrupt image: {image} (")
    assert error.count("\n") == 1


def test_missing_package_is_named(train, monkeypatch, tmp_path):
    """Without torchvision digits can be trained on and folders cannot."""
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    code, _, error = train("--data", f"folder:{tmp_path}")
    assert code == 2
    assert "torchvision is needed here: pip install torchvision" in error
    assert error.count("\n") == 1


def test_missing_tensorboard_is_named(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, error = train(*SMALL, "--epochs", "0.2", "--tensorboard")
    assert code == 2 and "pip install tensorboard" in error
    assert not Path("runs").exists()


def test_place_that_cannot_be_written(refuse):
    Path("occupied").write_text("a file, no folder")
    refuse("cannot write to occupied: File exists", *SMALL, "--out", "occupied")
    refuse("cannot write to occupied/deeper: Not a directory", *SMALL, "--out", "occupied/deeper")


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_place_without_permission(refuse, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refuse("cannot write to locked: Permission denied", *SMALL, "--out", "locked")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--arch preact_resnet20", f"--arch preact_resnet20: {RUN} was begun with preact_resnet8"),
        ("--epochs 7", f"--epochs 7.0: {RUN} was begun with 0.4"),
        ("--data cifar10", f"--data cifar10: {RUN} was begun with digits"),
    ],
)
def test_resumed_run_keeps_what_it_was_begun_with(refuse, earlier_run, argv, line):
    refuse(line, "--resume", earlier_run, *argv.split())


def test_checkpoint_of_another_architecture(train, refuse, earlier_run):
    """A checkpoint that was copied into another run's folder is not loaded."""
    other = train("--arch", "preact_resnet14", "--batch-size", 256, "--epochs", 0.2)
    assert other[0] == 0
    target = Path("runs/digits-preact_resnet14-0001/checkpoint.pt")
    shutil.copy(earlier_run / "checkpoint.pt", target)
    refuse(
        f"{target} is of another run: arch preact_resnet8, not preact_resnet14",
        "--resume",
        target.parent,
    )


def test_checkpoint_of_other_classes(refuse, train, image_folder):
    """The folder has gained a class since."""
    argv = ("--data", f"folder:{image_folder}", "--arch", "preact_resnet8", "--workers", 0)
    assert train(*argv, "--batch-size", 8, "--epochs", 1)[0] == 0
    for part in ("train", "test"):
        shutil.copytree(image_folder / part / "dark", image_folder / part / "medium")
    refuse(
        f"folder:{image_folder} has other classes than the run: medium",
        "--resume",
        "runs/folder-preact_resnet8-0001",
    )


def test_broken_checkpoint(train, earlier_run):
    path = earlier_run / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    code, _, error = train("--resume", earlier_run)
    assert code == 2 and f"not a checkpoint: {path}" in error and error.count("\n") == 1


def test_checkpoint_with_missing_weights(train, earlier_run):
    path = earlier_run / "checkpoint.pt"
    state = checkpoint.load(path, torch.device("cpu"))
    del state["model"]["conv1.weight"]
    checkpoint.save(path, state)
    code, _, error = train("--resume", earlier_run)
    assert code == 2 and f"{path} does not fit: " in error and error.count("\n") == 1


def test_diverged_loss(train):
    """At an absurd rate the loss leaves the numbers; the run says so and stops."""
    code, _, error = train(*SMALL, "--epochs", 1, "--lr", 1e30)
    assert code == 2 and "lower --lr" in error and error.count("\n") == 1


def test_error_of_a_worker_is_its_last_line():
    text = "Caught TrainingError in worker\nTraceback\nerrors.TrainingError: corrupt image: a\n"
    assert str(TrainingError(text)) == "corrupt image: a"


def test_ctrl_c_before_training(monkeypatch, train):
    """While the data are being read: nothing was begun, and that is what it says."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load_data", interrupted)
    assert train() == (130, "", "stopped; no run was begun\n")
