"""`luciola court`: what it lists, and the exit code that tells a script."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from luciola.cli import app
from luciola.verify import court
from luciola.verify.court import Case

REWARDS = """
import time
from luciola.verify import answer
def sound(prompt, completion, truth): return answer.grade(completion, truth)
def naive(prompt, completion, truth): return truth in completion
def strict(prompt, completion, truth): return 0
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
        "paid 0 of 1 cheats and 1 of 1 honest answers; 0 calls hung or failed\n",
    )


def test_a_paid_cheat_is_listed_and_fails_the_command() -> None:
    result = tried("naive")
    assert result.exit_code == 1
    assert "paid" in result.stdout and "two boxes" in result.stdout
    assert result.stdout.endswith("paid 1 of 1 cheats and 1 of 1 honest answers; 0 calls hung or failed\n")


def test_refused_honest_answers_are_listed_and_hanging_calls_fail_the_command() -> None:
    result = tried("strict")
    assert result.exit_code == 0
    assert "honest, not paid" in result.stdout
    result = tried("hangs", "--seconds", "0.2")
    assert result.exit_code == 1
    assert result.stdout.count("timeout") == 3
    assert result.stdout.endswith("3 calls hung or failed\n")


def test_a_reward_that_is_not_there_is_one_sentence() -> None:
    result = tried("none")
    assert result.exit_code == 1
    assert result.stderr == "error: the reward tried_rewards:none: the module tried_rewards has no none\n"
