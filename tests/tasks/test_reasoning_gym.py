"""Reasoning Gym: its problems are split as ours are, its scorers judge from another process."""

import pytest

from luciola.tasks.base import Problem
from luciola.tasks.reasoning_gym import ReasoningGym, dataset, names

LIGHT = ("chain_sum", "leg_counting", "spell_backward")


def test_problems_are_a_function_of_their_place_and_splits_are_disjoint() -> None:
    task = ReasoningGym(tasks=LIGHT)
    train, held = ([task.problem(split, i, 3) for i in range(30)] for split in ("train", "heldout"))  # type: ignore[arg-type]
    assert train == [task.problem("train", i, 3) for i in range(30)]
    assert not {p.key for p in train} & {p.key for p in held}
    assert [p.categories[0][1] for p in held[:3]] == list(LIGHT)


@pytest.mark.parametrize("name", LIGHT)
def test_the_oracle_is_right_and_another_answer_is_not(name: str) -> None:
    task = ReasoningGym(tasks=(name,))
    problem = task.problem("train", 0, 0)
    assert task.grade(problem, f"<think>hm</think><answer>{problem.truth}</answer>").kind == "correct"
    assert task.grade(problem, "<answer>qq</answer>").kind == "wrong"
    assert task.grade(problem, f"<think>{problem.truth}</think>").kind == "no_answer"


def test_a_scorer_that_fails_gives_a_verdict() -> None:
    task = ReasoningGym(tasks=LIGHT)
    broken = Problem("?", "1", "k", source='["no_such_task", 1]')
    assert task.grade(broken, "<answer>1</answer>").kind == "crash"


def test_every_task_is_there() -> None:
    assert len(names()) > 100
    assert dataset("chain_sum", 5)[0]["question"] == dataset("chain_sum", 5)[0]["question"]
    with pytest.raises(ValueError, match="did you mean chain_sum"):
        ReasoningGym(tasks=("chain_sums",))
