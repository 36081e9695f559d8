"""Rewards are the weighted sum of their parts, and a function that fails is a verdict, never a zero."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from luciola.engine.sequence import Completion
from luciola.recipe import RewardSection
from luciola.rl.reward import by_function, refuse_failures, rewards
from luciola.tasks.base import Problem
from luciola.verify import own
from luciola.verify.pool import Pool
from luciola.verify.verdict import Verdict, correct, wrong

FUNCTIONS = """
import os, time
def words(prompt, completion, truth): return len(completion.split()) + (prompt == "p") + (truth == "t")
def raising(prompt, completion, truth):
    if completion == "bad": raise KeyError("lost")
    return 1.0
def nothing(prompt, completion, truth):
    if completion == "bad": return float("nan")
    return 1.0
def text(prompt, completion, truth):
    if completion == "bad": return "1"
    return 1.0
def hanging(prompt, completion, truth):
    if "bad" in completion: time.sleep(60)
    return 1.0
def dying(prompt, completion, truth):
    if completion == "bad": os._exit(0)
    return 1.0
"""
GROUP = ["<think>one two</think><answer>1</answer>", "你好 three", "a b c a b c", ""]

PROBLEM = Problem("p", "t", "k")


@pytest.fixture
def functions(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (workplace / "mine.py").write_text(FUNCTIONS)
    pool = Pool(size=1, seconds=1.0, memory_mb=own.MEMORY_MB, program=own.WORKER)
    monkeypatch.setattr(own, "_pool", lambda: pool)
    yield own
    pool.close()


def earned(section: RewardSection, texts: list[str] = GROUP) -> Any:
    verdicts = [correct() if i == 0 else wrong() for i in range(len(texts))]
    completions = [Completion(text, [0] * (len(text) + 1), "stop") for text in texts]
    return rewards(section, [PROBLEM], [completions], [verdicts], called(section, texts), step=7)


def called(section: RewardSection, texts: list[str]) -> dict[str, list[list[Verdict]]]:
    """What each function of the section says of one problem's completions, given as a rollout gives them."""
    found = {}
    for name in section.own:
        with by_function(name, [PROBLEM]) as judging:
            for text in texts:
                judging.add(0, text)
            found[name] = refuse_failures(judging.each([texts]), [PROBLEM], [len(texts)], 7)
    return found


def test_the_total_is_the_weighted_sum_of_the_logged_parts(functions: Any) -> None:
    weights = {"accuracy": 1.0, "format": 0.5, "length": 0.25, "repetition": 0.125, "language": 2.0, "mine:words": -0.5}
    section = RewardSection(
        **{k: v for k, v in weights.items() if ":" not in k}, own={"mine:words": weights["mine:words"]}
    )
    found = earned(section)
    assert found.parts.keys() == weights.keys()
    by_hand = sum(weights[name] * part for name, part in found.parts.items())
    torch.testing.assert_close(found.total_PG, by_hand)
    assert found.parts["mine:words"].tolist() == [[4.0, 4.0, 8.0, 2.0]]
    assert bool(found.known_PG.all())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("raising", "crash"), ("nothing", "crash"), ("text", "crash"), ("hanging", "timeout"), ("dying", "crash")],
)
def test_a_function_that_fails_gives_a_verdict_and_no_known_reward(functions: Any, name: str, kind: str) -> None:
    texts = ["fine"] * 19
    texts.insert(7, "bad")
    found = earned(RewardSection(own={f"mine:{name}": 1.0}), texts)
    assert found.verdicts[0][7].kind == kind
    assert f"mine:{name}" in found.verdicts[0][7].detail
    assert found.known_PG[0].tolist() == [text == "fine" for text in texts]
    with pytest.raises(
        ValueError, match=rf"failed on 1 of the first 1 completions of step 8,.*\({kind}: .*has stopped"
    ):
        earned(RewardSection(own={f"mine:{name}": 1.0}), ["bad"])


def test_a_function_that_always_hangs_stops_the_step_soon(functions: Any) -> None:
    """40 completions at a second each, one at a time: over 5 % have failed with the third."""
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=r"failed on 3 of the first 3 completions of step 8, which is over 5% of its 40"
    ):
        earned(RewardSection(own={"mine:hanging": 1.0}), [f"bad {i}" for i in range(40)])
    assert time.monotonic() - began < 20


def test_five_percent_of_failures_are_borne() -> None:
    verdicts = [Verdict("crash", 0.0), *[wrong()] * 11, *[correct()] * 8]
    assert refuse_failures(verdicts, [PROBLEM] * 2, [4, 16], 0) == [verdicts[:4], verdicts[4:]]


def test_the_verdicts_after_too_many_failures_are_not_waited_for() -> None:
    def verdicts() -> Iterator[Verdict]:
        yield from [wrong(), correct(), wrong(), Verdict("timeout", 0.0, "late"), correct(), Verdict("crash", 0.0)]
        raise AssertionError("waited for one too many")

    problems = [Problem(f"question {p}", f"truth {p}", "k") for p in range(3)]
    with pytest.raises(
        ValueError,
        match=r"on 2 of the first 6 completions of step 1, .* 5% of its 20 \(timeout: late; first at the problem "
        r"'question 1', truth 'truth 1'\)",
    ):
        refuse_failures(verdicts(), problems, [2, 3, 15], 0)


def test_failures_of_the_task_and_of_a_function_count_together(functions: Any) -> None:
    """Each alone fails on one of twenty, which is borne; on two of twenty the run stops."""
    texts = ["fine"] * 19 + ["bad"]
    completions = [Completion(text, [0], "stop") for text in texts]
    section = RewardSection(own={"mine:raising": 1.0})
    of_function = called(section, texts)
    for failing, borne in ((19, True), (0, False)):
        verdicts = [wrong()] * 20
        verdicts[failing] = Verdict("crash", 0.0, "the task")
        if borne:
            assert rewards(section, [PROBLEM], [completions], [verdicts], of_function, 0).known_PG.sum() == 19
        else:
            with pytest.raises(ValueError, match="failed on 2 of the first 20"):
                rewards(section, [PROBLEM], [completions], [verdicts], of_function, 0)


def test_a_function_that_is_not_there_is_said_before_training(functions: Any) -> None:
    own.check("mine:words")
    with pytest.raises(ValueError, match=r"'mine:worms' cannot be used .*has no worms"):
        own.check("mine:worms")
    with pytest.raises(ValueError, match="module:function"):
        RewardSection(own={"mine.words": 1.0})
