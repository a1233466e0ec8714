"""Finds the torch whose headers the extension is compiled against, without importing it."""

import re
import sysconfig
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

MIN_TORCH = (2, 11)


class Torch(NamedTuple):
    root: Path  # holds include/ and lib/
    version: str

    @property
    def too_old(self) -> bool:
        return tuple(map(int, self.version.split(".")[:2])) < MIN_TORCH


def find_torch() -> Torch | None:
    """The torch of the environment that the package is installed into, else one on sys.path.

    In pip's isolated build sys.path shows the build requirements alone, yet sys.prefix, and with
    it the site-packages that sysconfig names, are still those of the environment pip runs in.
    """
    paths = sysconfig.get_paths()
    spec = PathFinder.find_spec("torch", [paths["purelib"], paths["platlib"]]) or find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    found = re.search(r"__version__ = '(.+)'", (root / "version.py").read_text())
    return Torch(root, found[1]) if found else None


def refuse_old(torch: Torch | None) -> None:
    """Ends the build, in words, where the torch found cannot run what we would build."""
    if torch and torch.too_old:
        minimum = ".".join(map(str, MIN_TORCH))
        raise SystemExit(
            f"fused_preact needs torch >= {minimum}, but found torch {torch.version} in "
            f"{torch.root.parent}. Upgrade it: pip install --upgrade 'torch>={minimum}'"
        )
