"""Sums and differences, with solutions written out digit by digit: small enough to learn from nothing on a laptop.

    | 345+678                | 345-692                |  the prompt, in one of many wordings
    | <think>                | <think>                |
    | 5+8+0=13               | -(692-345)             |  a difference: its sign, and the larger number first
    | 4+7+1=12               | 12-5-0=7               |
    | 3+6+1=10               | 09-4-1=4               |
    | </think>               | 06-3-0=3               |
    | <answer>1023</answer>  | </think>               |
    |                        | <answer>-347</answer>  |

What makes it learnable for a character-level model with a million parameters: the lowest digit comes first, so that
every carry is known before it is needed; the carry is written even when it is 0, and the shorter number is filled up
with zeros, so that every step has the same eight characters; a step is one look-up in a table of 200 entries; and the
answer is copied from the steps. Differences borrow where they must: 12-5-0=7 has borrowed a ten, and the next
step takes 1 away.
"""

import random
import re
from itertools import zip_longest
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from luciola.tasks.base import Problem, Split, chat, draws_allowed, generator, split_of
from luciola.verify import exact, extract
from luciola.verify.verdict import Verdict, correct, no_answer, wrong

_SYMBOLS = ("{a}{op}{b}", "{a} {op} {b}", "{a}{op}{b}=", "{a} {op} {b} =", "{a}{op}{b}=?", "{a} {op} {b} = ?")
_WORDS = (
    "What is {a}{op}{b}?",
    "What is {a} {op} {b}?",
    "what's {a} {op} {b}?",
    "Calculate {a}{op}{b}.",
    "Compute {a} {op} {b}.",
    "How much is {a} {op} {b}?",
    "How much is {a} {word} {b}?",
    "What is {a} {word} {b}?",
    "{a} {word} {b}",
)
_WORDINGS = {"symbols": _SYMBOLS, "words": _WORDS, "varied": _SYMBOLS + _WORDS}
_WORD = {"+": "plus", "-": "minus"}
_KEY = re.compile(r"(?P<a>[0-9]+)(?P<op>[+-])(?P<b>[0-9]+)")
_INTEGER = re.compile(r"[+-]?[0-9][0-9,]*")


class Arithmetic(BaseModel):
    """Add or subtract two numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["arithmetic"] = "arithmetic"
    operations: tuple[Literal["+", "-"], ...] = Field(("+",), min_length=1, description="+, - or both")
    min_digits: int = Field(1, ge=1, le=30, description="digits of the shortest number")
    max_digits: int = Field(3, ge=1, le=30, description="digits of the longest number; each length is equally frequent")
    max_value: int | None = Field(
        None, ge=1, description="numbers from 0 to this one, equally frequent, instead of min_digits and max_digits"
    )
    phrasing: Literal["varied", "symbols", "words"] = Field(
        "varied", description="symbols: 3+4 = ?; words: What is 3 plus 4?; varied: both"
    )
    thinking: bool = Field(True, description="false: solutions state the answer without any steps")
    answer_form: Literal["r1", "last_number"] = Field(
        "r1", description="r1: the answer stands in <answer> tags; last_number: an ordinary reply ends with the result"
    )
    instruction: str = Field("", description="a system message before every problem; none when empty")
    held_out_fraction: float = Field(0.1, gt=0, lt=1, description="share of all problems kept for evaluation")

    @model_validator(mode="after")
    def _lengths_ordered(self) -> Self:
        if self.min_digits > self.max_digits:
            raise ValueError(f"min_digits={self.min_digits} is larger than max_digits={self.max_digits}; lower it")
        # By value, not by what was written: a run's resolved recipe writes the defaults out too.
        changed = [name for name in ("min_digits", "max_digits") if getattr(self, name) != _default(name)]
        if self.max_value is not None and changed:
            raise ValueError("max_value stands instead of min_digits and max_digits; give one or the other")
        return self

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        """Draw numbers until they belong to the split.

        Raises:
            ValueError: when no problem of these sizes belongs to it.
        """
        rng = generator(split, index, seed)
        for _ in range(draws_allowed(split, self.held_out_fraction)):
            op, a, b = rng.choice(self.operations), self._number(rng), self._number(rng)
            # a+b and b+a, a-b and b-a stay together: to know one is to know the other
            if split_of(f"{min(a, b)}{op}{max(a, b)}", self.held_out_fraction) == split:
                prompt = rng.choice(_WORDINGS[self.phrasing]).format(a=a, b=b, op=op, word=_WORD[op])
                return Problem(prompt, truth=str(a + b if op == "+" else a - b), key=f"{a}{op}{b}")
        raise ValueError(
            f"No problem with numbers this small belongs to the {split} split; raise max_digits or max_value, or "
            f"change held_out_fraction={self.held_out_fraction}."
        )

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        return chat(problem.prompt, self.instruction)

    def solution(self, problem: Problem, rng: random.Random, error_rate: float = 0.0) -> str:
        """The digits worked out one by one; each carry (or borrowed ten) is forgotten with probability `error_rate`.

        Forgetting is a mistake that a reader of such texts takes over: above one half it is what most texts do, and a
        model trained on them gets the sums without carries right and the others wrong, however long it trains.
        """
        a, op, b = _parts(problem)
        steps, answer = (_add if op == "+" else _subtract)(a, b, rng, error_rate)
        if self.answer_form == "last_number":
            return f"{a} {op} {b} = {answer}"
        thoughts = f"<think>\n{steps}\n</think>\n" if self.thinking else ""
        return f"{thoughts}<answer>{answer}</answer>"

    def grade(self, problem: Problem, completion: str) -> Verdict:
        """Compare the integer in the <answer> block, or the result that an ordinary reply ends with.

        An ordinary reply may repeat the question's numbers and show its steps, but its last sentence with a number
        must state one result, and no earlier one another (`extract.final_number` has the rule): a list of guesses is
        no answer.
        """
        if self.answer_form == "last_number":
            a, _, b = _parts(problem)
            found = extract.final_number(completion, given=(a, b))
        else:
            found = extract.answer_block(completion)
        if found.answer is None:
            return no_answer(found.why)
        if not _INTEGER.fullmatch(found.answer):
            return wrong("the answer is not a whole number")
        return correct() if exact.number(found.answer) == int(problem.truth) else wrong()

    def grade_steps(self, problem: Problem, completion: str) -> list[tuple[int, float]]:
        """1 for each line of the thinking that is the line due there, 0 for any other; then the answer's reward."""
        a, op, b = _parts(problem)
        due = (_add if op == "+" else _subtract)(a, b, random.Random(0), 0.0)[0].split("\n")
        end = completion.find("</think>")
        steps: list[tuple[int, float]] = []
        place = 0
        for line in completion[:end].splitlines(keepends=True) if end >= 0 else ():
            place += len(line)
            if line.strip() not in ("", "<think>"):
                right = len(steps) < len(due) and line.strip() == due[len(steps)]
                steps.append((place, float(right)))
        return [*steps, (len(completion), self.grade(problem, completion).reward)]

    def size(self, split: Split) -> int | None:
        return None

    def _number(self, rng: random.Random) -> int:
        if self.max_value is not None:
            return rng.randint(0, self.max_value)
        digits = rng.randint(self.min_digits, self.max_digits)
        return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _default(name: str) -> object:
    return Arithmetic.model_fields[name].default


def _parts(problem: Problem) -> tuple[int, str, int]:
    parts = _KEY.fullmatch(problem.key)
    if parts is None:
        raise ValueError(f"The key {problem.key!r} is not one of an arithmetic problem, such as '345+678'.")
    return int(parts["a"]), parts["op"], int(parts["b"])


def _add(a: int, b: int, rng: random.Random, error_rate: float) -> tuple[str, int]:
    steps, total, carry, place = [], 0, 0, 1
    for x, y in _columns(a, b):
        carry = _perhaps_forgotten(carry, rng, error_rate)
        result = x + y + carry
        steps.append(f"{x}+{y}+{carry}={result:02d}")
        carry, digit = divmod(result, 10)
        total += digit * place
        place *= 10
    return "\n".join(steps), total + carry * place


def _subtract(a: int, b: int, rng: random.Random, error_rate: float) -> tuple[str, int]:
    sign, large, small = ("-", b, a) if a < b else ("+", a, b)
    steps, total, borrowed, place = [f"{sign}({large}-{small})"], 0, 0, 1
    for x, y in _columns(large, small):
        borrowed = _perhaps_forgotten(borrowed, rng, error_rate)
        result = x - y - borrowed
        borrow, digit = int(result < 0), result % 10
        steps.append(f"{borrow}{x}-{y}-{borrowed}={digit}")
        total += digit * place
        borrowed, place = borrow, place * 10
    return "\n".join(steps), -total if sign == "-" else total


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    """Pairs of digits, lowest first, the shorter number filled up with zeros."""
    return [(int(x), int(y)) for x, y in zip_longest(reversed(str(a)), reversed(str(b)), fillvalue="0")]


def _perhaps_forgotten(carry: int, rng: random.Random, error_rate: float) -> int:
    """The carry that a step goes on with: 0 where it is forgotten."""
    return 0 if carry and rng.random() < error_rate else carry
