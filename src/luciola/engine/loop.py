"""Who drives the engine: one loop, turned by whoever waits for its results, or by a thread of its own.

Everything that touches the scheduler, the cache or a sequence happens while the loop's lock is held: steps, and between
two of them whatever other threads have asked for.
"""

from __future__ import annotations

import atexit
import contextlib
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from types import FrameType

WAIT = 0.05  # seconds after which a thread whose results another one computes looks whether they are there


class Loop:
    """`step` is called over and over and returns whether there is more to do."""

    def __init__(self, step: Callable[[], bool]) -> None:
        self._step = step
        self._asked: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._driving, self._starting = threading.Lock(), threading.Lock()
        self._driver: threading.Thread | None = None
        self._closed = False
        self._fresh = False  # something was taken in since the driver's last step began
        _loops.add(self)

    def ask(self, request: Callable[[], None]) -> None:
        """Have `request`, which raises nothing, done before the next step, or now if nobody is at one."""
        self._asked.put(request)
        self._tend()

    def turn(self) -> None:
        """One step, unless another thread is at it; then wait for a moment. Ctrl-C waits for the end of the step."""
        if interrupts.holding:
            self._turn()
        else:
            with interrupts.held():
                self._turn()
        interrupts.due()
        self._tend()

    def _turn(self) -> None:
        if self._driving.acquire(timeout=WAIT):
            try:
                self._take_in()
                self._step()
            finally:
                self._driving.release()

    def drive(self, request: Callable[[], None]) -> None:
        """Have `request` done, and turn in a thread of the loop's own until there is nothing more to do."""
        self._asked.put(request)
        with self._starting:
            if self._driver is None and not self._closed:
                self._driver = threading.Thread(target=self._drive, name="luciola-engine", daemon=True)
                self._driver.start()

    @property
    def idle(self) -> bool:
        """Whether nothing has been asked for and no thread of its own runs."""
        return self._driver is None and self._asked.empty()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody takes a step meanwhile, and all that was asked for has been done."""
        with self._driving:
            self._take_in()
            yield
        self._tend()

    def close(self) -> None:
        """Stop the thread after its step."""
        self._closed = True
        driver = self._driver
        if driver is not None and driver is not threading.current_thread():
            driver.join()

    def _drive(self) -> None:
        while True:
            with self._driving:
                self._take_in()
                self._fresh = False
                busy = self._step()
            with self._starting:
                # Whoever asked for something else may have taken a request in meanwhile, without a step.
                if self._closed or not (busy or self._fresh or not self._asked.empty()):
                    self._driver = None
                    return

    def _tend(self) -> None:
        """Whoever holds the lock when something is asked for comes by here after letting go of it."""
        while not self._asked.empty():
            with interrupts.held():
                if not self._driving.acquire(blocking=False):
                    return
                try:
                    self._take_in()
                finally:
                    self._driving.release()

    def _take_in(self) -> None:
        while not self._asked.empty():  # only who holds the lock takes anything out
            self._fresh = True  # before it is out: the driver sees one or the other
            self._asked.get_nowait()()


class _Interrupts:
    """Ctrl-C takes effect between steps: what a step has written down must not be broken off in the middle.

    Setting a signal's handler costs a twentieth of a small model's step, so `held` does it once for many steps, and
    `due` says after each of them what is to happen.
    """

    def __init__(self) -> None:
        self._caught: list[tuple[int, FrameType | None]] = []
        self._before: Callable[[int, FrameType | None], object] | None = None  # None: nothing is held

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile Ctrl-C is only noted, until `due` is called, or this ends."""
        before = None if self.holding else signal.getsignal(signal.SIGINT)
        if not callable(before):
            yield
            return
        try:
            self._before = before
            signal.signal(signal.SIGINT, lambda number, frame: self._caught.append((number, frame)))
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            try:
                self.due()
            finally:
                self._before = None

    @contextlib.contextmanager
    def let_go(self) -> Iterator[None]:
        """Within `held`: meanwhile Ctrl-C does what it always does."""
        before = self._before
        if before is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.due()
        ours = signal.signal(signal.SIGINT, before)
        try:
            self._before = None
            yield
        finally:
            signal.signal(signal.SIGINT, ours)
            self._before = before

    @property
    def holding(self) -> bool:
        """Whether it is held already, or need not be, for this thread is never interrupted."""
        return self._before is not None or threading.current_thread() is not threading.main_thread()

    def due(self) -> None:
        """Do now what Ctrl-C does where nothing is held, if it has come."""
        if self._caught and threading.current_thread() is threading.main_thread() and self._before is not None:
            first, self._caught = self._caught[0], []
            self._before(*first)


interrupts = _Interrupts()

_loops: weakref.WeakSet[Loop] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that is inside PyTorch when the interpreter goes takes the process down with it."""
    for loop in list(_loops):
        loop.close()
