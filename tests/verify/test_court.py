"""The court: a reward that can be cheated is found out, and one that hangs or fails does not end the trial."""

from pathlib import Path

import pytest

from luciola.verify import court, own
from luciola.verify.court import Case, Finding, try_reward
from luciola.verify.pool import Pool
from luciola.verify.reward_function import load

REWARDS = """
import os, time
from luciola.verify import answer
def naive(prompt, completion, truth): return float(truth in completion)
def form(prompt, completion, truth): return 0.2 + (completion == truth)
def verdict(prompt, completion, truth): return answer.grade(completion, truth)
def erratic(prompt, completion, truth):
    if completion == "hang": time.sleep(3600)
    if completion == "leave": os._exit(1)
    if completion == "raise": raise ValueError("no")
    if completion == "exit": raise SystemExit(0)
    return float("nan") if completion == "nan" else 1.0
def single(prompt, completion, truth):
    import numpy
    return numpy.float32(completion == truth)
def text(prompt, completion, truth): return "1"
def writes(prompt, completion, truth):
    import tempfile
    with tempfile.NamedTemporaryFile("w") as file: return float(file.write(completion))
def reads(prompt, completion, truth):
    import sys
    return len(sys.stdin.read())
def too_much(prompt, completion, truth): return len(bytearray(1 << 34))
def says_crash(prompt, completion, truth):
    from luciola.verify.verdict import Verdict
    return Verdict("crash", 1.0, "no service")
number = 3
"""
CASES = [
    Case("guesses", "2+2?", "3 4 5", "4"),
    Case("honest", "2+2?", "4", "4", "honest"),
    Case("wrong", "2+2?", "5", "4", "wrong"),
]


@pytest.fixture(autouse=True)
def _rewards(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "court_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(workplace))


def outcomes(name: str, cases: list[Case], seconds: float = 20) -> dict[str, Finding]:
    return {finding.case.name: finding for finding in try_reward(f"court_rewards:{name}", cases, seconds)}


def test_a_reward_that_looks_for_the_truth_anywhere_pays_a_list_of_guesses() -> None:
    found = outcomes("naive", CASES)
    assert {name: finding.outcome for name, finding in found.items()} == {
        "guesses": "paid", "honest": "paid", "wrong": "unpaid",
    }  # fmt: skip


def test_what_any_wrong_answer_earns_is_no_pay_for_a_cheat() -> None:
    found = outcomes("form", CASES)
    assert found["guesses"].reward == found["wrong"].reward == 0.2
    assert (found["guesses"].outcome, found["honest"].outcome) == ("unpaid", "paid")


def test_verdicts_are_rewards_too() -> None:
    found = outcomes("verdict", CASES)
    assert [found[name].outcome for name in ("guesses", "honest", "wrong")] == ["unpaid", "paid", "unpaid"]
    assert found["guesses"].detail.startswith("no_answer")


def test_failures_are_told_apart_and_the_trial_goes_on() -> None:
    cases = [Case(text, "", text, "4") for text in ("hang", "leave", "raise", "exit", "nan", "fine")]
    found = outcomes("erratic", cases, seconds=1)
    assert {name: finding.outcome for name, finding in found.items()} == {
        "hang": "timeout", "leave": "crash", "raise": "crash", "exit": "crash", "nan": "crash", "fine": "paid",
    }  # fmt: skip
    assert (found["raise"].detail, found["exit"].detail) == ("ValueError: no", "SystemExit: 0")
    assert all(found[name].reward == 0 for name in ("hang", "leave", "raise", "exit", "nan"))


@pytest.mark.parametrize(
    "name", ["naive", "form", "verdict", "single", "text", "writes", "reads", "too_much", "says_crash"]
)
def test_the_court_and_the_trainer_read_a_reward_alike(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = outcomes(name, CASES)
    with Pool(size=1, seconds=own.SECONDS, memory_mb=own.MEMORY_MB, program=own.WORKER) as pool:
        monkeypatch.setattr(own, "_pool", lambda: pool)
        for case in CASES:
            trainers = own.call(f"court_rewards:{name}", case.prompt, case.completion, case.truth)
            finding = found[case.name]
            failed = name in ("text", "too_much", "says_crash")
            assert (finding.outcome == "crash") == (trainers.kind == "crash") == failed
            assert finding.reward == trainers.reward
            assert finding.detail.removeprefix(trainers.kind).strip() in trainers.detail


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("naive", 'a reward is named "module:function"'),
        ("nowhere:naive", "there is no module nowhere"),
        ("court_rewards:none", "the module court_rewards has no none"),
        ("court_rewards:number", "expected a function, got int"),
    ],
)
def test_a_reward_that_is_none(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name)
    with pytest.raises(ValueError, match=message):
        list(try_reward(name, CASES))


def test_the_suite_has_many_cases_of_each_role() -> None:
    roles = [case.role for case in court.answer_cases()]
    assert (roles.count("cheat") >= 40, roles.count("honest") >= 40, roles.count("wrong")) == (True, True, 2)
    assert sum(case.role == "cheat" for case in court.code_cases()) >= 40
