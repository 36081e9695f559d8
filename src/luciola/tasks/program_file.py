"""Programming problems of one's own from a JSONL file, in Python or C++, judged by their tests in the sandbox.

    [task]
    name = "programs"
    path = "problems.jsonl"

One JSON object a line; further fields may stand beside these:

| field      | what it holds                                                                                           |
| ---------- | ------------------------------------------------------------------------------------------------------- |
| `prompt`   | what is asked                                                                                           |
| `language` | "python", which is also meant where there is none, or "cpp"                                             |
| `pairs`    | [input, output] texts: what the program reads on stdin, and what it must then print                     |
| `tests`    | in the place of `pairs`, Python only: asserts that call the program's functions, one text or several    |

    {"prompt": "Read two numbers and print their sum.", "language": "cpp", "pairs": [["1 2\\n", "3\\n"], ["5 5", "10"]]}
    {"prompt": "Write a function double(x).", "tests": ["assert double(2) == 4", "assert double('ab') == 'abab'"]}

`verify/code.py` has the rules: which text is the program, how output is compared, and the fields `given`, `names` and
`classes` that tests may have too. `rows.py` says which rows are held out.
"""

import json
import random
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field

from luciola.tasks.base import Problem, Split, chat
from luciola.tasks.programs import refuse_without_sandbox
from luciola.tasks.rows import FileTask, key_of, text_of
from luciola.verify import code, sandbox
from luciola.verify.verdict import Verdict

INSTRUCTIONS = {
    "python": "Write the program that is asked for in Python, complete and in one ```python code block at the end.",
    "c++": "Write the program that is asked for in C++, complete and in one ```cpp code block at the end.",
}


class Programs(FileTask):
    """Programs to write, and tests that they must pass."""

    name: Literal["programs"] = "programs"
    instruction: str | None = Field(
        None, description="a system message before every problem, by default one that names the language; none if empty"
    )

    def parse(self, row: dict[str, Any]) -> Problem:
        if not isinstance(row, dict):
            raise ValueError('a row must be a JSON object, such as {"prompt": ..., "pairs": ...}')
        prompt, tests = text_of(row, "prompt").strip(), code.tests_of(row)
        language = tests.language if isinstance(tests, code.Pairs) else "python"
        return Problem(prompt, json.dumps(asdict(tests)), key_of(prompt), (("language", language),))

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        ((_, language),) = problem.categories
        return chat(problem.prompt, INSTRUCTIONS[language] if self.instruction is None else self.instruction)

    def opening(self, problem: Problem) -> str | None:
        """None: these problems are put as messages."""
        return None

    @property
    def stops(self) -> tuple[str, ...]:
        return ()

    def solution(self, problem: Problem, rng: random.Random, error_rate: float = 0.0) -> str:
        raise ValueError(
            "The task 'programs' has no worked solutions; train on text with data.source = 'files' instead."
        )

    def grade(self, problem: Problem, completion: str) -> Verdict:
        return code.grade(completion, code.read_tests(problem.truth))

    def _rows(self, split: Split) -> tuple[Problem, ...]:
        refuse_without_sandbox()
        rows = super()._rows(split)
        if (reason := code.without_compiler()) and any(("language", "c++") in row.categories for row in rows):
            raise sandbox.SandboxError(reason)
        return rows
