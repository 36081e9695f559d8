"""Stopping well: at Ctrl-C a run ends after the step it is in, saves, and says how to go on; at NaN it stops at
once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Stop:
    """Whether the user has asked the run to end."""

    requested = False


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Within the block SIGINT and SIGTERM only set `requested`; a second one interrupts at once.

    Outside the main thread, where no handler can be set, signals act as usual.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Diverged(ValueError):
    """The loss or the gradient is no longer a finite number."""

    def __init__(self, what: str, value: float, step: int, checkpoint: Path | None) -> None:
        good = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(
            f"{what} is {value} at step {step}; the run has stopped, {good}. "
            "Lower the learning rate, raise warmup_steps or lower clip_grad_norm, and start again with another run.name"
        )
