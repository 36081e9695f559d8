"""Task families. A task yields problems and grades completions; its fields are the [task] section of a recipe."""

from typing import Annotated

from pydantic import Field

from luciola.tasks.arithmetic import Arithmetic
from luciola.tasks.base import Problem, Split, Task
from luciola.tasks.countdown import Countdown
from luciola.tasks.jsonl import Jsonl
from luciola.tasks.mixture import Mixture
from luciola.tasks.program_file import Programs
from luciola.tasks.programs import HumanEval, Mbpp
from luciola.tasks.reasoning_gym import ReasoningGym

TaskConfig = Annotated[
    Arithmetic | Countdown | HumanEval | Jsonl | Mbpp | Mixture | Programs | ReasoningGym, Field(discriminator="name")
]

__all__ = [
    "Arithmetic",
    "Countdown",
    "HumanEval",
    "Jsonl",
    "Mbpp",
    "Mixture",
    "Problem",
    "Programs",
    "ReasoningGym",
    "Split",
    "Task",
    "TaskConfig",
]
