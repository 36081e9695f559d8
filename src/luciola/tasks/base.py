"""What every task offers, and the two rules that keep them honest.

Train and held-out problems are disjoint because a problem's *key* decides where it belongs, whoever draws it and
whenever. All randomness comes from (seed, split, index), so that a stopped run finds the same problems when it resumes.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from luciola.verify.verdict import Verdict

if TYPE_CHECKING:
    from luciola.text.tokenizer import Tokenizer

Split = Literal["train", "heldout"]

R1_INSTRUCTION = (
    "Solve the problem. Think first, and write your reasoning between <think> and </think>. "
    "Then give the final answer alone, between <answer> and </answer>."
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One instance: what is asked, the reference answer, and the key that identifies it across splits.

    Attributes:
        categories: (kind, category) pairs under which an evaluation lists it, such as ("level", "Level 3").
        source: what the task needs to find the problem again when it judges; empty where the truth is enough.
    """

    prompt: str
    truth: str
    key: str
    categories: tuple[tuple[str, str], ...] = ()
    source: str = ""


class Task(Protocol):
    """A family of problems. Each is one frozen pydantic model, told from the others by its `name`."""

    @property
    def name(self) -> str: ...

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        """The problem at `index`, a pure function of its arguments; any index >= 0 is allowed."""
        ...

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """The chat messages that put the problem to a model: perhaps a system message, then the user's."""
        ...

    def solution(self, problem: Problem, rng: random.Random, error_rate: float = 0.0) -> str:
        """A completion in the form the task rewards; each step that can go wrong does so with probability `error_rate`.

        A wrong step is followed consistently, so that the answer is wrong whenever a step is.

        Raises:
            ValueError: for tasks which have no worked solutions.
        """
        ...

    def grade(self, problem: Problem, completion: str) -> Verdict:
        """Whether the completion solves the problem."""
        ...

    def size(self, split: Split) -> int | None:
        """How many problems a data set has in this split; None where problems are made up as they are needed."""
        ...


@runtime_checkable
class GradesSteps(Protocol):
    """A task that can also tell which steps of a solution are right (process supervision)."""

    def grade_steps(self, problem: Problem, completion: str) -> list[tuple[int, float]]:
        """(number of characters up to the end of the step, reward) of each step, in order, the answer as the last."""
        ...


@runtime_checkable
class AsksForPrograms(Protocol):
    """A task whose completions are programs: they have no short answers that could vote, nor the R1 form."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end a completion, besides the model's end token."""
        ...

    def opening(self, problem: Problem) -> str | None:
        """The text that a base model is to go on with; None where the problem is put as messages."""
        ...


@runtime_checkable
class GradedElsewhere(Protocol):
    """A task whose completions other processes grade, which can work while further ones are sampled here. Graders in
    this process would only take turns with the sampling, at a price."""

    @property
    def graded_elsewhere(self) -> bool: ...


def encoded(tokenizer: Tokenizer, task: Task, problem: Problem) -> list[int]:
    """The token ids that put the problem to a model: a conversation, or the beginning of a text."""
    opening = task.opening(problem) if isinstance(task, AsksForPrograms) else None
    return tokenizer.chat(task.messages(problem)) if opening is None else tokenizer.encode(opening)


def stops_of(task: Task) -> tuple[str, ...]:
    """The stop strings of the task's completions."""
    return task.stops if isinstance(task, AsksForPrograms) else ()


def split_of(key: str, held_out_fraction: float) -> Split:
    """Where a problem belongs, from a hash of its key that is the same on every machine (Python's hash() is not)."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest) < held_out_fraction * 2**64 else "train"


def generator(split: Split, index: int, seed: int) -> random.Random:
    """Random numbers for one problem; a text seed is hashed with SHA-512 and so is the same on every machine."""
    assert index >= 0, index
    return random.Random(f"{seed}/{split}/{index}")


def draws_allowed(split: Split, held_out_fraction: float) -> int:
    """After how many draws in vain a split may be called empty (wrongly with a probability below e^-100)."""
    share = held_out_fraction if split == "heldout" else 1 - held_out_fraction
    return 1000 + int(1000 / share)


def chat(prompt: str, instruction: str) -> list[dict[str, str]]:
    """The prompt as a user message, behind the instruction as a system message unless that is empty."""
    system = [{"role": "system", "content": instruction}] if instruction else []
    return [*system, {"role": "user", "content": prompt}]
