"""Ctrl-C and SIGTERM as a flag that the loop reads after each step."""

import signal
from types import FrameType, TracebackType

from .errors import Interrupted


class StopSignal:
    """Inside, the first SIGINT or SIGTERM sets `received`; another acts as it did before."""

    def __enter__(self) -> "StopSignal":
        self.received = False
        self.before = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._restore()
        # SIGTERM sent to all processes at once kills data workers, which torch reports as an error.
        if self.received and isinstance(error, RuntimeError) and "worker" in str(error):
            raise Interrupted from error

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self.received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
