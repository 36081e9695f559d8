"""Reward functions of one's own: a number is a reward, and whatever else happens is told as what it is."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from luciola.verify import own
from luciola.verify.pool import Pool
from luciola.verify.verdict import Verdict

MODULE = """
import os, time
def half(prompt, completion, truth): return 0.5 * (completion == truth)
def yes(prompt, completion, truth): return True
def raises(prompt, completion, truth): raise KeyError("lost")
def nan(prompt, completion, truth): return float("nan")
def infinite(prompt, completion, truth): return float("inf")
def single(prompt, completion, truth):
    import numpy
    return numpy.float32(0.5)
def verdict(prompt, completion, truth):
    from luciola.verify.verdict import Verdict
    return Verdict("wrong", 0.25, "close")
def text(prompt, completion, truth): return "1.0"
def nothing(prompt, completion, truth): pass
def hangs(prompt, completion, truth): time.sleep(3600)
def spins(prompt, completion, truth): return 9 ** 9 ** 9 ** 9
def leaves(prompt, completion, truth): os._exit(0)
def prints(prompt, completion, truth):
    print('{"kind": "correct", "reward": 100}', flush=True)
    return 0.25
def exits(prompt, completion, truth): raise SystemExit(0)
def huge(prompt, completion, truth): return 10 ** 400
def too_few(prompt): return 1.0
def too_many(prompt, completion, truth, more): return 1.0
def named_only(*, prompt, completion, truth): return 1.0
def with_default(prompt, completion, truth, weight=1.0): return weight
def anything(*arguments): return float(len(arguments))
def uses_files(prompt, completion, truth):
    import tempfile
    with open("rewards.log", "a") as log: log.write(completion + "\\n")
    with tempfile.NamedTemporaryFile("w") as file: file.write(completion)
    return 1.0
def forks(prompt, completion, truth):
    from multiprocessing import get_context
    queue = get_context("fork").Queue()
    child = get_context("fork").Process(target=queue.put, args=(0.5,))
    child.start()
    found = queue.get()
    child.join()
    return found
def reads(prompt, completion, truth):
    import sys
    return len(sys.stdin.read()) + len(os.read(0, 1))
def writes_much(prompt, completion, truth):
    with open("much", "wb") as file: file.truncate(2 << 30)
class Callable:
    def __call__(self, prompt, completion, truth): return 0.75
instance = Callable()
number = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "my_rewards.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[Pool]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        with Pool(size=1, seconds=3, memory_mb=4096, program=own.WORKER) as pool:
            yield pool
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def _small(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_pool", lambda: pool)


def call(function: str, completion: str = "4") -> Verdict:
    return own.call(f"my_rewards:{function}", "2+2?", completion, "4")


def test_a_number_is_a_reward() -> None:
    assert call("half") == Verdict("correct", 0.5)
    assert call("half", "5") == Verdict("correct", 0.0)
    assert call("yes") == Verdict("correct", 1.0)
    assert call("prints") == Verdict("correct", 0.25)
    assert call("with_default") == Verdict("correct", 1.0)
    assert call("anything") == Verdict("correct", 3.0)
    assert call("single") == Verdict("correct", 0.5)
    assert call("instance") == Verdict("correct", 0.75)


def test_a_verdict_keeps_its_kind_and_its_reward() -> None:
    assert call("verdict") == Verdict("wrong", 0.25, "close")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("raises", "KeyError: 'lost'"),
        ("nan", "or a Verdict, got nan"),
        ("infinite", "expected a finite real number"),
        ("text", "or a Verdict, got '1.0'"),
        ("nothing", "or a Verdict, got None"),
        ("huge", "OverflowError"),
        ("leaves", "the worker process ended (status 0)"),
        ("exits", "SystemExit: 0"),
    ],
)
def test_what_is_no_number_is_a_crash_and_the_next_call_works(function: str, reason: str) -> None:
    verdict = call(function)
    assert (verdict.kind, verdict.reward) == ("crash", 0.0)
    assert reason in verdict.detail and f"my_rewards:{function}" in verdict.detail
    assert call("half") == Verdict("correct", 0.5)


@pytest.mark.parametrize("function", ["hangs", "spins"])
def test_what_hangs_is_a_timeout_and_the_next_call_works(function: str) -> None:
    verdict = call(function)
    assert (verdict.kind, verdict.detail) == (
        "timeout",
        f"reward function my_rewards:{function}: no result within 3 seconds",
    )
    assert call("half").reward == 0.5


def test_a_worker_killed_from_outside_is_a_crash_once(pool: Pool) -> None:
    call("half")
    process = pool._idle[0]._process
    assert process is not None
    killer = threading.Timer(0.5, os.kill, (process.pid, signal.SIGKILL))
    killer.start()
    began = time.monotonic()
    verdict = call("hangs")
    killer.join()
    assert (verdict.kind, verdict.reward) == ("crash", 0.0)
    assert time.monotonic() - began < 2.5  # the kill, not the time limit, ended it
    assert call("half") == Verdict("correct", 0.5)


def test_files_and_processes_may_be_used_and_stdin_is_empty(pool: Pool, folder: Path) -> None:
    assert call("uses_files", "one") == call("uses_files", "two") == Verdict("correct", 1.0)
    assert (folder / "rewards.log").read_text() == "one\ntwo\n"
    assert call("forks") == Verdict("correct", 0.5)
    assert call("reads") == Verdict("correct", 0.0)
    assert call("half") == Verdict("correct", 0.5)
    assert "File too large" in call("writes_much").detail


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("my_rewards:none", "the module my_rewards has no none"),
        ("no_such_module:f", "there is no module no_such_module"),
        ("my_rewards", 'a reward is named "module:function"'),
        ("my_rewards:number", "expected a function, got int"),
        ("my_rewards:too_few", r"expected a function of \(prompt, completion, truth\), got one of \(prompt\)"),
        ("my_rewards:too_many", r"got one of \(prompt, completion, truth, more\)"),
        ("my_rewards:named_only", r"got one of \(\*, prompt, completion, truth\)"),
        ("my_rewards:Callable", "expected a function of"),
    ],
)
def test_what_cannot_be_called_is_refused_before_training(name: str, reason: str) -> None:
    with pytest.raises(
        ValueError, match=rf"the reward function '{name}' cannot be used \(.*{reason}.*mend reward\.own"
    ):
        own.check(name)
    own.check("my_rewards:half")
