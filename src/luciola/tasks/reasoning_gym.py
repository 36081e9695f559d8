"""Reasoning Gym: about a hundred generators of problems in algebra, logic, graphs, games and more, each with a scorer.

    [task]
    name = "reasoning_gym"
    tasks = ["chain_sum", "leg_counting"]       # left out: all

The package (extra `reasoning-gym`) writes the problems and scores the answers. Its scorers parse what the model wrote,
some of them by evaluating it, and can be slow: they run in a worker process with limits of time and memory
(`luciola.verify.pool`). The worker writes the problem anew from its seed, because what a scorer needs of it is not
always data.
"""

import hashlib
import json
import random
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from luciola.tasks.base import R1_INSTRUCTION, Problem, Split, chat, draws_allowed, generator, split_of
from luciola.verify import extract
from luciola.verify.pool import Pool, shared
from luciola.verify.verdict import Verdict, no_answer

MIXTURES = ("composite",)  # made of other tasks
WORKER = Path(__file__).with_name("reasoning_gym_worker.py")
SECONDS = 10.0  # for writing a problem anew and scoring; a few take two seconds
MEMORY_MB = 2048


class ReasoningGym(BaseModel):
    """Problems of the package reasoning-gym, scored by it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    graded_elsewhere: ClassVar[bool] = True  # see tasks/base.py

    name: Literal["reasoning_gym"] = "reasoning_gym"
    tasks: tuple[str, ...] = Field((), description="names of its tasks, in turn; left out: all that there are")
    held_out_fraction: float = Field(0.1, gt=0, lt=1, description="share of all problems kept for evaluation")
    instruction: str = Field(R1_INSTRUCTION, description="a system message before every problem; none when empty")

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.tasks and find_spec("reasoning_gym") is not None:
            from luciola.recipe.check import nearest

            known = names()
            for name in self.tasks:
                if name not in known:
                    near = nearest(name, known)
                    mend = f"did you mean {near}?" if near else f"there are {', '.join(known)}"
                    raise ValueError(f"reasoning-gym has no task {name!r}; {mend}")
        return self

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        """Draw seeds until the problem belongs to the split; task follows task with the index.

        Raises:
            ValueError: reasoning-gym is not installed, or a task has too few problems for the split.
        """
        known = self.tasks or names()
        name = known[index % len(known)]
        rng = generator(split, index, seed)
        for _ in range(draws_allowed(split, self.held_out_fraction)):
            drawn = rng.randrange(2**31)
            entry = dataset(name, drawn)[0]
            question = str(entry["question"]).strip()
            key = f"{name}/{hashlib.blake2b(question.encode(), digest_size=16).hexdigest()}"
            if split_of(key, self.held_out_fraction) == split:
                answer = entry["answer"]  # None where many answers are right and only the scorer can tell
                truth = "(whatever the scorer of this task accepts)" if answer is None else str(answer)
                return Problem(question, truth, key, (("task", name),), json.dumps([name, drawn]))
        raise ValueError(
            f"reasoning-gym's task {name!r} has too few problems for a {split} split; leave it out of task.tasks, or "
            f"change held_out_fraction={self.held_out_fraction}."
        )

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        return chat(problem.prompt, self.instruction)

    def solution(self, problem: Problem, rng: random.Random, error_rate: float = 0.0) -> str:
        raise ValueError(
            "The task 'reasoning_gym' has no worked solutions; train on text with data.source = 'files' instead."
        )

    def grade(self, problem: Problem, completion: str) -> Verdict:
        """Right where the task's own scorer gives the full score; a part of it is told in the detail, no reward."""
        found = extract.find(completion)
        if found.answer is None:
            return no_answer(found.why)
        return _pool().check(found.answer, *json.loads(problem.source))

    def size(self, split: Split) -> int | None:
        return None


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """The names of all tasks.

    Raises:
        ValueError: reasoning-gym is not installed.
    """
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ValueError("the task reasoning_gym needs an extra: pip install 'luciola[reasoning-gym]'") from None
    return tuple(sorted(set(DATASETS) - set(MIXTURES)))


def dataset(name: str, seed: int) -> Any:
    """A data set of one problem, which is the same wherever it is made."""
    names()
    from reasoning_gym import create_dataset

    return create_dataset(name, seed=seed, size=1)


def _pool() -> Pool:
    return shared(WORKER, seconds=SECONDS, memory_mb=MEMORY_MB)
