"""Files of one JSON object a line: metrics.jsonl and samples.jsonl of a run, appended to while it goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from luciola.run.publish import atomic_write


class RecordFile:
    """Appends records to a file, each with its `step` first; every line is handed to the system at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def append(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds a line; numbers may be Python's, numpy's or one-element tensors. JSON has no NaN or infinity: null."""
        if self._file is None:
            # backslashreplace: a lone surrogate in a completion becomes \udcxx, which is how JSON writes it
            self._file = open(self.path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        line = {"step": step} | {key: _plain(value) for key, value in record.items()}
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")

    def truncate(self, step: int) -> None:
        """Forgets the records after `step`, and a last line that was torn by a kill."""
        self.close()
        if self.path.exists():
            kept = [record for record in read_records(self.path) if record["step"] <= step]
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
            atomic_write(self.path, text.encode(errors="backslashreplace"))

    def sync(self) -> None:
        """Waits until what was appended is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file, without a last line that is torn; ValueError if another line is no JSON, or no record."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON; delete the line to go on") from None
            continue
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{path}, line {number} has no whole number as its step; delete the line to go on")
        records.append(record)
    return records


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
