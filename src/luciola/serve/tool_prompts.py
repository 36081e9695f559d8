"""Tools, their calls and their results as a model's chat template takes them.

Templates differ in what they have a place for. Some show the tools themselves, some only calls and results, some
neither; some write a call's arguments as they are and want text, others turn them into JSON and want an object. Rather
than read the template, we render a small conversation with it and look at what comes of it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json

from luciola.serve.tool_formats import CallFormat, recognised, special_names
from luciola.text.tokenizer import TOOL_USE, Tokenizer
from luciola.text.untrusted import shortened

_PROBE = "probe_function"
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": _PROBE, "description": "", "parameters": {"type": "object", "properties": {}}},
}
_USER = {"role": "user", "content": "Hello."}


@dataclass(frozen=True)
class ToolPrompts:
    """How tools stand in the prompts of one model; made by `of`.

    Attributes:
        form: how the model writes calls.
        shows_tools: whether its template describes the tools; otherwise a system message does.
        arguments: what the template takes as a call's arguments: "object", "text", or None if it has no place for
            calls, which are messages of text then.
        content_beside_calls: whether the template keeps the calls of a message that has content as well; otherwise the
            content is what is left out.
        no_content: the content of a message that has calls alone: None, by which some templates know it, or "", where
            None makes them fail.
        takes_system: whether the template takes a system message; otherwise the first user's message describes tools.
        special: the names of special tokens, if some belong to the markup of calls; the engine must decode with
            `skip_special_tokens=False` then and a `SpecialTokenFilter` take out the others. Otherwise empty.
    """

    form: CallFormat
    shows_tools: bool
    arguments: Literal["object", "text"] | None
    content_beside_calls: bool
    no_content: str | None
    takes_system: bool
    special: frozenset[str]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ToolPrompts:
        """As the tokenizer's chat template shows it; takes some milliseconds, so keep it."""
        form = recognised(tokenizer.further_templates.get(TOOL_USE, tokenizer.chat_template))
        render = functools.partial(_rendered, tokenizer)
        shows_tools = _PROBE in render([_USER], [_PROBE_TOOL])
        tools = [_PROBE_TOOL] if shows_tools else None
        arguments: Literal["object", "text"] | None = None
        beside, no_content = True, None
        kinds: tuple[tuple[Literal["object", "text"], object], ...] = (
            ("object", {"probe_key": "a"}), ("text", '{"probe_key": "a"}'),
        )  # fmt: skip
        for kind, value, nothing in ((*kind, nothing) for kind in kinds for nothing in (None, "")):
            text = render(_probe_conversation(value, nothing), tools)
            # Not as it should be: an object as Python's repr, or text that is quoted as JSON once more.
            if re.search(r'"probe_key"\s*:\s*"a"', text) and "probe_result" in text:
                arguments, no_content = kind, nothing
                beside = "probe_key" in render(_probe_conversation(value, "probe_content"), tools)
                break
        takes_system = _PROBE in render([{"role": "system", "content": _PROBE}, _USER], None)
        special = special_names(tokenizer)
        markup = form.write([("", "")])
        in_markup = any(name in markup for name in special)
        names = frozenset(special) if in_markup else frozenset()
        return cls(form, shows_tools, arguments, beside, no_content, takes_system, names)

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]] | None]:
        """(messages, tools) to give to `Tokenizer.render`.

        Args:
            messages: OpenAI's, whose contents are text or None.
            tools: the request's, in OpenAI's form (`ToolUse.given`); empty when none may be called.

        Raises:
            ValueError: a message's tool_calls are not in OpenAI's form.
        """
        prepared = self._with_calls(messages)
        if not tools:
            return prepared, None
        if self.shows_tools:
            return prepared, list(tools)
        description = describe(self.form, tools)
        first = prepared[0] if prepared else {}
        if first.get("role") == "system":
            first["content"] = f"{first.get('content') or ''}\n\n{description}".lstrip()
        elif first.get("role") == "user" and not self.takes_system:
            first["content"] = f"{description}\n\n{first.get('content') or ''}"
        else:
            prepared.insert(0, {"role": "system", "content": description})
        return prepared, None

    def _with_calls(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        prepared: list[dict[str, Any]] = []
        names: dict[str, str] = {}  # of the function, by the call's id
        for place, message in enumerate(messages):
            message = dict(message)
            calls = _calls(message.pop("tool_calls", None), f"messages[{place}].tool_calls")
            names |= {call_id: name for call_id, name, _ in calls}
            if message.get("role") == "tool":
                call_id = message.get("tool_call_id")
                if isinstance(call_id, str):
                    if call_id in names:
                        message.setdefault("name", names[call_id])
                    message["tool_call_id"] = self._id(call_id)
                if self.arguments is None:
                    self._add_result(prepared, message)
                    continue
            elif calls and self.arguments is None:
                text = self.form.write(
                    [(name, json.dumps(arguments, ensure_ascii=False)) for _, name, arguments in calls]
                )
                content = (message.get("content") or "").rstrip()
                message["content"] = f"{content}\n{text}" if content else text
            elif calls:
                content = message.get("content") if self.content_beside_calls else None
                message["content"] = content or self.no_content
                message["tool_calls"] = [self._call(*call) for call in calls]
            prepared.append(message)
        return prepared

    def _call(self, call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        as_text = self.arguments == "text"
        value: object = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
        return {"id": self._id(call_id), "type": "function", "function": {"name": name, "arguments": value}}

    def _id(self, call_id: str) -> str:
        """Mistral's templates refuse ids that have not nine letters and digits."""
        if self.form.marker != "[TOOL_CALLS]":
            return call_id
        return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]

    @staticmethod
    def _add_result(prepared: list[dict[str, Any]], message: Mapping[str, Any]) -> None:
        """A result as a user's message, results of several calls together in one."""
        text = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
        before = prepared[-1] if prepared else {}
        if before.get("role") == "user" and str(before.get("content", "")).endswith("</tool_response>"):
            before["content"] += "\n" + text
        else:
            prepared.append({"role": "user", "content": text})


def describe(form: CallFormat, tools: Sequence[Mapping[str, Any]]) -> str:
    """The system message for a template that does not show tools."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = form.write([("NAME", "{ARGUMENTS}")])
    return (
        f"You can call these functions, each given with the JSON schema of its arguments:\n\n<tools>\n{listed}\n"
        "</tools>\n\nTo call one, write its name and its arguments, a JSON object, in exactly this form and nothing "
        f"behind it:\n\n{example}\n\nThe result is then given to you."
    )


def _calls(calls: object, field: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(id, name, arguments) of each call in a message of the history."""
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise ValueError(f"{field} must be a list of calls.")
    read = []
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str):
            raise ValueError(f"{field}[{place}] must be an object with id, type and function, whose name is text.")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with suppress(ValueError):  # a call that a limit of tokens has cut short keeps what is whole of it
                arguments = from_json(arguments or "{}", allow_partial=True)
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            given = shortened(arguments)
            raise ValueError(
                f"{field}[{place}].function.arguments must be a JSON object, written as text, not {given}."
            )
        read.append((str(call.get("id") or f"call_{place}"), name, arguments))
    return read


def _probe_conversation(arguments: object, content: str | None) -> list[dict[str, Any]]:
    call = {"id": "probe0123", "type": "function", "function": {"name": _PROBE, "arguments": arguments}}
    return [
        _USER,
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "probe0123", "name": _PROBE, "content": "probe_result"},
    ]


def _rendered(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> str:
    """The prompt, or "" where the template refuses the messages."""
    try:
        return tokenizer.render(messages, tools=tools)
    except ValueError:
        return ""
