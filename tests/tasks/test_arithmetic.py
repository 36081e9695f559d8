"""Every solution can be checked line by line; a wrong line means a wrong answer; held-out sums are never trained on."""

import random
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from luciola.tasks import Arithmetic, Problem, TaskConfig
from luciola.tasks.base import Split, split_of
from luciola.verify.style import format_reward

BOTH = Arithmetic(operations=("+", "-"), max_digits=4)
STEP = re.compile(r"(?P<value>[0-9]+)(?P<op>[+-])(?P<other>[0-9])[+-](?P<carry>[01])=(?P<result>[0-9]+)")


def problem_of(a: int, op: str, b: int) -> Problem:
    return Problem(f"{a}{op}{b}", str(a + b if op == "+" else a - b), f"{a}{op}{b}")


def steps_are_right(solution: str) -> bool:
    """Check each step by itself. Of a difference, the digit must be right and the borrowed ten be needed."""
    for step in STEP.finditer(solution):
        value, other, carry, result = (int(step[name]) for name in ("value", "other", "carry", "result"))
        if step["op"] == "+" and value + other + carry != result:
            return False
        if step["op"] == "-" and (value - other - carry != result or (value > 9) != (value % 10 < other + carry)):
            return False
    return True


def test_the_solutions_of_the_docstring() -> None:
    total = BOTH.solution(problem_of(345, "+", 678), random.Random(0))
    assert total == "<think>\n5+8+0=13\n4+7+1=12\n3+6+1=10\n</think>\n<answer>1023</answer>"
    difference = BOTH.solution(problem_of(345, "-", 692), random.Random(0))
    assert difference == "<think>\n-(692-345)\n12-5-0=7\n09-4-1=4\n06-3-0=3\n</think>\n<answer>-347</answer>"


numbers = st.integers(min_value=0, max_value=10**6)


@given(numbers, st.sampled_from("+-"), numbers)
def test_faultless_solutions_are_right_in_every_step_and_form(a: int, op: str, b: int) -> None:
    problem = problem_of(a, op, b)
    solution = BOTH.solution(problem, random.Random(0))
    assert steps_are_right(solution)
    assert len(STEP.findall(solution)) == len(str(max(a, b)))
    assert BOTH.grade(problem, solution).kind == "correct"
    assert format_reward(solution) == 1.0


@given(numbers, st.sampled_from("+-"), numbers, st.integers(0, 2**32), st.sampled_from([0.1, 0.5, 1.0]))
def test_an_answer_is_wrong_exactly_when_a_carry_was_forgotten(
    a: int, op: str, b: int, seed: int, error_rate: float
) -> None:
    problem = problem_of(a, op, b)
    faultless = BOTH.solution(problem, random.Random(seed))
    solution = BOTH.solution(problem, random.Random(seed), error_rate)
    assert BOTH.grade(problem, solution).kind == ("correct" if solution == faultless else "wrong")
    silent = Arithmetic(operations=("+", "-"), thinking=False).solution(problem, random.Random(seed), error_rate)
    assert silent == solution[solution.index("<answer>") :]


def test_carries_are_forgotten_as_often_as_asked() -> None:
    sums = [problem_of(199, "+", 801) for _ in range(2000)]  # without the first carry there is no second one
    wrong = sum(BOTH.grade(p, BOTH.solution(p, random.Random(i), 0.6)).kind == "wrong" for i, p in enumerate(sums))
    assert wrong / 2000 == pytest.approx(0.6 + 0.4 * 0.6, abs=0.03)


def test_solutions_of_equal_length_numbers_have_one_layout() -> None:
    task = Arithmetic(min_digits=3, max_digits=3)
    for index in range(50):
        problem = task.problem("train", index, 0)
        steps = task.solution(problem, random.Random(0)).split("\n")[1:-2]
        assert [len(step) for step in steps] == [8, 8, 8]


def test_without_thinking_the_answer_stands_alone() -> None:
    task = Arithmetic(thinking=False)
    problem = problem_of(7, "+", 8)
    assert task.solution(problem, random.Random(0)) == "<answer>15</answer>"
    assert task.grade(problem, "<answer>15</answer>").kind == "correct"


@pytest.mark.parametrize("seed", [0, 1])
def test_train_and_heldout_are_disjoint_also_with_the_numbers_exchanged(seed: int) -> None:
    task = Arithmetic(operations=("+", "-"), max_digits=2)

    def seen(split: Split) -> set[tuple[str, frozenset[str]]]:
        keys = [task.problem(split, index, seed).key for index in range(3000)]
        return {("+" if "+" in key else "-", frozenset(re.split(r"[+-]", key))) for key in keys}

    assert not seen("train") & seen("heldout")
    assert len(seen("heldout")) > 300  # 10 % of some 10,000 unordered problems, as far as 3000 draws reach


def test_the_share_held_out() -> None:
    held_out = sum(split_of(f"{a}+{b}", 0.1) == "heldout" for a in range(100) for b in range(a, 100))
    assert held_out / 5050 == pytest.approx(0.1, abs=0.015)


def test_problems_depend_on_their_arguments_alone() -> None:
    task = Arithmetic(operations=("+", "-"))
    code = (
        "from luciola.tasks import Arithmetic\n"
        "task = Arithmetic(operations=('+', '-'))\n"
        "print([task.problem('heldout', index, 7) for index in range(20)])"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "12345"}
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    here = [task.problem("heldout", index, 7) for index in range(20)]
    assert elsewhere.stdout.strip() == str(here)
    assert task.problem("heldout", 3, 8) != here[3]
    assert task.size("train") is None


def test_every_wording_is_used_and_means_the_problem() -> None:
    for phrasing, sign in (("symbols", True), ("words", False)):
        task = Arithmetic(operations=("+", "-"), phrasing=phrasing)
        problems = [task.problem("train", index, 0) for index in range(200)]
        for problem in problems:
            a, b = re.split(r"[+-]", problem.key)
            assert re.search(rf"\b{a}\b.*\b{b}\b", problem.prompt)
            assert bool(re.fullmatch(r"[0-9 +=?-]+", problem.prompt)) == sign
        skeletons = {re.sub("[0-9]+", "n", problem.prompt) for problem in problems}
        assert len(skeletons) >= 10


def test_operands_have_the_digits_asked_for() -> None:
    task = Arithmetic(min_digits=2, max_digits=3)
    lengths = {len(part) for i in range(200) for part in task.problem("train", i, 0).key.split("+")}
    assert lengths == {2, 3}
    small = Arithmetic(max_value=20)
    values = {int(part) for i in range(500) for part in small.problem("train", i, 0).key.split("+")}
    assert values == set(range(21))


def test_an_empty_split_is_said_to_be_empty() -> None:
    with pytest.raises(ValueError, match="belongs to the heldout split; raise max_digits"):
        Arithmetic(max_value=1, held_out_fraction=0.02).problem("heldout", 0, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_digits": 4, "max_digits": 3}, "larger than max_digits"),
        ({"max_value": 20, "max_digits": 2}, "instead of min_digits and max_digits"),
        ({"operations": []}, "operations"),
        ({"operations": ["*"]}, "operations"),
        ({"digits": 3}, "digits"),
        ({"held_out_fraction": 0}, "held_out_fraction"),
    ],
)
def test_mistaken_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Arithmetic(**fields)  # type: ignore[arg-type]


def test_the_name_tells_tasks_apart() -> None:
    adapter: TypeAdapter[TaskConfig] = TypeAdapter(TaskConfig)
    assert adapter.validate_python({"name": "arithmetic", "operations": ["+"]}) == Arithmetic()
    assert adapter.validate_python({"name": "countdown"}).name == "countdown"
    with pytest.raises(ValidationError, match="'arithmetic', 'countdown', 'humaneval', 'jsonl'"):
        adapter.validate_python({"name": "chess"})


def test_messages() -> None:
    problem = problem_of(7, "+", 8)
    assert Arithmetic().messages(problem) == [{"role": "user", "content": "7+8"}]
    assert Arithmetic(instruction="Be brief.").messages(problem)[0] == {"role": "system", "content": "Be brief."}


CHEATS = [
    "15",  # the R1 form asks for tags
    "<think>a</think>15",
    "<think><answer>15</answer></think>",
    "<answer>14</answer><answer>15</answer>",
    "<answer>14 15</answer>",
    "<answer>7+8</answer>",
    "<answer>15/1</answer>",
    "<answer>15.0</answer>",
    "<answer>14 or 15</answer>",
    "<answer>１５</answer>",
    "<answer>9**9**9**9</answer>",
    "<answer>" + "9" * 10**6 + "</answer>",
    "<answer>fifteen</answer>",
    "",
]


@pytest.mark.parametrize("completion", CHEATS, ids=lambda text: text[:30])
def test_cheats_in_the_r1_form(completion: str) -> None:
    assert Arithmetic().grade(problem_of(7, "+", 8), completion).reward == 0.0


ORDINARY = Arithmetic(max_value=20, phrasing="words", answer_form="last_number")


@pytest.mark.parametrize(
    "reply",
    [
        "15",
        "The answer is 15.",
        "The sum of 7 and 8 is 15.",
        "15 is the sum of 7 and 8.",
        "7 + 8 = 15",
        "**15**",
        "$7 + 8 = \\boxed{15}$",
        "The sum of 7 and 8 is 15.\n\n7 + 8 = 15",
        "Let me add 3 to 7 first, which gives 10. Then I add the other 5. So 7 + 8 = 10 + 5 = 15.",
        "To find the sum of 7 and 8, we add them:\n\n7 + 8 = 15.\n\nTherefore, the answer is 15!",
        "If you have 7 apples and get 8 more, you have 15 apples.",
    ],
)
def test_ordinary_replies(reply: str) -> None:
    assert ORDINARY.grade(problem_of(7, "+", 8), reply).kind == "correct"


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "The sum of 7 and 8 is fifteen.",
        "7 and 8",
        "The sum of 7 and 8.",
        "14",
        "7 + 8 = –15",  # an en dash is a sign too
        "10 11 12 13 14 15",
        "13, 14, 15",
        "13\n14\n15",
        "14 or 15",
        "The answer is 14 or 15.",
        "The answer is 14. The answer is 15.",
        "The sum is 14. The sum is 15.",
        "The sum of 7 and 8 is 14. The sum of 7 and 8 is 15.",
        "7 + 8 = 14\n7 + 8 = 15",
        "7 + 8 = 14 = 15",
        "7 + 8 = 13, 14, 15",
        "7 + 8 = 15. 7 + 8 = 16.",
        "15 16",
        "1" * 10**6,
    ],
    ids=lambda text: text[:30],
)
def test_replies_without_one_right_result(reply: str) -> None:
    assert ORDINARY.grade(problem_of(7, "+", 8), reply).reward == 0.0


@pytest.mark.parametrize(
    ("a", "op", "b", "reply"),
    [
        (5, "+", 0, "The sum of 5 and 0 is 5."),
        (5, "+", 0, "5 is the sum of 5 and 0."),
        (5, "+", 0, "The answer is 5."),
        (10, "+", 10, "10 + 10 = 20"),
        (0, "+", 0, "0 + 0 = 0"),
        (3, "-", 9, "3 - 9 = -6"),
        (3, "-", 9, "The result is −6."),
        (20, "-", 5, "20-5 = 15"),
    ],
)
def test_replies_that_repeat_the_question(a: int, op: str, b: int, reply: str) -> None:
    assert ORDINARY.grade(problem_of(a, op, b), reply).kind == "correct"


def test_ordinary_solutions_pass_their_own_grader() -> None:
    for index in range(100):
        problem = ORDINARY.problem("train", index, 0)
        assert ORDINARY.grade(problem, ORDINARY.solution(problem, random.Random(0))).kind == "correct"


def test_a_foreign_problem_is_refused() -> None:
    with pytest.raises(ValueError, match="not one of an arithmetic problem"):
        Arithmetic().solution(Problem("?", "1", "abc"), random.Random(0))
