"""`luciola court`: what it lists, and the exit code that tells a script."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from luciola.cli import app
from luciola.verify import court
from luciola.verify.court import Case, Finding

REWARDS = """
import time
from luciola.verify import answer
def sound(prompt, completion, truth): return answer.grade(completion, truth)
def naive(prompt, completion, truth): return truth in completion
def strict(prompt, completion, truth): return 0
def constant(prompt, completion, truth): return 0.5
def raises(prompt, completion, truth): raise KeyError("lost")
def hangs(prompt, completion, truth): time.sleep(3600)
"""


@pytest.fixture(autouse=True)
def _few_cases(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "tried_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(workplace))
    cases = [
        Case("a wrong box", "2+2?", "\\boxed{5}", "4", "wrong"),
        Case("two boxes", "2+2?", "\\boxed{4} \\boxed{5}", "4"),
        Case("a box", "2+2?", "\\boxed{4}", "4", "honest"),
    ]
    monkeypatch.setattr(court, "answer_cases", lambda: cases)


def tried(name: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["court", f"tried_rewards:{name}", *options])


def test_a_sound_reward_passes() -> None:
    result = tried("sound")
    assert (result.exit_code, result.stdout) == (
        0,
        "paid 0 of 1 cheats and 1 of 1 honest answers, measured against 1 wrong ones; 0 of 3 calls hung or failed\n",
    )


def test_a_paid_cheat_is_listed_and_fails_the_command() -> None:
    result = tried("naive")
    assert result.exit_code == 1
    assert "paid" in result.stdout and "two boxes" in result.stdout
    assert "paid 1 of 1 cheats and 1 of 1 honest answers, measured against 1" in result.stdout
    assert result.stdout.endswith("; 0 of 3 calls hung or failed\n")


@pytest.mark.parametrize("name", ["strict", "constant"])
def test_a_reward_that_pays_no_honest_answer_fails_the_command(name: str) -> None:
    result = tried(name)
    assert result.exit_code == 1
    assert "honest, not paid" in result.stdout
    assert "paid 0 of 1 cheats and 0 of 1 honest answers" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("fewer than half of the honest answers earn more than 0")


@pytest.mark.parametrize(("refused", "code"), [(1, 0), (2, 1), (5, 1)])
def test_half_of_the_honest_answers_have_to_be_paid(monkeypatch: pytest.MonkeyPatch, refused: int, code: int) -> None:
    few = court.answer_cases()
    odd = [Case(f"an odd form {i}", "2+2?", "\\boxed{four}", "4", "honest") for i in range(refused)]
    monkeypatch.setattr(court, "answer_cases", lambda: [*few, *odd])
    result = tried("sound")
    assert result.exit_code == code
    assert f"1 of {refused + 1} honest answers" in result.stdout
    assert ("fewer than half" in result.stdout) == (code == 1)


def test_the_help_says_what_each_exit_code_means() -> None:
    text = CliRunner().invoke(app, ["court", "--help"]).stdout
    assert all(f"Exit code {code}:" in text for code in (0, 1, 2))


def test_an_honest_answer_that_is_refused_beside_one_that_is_paid_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    few = court.answer_cases()
    odd = Case("an odd form", "2+2?", "\\boxed{four}", "4", "honest")
    monkeypatch.setattr(court, "answer_cases", lambda: [*few, odd])
    result = tried("sound")
    assert result.exit_code == 0
    assert "honest, not paid" in result.stdout and "an odd form" in result.stdout
    assert "1 of 2 honest answers" in result.stdout


@pytest.mark.parametrize(("name", "outcome"), [("hangs", "timeout"), ("raises", "crash")])
def test_a_call_that_hangs_or_fails_fails_the_command_and_pays_nothing(name: str, outcome: str) -> None:
    result = tried(name, "--seconds", "0.2" if name == "hangs" else "20")
    assert result.exit_code == 1
    assert result.stdout.count(outcome) == 3
    assert "paid 0 of 1 cheats and 0 of 1 honest answers" in result.stdout
    assert "; 3 of 3 calls hung or failed\n" in result.stdout


def test_a_reward_that_always_hangs_is_given_up_after_five_calls_listed_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases = [Case(f"case {i}", "2+2?", "\\boxed{5}", "4") for i in range(30)]
    monkeypatch.setattr(court, "answer_cases", lambda: cases)
    result = tried("hangs", "--seconds", "0.2")
    assert result.exit_code == 1
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["outcome", *["timeout"] * 5]
    assert "stopped after 5 of 30 calls" in result.stderr and "tried_rewards:hangs" in result.stderr
    calls = iter([False, True, True, True, True] * 6)  # never five in a row
    monkeypatch.setattr(court, "try_reward", lambda *_: (
        Finding(case, "timeout" if next(calls) else "unpaid", 0.0) for case in cases
    ))  # fmt: skip
    assert "24 of 30 calls hung or failed" in tried("hangs").stdout


def test_what_is_found_is_printed_before_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: printed.append(str(words)))

    def findings(*_: object) -> Iterator[Finding]:
        for i, case in enumerate(court.answer_cases()):
            assert sum("crash" in words for words in printed) == i
            yield Finding(case, "crash", 0.0, "it is broken")

    monkeypatch.setattr(court, "try_reward", findings)
    assert isinstance(tried("sound").exception, SystemExit)
    assert sum("crash" in words for words in printed) == 3
