"""Several tasks as one: taken in turn, each graded by its own rules, none of its problems on both sides."""

import random

import pytest
from pydantic import ValidationError

from luciola.tasks import Mixture
from luciola.tasks.arithmetic import Arithmetic
from luciola.tasks.countdown import Countdown

PARTS = {"sums": {"name": "arithmetic"}, "brief": {"name": "arithmetic", "thinking": False, "phrasing": "words"}}
MIXED = Mixture.model_validate({"parts": PARTS | {"countdown": {"name": "countdown", "numbers": 3}}})


def test_parts_come_in_turn_with_their_own_problems() -> None:
    problems = [MIXED.problem("train", index, 0) for index in range(6)]
    assert [problem.categories for problem in problems] == [(("part", name),) for name in MIXED.parts] * 2
    alone = [Arithmetic().problem("train", index, 0) for index in range(2)]
    assert [(p.prompt, p.truth) for p in problems[::3]] == [(p.prompt, p.truth) for p in alone]
    assert problems[2].prompt == Countdown(numbers=3).problem("train", 0, 0).prompt
    assert len({problem.key for problem in problems}) == 6


@pytest.mark.parametrize("index", range(9))
def test_each_part_asks_solves_and_grades_as_it_does_alone(index: int) -> None:
    problem = MIXED.problem("train", index, 1)
    part = list(MIXED.parts.values())[index % 3]
    own = part.problem("train", index // 3, 1)
    assert MIXED.messages(problem) == part.messages(own)
    solution = MIXED.solution(problem, random.Random(0))
    assert solution == part.solution(own, random.Random(0))
    assert MIXED.grade(problem, solution).kind == "correct"
    assert MIXED.grade(problem, MIXED.solution(MIXED.problem("train", index + 3, 1), random.Random(0))).kind == "wrong"


def test_train_and_held_out_problems_are_disjoint() -> None:
    sides = [{MIXED.problem(split, index, 0).key for index in range(300)} for split in ("train", "heldout")]
    assert not sides[0] & sides[1]


def test_a_mixture_of_nothing_or_of_mixtures_is_refused() -> None:
    for parts in ({}, {"inner": {"name": "mixture", "parts": PARTS}}):
        with pytest.raises(ValidationError):
            Mixture.model_validate({"parts": parts})
