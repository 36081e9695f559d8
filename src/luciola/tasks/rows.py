"""Rows of a JSON-lines file: read with the line of each mistake, again after a change, and shuffled in each pass."""

import json
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from luciola.tasks.base import Problem, Split

Row = TypeVar("Row")


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
