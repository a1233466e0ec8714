"""Files that are either whole or as before, and what a resumed run must remember."""

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from .errors import TrainingError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace the file by what write(file) writes; it is the old one whole until then."""
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name outlasts a power failure too
    finally:
        os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values, never code."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or ["empty"])[0]
        raise TrainingError(f"not a checkpoint: {path} ({reason})") from error
    if not isinstance(state, dict):
        raise TrainingError(f"not a checkpoint: {path}")
    return state


def seed_random_states(seed: int) -> None:
    """Let every global random generator begin with the seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of every global random generator, as plain values and tensors."""
    name, key, *rest = cast(tuple, np.random.get_state())  # key is an array
    return {
        "python": random.getstate(),
        "numpy": (name, key.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Set every global random generator back."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
