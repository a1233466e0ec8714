"""Checkpoints are whole, or the one before."""

import io
import random

import numpy as np
import pytest
import torch

from fused_preact.training import checkpoint
from fused_preact.training.errors import TrainingError


def failing_in_the_middle(file: io.BufferedIOBase) -> None:
    file.write(b"half of it")
    file.flush()
    raise OSError(28, "No space left on device")


def test_failed_write_leaves_the_old_file(tmp_path):
    """A disk that fills up costs the new checkpoint, not the old; nothing else is left behind."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1})
    with pytest.raises(TrainingError, match=r"cannot write .*checkpoint\.pt: No space left"):
        checkpoint.write_atomically(path, failing_in_the_middle)
    assert checkpoint.load(path, torch.device("cpu")) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_file_is_synchronised_before_it_takes_the_name(tmp_path, monkeypatch):
    """fsync of the file, rename, fsync of the folder: in any other order power failures cost it."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(checkpoint.os, name)
        monkeypatch.setattr(
            checkpoint.os,
            name,
            lambda *args, name=name, real=real: (calls.append(name), real(*args)),
        )
    checkpoint.save(tmp_path / "checkpoint.pt", {})
    assert calls == ["fsync", "replace", "fsync"]


def test_random_states_come_back(tmp_path):
    """Through a file, all three generators draw the same again."""

    def draw():
        return random.random(), np.random.normal(), torch.rand(1).item()

    np.random.normal()  # leaves one of its two values for the next call
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, checkpoint.random_states())
    first = draw()
    checkpoint.restore_random_states(checkpoint.load(path, torch.device("cpu")))
    assert draw() == first


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 broken"])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"not a checkpoint: .*checkpoint\.pt"):
        checkpoint.load(path, torch.device("cpu"))
