"""Stopping between two steps, so that the notebook, or the next run, can go on from there."""

import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .trainer import TrainResult


class TrainingInterrupted(KeyboardInterrupt):
    """An interrupt ended a run that a program had started: its next line must not take the model for a trained one.

    result: of the run so far.
    """

    def __init__(self, result: "TrainResult") -> None:
        super().__init__(f"training was interrupted; the last checkpoint is {result.checkpoint}")
        self.result = result

    def __reduce__(self) -> tuple:  # between processes
        return TrainingInterrupted, (self.result,)


class StopRequest:
    """Within this context an interrupt is a wish, and `asked` becomes true: Ctrl-C, the kernel's stop button, SIGTERM,
    and where there is such a thing the end of the terminal (SIGHUP).

    A second one is an interrupt as usual. Outside the main thread, where signals cannot be caught, nothing changes.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.asked = False
        self.to_end = False  # the process, not only the run
        self._before: dict = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup
            self._before = {number: signal.signal(number, self._ask) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self.to_end = True, number != signal.SIGINT or not at_prompt()


def at_prompt() -> bool:
    """Whether somebody types the code that runs: in a notebook, or in the interpreter."""
    return hasattr(sys, "ps1")
