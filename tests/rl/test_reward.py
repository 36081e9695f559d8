"""Rewards are the weighted sum of their parts, and a function that fails is a verdict, never a zero."""

from pathlib import Path
from typing import Any

import pytest
import torch

from luciola.engine.sequence import Completion
from luciola.recipe import RewardSection
from luciola.rl.reward import refuse_failures, rewards
from luciola.tasks.base import Problem
from luciola.verify import own
from luciola.verify.pool import Pool
from luciola.verify.verdict import Verdict, correct, wrong

FUNCTIONS = """
import os, time
def words(prompt, completion, truth): return len(completion.split()) + (prompt == "p") + (truth == "t")
def raising(prompt, completion, truth): raise KeyError("lost")
def nothing(prompt, completion, truth): return float("nan")
def text(prompt, completion, truth): return "1"
def hanging(prompt, completion, truth): time.sleep(60)
def dying(prompt, completion, truth): os._exit(0)
"""
GROUP = ["<think>one two</think><answer>1</answer>", "你好 three", "a b c a b c", ""]


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
    return rewards(section, [Problem("p", "t", "k")], [completions], [verdicts])


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
    found = earned(RewardSection(own={f"mine:{name}": 1.0}), GROUP[:1])
    assert found.verdicts[0][0].kind == kind
    assert f"mine:{name}" in found.verdicts[0][0].detail
    assert not found.known_PG.any()
    with pytest.raises(ValueError, match=rf"failed on 100% of the completions of step 8 \({kind}: .*has stopped"):
        refuse_failures(found.verdicts, 7)


def test_five_percent_of_failures_are_borne() -> None:
    refuse_failures([[Verdict("crash", 0.0), *[wrong()] * 19]], 0)
    with pytest.raises(ValueError, match="10%"):
        refuse_failures([[Verdict("timeout", 0.0), *[wrong()] * 9]], 0)


def test_a_function_that_is_not_there_is_said_before_training(functions: Any) -> None:
    own.check("mine:words")
    with pytest.raises(ValueError, match=r"'mine:worms' cannot be used .*has no worms"):
        own.check("mine:worms")
    with pytest.raises(ValueError, match="module:function"):
        RewardSection(own={"mine.words": 1.0})
