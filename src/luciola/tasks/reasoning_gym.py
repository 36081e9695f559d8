"""Reasoning Gym: about a hundred generators of problems in algebra, logic, graphs, games and more, each with a scorer.

    [task]
    name = "reasoning_gym"
    tasks = ["chain_sum", "leg_counting"]       # left out: all
    settings.chain_sum = { min_terms = 4, max_terms = 8 }      # how hard: the package's own settings of a task

The package (extra `reasoning-gym`) writes the problems and scores the answers, both in a worker process with limits of
time and memory (`luciola.verify.pool`). Scorers parse what the model wrote, some of them by evaluating it, and can be
slow; and some problems depend on the order of sets of texts, which Python shuffles anew in every process unless its
hash seed is fixed, as the worker's is. To score, the worker writes the problem anew from its seed, because what a
scorer needs of it is not always data.
"""

import hashlib
import json
import random
from dataclasses import fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from luciola.tasks.base import R1_INSTRUCTION, Problem, Split, chat, draws_allowed, generator, split_of
from luciola.verify import extract
from luciola.verify.pool import Pool, shared
from luciola.verify.verdict import Verdict, no_answer

MIXTURES = ("composite",)  # made of other tasks
WORKER = Path(__file__).with_name("reasoning_gym_worker.py")
SECONDS = 10.0  # for writing a problem anew and scoring; a few take two seconds
SECONDS_TO_WRITE = 60.0  # where no answer can be the cause, and being late would stop the run
MEMORY_MB = 2048


class ReasoningGym(BaseModel):
    """Problems of the package reasoning-gym, scored by it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    graded_elsewhere: ClassVar[bool] = True  # see tasks/base.py

    name: Literal["reasoning_gym"] = "reasoning_gym"
    tasks: tuple[str, ...] = Field((), description="names of its tasks, in turn; left out: all that there are")
    settings: dict[str, dict[str, JsonValue]] = Field(
        {}, description="the package's own settings of a task, by its name: chain_sum = { min_terms = 4 }"
    )
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

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.settings and find_spec("reasoning_gym") is not None:
            for name, settings in self.settings.items():
                if name not in (self.tasks or names()):
                    chosen = ", ".join(self.tasks) or "all of reasoning-gym's"
                    raise ValueError(
                        f"settings.{name} is for none of the tasks ({chosen}); add it to tasks, or leave it out"
                    )
                _refuse_misfits(name, settings)
        return self

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        """Draw seeds until the problem belongs to the split; task follows task with the index.

        Raises:
            ValueError: reasoning-gym is not installed, or a task fails to write problems or has too few for the split.
        """
        all_of_them = names()
        known = self.tasks or all_of_them
        name = known[index % len(known)]
        rng = generator(split, index, seed)
        for _ in range(draws_allowed(split, self.held_out_fraction)):
            source = (name, self.settings.get(name, {}), rng.randrange(2**31))
            written = _pool().ask("write", *source, seconds=SECONDS_TO_WRITE)
            if "kind" in written:
                raise ValueError(
                    f"reasoning-gym's task {name!r} has failed to write a problem ({written['detail']}); change its "
                    "task.settings, or name tasks without it in task.tasks"
                )
            question = str(written["question"]).strip()
            key = f"{name}/{hashlib.blake2b(question.encode(), digest_size=16).hexdigest()}"
            if split_of(key, self.held_out_fraction) == split:
                answer = written["answer"]  # None where many answers are right and only the scorer can tell
                truth = "(whatever the scorer of this task accepts)" if answer is None else answer
                return Problem(question, truth, key, (("task", name),), json.dumps(source))
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
        return _pool().check("score", *json.loads(problem.source), found.answer)

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


def _refuse_misfits(name: str, settings: dict[str, JsonValue]) -> None:
    """Raise ValueError unless these are settings of the task, with values that it takes."""
    from reasoning_gym.factory import DATASETS

    from luciola.recipe.check import nearest

    _, Config = DATASETS[name]
    known = [field.name for field in fields(Config) if field.name not in ("seed", "size")]  # which every problem has
    for key in settings:
        if key not in known:
            near = nearest(key, known)
            mend = f"did you mean {near}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"reasoning-gym's task {name!r} has no setting {key!r}; {mend}")
    try:
        Config(**settings).validate()
    except Exception as error:
        said = f"{type(error).__name__}: {error}".removeprefix("AssertionError: ")
        raise ValueError(f"reasoning-gym refuses settings.{name} = {settings} ({said}); mend them") from None


def _pool() -> Pool:
    return shared(WORKER, seconds=SECONDS, memory_mb=MEMORY_MB)
