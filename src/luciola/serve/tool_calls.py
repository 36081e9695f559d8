"""Calls of tools in a completion that arrives in pieces: the text before them, and each call's name and arguments."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from luciola.serve.tool_formats import CallFormat

SPACE = re.compile(r"\s*")
LONGEST_HEADER = 1000  # characters before a call's arguments, blank space included; more are no header
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class CallPiece:
    """A piece of a call, as OpenAI's clients put them together: by index, the arguments one behind the other.

    Attributes:
        index: which call of the completion, from 0.
        arguments: the next characters of the arguments' JSON, perhaps "".
        id, name: in a call's first piece; None later.
    """

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None

    def delta(self) -> dict[str, Any]:
        """As it stands in `delta.tool_calls` of a streamed chunk."""
        if self.id is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


class _UnfinishedError(Exception):
    """The text ends before it is known what it will be."""


class ToolCallParser:
    """Finds the calls of one completion, its thinking taken off before.

    What only looks like a call comes out as content: markup that goes on otherwise, a name that is no tool's,
    arguments that are no JSON object. Blank space before a call and between calls belongs to the markup.

    Args:
        form: how the model writes calls.
        names: of the tools.
        enforced: whether a grammar has made sure that every call is well formed. Then arguments come as they are
            written; otherwise each call comes as a whole, once it is known to be one.
        other: what the grammar lets stand in place of calls.

    Attributes:
        calls: all calls so far as they stand in a message: {id, type, function {name, arguments}}.
    """

    def __init__(
        self,
        form: CallFormat,
        names: Collection[str],
        *,
        enforced: bool,
        other: Literal["none", "json", "text"] = "text",
    ) -> None:
        self.calls: list[dict[str, Any]] = []
        self._form, self._names, self._enforced = form, frozenset(names), enforced
        self._other = other
        self._held = ""
        self._blank = ""  # white space before the call that is being read
        self._step = self._text
        self._name = ""
        self._json = _ObjectEnd(0)
        self._content: list[str] = []
        self._said = False  # whether some content has been given out
        self._pieces: list[CallPiece] = []

    @property
    def whole(self) -> bool:
        """Whether there are calls, and the last one is complete."""
        return bool(self.calls) and self._step != self._arguments

    def push(self, text: str) -> tuple[str, list[CallPiece]]:
        """Add a piece of the completion; the content and the pieces of calls that are certain now."""
        self._held += text
        try:
            while self._held:
                self._step()
        except _UnfinishedError:
            pass
        return self._taken()

    def end(self) -> tuple[str, list[CallPiece]]:
        """What is still held back, as it is now that nothing follows."""
        text = self._blank + self._held
        if not (self._within_markup(text) if self._enforced else self._closes(text)):
            self._content.append(text)
        self._held = self._blank = ""
        return self._taken()

    def _closes(self, text: str) -> bool:
        """Whether the last of a completion belongs to a call that is whole."""
        blank = bool(self.calls) and not text.strip()
        closing = self._step == self._after_call and _begins(self._form.close, text)
        return self._step == self._after_arguments or blank or closing

    def _within_markup(self, text: str) -> bool:
        """Whether the last of a completion that a grammar bound can be nothing but a call's, perhaps cut short."""
        if self.calls or self._other == "none":
            return True
        if self._other == "json":  # nothing but calls alone, or an answer alone, which some markers begin as well
            marker, lead = self._form.marker, text.strip()
            unlike = marker != "{" and lead != "["
            return unlike and not self._said and (self._step == self._first_call or marker.startswith(lead))
        return self._step == self._first_call

    def _taken(self) -> tuple[str, list[CallPiece]]:
        content, pieces = "".join(self._content), self._pieces
        self._content, self._pieces = [], []
        self._said = self._said or bool(content)
        return content, pieces

    # Each step reads from the beginning of the held text and says what the next step is.

    def _text(self) -> None:
        """Content, up to a marker."""
        marker, held = self._form.marker, self._held
        if self._form.anywhere:
            place = held.find(marker)
            found = place >= 0
            if not found:
                lengths = range(min(len(marker) - 1, len(held)), -1, -1)
                place = len(held) - next(n for n in lengths if held.endswith(marker[:n]))
        else:
            place = len(held) - len(held.lstrip())
            found = held.startswith(marker, place)
            if not found and place < len(held):
                self._step = self._only_text
                return
        certain = held[:place].rstrip()
        self._content.append(certain)
        self._held = held[len(certain) :]
        if not found:
            raise _UnfinishedError
        self._blank, self._held = held[len(certain) : place], held[place:]
        self._step = self._first_call

    def _only_text(self) -> None:
        self._content.append(self._held)
        self._held = ""

    def _first_call(self) -> None:
        if not self._begin_call(self._form.open + self._form.before):
            self._no_call()

    def _arguments(self) -> None:
        end = self._json.find(self._held)
        if self._enforced:
            piece = self._held[:end]
            self.calls[-1]["function"]["arguments"] += piece
            self._pieces.append(CallPiece(len(self.calls) - 1, piece))
            self._held = "" if end is None else self._held[end:]
            self._json.scanned = 0
        elif end is not None:
            arguments = self._held[self._json.start : end]
            if not _is_object(arguments):
                self._no_call()
                return
            self._new_call(arguments)
            self._held = self._held[end:]
        if end is None:
            raise _UnfinishedError
        self._step = self._after_arguments

    def _after_arguments(self) -> None:
        end = _past(self._held, 0, self._form.after)
        self._held = self._held[end or 0 :]
        self._step = self._after_call

    def _after_call(self) -> None:
        """Another call, the end of the calls, or text once more."""
        form, unfinished = self._form, False
        self._held = self._held.lstrip()
        if not self._held:
            return
        try:
            if form.close and (end := _past(self._held, 0, form.close)) is not None:
                self._held, self._step = self._held[end:], self._text
                return
        except _UnfinishedError:
            unfinished = True
        if self._begin_call(form.separator + form.before):
            return
        if unfinished:
            raise _UnfinishedError
        self._step = self._text if form.anywhere else self._only_text

    def _begin_call(self, lead: str) -> bool:
        """Past `lead`, a name, and what stands before the arguments; False if there is something else."""
        try:
            return self._header(lead)
        except _UnfinishedError:
            if len(self._held) < LONGEST_HEADER:
                raise
            return False

    def _header(self, lead: str) -> bool:
        held = self._held[:LONGEST_HEADER]
        start = _past(held, 0, lead)
        if start is None:
            return False
        if start == len(held):
            raise _UnfinishedError
        name = NAME.match(held, start)
        if name is None:
            return False
        if name.end() == len(held):
            raise _UnfinishedError
        place = _past(held, name.end(), self._form.between) if name[0] in self._names else None
        if place is None:
            return False
        place = _space_end(held, place)
        if place == len(held):
            raise _UnfinishedError
        if held[place] != "{":
            return False
        self._name, self._json, self._step = name[0], _ObjectEnd(place), self._arguments
        if self._enforced:
            self._new_call("")
            self._held, self._json = self._held[place:], _ObjectEnd(0)
        return True

    def _new_call(self, arguments: str) -> None:
        call_id = "call_" + secrets.token_hex(12)
        self._pieces.append(CallPiece(len(self.calls), arguments, call_id, self._name))
        function = {"name": self._name, "arguments": arguments}
        self.calls.append({"id": call_id, "type": "function", "function": function})
        self._blank = ""

    def _no_call(self) -> None:
        """What is held begins with no call; another one may be further on."""
        self._content.append(self._blank + self._held[:1])
        self._blank, self._held = "", self._held[1:]
        self._step = self._text if self._form.anywhere else self._only_text


class _ObjectEnd:
    """Finds where a JSON object ends in a text that grows."""

    _SIGNS = re.compile(r'[{}\[\]"]')
    _IN_STRING = re.compile(r'["\\]')

    def __init__(self, start: int) -> None:
        self.start = self.scanned = start
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int | None:
        """The place behind the object, or None if it goes on; `text` is as before up to `scanned`."""
        if self._escaped and self.scanned < len(text):
            self.scanned, self._escaped = self.scanned + 1, False
        while match := (self._IN_STRING if self._in_string else self._SIGNS).search(text, self.scanned):
            sign, self.scanned = match[0], match.end()
            if sign == "\\":
                self._escaped = self.scanned == len(text)  # what it escapes is still to come
                self.scanned += not self._escaped
            elif sign == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if sign in "{[" else -1
                if self._depth == 0:
                    return self.scanned
        self.scanned = len(text)
        return None


def _is_object(text: str) -> bool:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        return isinstance(json.loads(text, parse_constant=refuse), dict)
    except (ValueError, RecursionError):
        return False


def _past(text: str, start: int, literal: str) -> int | None:
    """Where `text` is past `literal`, which it may space otherwise; None if it has something else there.

    Raises:
        _UnfinishedError: the text ends within the literal.
    """
    for character in literal:
        if character.isspace():
            continue
        start = _space_end(text, start)
        if start == len(text):
            raise _UnfinishedError
        if text[start] != character:
            return None
        start += 1
    return start


def _space_end(text: str, start: int) -> int:
    space = SPACE.match(text, start)
    assert space is not None
    return space.end()


def _begins(literal: str, text: str) -> bool:
    """Whether `text` is a beginning of `literal`."""
    try:
        _past(text, 0, literal)
    except _UnfinishedError:
        return True
    return False


class SpecialTokenFilter:
    """Takes the names of special tokens out of a text decoded with them, all but those that a format's markup has.

    Args:
        names: of the special tokens, such as "</s>".
        form: the format of calls.
    """

    def __init__(self, names: Collection[str], form: CallFormat) -> None:
        markup = form.write([("", "")])
        self._names: Sequence[str] = sorted((n for n in names if n and n not in markup), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        self._longest = len(self._names[0]) if self._names else 0
        self._held = ""

    def push(self, text: str) -> str:
        """Add a piece; what is certain now, the beginnings of names held back."""
        text = self._pattern.sub("", self._held + text)
        starts = range(max(0, len(text) - self._longest + 1), len(text))
        cut = next((i for i in starts if any(name.startswith(text[i:]) for name in self._names)), len(text))
        self._held = text[cut:]
        return text[:cut]

    def end(self) -> str:
        """What is still held back."""
        held, self._held = self._held, ""
        return held
