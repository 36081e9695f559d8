"""Worker processes that compare answers by algebra, each killed when it is late or too large.

Simplifying one hostile answer can take sympy for ever, in C code that no signal or thread interrupts, and off the main
thread no alarm can even be set. So the bound is a process: it starts on first use, serves answer after answer, and is
killed and replaced when it misses its deadline. It is an interpreter of its own, not a fork, and thus holds no copy of
torch's threads or of the caller's `__main__`.
"""

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from luciola import hardware
from luciola.verify import extract, plain
from luciola.verify.verdict import Verdict, no_answer

SECONDS = 5.0  # of wall time for one comparison; 99 % of MATH's take under a tenth
MEMORY_MB = 1024
_START_SECONDS = 60.0  # for an interpreter to import sympy on a machine that is busy with training
_END_SECONDS = 1.0  # for a process that has closed its pipes to be gone
_LOOK_SECONDS = 0.1  # between looks at whether a process from which nothing comes is still there
_REPLACE_AFTER = 2000  # comparisons; sympy's caches grow

ALGEBRA = Path(__file__).with_name("worker.py")


class Pool:
    """Up to `size` worker processes, shared by any number of threads.

    Args:
        size: how many comparisons may run at once; by default one for each core this process may use, at most four.
        seconds: wall time for one comparison.
        memory_mb: address space of one worker (on Linux; macOS cannot limit it).
        program: the worker's file, which calls `luciola.verify.serving.serve`; by default algebra's.
    """

    def __init__(
        self,
        size: int | None = None,
        seconds: float = SECONDS,
        memory_mb: int = MEMORY_MB,
        program: Path = ALGEBRA,
    ) -> None:
        self.size = size or min(4, hardware.cores())
        self.seconds = seconds
        self.memory_mb = memory_mb
        self.program = program
        self._places = threading.BoundedSemaphore(self.size)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()

    def check(self, *request: object) -> Verdict:
        """The verdict of a worker, algebra's for (answer, truth)."""
        reply = self.ask(*request)
        return Verdict(reply["kind"], reply.get("reward", float(reply["kind"] == "correct")), reply["detail"])

    def ask(self, *request: object, seconds: float | None = None) -> dict[str, Any]:
        """What a worker replies, or a "kind" out of VERIFIER_FAILED with a "detail" where it fails. Waits while all are
        busy; the wait is not counted as time.

        Args:
            seconds: wall time for this request; by default the pool's.
        """
        with self._places:
            with self._lock:
                worker = self._idle.pop() if self._idle else _Worker(self.program, self.memory_mb)
                self._busy.add(worker)
            try:
                return worker.ask(request, seconds or self.seconds)
            finally:
                with self._lock:
                    self._busy.discard(worker)
                    self._idle.append(worker)

    def check_many(self, requests: Sequence[tuple[object, ...]]) -> list[Verdict]:
        """`check` for each request, side by side; verdicts in the order of the requests."""
        if len(requests) < 2:
            return [self.check(*request) for request in requests]
        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(lambda request: self.check(*request), requests))

    def close(self) -> None:
        """End all workers. The pool may be used again: they start anew."""
        with self._lock:
            for worker in self._idle:
                worker.kill()
            for worker in self._busy:  # the thread that waits for it notices, and does the rest
                worker.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def grade_many(pairs: Sequence[tuple[str, str]], pool: Pool | None = None) -> list[Verdict]:
    """Verdicts for (completion, truth) pairs, in their order, whichever comparison ends first.

    Most are decided in this process; what needs algebra goes to `pool`, by default the one shared by this process.

    Raises:
        ValueError: when a truth is blank.
    """
    verdicts: dict[int, Verdict] = {}
    algebra: dict[tuple[str, str], list[int]] = {}  # equal pairs, of which a group of samples has many, are asked once
    for index, (completion, truth) in enumerate(pairs):
        found = extract.find(completion)
        if found.answer is None:
            verdicts[index] = no_answer(found.why)
        elif (verdict := plain.compare(found.answer, truth)) is not None:
            verdicts[index] = verdict
        else:
            algebra.setdefault((found.answer, truth), []).append(index)
    if algebra:
        checked = (pool or shared()).check_many(list(algebra))
        for places, verdict in zip(algebra.values(), checked, strict=True):
            verdicts.update(dict.fromkeys(places, verdict))
    return [verdicts[index] for index in range(len(pairs))]


# by process id: a forked child must not share its parent's pipes
_of_process: dict[tuple[int, Path], Pool] = {}
_choosing = threading.Lock()


def shared(program: Path = ALGEBRA, seconds: float = SECONDS, memory_mb: int = MEMORY_MB) -> Pool:
    """The pool of this program that all callers in this process share; it closes when the process ends."""
    with _choosing:
        if (os.getpid(), program) not in _of_process:
            pool = _of_process[os.getpid(), program] = Pool(seconds=seconds, memory_mb=memory_mb, program=program)
            atexit.register(pool.close)
        return _of_process[os.getpid(), program]


class _Worker:
    """One process, started when first asked and again after it was killed."""

    def __init__(self, program: Path, memory_mb: int) -> None:
        self._program = program
        self._memory_mb = memory_mb
        self._process: subprocess.Popen[bytes] | None = None
        self._served = 0

    def ask(self, request: Sequence[object], seconds: float) -> dict[str, Any]:
        process = self._running()
        self._served += 1
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps([*request, seconds]).encode() + b"\n")
            process.stdin.flush()
            reply: dict[str, Any] = _read_line(process, seconds)
        except TimeoutError:
            self.kill()
            return {"kind": "timeout", "detail": f"no result within {seconds:g} seconds"}
        except (OSError, EOFError):
            with suppress(subprocess.TimeoutExpired):  # its pipes close a moment before it has a status of its own
                process.wait(_END_SECONDS)
            self.kill()
            return {"kind": "crash", "detail": f"the worker process ended (status {process.returncode})"}
        except BaseException:  # an interrupt must not leave this reply in the pipe for the next answer
            self.kill()
            raise
        return reply

    def kill(self) -> None:
        if self._process is not None:
            _end(self._process)
            self._process = None

    def stop(self) -> None:
        if (process := self._process) is not None:
            _kill_group(process)

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and (self._process.poll() is not None or self._served >= _REPLACE_AFTER):
            self.kill()
        if self._process is None:
            self._process, self._served = self._start(), 0
        return self._process

    def _start(self) -> "subprocess.Popen[bytes]":
        # -P keeps the file names of this folder out of the child's imports. A session of its own, so that Ctrl-C
        # reaches only the parent; a fixed hash seed, so that the order of sympy's sets is the same in every worker.
        process = subprocess.Popen(
            [sys.executable, "-P", str(self._program), str(self._memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            _read_line(process, _START_SECONDS)
        except (TimeoutError, EOFError) as error:
            _end(process)
            raise RuntimeError(
                f"The process that judges answers did not start; `python {self._program} 1024` may say why."
            ) from error
        return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a worker with its children. One that has left for a session of its own lives on, but is not waited for."""
    _kill_group(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(OSError):  # of a request that nobody has read
            pipe.close()


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError, PermissionError):  # nobody is left in it (macOS: only the dead)
        os.killpg(process.pid, signal.SIGKILL)


def _read_line(process: "subprocess.Popen[bytes]", seconds: float) -> Any:
    """The next line of JSON; TimeoutError when it is late, EOFError when the process has ended."""
    assert process.stdout is not None
    descriptor, deadline, line = process.stdout.fileno(), time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            # The pipe alone does not tell of an end: a child that the process has forked holds it open.
            left, ended = deadline - time.monotonic(), process.poll() is not None
            if not selector.select(0.0 if ended else max(0.0, min(left, _LOOK_SECONDS))):
                if ended:
                    raise EOFError
                if left <= 0:
                    raise TimeoutError
                continue
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise EOFError
            line += piece
    return json.loads(line)
