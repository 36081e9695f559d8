"""Progress of a long loop: a bar with rate and time left on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL = 10.0  # seconds between lines where there is no terminal

Advance = Callable[..., None]


@contextmanager
def progress(total: int, description: str, start: int = 0, unit: str = "step") -> Iterator[Advance]:
    """Yields `advance(note="", count=1)`, to be called as each item is done; `note` says how it stands ("loss 1.23").

    `start` items were done before, by the run that is being resumed, and do not count in the rate. Everything goes to
    standard error, which leaves standard output to results.
    """
    bar = _bar if sys.stderr.isatty() else _lines
    with bar(total, description, start, unit) as advance:
        yield advance


@contextmanager
def _bar(total: int, description: str, start: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    clock = _Clock(total, start, unit)
    columns = [
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("[cyan]{task.fields[pace]}"),
        TextColumn("[dim]{task.fields[note]}"),
    ]
    with Progress(*columns, console=Console(stderr=True)) as display:
        task = display.add_task(description, total=total, completed=start, pace="", note="")

        def advance(note: str = "", count: int = 1) -> None:
            clock.count(count)
            display.update(task, completed=clock.done, pace=clock.pace(), note=note)

        yield advance


@contextmanager
def _lines(total: int, description: str, start: int, unit: str) -> Iterator[Advance]:
    clock = _Clock(total, start, unit)
    next_line = time.monotonic() + INTERVAL

    def advance(note: str = "", count: int = 1) -> None:
        nonlocal next_line
        clock.count(count)
        if time.monotonic() >= next_line or clock.done == total:
            next_line = time.monotonic() + INTERVAL
            line = f"{description} {clock.done}/{total}  {clock.pace()}  {note}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    yield advance


class _Clock:
    def __init__(self, total: int, start: int, unit: str) -> None:
        self.total, self.start, self.done, self.unit = total, start, start, unit
        self.began = time.monotonic()

    def count(self, count: int) -> None:
        self.done += count

    def pace(self) -> str:
        """Rate and time left, or at the end the time taken."""
        elapsed = max(time.monotonic() - self.began, 1e-9)
        rate = (self.done - self.start) / elapsed
        speed = f"{rate:.3g} {self.unit}s/s" if rate >= 1 or rate == 0 else f"{1 / rate:.3g} s/{self.unit}"
        if self.done >= self.total or rate == 0:
            return f"{speed}, {duration(elapsed)}"
        return f"{speed}, {duration((self.total - self.done) / rate)} left"


def duration(seconds: float) -> str:
    """A time for people: "47 s", "3 min 05 s", "2 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
