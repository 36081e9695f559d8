"""Several tasks as one, in turn: what reinforcement learning on all tasks trains on.

    [task]                          problem 0 is the first of `sums`,
    name = "mixture"                problem 1 the first of `countdown`,
    [task.parts.sums]               problem 2 the second of `sums`, and so on
    name = "arithmetic"
    [task.parts.countdown]
    name = "countdown"

Every part keeps its own split and its own grader; an evaluation lists the parts as categories.
"""

import random
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from luciola.tasks.arithmetic import Arithmetic
from luciola.tasks.base import GradedElsewhere, Problem, Split, Task
from luciola.tasks.countdown import Countdown
from luciola.tasks.jsonl import Jsonl
from luciola.tasks.reasoning_gym import ReasoningGym
from luciola.verify.verdict import Verdict

Single = Annotated[Arithmetic | Countdown | Jsonl | ReasoningGym, Field(discriminator="name")]


class Mixture(BaseModel):
    """Several tasks, each equally frequent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["mixture"] = "mixture"
    parts: dict[str, Single] = Field(min_length=1, description="the tasks, each under a name of one's own")

    @property
    def graded_elsewhere(self) -> bool:
        """Whether any part is."""
        return any(isinstance(part, GradedElsewhere) and part.graded_elsewhere for part in self.parts.values())

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        """Part after part; each is asked for its own problems 0, 1, 2, ..."""
        number, place = index % len(self.parts), index // len(self.parts)
        name = list(self.parts)[number]
        found = self.parts[name].problem(split, place, seed)
        return replace(
            found,
            key=f"{name}/{found.key}",
            categories=(("part", name), *found.categories),
            source=f"{name}/{found.source}",
        )

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        part, own = self._own(problem)
        return part.messages(own)

    def solution(self, problem: Problem, rng: random.Random, error_rate: float = 0.0) -> str:
        part, own = self._own(problem)
        return part.solution(own, rng, error_rate)

    def grade(self, problem: Problem, completion: str) -> Verdict:
        part, own = self._own(problem)
        return part.grade(own, completion)

    def size(self, split: Split) -> int | None:
        """None: parts of different sizes never come to an end together."""
        return None

    def _own(self, problem: Problem) -> tuple[Task, Problem]:
        """The part that a problem came from, and the problem as that part made it."""
        name, _, source = problem.source.partition("/")
        own = replace(
            problem, key=problem.key.removeprefix(f"{name}/"), categories=problem.categories[1:], source=source
        )
        return self.parts[name], own
