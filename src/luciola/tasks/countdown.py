"""Countdown, and the Game of 24: make the target from the given numbers with + - * / and brackets.

    Use each of the numbers 3, 5, 7, 9 exactly once, with + - * / and brackets, to make 24.
    <think>
    9-3=6
    7*6=42 ...

A problem has many right answers, so the verifier reads the expression itself: it evaluates it exactly, with fractions,
and looks at which numbers it used. Python's grammar parses it into a tree, of which only the four operations on whole
numbers are accepted; nothing is ever executed.
"""

import ast
import operator
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from luciola.tasks.base import R1_INSTRUCTION, Problem, Split, chat, draws_allowed, generator, split_of
from luciola.verify import extract
from luciola.verify.verdict import Verdict, correct, no_answer, wrong

MAX_EXPRESSION = 200  # characters

_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_SIGNS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_EXPRESSION = re.compile(r"[0-9+*/() -]+")
_KEY = re.compile(r"(?P<numbers>[0-9]+(?:,[0-9]+)*)->(?P<target>[0-9]+)")


class Countdown(BaseModel):
    """Combine numbers into a target."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["countdown"] = "countdown"
    numbers: int = Field(4, ge=2, le=5, description="how many numbers are given")
    max_number: int = Field(20, ge=1, le=1000, description="numbers from 1 to this one")
    target: int | None = Field(None, ge=0, description="what to make, such as 24; absent: a value that can be made")
    max_target: int = Field(100, ge=1, le=100_000, description="largest target, when target is absent")
    use_all: bool = Field(True, description="true: every number exactly once; false: at most once")
    instruction: str = Field(R1_INSTRUCTION, description="a system message before every problem; none when empty")
    held_out_fraction: float = Field(0.1, gt=0, lt=1, description="share of all problems kept for evaluation")

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        """Draw numbers and a target, until they can be solved and belong to the split.

        Raises:
            ValueError: when no such problem is found.
        """
        rng = generator(split, index, seed)
        for _ in range(draws_allowed(split, self.held_out_fraction)):
            numbers = sorted(rng.randint(1, self.max_number) for _ in range(self.numbers))
            target = self.target if self.target is not None else self._makeable(numbers, rng)
            if target is None or (not self.use_all and target in numbers):
                continue
            key = f"{','.join(map(str, numbers))}->{target}"
            if split_of(key, self.held_out_fraction) != split:
                continue
            if self.target is None or _reachable(_exact(numbers), target, self.use_all):
                rng.shuffle(numbers)
                return Problem(self._prompt(numbers, target), truth=str(target), key=key)
        raise ValueError(
            f"No problem of the {split} split was found with numbers={self.numbers}, max_number={self.max_number} and "
            f"target={self.target}; allow larger or more numbers, or leave out the target."
        )

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        return chat(problem.prompt, self.instruction)

    def solution(self, problem: Problem, rng: random.Random, error_rate: float = 0.0) -> str:
        """One of the ways that search finds, step by step; each step is wrong with probability `error_rate`.

        A wrong step's result is off by 1 or 2, and the search goes on from there; a wrong last step pretends to reach
        the target. Should the answer come out right in spite of it, another attempt is written; at last a faultless
        one.
        """
        numbers, target = _parts(problem)
        for rate in [error_rate] * 20 + [0.0]:
            steps, answer, slipped = self._attempt(numbers, target, rng, rate)
            if not slipped or not _makes(answer, target):
                break
        return "<think>\n" + "\n".join(steps) + f"\n</think>\n<answer>{answer}</answer>"

    def grade(self, problem: Problem, completion: str) -> Verdict:
        """Whether the expression in the <answer> block makes the target from the numbers. `= target` may follow it."""
        numbers, target = _parts(problem)
        found = extract.answer_block(completion)
        if found.answer is None:
            return no_answer(found.why)
        expression, equals, right = found.answer.partition("=")
        if equals and right.strip() != str(target):
            return wrong("what follows the = is not the target")
        try:
            value, used = evaluate(expression)
        except ValueError as error:
            return wrong(str(error))
        if value != target:
            return wrong(f"the expression makes {_show(value)}")
        spare = Counter(numbers)
        spare.subtract(used)
        if min(spare.values()) < 0 or (self.use_all and any(spare.values())):
            return wrong("the expression does not use the given numbers as often as it must")
        return correct()

    def size(self, split: Split) -> int | None:
        return None

    def _prompt(self, numbers: list[int], target: int) -> str:
        each = "Use each of the numbers" if self.use_all else "Use some or all of the numbers"
        often = "exactly once" if self.use_all else "at most once each"
        return f"{each} {', '.join(map(str, numbers))} {often}, with + - * / and brackets, to make {target}."

    def _makeable(self, numbers: list[int], rng: random.Random) -> int | None:
        """A whole number from 1 to max_target that random operations on all the numbers made, if they did."""
        values = [Fraction(number) for number in numbers]
        while len(values) > 1:
            rng.shuffle(values)
            left, right, sign = values.pop(), values.pop(), rng.choice("+-*/")
            if sign == "/" and right == 0:
                return None
            values.append(_OPERATIONS[sign](left, right))
        target = values[0]
        return int(target) if target.denominator == 1 and 1 <= target <= self.max_target else None

    def _attempt(
        self, numbers: list[int], target: int, rng: random.Random, error_rate: float
    ) -> tuple[list[str], str, bool]:
        """Steps, the answer, and whether a step slipped. `made` holds (believed value, its expression)."""
        made = [(Fraction(number), str(number)) for number in numbers]
        steps: list[str] = []
        slipped = False
        while len(made) > 1 and not _done(tuple(value for value, _ in made), target, self.use_all):
            moves = list(_moves(_exact(value for value, _ in made)))
            rng.shuffle(moves)
            slip, last = rng.random() < error_rate, len(made) == 2
            slipped |= slip
            good = (move for move in moves if _reachable(move[3], target, self.use_all) != (slip and last))
            left, sign, right, _ = next(good, moves[0])
            result = _OPERATIONS[sign](left, right)
            if slip:
                result = Fraction(target) if last else result + rng.choice((-2, -1, 1, 2))
            steps.append(f"{_show(left)}{sign}{_show(right)}={_show(result)}")
            made.append((result, f"({_take(made, left)}{sign}{_take(made, right)})"))
        values = [value for value, _ in made]
        answer = made[values.index(Fraction(target)) if target in values else -1][1]
        return steps, answer[1:-1] if answer.startswith("(") else answer, slipped


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The exact value of an arithmetic expression, and the numbers it uses.

    Raises:
        ValueError: for anything but whole numbers, + - * / (also written × ÷) and brackets, for an expression longer
            than MAX_EXPRESSION, and for a division by zero.
    """
    text = expression.strip().replace("×", "*").replace("÷", "/").replace("−", "-")
    if len(text) > MAX_EXPRESSION:
        raise ValueError(f"the expression is longer than {MAX_EXPRESSION} characters")
    if not _EXPRESSION.fullmatch(text):
        raise ValueError("the expression has more than whole numbers, + - * / and brackets")
    used: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
            return _OPERATIONS[_SIGNS[type(node.op)]](value(node.left), value(node.right))
        raise ValueError("the expression has more than whole numbers, + - * / and brackets")

    try:
        return value(ast.parse(text, mode="eval").body), used
    except ZeroDivisionError:
        raise ValueError("the expression divides by zero") from None
    except (SyntaxError, MemoryError, RecursionError):  # the last two: brackets nested too deeply for the parser
        raise ValueError("the expression is not well formed") from None


_Values = tuple[Fraction, ...]


def _makes(expression: str, target: int) -> bool:
    try:
        return evaluate(expression)[0] == target
    except ValueError:  # an expression that slips led to may divide by zero
        return False


def _moves(values: _Values) -> Iterator[tuple[Fraction, str, Fraction, _Values]]:
    """Every (left, sign, right, values afterwards) that combines two of the values; those afterwards are in order."""
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            rest = [value for k, value in enumerate(values) if k not in (i, j)]
            for sign in "+*-/" if i < j else "-/" if i > j else "":
                if sign != "/" or b != 0:
                    yield a, sign, b, tuple(sorted([*rest, _OPERATIONS[sign](a, b)]))


@lru_cache(maxsize=1 << 16)
def _reachable(values: _Values, target: int, use_all: bool) -> bool:
    """Whether the target can still be made; `values` are in order, so that each set of them is searched once."""
    return _done(values, target, use_all) or any(_reachable(after, target, use_all) for *_, after in _moves(values))


def _done(values: _Values, target: int, use_all: bool) -> bool:
    return target in values and (len(values) == 1 or not use_all)


def _exact(numbers: Iterable[Fraction | int]) -> _Values:
    return tuple(sorted(Fraction(number) for number in numbers))


def _take(made: list[tuple[Fraction, str]], value: Fraction) -> str:
    """Remove one entry of this value and return its expression."""
    return made.pop([other for other, _ in made].index(value))[1]


def _show(value: Fraction) -> str:
    return str(value) if value >= 0 and value.denominator == 1 else f"({value})"


def _parts(problem: Problem) -> tuple[list[int], int]:
    parts = _KEY.fullmatch(problem.key)
    if parts is None:
        raise ValueError(f"The key {problem.key!r} is not one of a countdown problem, such as '3,5,7,9->24'.")
    return [int(number) for number in parts["numbers"].split(",")], int(parts["target"])
