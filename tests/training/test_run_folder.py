"""What a run leaves behind."""

import json
from pathlib import Path

import pytest
import torch
from training.runs import SMALL, contents

from fused_preact.training import checkpoint
from fused_preact.training.curves import draw_curves


def test_run_folder_holds_the_run(train):
    """Configuration, a line an epoch, checkpoint, picture; and a last line that sums it up."""
    code, output, error = train(*SMALL, "--epochs", "2", "--seed", "3")
    run = Path("runs/digits-preact_resnet8-0001")
    assert (code, error) == (0, "")
    assert set(contents(run)) == {"config.json", "metrics.jsonl", "checkpoint.pt", "curves.png"}

    config = json.loads((run / "config.json").read_text())
    assert config["recipe"]["arch"] == "preact_resnet8" and config["options"]["seed"] == 3
    assert config["images"] == [1433, 364] and len(config["classes"]) == 10

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert [record["step"] for record in records] == [5, 10]
    assert records[1]["train_loss"] < records[0]["train_loss"]

    assert checkpoint.load(run / "checkpoint.pt", torch.device("cpu"))["history"] == records
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")

    last = output.splitlines()[-1]
    assert f"{100 * records[1]['test_accuracy']:.2f}% of 364 held-out images" in last
    assert "images/s" in last and last.endswith(str(run))


def test_each_run_has_its_own_folder(train):
    argv = (*SMALL, "--epochs", "0.2")
    assert train(*argv)[0] == 0
    first = contents(Path("runs"))
    assert train(*argv)[0] == 0
    after = contents(Path("runs"))
    assert first.items() <= after.items()
    assert len(list(Path("runs").iterdir())) == 2


def test_same_seed_same_run(train):
    """Two runs differ in their times only, and another seed in more."""
    for seed in (0, 0, 1):
        assert train(*SMALL, "--epochs", "0.4", "--seed", seed)[0] == 0
    weights = [
        checkpoint.load(run / "checkpoint.pt", torch.device("cpu"))["model"]["conv1.weight"]
        for run in sorted(Path("runs").iterdir())
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(train, precision):
    """The parameters stay float32; the numbers are numbers."""
    code, _, error = train(*SMALL, "--epochs", "0.4", "--precision", precision)
    assert (code, error) == (0, "")
    run = Path("runs/digits-preact_resnet8-0001")
    model = checkpoint.load(run / "checkpoint.pt", torch.device("cpu"))["model"]
    floats = [value for value in model.values() if value.is_floating_point()]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in floats)


def test_folder_of_images_is_learnt(train, image_folder):
    """Dark against light noise, with data workers and a validation folder named val."""
    (image_folder / "test").rename(image_folder / "val")
    code, _, error = train("--data", f"folder:{image_folder}", "--arch", "preact_resnet8",
                           "--batch-size", 8, "--epochs", 6, "--workers", 2)  # fmt: skip
    assert (code, error) == (0, "")
    lines = Path("runs/folder-preact_resnet8-0001/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["train_loss"] < json.loads(lines[0])["train_loss"]


def test_tensorboard_gets_every_number(train):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(*SMALL, "--epochs", "2", "--tensorboard")[0] == 0
    events = EventAccumulator("runs/digits-preact_resnet8-0001/tensorboard")
    events.Reload()
    assert [event.step for event in events.Scalars("test_accuracy")] == [1, 2]
    assert {"train_loss", "test_loss", "lr", "images_per_second"} <= set(events.Tags()["scalars"])


def test_curves_of_a_single_epoch(tmp_path):
    """A run of one epoch has points to look at, where there is no line yet."""
    record = {"epoch": 1, "train_loss": 1.0, "test_loss": 2.0, "train_accuracy": 0.5,
              "test_accuracy": 0.4}  # fmt: skip
    draw_curves(tmp_path / "curves.png", [record], "one epoch")
    assert (tmp_path / "curves.png").stat().st_size > 1000
