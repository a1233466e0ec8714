"""A run's folder: config.json, metrics.jsonl, checkpoint.pt, curves.png."""

import json
from pathlib import Path
from typing import Any

from .checkpoint import write_atomically
from .errors import TrainingError


class RunFolder:
    """Where a run keeps what it is and what it reached."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoint = path / "checkpoint.pt"
        self.curves = path / "curves.png"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def create(cls, parent: Path, name: str) -> "RunFolder":
        """A new folder parent/name-NNNN; a run never lands in another's."""
        try:
            parent.mkdir(parents=True, exist_ok=True)
            number = 1
            while True:
                path = parent / f"{name}-{number:04d}"
                try:
                    path.mkdir()
                    return cls(path)
                except FileExistsError:
                    number += 1
        except OSError as error:
            raise TrainingError(f"cannot write to {parent}: {error.strerror}") from error

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of an earlier run."""
        folder = cls(path)
        if not folder.config.is_file():
            raise TrainingError(f"{path} is no run: it has no config.json")
        return folder

    def write_config(self, config: dict[str, Any]) -> None:
        """Write config.json."""
        text = json.dumps(config, indent=2) + "\n"
        write_atomically(self.config, lambda file: file.write(text.encode()))

    def read_config(self) -> dict[str, Any]:
        """Read config.json."""
        try:
            return json.loads(self.config.read_text())
        except (OSError, ValueError) as error:
            raise TrainingError(f"{self.config}: {error}") from error

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl, a line an epoch; whole, so that none is ever there twice."""
        text = "".join(json.dumps(record) + "\n" for record in history)
        write_atomically(self.metrics, lambda file: file.write(text.encode()))
