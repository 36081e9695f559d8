"""Rows of a JSON-lines file: read with the line of each mistake, again after a change, and shuffled in each pass.

A row is held out by a hash of its question, so that a question which occurs twice is never on both sides; or
`heldout_path` names a file of its own, whose questions are then left out of training.
"""

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from luciola.tasks.base import Problem, Split, split_of

Row = TypeVar("Row")


class FileTask(BaseModel, ABC):
    """What the tasks have in common whose problems are the rows of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    graded_elsewhere: ClassVar[bool] = True  # see tasks/base.py

    path: Path = Field(description="the file; relative to the folder in which luciola is started")
    heldout_path: Path | None = Field(None, description="a file of problems to evaluate on, instead of a share of path")
    held_out_fraction: float = Field(0.1, gt=0, lt=1, description="share of the questions kept for evaluation")

    @abstractmethod
    def parse(self, row: dict[str, Any]) -> Problem:
        """The problem of a row.

        Raises:
            ValueError: the row is not what it should be.
        """

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

    def size(self, split: Split) -> int | None:
        return len(self._rows(split))

    def _rows(self, split: Split) -> tuple[Problem, ...]:
        heldout_version = None if self.heldout_path is None else version(self.heldout_path)
        return _splits(self, version(self.path), heldout_version)[split]


@lru_cache(maxsize=8)
def _splits(task: FileTask, path_version: object, heldout_version: object) -> dict[Split, tuple[Problem, ...]]:
    """The rows of both splits. The versions are there for the cache alone: a file that has changed is read again."""
    rows = read(task.path, task.parse)
    if task.heldout_path is not None:
        heldout = read(task.heldout_path, task.parse)
        asked = {row.key for row in heldout}
        return {"train": tuple(row for row in rows if row.key not in asked), "heldout": tuple(heldout)}
    where = [split_of(row.key, task.held_out_fraction) for row in rows]
    train = tuple(row for row, split in zip(rows, where, strict=True) if split == "train")
    return {"train": train, "heldout": tuple(row for row, split in zip(rows, where, strict=True) if split == "heldout")}


def key_of(question: str) -> str:
    """The key of a problem that is known by its question, however that is spaced."""
    return hashlib.blake2b(" ".join(question.split()).encode(), digest_size=16).hexdigest()


def text_of(row: dict[str, Any], name: str) -> str:
    """The text, or number, in a field of a row.

    Raises:
        ValueError: there is none.
    """
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        found = ", ".join(row) or "none"
        raise ValueError(f"expected text in the field {name!r}; the row has the fields: {found}")
    if not str(value).strip():
        raise ValueError(f"the field {name!r} is empty")
    return str(value)


def version(path: Path) -> tuple[int, int]:
    """What differs once a file has changed: a key for caches of its rows.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}; set task.path (and task.heldout_path) to a JSONL file.")
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def read(path: Path, parse: Callable[[Any], Row]) -> list[Row]:
    """Every line of the file but blank ones, parsed.

    Raises:
        ValueError: a line is no JSON, or `parse` refuses it (the sentence has its number), or there is none.
    """
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    rows.append(parse(json.loads(line.decode("utf-8-sig"))))
                except ValueError as error:  # also what json and the decoder raise
                    raise ValueError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no rows; it should hold one JSON object a line.")
    return rows


def pick(rows: Sequence[Problem], split: Split, index: int, seed: int) -> Problem:
    """Row `index` in a shuffled order, which is another one in each pass over the rows."""
    epoch, position = divmod(index, len(rows))
    return rows[_order(len(rows), f"{seed}/{split}/{epoch}")[position]]


@lru_cache(maxsize=4)
def _order(rows: int, seed: str) -> tuple[int, ...]:
    return tuple(random.Random(seed).sample(range(rows), rows))
