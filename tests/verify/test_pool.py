"""Workers are killed on time, replaced, and change nothing about the verdicts."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from luciola.verify import answer
from luciola.verify import pool as pools
from luciola.verify.pool import Pool
from luciola.verify.verdict import Verdict

HANG = "3^{9 \\cdot 99999999}"


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(size=2, seconds=10) as pool:
        yield pool


def test_algebra(pool: Pool) -> None:
    assert pool.check("(x+1)^2", "x^2+2x+1").kind == "correct"
    assert pool.check("(x+1)^2", "x^2+2x-1").kind == "wrong"
    assert pool.check("( ) (", "x").kind == "no_answer"


def test_verdicts_keep_the_order_of_their_questions() -> None:
    # References that are sums: only algebra can tell.
    pairs = [(f"<answer>\\sqrt{{{n * n + n % 2}}}</answer>", f"{n} + 0") for n in range(2, 14)]
    pairs.insert(3, (f"<answer>{HANG}</answer>", "5 + 0"))
    expected = ["correct" if n % 2 == 0 else "wrong" for n in range(2, 14)]
    expected.insert(3, "timeout")
    with Pool(size=3, seconds=1.5) as slow_and_fast:
        slow_and_fast.check_many([("x", "y")] * 3)  # the workers have started: their first answers may take longest
        assert [v.kind for v in answer.grade_many(pairs, pool=slow_and_fast)] == expected
        backwards = answer.grade_many(pairs[::-1], pool=slow_and_fast)
        assert [v.kind for v in backwards] == expected[::-1]


def test_a_worker_that_was_killed_is_a_crash_once_and_then_replaced() -> None:
    with Pool(size=1, seconds=30) as pool:
        assert pool.check("x", "x").kind == "correct"
        process = pool._idle[0]._process
        assert process is not None
        killer = threading.Timer(0.5, os.kill, (process.pid, signal.SIGKILL))
        killer.start()
        verdict = pool.check(HANG, "5")
        killer.join()
        assert (verdict.kind, verdict.reward) == ("crash", 0.0)
        assert pool.check("x", "x").kind == "correct"


def test_a_worker_that_died_while_idle_is_nobodys_crash() -> None:
    with Pool(size=1) as pool:
        pool.check("x", "x")
        process = pool._idle[0]._process
        assert process is not None
        process.kill()
        process.wait()
        assert pool.check("x", "x").kind == "correct"


@pytest.mark.skipif(sys.platform != "linux", reason="macOS cannot limit address space")
def test_memory_is_limited() -> None:
    with Pool(size=1, seconds=30, memory_mb=150) as pool:
        assert pool.check("7" * 100_000_000, "x").kind == "crash"  # its text alone is too large
        assert pool.check("x", "x").kind == "correct"


def test_threads_share_a_pool(pool: Pool) -> None:
    kinds: dict[int, str] = {}

    def ask(n: int) -> None:
        kinds[n] = pool.check(f"x + {n % 3}", "x + 1").kind

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kinds == {n: "correct" if n % 3 == 1 else "wrong" for n in range(12)}
    assert len(pool._idle) <= pool.size


def test_plain_answers_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "shared", lambda: pytest.fail("no algebra is needed"))
    assert [v.kind for v in answer.grade_many([("7", "7"), ("\\boxed{8}", "7"), ("", "7")])] == [
        "correct",
        "wrong",
        "no_answer",
    ]


def test_a_script_without_a_main_guard_ends_and_leaves_no_process() -> None:
    script = (
        "import threading\n"
        "from luciola.verify import answer, pool\n"
        "results = []\n"
        "thread = threading.Thread(target=lambda: results.append(answer.grade('\\\\boxed{x+x}', '2x')))\n"
        "thread.start(); thread.join()\n"
        "print(results[0].kind, pool.shared()._idle[0]._process.pid)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    kind, pid = done.stdout.split()
    assert kind == "correct"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_forked_child_uses_workers_of_its_own() -> None:
    ours = pools.shared()
    assert answer.grade("\\boxed{x+x}", "2x").kind == "correct"
    assert pools.shared() is ours
    here, child = (os.getpid(), pools.ALGEBRA), (os.getpid() + 1, pools.ALGEBRA)
    pools._of_process[child] = pools._of_process.pop(here)  # as a fork would find it
    try:
        assert pools.shared() is not ours
    finally:
        pools.shared().close()
        pools._of_process[here] = pools._of_process.pop(child)


FORKS = """
import os, sys, time
from luciola.verify.serving import serve

def check(how, note):
    if how != "fine" and os.fork() == 0:
        if how == "answers":
            return {"kind": "wrong", "detail": "of the child"}
        if how == "leaves":
            os.setsid()
        with open(note, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(3600)
    while how not in ("fine", "answers") and not os.path.exists(note):
        time.sleep(0.01)
    if how in ("hangs", "leaves"):
        time.sleep(3600)
    if how == "dies":
        os._exit(7)
    return {"kind": "correct", "detail": ""}

serve(check, file_mb=1)
"""


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process is dead, or will be in a moment."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            if sys.platform == "linux" and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(("how", "kind"), [("hangs", "timeout"), ("dies", "crash"), ("leaves", "timeout")])
def test_a_forked_child_that_holds_the_pipe_delays_no_verdict(workplace: Path, how: str, kind: str) -> None:
    (workplace / "forks.py").write_text(FORKS)
    note = workplace / "pid"
    with Pool(size=1, seconds=2, program=workplace / "forks.py") as pool:
        pool.check("fine", str(note))  # it has started
        began = time.monotonic()
        verdict = pool.check(how, str(note))
        took = time.monotonic() - began
        child = int(note.read_text())
        try:
            assert (verdict.kind, took < 4) == (kind, True)
            if how == "dies":
                assert took < 2 and verdict.detail == "the worker process ended (status 7)"
            if how != "leaves":  # which is in no group of ours
                assert gone(child)
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        assert pool.check("fine", str(note)).kind == "correct"


def test_a_forked_child_answers_nothing(workplace: Path) -> None:
    (workplace / "forks.py").write_text(FORKS)
    with Pool(size=1, seconds=5, program=workplace / "forks.py") as pool:
        assert [pool.check(how, "") for how in ("answers", "fine", "fine")] == [Verdict("correct", 1.0)] * 3


def test_a_pool_that_closes_ends_the_call_that_another_thread_waits_for(workplace: Path) -> None:
    (workplace / "forks.py").write_text(FORKS)
    note, verdicts = workplace / "pid", list[Verdict]()
    with Pool(size=1, seconds=60, program=workplace / "forks.py") as pool:
        thread = threading.Thread(target=lambda: verdicts.append(pool.check("hangs", str(note))))
        thread.start()
        while not note.exists() or not note.read_text():
            time.sleep(0.01)
    thread.join(5)
    assert [verdict.kind for verdict in verdicts] == ["crash"]
    assert gone(int(note.read_text()))
