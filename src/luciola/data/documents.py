"""Sources of training documents: each turns a document's number into its tokens and says which of them carry loss.

A source is a pure function of the number (and the seed it was made with), so that the batch of any step can be made
again after a crash without replaying the ones before it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from luciola.tasks.base import Task
from luciola.text.tokenizer import Tokenizer


class Document(NamedTuple):
    """Token ids, and for each whether the model is trained to predict it."""

    tokens: list[int]
    trained: list[bool]


class Documents(Protocol):
    """A numbered collection of documents; `size` is None where there is no end."""

    @property
    def size(self) -> int | None: ...

    def document(self, index: int) -> Document:
        """Document number `index`."""
        ...


class TaskDocuments:
    """Worked solutions written by a task, as conversations; a share of their steps may be wrong.

    Pre-training reads prompt and solution alike; with `completion_only` (fine-tuning) the loss is on the solution.
    """

    size = None

    def __init__(
        self, task: Task, tokenizer: Tokenizer, seed: int, error_rate: float = 0.0, *, completion_only: bool = False
    ) -> None:
        self.task, self.tokenizer, self.seed = task, tokenizer, seed
        self.error_rate, self.completion_only = error_rate, completion_only

    def document(self, index: int) -> Document:
        """The problem number `index` of the training split with a solution."""
        problem = self.task.problem("train", index, self.seed)
        rng = random.Random(f"{self.seed}/{index}/solution")
        solution = self.task.solution(problem, rng, self.error_rate)
        return _turn(self.tokenizer, self.task.messages(problem), solution, self.completion_only)


class TextDocuments:
    """Plain texts from files, each followed by the end token."""

    def __init__(self, paths: Sequence[str], field: str, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.texts = list(read_texts(paths, field))
        self.size = len(self.texts)

    def document(self, index: int) -> Document:
        """The text number `index`, in file order."""
        tokens = [*self.tokenizer.encode(self.texts[index]), *self.tokenizer.eos_token_ids[:1]]
        return Document(tokens, [True] * len(tokens))


class Conversations:
    """Conversations from JSON-lines files; the loss is on what the assistant says."""

    def __init__(
        self,
        paths: Sequence[str],
        tokenizer: Tokenizer,
        messages_field: str,
        prompt_field: str | None = None,
        completion_field: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.conversations: list[list[dict[str, str]]] = []
        self.places: list[str] = []
        for where, record in read_records(paths):
            self.places.append(where)
            if prompt_field is not None and completion_field is not None:
                user, assistant = (_text(record, name, where) for name in (prompt_field, completion_field))
                self.conversations.append(
                    [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
                )
            else:
                self.conversations.append(_messages(record, messages_field, where))
        self.size = len(self.conversations)

    def document(self, index: int) -> Document:
        """Conversation number `index`, rendered turn by turn by the model's own chat template.

        Raises ValueError naming the row which the template refuses.
        """
        try:
            return self._rendered(self.conversations[index])
        except ValueError as error:
            raise ValueError(f"{self.places[index]}: {error}") from error

    def _rendered(self, messages: list[dict[str, str]]) -> Document:
        document = Document([], [])
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                turn = _turn(self.tokenizer, messages[:i], message["content"], completion_only=True)
                # Templates may render a finished turn differently (they drop old thinking): the newest rendering of the
                # history leads, and of the earlier turns only those that still stand in it keep their loss.
                kept = document.trained if turn.tokens[: len(document.tokens)] == document.tokens else []
                trained = kept + turn.trained[len(kept) :]
                document = Document(turn.tokens, trained)
        return document


def _turn(tokenizer: Tokenizer, messages: list[dict[str, str]], completion: str, completion_only: bool) -> Document:
    prompt = tokenizer.chat(messages)
    answer = [*tokenizer.encode(completion), *tokenizer.eos_token_ids[:1]]
    return Document(prompt + answer, [not completion_only] * len(prompt) + [True] * len(answer))


def read_texts(paths: Sequence[str], field: str) -> Iterator[str]:
    """The texts of files: a .txt file (or any other) is one text, a .jsonl file has one in `field` of each row.

    Raises ValueError naming the file, and the row of a .jsonl file, for what cannot be read.
    """
    for path in _files(paths):
        if path.suffix == ".jsonl":
            for where, record in _rows(path):
                yield _text(record, field, where)
        else:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert or drop it") from error
            if not text.strip():
                raise ValueError(f"{path} is empty; there is nothing to train on")
            yield text


def read_records(paths: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of JSON-lines files, each with a name for error messages ("FILE row 3")."""
    for path in _files(paths):
        yield from _rows(path)


def _files(paths: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in {".txt", ".md", ".jsonl"})
            if not found:
                raise ValueError(f"{path} holds no .txt, .md or .jsonl file")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"data file {path} does not exist; check data.paths (relative to {Path.cwd()})")
    return files


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    empty = True
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path} row {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8 text (byte {error.start}); convert or drop it") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where} is not a JSON object")
            empty = False
            yield where, record
    if empty:
        raise ValueError(f"{path} is empty; there is nothing to train on")


def _text(record: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(record.get(name), str) or not record[name]:
        fields = ", ".join(sorted(record)) or "none"
        raise ValueError(f"{where} has no text in field {name!r}; its fields: {fields}")
    return str(record[name])


def _messages(record: dict[str, Any], name: str, where: str) -> list[dict[str, str]]:
    messages = record.get(name)
    wanted = "a list of messages with role and content, one of them the assistant's"
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise ValueError(f"{where}: field {name!r} must be {wanted}")
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError(f"{where}: field {name!r} must be {wanted}")
    return messages
