"""The training loop, and the state that a checkpoint holds."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint
from .curves import draw_curves
from .data import Data, batches, epoch_order
from .errors import Interrupted, TrainingError, require
from .progress import Progress
from .recipe import Recipe, learning_rate
from .run_folder import RunFolder
from .stop_signal import StopSignal

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EVALUATION_BATCH = 256
CURVES_EVERY = 20.0  # seconds; to draw them takes a few tenths of one


@dataclass(frozen=True)
class Options:
    """What a run does beside its recipe; only precision and seed change its numbers."""

    precision: str = "fp32"
    seed: int = 0
    workers: int = 0
    save_seconds: float = 60.0
    tensorboard: bool = False


class Training:
    """A model, its optimiser, and how far they have come."""

    def __init__(self, model: nn.Module, recipe: Recipe, data: Data, options: Options) -> None:
        self.device = next(model.parameters()).device
        self.model = model.to(memory_format=torch.channels_last)
        self.recipe, self.data, self.options = recipe, data, options
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")
        # An epoch leaves out an incomplete last batch, another one each time.
        self.steps_per_epoch = len(data.train) // recipe.batch_size
        self.total_steps = max(1, round(recipe.epochs * self.steps_per_epoch))
        self.epochs = math.ceil(self.total_steps / self.steps_per_epoch)

        self.step = 0
        self.history: list[dict[str, Any]] = []  # a record for each finished epoch
        self._start_epoch()

    def _start_epoch(self) -> None:
        # Sum of losses and right answers in the epoch so far, kept on the device.
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.seconds = 0.0

    @property
    def epoch(self) -> int:
        """The epoch under way, counted from 0; it is over when its record is in the history."""
        return len(self.history)

    @property
    def done(self) -> bool:
        """Whether every epoch is over."""
        return self.epoch == self.epochs

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "history": self.history,
            "sums": self.sums,
            "seconds": self.seconds,
            "random": checkpoint.random_states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        self.sums, self.seconds = state["sums"], state["seconds"]
        checkpoint.restore_random_states(state["random"])

    def epoch_steps(self) -> tuple[int, int]:
        """How many steps the epoch under way has, and how many of them are done."""
        first = self.epoch * self.steps_per_epoch
        return min(self.steps_per_epoch, self.total_steps - first), self.step - first

    def remaining_batches(self) -> Any:
        """The batches of the epoch under way that are still to be trained on."""
        steps, done = self.epoch_steps()
        order = epoch_order(len(self.data.train), self.options.seed, self.epoch)
        size = self.recipe.batch_size
        rest = order[done * size : steps * size]
        return batches(self.data.train, rest, self.epoch, size, self.options.workers)

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """One step of SGD."""
        rate = learning_rate(self.recipe, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, sums = self._loss(images, labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.sums += sums
        self.step += 1

    @torch.no_grad()
    def evaluate(self, stop: StopSignal) -> Tensor:
        """The sums over the held-out images; incomplete if a stop is asked for."""
        self.model.eval()
        sums = torch.zeros_like(self.sums)
        order = range(len(self.data.test))
        workers = self.options.workers
        for images, labels in batches(self.data.test, order, 0, EVALUATION_BATCH, workers):
            if stop.received:
                break
            sums += self._loss(images, labels)[1]
        self.model.train()
        return sums

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A batch's mean loss, and its sum of losses and number of right answers as a tensor."""
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(self.device, non_blocking=True)
        dtype = PRECISIONS[self.options.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels)
        right = (logits.detach().argmax(1) == labels).sum()
        return loss, torch.stack([loss.detach().double() * len(labels), right.double()])

    def means(self) -> tuple[float, float, float]:
        """Mean loss, accuracy and images a second of the epoch so far."""
        count = self.epoch_steps()[1] * self.recipe.batch_size
        loss, accuracy = (self.sums / count).tolist()
        return loss, accuracy, count / self.seconds

    def finish_epoch(self, test_sums: Tensor) -> dict[str, Any]:
        """Put the epoch's record into the history."""
        train_loss, train_accuracy, speed = self.means()
        test_loss, test_accuracy = (test_sums / len(self.data.test)).tolist()
        if not math.isfinite(train_loss):
            raise TrainingError(f"the loss is {train_loss} in epoch {self.epoch + 1}: lower --lr")
        record = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(speed, 1),
        }
        self.history.append(record)
        self._start_epoch()
        return record


def train(training: Training, folder: RunFolder, identity: dict[str, Any], title: str) -> None:
    """Train to the end, leaving metrics, checkpoints and curves; Interrupted if asked to stop.

    identity goes into each checkpoint: what a run must agree on to load it.
    """
    options = training.options
    writer = _tensorboard(folder, training.epoch) if options.tensorboard else None

    def save() -> None:
        checkpoint.save(folder.checkpoint, {**identity, **training.state_dict()})

    last_save = last_curves = time.monotonic()
    with StopSignal() as stop, Progress(training.epochs) as progress:
        while not training.done:
            progress.start_epoch(training.epoch, *training.epoch_steps())
            before = time.monotonic()
            for images, labels in training.remaining_batches():
                training.train_step(images, labels)

                now = time.monotonic()
                training.seconds, before = training.seconds + now - before, now
                if progress.advance():
                    progress.status(*training.means())
                if stop.received:
                    save()
                    raise Interrupted
                if now - last_save >= options.save_seconds:
                    save()
                    last_save = before = time.monotonic()

            test_sums = training.evaluate(stop)
            if stop.received:  # the evaluation is done again on resuming
                save()
                raise Interrupted
            record = training.finish_epoch(test_sums)
            folder.write_metrics(training.history)
            save()
            last_save = time.monotonic()
            progress.finish_epoch(record)
            if writer is not None:
                for name in record.keys() - {"epoch", "step"}:
                    writer.add_scalar(name, record[name], record["epoch"])
                writer.flush()
            if last_save - last_curves >= CURVES_EVERY:
                draw_curves(folder.curves, training.history, title)
                last_curves = time.monotonic()
    draw_curves(folder.curves, training.history, title)


def _tensorboard(folder: RunFolder, epoch: int) -> Any:
    """A writer that drops what an interrupted run logged beyond its checkpoint."""
    module = require("torch.utils.tensorboard", "tensorboard")
    return module.SummaryWriter(str(folder.tensorboard), purge_step=epoch + 1)
