"""Problems with reference answers from a JSONL file: GSM8K, MATH, or your own.

    [task]                                 [task]
    name = "jsonl"                         name = "jsonl"
    path = "gsm8k_train.jsonl"             path = "math_train.jsonl"
    answer_after = "####"                  question = "problem"
                                           answer = "solution"
                                           answer_boxed = true
                                           categories = ["type", "level"]

A row is held out by a hash of its question, so that a question which occurs twice is never on both sides; or
`heldout_path` names a file of its own, whose questions are then left out of training.
"""

import hashlib
import random
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from luciola.tasks.base import R1_INSTRUCTION, Problem, Split, chat, split_of
from luciola.tasks.rows import pick, read, version
from luciola.verify import answer, extract
from luciola.verify.verdict import Verdict


class Jsonl(BaseModel):
    """Questions and answers, one JSON object a line."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    graded_elsewhere: ClassVar[bool] = True  # see tasks/base.py

    name: Literal["jsonl"] = "jsonl"
    path: Path = Field(description="the file; relative to the folder in which luciola is started")
    question: str = Field("question", description="the field that holds the question")
    answer: str = Field("answer", description="the field that holds the answer")
    answer_after: str | None = Field(
        None, min_length=1, description="the answer follows the last such mark; GSM8K: ####"
    )
    answer_boxed: bool = Field(False, description="the answer is the content of the last \\boxed{} in its field")
    categories: tuple[str, ...] = Field(
        (), description="fields by which an evaluation breaks its figures down; MATH: type and level"
    )
    heldout_path: Path | None = Field(None, description="a file of problems to evaluate on, instead of a share of path")
    held_out_fraction: float = Field(0.1, gt=0, lt=1, description="share of the questions kept for evaluation")
    instruction: str = Field(R1_INSTRUCTION, description="a system message before every problem; none when empty")

    @model_validator(mode="after")
    def _one_way_to_the_answer(self) -> Self:
        if self.answer_boxed and self.answer_after is not None:
            raise ValueError("answer_after and answer_boxed are two ways to find the answer; give one of them")
        return self

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        """Row `index` of the split in a shuffled order, which is another one in each pass over the data.

        Raises:
            ValueError: when a file is missing or malformed (with the number of the line), or the split has no rows.
        """
        rows = self._rows(split)
        if not rows:
            raise ValueError(
                f"The {split} split of {self.path} is empty; give more rows, or change held_out_fraction="
                f"{self.held_out_fraction}."
            )
        return pick(rows, split, index, seed)

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        return chat(problem.prompt, self.instruction)

    def solution(self, problem: Problem, rng: random.Random, error_rate: float = 0.0) -> str:
        raise ValueError(
            "The task 'jsonl' has no worked solutions in the R1 form; train on text with data.source = 'files' instead."
        )

    def grade(self, problem: Problem, completion: str) -> Verdict:
        return answer.grade(completion, problem.truth)

    def size(self, split: Split) -> int | None:
        return len(self._rows(split))

    def _rows(self, split: Split) -> tuple[Problem, ...]:
        heldout_version = None if self.heldout_path is None else version(self.heldout_path)
        return _splits(self, version(self.path), heldout_version)[split]


@lru_cache(maxsize=8)
def _splits(task: Jsonl, path_version: object, heldout_version: object) -> dict[Split, tuple[Problem, ...]]:
    """The rows of both splits. The versions are there for the cache alone: a file that has changed is read again."""
    rows = read(task.path, partial(_problem, task))
    if task.heldout_path is not None:
        heldout = read(task.heldout_path, partial(_problem, task))
        asked = {row.key for row in heldout}
        return {"train": tuple(row for row in rows if row.key not in asked), "heldout": tuple(heldout)}
    where = [split_of(row.key, task.held_out_fraction) for row in rows]
    train = tuple(row for row, split in zip(rows, where, strict=True) if split == "train")
    return {"train": train, "heldout": tuple(row for row, split in zip(rows, where, strict=True) if split == "heldout")}


def _problem(task: Jsonl, row: object) -> Problem:
    if not isinstance(row, dict):
        raise ValueError('a row must be a JSON object, such as {"question": ..., "answer": ...}')
    question, answer_text = _field(row, task.question), _field(row, task.answer)
    if task.answer_after is not None:
        _, mark, answer_text = answer_text.rpartition(task.answer_after)
        if not mark:
            raise ValueError(f"the field {task.answer!r} does not contain answer_after = {task.answer_after!r}")
    elif task.answer_boxed:
        boxes = extract.boxes(answer_text)
        if not boxes:
            raise ValueError(f"the field {task.answer!r} has no \\boxed{{}}, which answer_boxed = true asks for")
        answer_text = boxes[-1]
    if not answer_text.strip():
        raise ValueError(f"the field {task.answer!r} holds no answer")
    key = hashlib.blake2b(" ".join(question.split()).encode(), digest_size=16).hexdigest()
    categories = tuple((name, _field(row, name).strip()) for name in task.categories)
    return Problem(question.strip(), answer_text.strip(), key, categories)


def _field(row: dict[str, object], name: str) -> str:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        found = ", ".join(row) or "none"
        raise ValueError(f"expected text in the field {name!r}; the row has the fields: {found}")
    if not str(value).strip():
        raise ValueError(f"the field {name!r} is empty")
    return str(value)
