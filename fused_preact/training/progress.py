"""The progress bar of a run, and a line for each finished epoch."""

import time
from types import TracebackType
from typing import Any

from .errors import require


class Progress:
    """A bar for the epoch under way; finished epochs become lines above it."""

    def __init__(self, epochs: int) -> None:
        rich = require("rich.progress", "rich")
        self.epochs = epochs
        self.bar = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(bar_width=30),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[status]}"),
            rich.TimeRemainingColumn(),
            transient=True,
        )
        self.task = self.bar.add_task("", total=None, status="")
        self.shown = 0.0

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.bar.stop()

    def start_epoch(self, epoch: int, steps: int, done: int) -> None:
        """Begin the bar of an epoch, counted from 0, of which some steps are done."""
        description = f"epoch {epoch + 1}/{self.epochs}"
        self.bar.reset(self.task, total=steps, completed=done, description=description, status="")

    def advance(self) -> bool:
        """Move on by a step; True now and then, when it is time for a new status."""
        self.bar.advance(self.task)
        now = time.monotonic()
        if now - self.shown < 0.25:
            return False
        self.shown = now
        return True

    def status(self, loss: float, accuracy: float, speed: float) -> None:
        """Show beside the bar how the epoch does."""
        text = f"loss {loss:.3f}  train {100 * accuracy:.1f}%  {speed:,.0f} images/s"
        self.bar.update(self.task, status=text)

    def finish_epoch(self, record: dict[str, Any]) -> None:
        """Print an epoch's line."""
        self.bar.console.print(
            f"epoch {record['epoch']:>3}/{self.epochs}"
            f"  loss {record['train_loss']:.4f}"
            f"  train {100 * record['train_accuracy']:.2f}%"
            f"  held-out {100 * record['test_accuracy']:.2f}%"
            f"  {record['images_per_second']:,.0f} images/s",
            highlight=False,
            soft_wrap=True,
        )
