"""Expressions are read, never run; what they use and make is checked exactly."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luciola.tasks import Countdown, Problem
from luciola.tasks.base import split_of
from luciola.tasks.countdown import evaluate
from luciola.verify.style import format_reward

PROBLEM = Problem("", "24", "3,5,7,9->24")
GAME = Countdown(target=24, max_number=13)


def grade(expression: str, task: Countdown = GAME, problem: Problem = PROBLEM) -> str:
    return task.grade(problem, f"<think>a</think><answer>{expression}</answer>").kind


@pytest.mark.parametrize("expression", ["(3+5+7+9)", "3+5+7+9", "((9+7)+5)+3", "3+5+7+9=24", " 3 + 5+7 +9 = 24 "])
def test_right_expressions(expression: str) -> None:
    assert grade(expression) == "correct"


@pytest.mark.parametrize(
    ("expression", "task", "problem"),
    [
        ("8/(3-8/3)", GAME, Problem("", "24", "3,3,8,8->24")),
        ("8÷(3−8÷3)", GAME, Problem("", "24", "3,3,8,8->24")),
        ("9*3-3", Countdown(use_all=False), Problem("", "24", "1,3,3,9->24")),
    ],
)
def test_fractions_on_the_way_and_numbers_left_over(expression: str, task: Countdown, problem: Problem) -> None:
    assert grade(expression, task, problem) == "correct"


@pytest.mark.parametrize(
    "expression",
    [
        "24",
        "3+5+7+9+0",
        "12+12",
        "3*5+9",  # 7 is left over
        "3*5+9+7-7",
        "3+5+7+9-0",
        "3+5+7+9=25",
        "3+5+7+9=24=24",
        "3+5+7",
        "33-9",
        "3.0+5+7+9",
        "03+5+7+9",
        "3+5+7+9 # 24",
        "3+5+7+9 or 24",
        "-3+5+7+9",
        "3+5+7+ +9",
        "3**5**7**9",
        "9**9**9**9**9",
        "3//5+7+9",
        "3%5+7*9",
        "(3+5+7+9",
        "3,5,7,9",
        "3/(5-5)+7+9",
        "[3+5+7+9][0]",
        "__import__('os').system('true') or 24",
        "(lambda: 24)()",
        "True+5+7+9",
        "1e1+5+9",
        "3_0-9",
        "３+5+7+9",
        "3+5+7+9\n3+5+7+9",
        "(" * 99 + "3+5+7+9" + ")" * 93,
        "(" * 90 + "3+5+7+8" + ")" * 90,
        "3+" * 10**5 + "9",
        "9*" * 90 + "9",
        "\x00",
    ],
    ids=lambda expression: expression[:24],
)
def test_cheats(expression: str) -> None:
    assert grade(expression) in ("wrong", "no_answer")


def test_the_form_of_the_answer() -> None:
    assert GAME.grade(PROBLEM, "3+5+7+9").kind == "no_answer"
    assert GAME.grade(PROBLEM, "<think><answer>3+5+7+9</answer></think>").kind == "no_answer"
    assert GAME.grade(PROBLEM, "<answer>3+5+7+9</answer><answer>3*5+9</answer>").kind == "no_answer"


expressions = st.recursive(
    st.integers(0, 20).map(lambda n: (str(n), Fraction(n), [n])),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
        lambda parts: (
            f"({parts[0][0]}{parts[1]}{parts[2][0]})",
            {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__}[parts[1]](parts[0][1], parts[2][1]),
            parts[0][2] + parts[2][2],
        )
    ),
    max_leaves=8,
)


@given(expressions)
def test_evaluation_is_exact(case: tuple[str, Fraction, list[int]]) -> None:
    text, value, used = case
    assert evaluate(text) == (value, used)


@given(st.text(max_size=30))
def test_any_text_is_a_value_or_a_value_error(text: str) -> None:
    try:
        evaluate(text)
    except ValueError:
        return
    assert set(text.strip()) <= set("0123456789+-*/() ×÷−")


TASKS = [
    Countdown(),
    GAME,
    Countdown(numbers=2),
    Countdown(numbers=3, use_all=False, max_number=9),
    Countdown(numbers=5, max_target=999),
]


@pytest.mark.parametrize("task", TASKS, ids=str)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_problems_can_be_solved_and_belong_to_their_split(task: Countdown, split: str) -> None:
    assert split in ("train", "heldout")
    for index in range(20):
        problem = task.problem(split, index, 3)  # type: ignore[arg-type]
        assert problem == task.problem(split, index, 3)  # type: ignore[arg-type]
        assert split_of(problem.key, task.held_out_fraction) == split
        assert problem.key.endswith(f"->{problem.truth}")
        assert problem.truth in problem.prompt
        solution = task.solution(problem, random.Random(index))
        assert task.grade(problem, solution).kind == "correct"
        assert format_reward(solution) == 1.0


@given(st.sampled_from(TASKS[:4]), st.integers(0, 50), st.integers(0, 2**32), st.sampled_from([0.3, 1.0]))
@settings(deadline=None)
def test_a_solution_is_right_exactly_when_every_step_is(task: Countdown, index: int, seed: int, rate: float) -> None:
    problem = task.problem("train", index, 0)
    solution = task.solution(problem, random.Random(seed), rate)
    steps = solution.split("\n")[1:-2]
    right = all(evaluate_signed(left) == evaluate_signed(made) for left, made in (step.split("=") for step in steps))
    assert task.grade(problem, solution).kind == ("correct" if right else "wrong")


def evaluate_signed(text: str) -> Fraction:
    """As `evaluate`, for steps, whose values may be negative: (-3) is read as (0-3)."""
    return evaluate(text.replace("(-", "(0-"))[0]


def test_impossible_settings_are_said_to_be_impossible() -> None:
    with pytest.raises(ValueError, match="target=1000; allow larger or more numbers"):
        Countdown(numbers=2, max_number=5, target=1000).problem("train", 0, 0)
