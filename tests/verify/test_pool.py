"""Workers are killed on time, replaced, and change nothing about the verdicts."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from luciola.verify import answer
from luciola.verify import pool as pools
from luciola.verify.pool import Pool

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
