"""One picture of a run: loss and accuracy against the epoch."""

from pathlib import Path
from typing import Any

from .checkpoint import write_atomically
from .errors import require


def draw_curves(path: Path, history: list[dict[str, Any]], title: str) -> None:
    """Write curves.png: training and held-out loss beside training and held-out accuracy."""
    figure = require("matplotlib.figure", "matplotlib").Figure(
        figsize=(10, 4), layout="constrained"
    )
    figure.suptitle(title)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in history]
    marker = "o" if len(epochs) < 3 else None  # a line needs two points
    for part, color, label in (
        ("train", "tab:blue", "training"),
        ("test", "tab:orange", "held-out"),
    ):
        for axes, name, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
            values = [scale * record[f"{part}_{name}"] for record in history]
            text = f"{label}, last {values[-1]:.4g}"
            axes.plot(epochs, values, color=color, label=text, marker=marker)
    loss.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)")
    for axes in (loss, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
