"""What a user can get wrong, as one line without a traceback."""

import importlib
from types import ModuleType


class TrainingError(Exception):
    """A mistake that the user can mend; its message is one line that says how."""

    def __init__(self, message: str) -> None:
        # A data worker hands its error on as text: a traceback that ends in "TrainingError: ...".
        super().__init__(message.rsplit("TrainingError: ", 1)[-1].strip())


class Interrupted(Exception):
    """Training was stopped by Ctrl-C or SIGTERM; the run's checkpoint is whole."""


def require(module: str, package: str) -> ModuleType:
    """The imported module, or a TrainingError that says which package to install."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # the last: an unfit torchvision
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"{package} is needed here: pip install {package} ({reason})"
        ) from error
