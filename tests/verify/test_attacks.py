"""Every program of programs.toml earns nothing, ends within its limits, and leaves no process and no file behind."""

import os
import time
from pathlib import Path

import pytest

from luciola.verify import code, court, sandbox

pytestmark = pytest.mark.skipif(bool(sandbox.unavailable()), reason=sandbox.unavailable() or "")
CASES = court.code_cases()


def ours() -> set[int]:
    """The processes on this machine that run for a sandbox."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and b"/tmp/inside.py" in (folder / "cmdline").read_bytes().split(b"\0"):
                found.add(int(folder.name))
            if state != "Z" and b"/tmp/solution.py" in (folder / "cmdline").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def test_there_are_many_and_each_is_named_once() -> None:
    attacks = [case for case in CASES if case.role == "cheat"]
    assert len(attacks) >= 40
    assert len({case.name for case in attacks}) == len(attacks)


def test_an_honest_program_passes_the_tests_of_every_attack() -> None:
    honest = {case.prompt: case.completion for case in CASES if case.role == "honest"}
    pairs = {(honest[case.prompt], case.truth) for case in CASES}
    for verdict in code.grade_many([(completion, code.read_tests(truth)) for completion, truth in sorted(pairs)]):
        assert verdict.kind == "correct", verdict


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_an_attack_earns_and_leaves_behind(case: court.Case) -> None:
    before = ours()
    start = time.monotonic()
    seconds = 10.0 if case.role == "honest" else 1.0
    verdict = code.grade(case.completion, code.read_tests(case.truth), seconds=seconds, memory_mb=256)
    assert time.monotonic() - start < 30
    if case.role == "honest":
        assert (verdict.kind, verdict.reward) == ("correct", 1.0)
        return
    assert (verdict.kind, verdict.reward) == ("wrong", 0.0), verdict
    left, limit = ours() - before, time.monotonic() + 20
    while left & ours():  # other tests' programs end; what an attack has left behind would not
        assert time.monotonic() < limit, f"still there: {sorted(left & ours())}"
        time.sleep(0.1)
    for folder in ("/", "/tmp", "/usr", "/usr/bin", "/usr/local", "/etc", "/dev", "/dev/shm", "/var/tmp", Path.home()):
        assert not os.path.exists(os.path.join(folder, "luciola-was-here"))
