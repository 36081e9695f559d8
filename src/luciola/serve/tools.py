"""What a request says about tools: `tools`, `tool_choice` and `parallel_tool_calls`, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from luciola.engine.grammar import Grammar
from luciola.serve.protocol import MAX_TOOLS
from luciola.serve.tool_calls import NAME, ToolCallParser
from luciola.serve.tool_formats import CallFormat, Tool, call_grammar
from luciola.text.tokenizer import Tokenizer
from luciola.text.untrusted import printable, shortened

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request and how the model may use them; made by `read`.

    Attributes:
        tools: those that may be called.
        given: the request's `tools` as they are shown to the model: all, also where only one may be called.
        required: whether the completion must be calls.
        parallel: whether there may be several.
    """

    tools: tuple[Tool, ...]
    given: tuple[Mapping[str, Any], ...]
    required: bool
    parallel: bool

    @classmethod
    def read(cls, tools: object, tool_choice: object = None, parallel_tool_calls: object = None) -> ToolUse | None:
        """From a request's three fields as they came in; None when no tool may be called.

        Raises:
            ValueError: in one sentence that names the field.
        """
        if tools is not None and not isinstance(tools, list | tuple):
            raise ValueError(f"tools must be a list of functions, not {shortened(tools)}.")
        if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
            raise ValueError(f"parallel_tool_calls must be true or false, not {shortened(parallel_tool_calls)}.")
        given: Sequence[object] = tools or ()
        if len(given) > MAX_TOOLS:
            raise ValueError(f"tools has {len(given)} functions; at most {MAX_TOOLS} are taken.")
        known: dict[str, Tool] = {}
        for place, entry in enumerate(given):
            tool = _tool(entry, f"tools[{place}]")
            if tool.name in known:
                raise ValueError(
                    f"tools[{place}].function.name '{tool.name}' is taken already; give each its own name."
                )
            known[tool.name] = tool
        names, required = _chosen(tool_choice)
        if not known and (names or required):
            raise ValueError("tools is empty, but tool_choice asks for a call; give the functions in tools.")
        for name in names:
            if name not in known:
                raise ValueError(
                    f"tool_choice names '{printable(name, 80)}', which is not in tools; there are: "
                    f"{printable(', '.join(known))}."
                )
        if not known or tool_choice == "none":
            return None
        one = isinstance(tool_choice, Mapping) and tool_choice["type"] == "function"  # named alone: one call of it
        return cls(
            tools=tuple(known[name] for name in names or known),
            given=tuple(_as_shown(tool) for tool in known.values()),
            required=required,
            parallel=parallel_tool_calls is not False and not one,
        )

    def grammar(
        self, form: CallFormat, tokenizer: Tokenizer, answer: Mapping[str, Any] | None = None, strict: bool = False
    ) -> Grammar:
        """Completions that use the tools so; give it `.after("</think>")` for a model that thinks first.

        Args:
            answer: the JSON schema that a completion without calls must fit; None: any text.
            strict: whether that schema is refused if it has keywords that cannot be enforced.

        Raises:
            ValueError: a schema that cannot be enforced; the sentence names the tool.
        """
        return call_grammar(
            form,
            self.tools,
            tokenizer,
            required=self.required,
            parallel=self.parallel,
            answer=answer,
            strict=strict,
        )

    def parser(self, form: CallFormat, *, enforced: bool = True, answers: bool = False) -> ToolCallParser:
        """Finds the calls in one completion; `enforced` if `grammar` is in force there, `answers` if with a schema for
        completions without calls."""
        other: Literal["none", "json", "text"] = "none" if self.required else "json" if answers else "text"
        return ToolCallParser(form, [tool.name for tool in self.tools], enforced=enforced, other=other)


def _tool(entry: object, field: str) -> Tool:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{field} must be an object with type and function, not {shortened(entry)}.")
    if entry.get("type", "function") != "function":
        raise ValueError(f"{field}.type is {shortened(entry['type'])}; only 'function' is known here.")
    function = entry.get("function")
    if not isinstance(function, Mapping):
        raise ValueError(f"{field}.function must be an object with name, description and parameters.")
    name, description = function.get("name"), function.get("description")
    parameters, strict = function.get("parameters"), function.get("strict")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{field}.function.name must be 1 to 64 letters, digits, '_', '-' or '.', not {shortened(name)}."
        )
    if description is not None and not isinstance(description, str):
        raise ValueError(f"{field}.function.description must be text, not {shortened(description)}.")
    if strict is not None and not isinstance(strict, bool):
        raise ValueError(f"{field}.function.strict must be true or false, not {shortened(strict)}.")
    if parameters is None:
        parameters = NO_ARGUMENTS
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise ValueError(
            f"{field}.function.parameters must be the JSON schema of an object ('type': 'object'), "
            f"not {shortened(parameters)}."
        )
    return Tool(name, description or "", {"type": "object", **parameters}, bool(strict))


def _chosen(tool_choice: object) -> tuple[tuple[str, ...], bool]:
    """The functions that `tool_choice` names, none if any will do, and whether one must be called."""
    if tool_choice is None or (isinstance(tool_choice, str) and tool_choice in ("none", "auto", "required")):
        return (), tool_choice == "required"
    kind = tool_choice.get("type") if isinstance(tool_choice, Mapping) else None
    names: tuple[str, ...]
    if isinstance(tool_choice, Mapping) and kind == "function":
        names, required = (_name(tool_choice),), True
    else:
        allowed = tool_choice.get("allowed_tools") if isinstance(tool_choice, Mapping) else None
        tools = allowed.get("tools") if isinstance(allowed, Mapping) and kind == "allowed_tools" else None
        names = tuple(map(_name, tools)) if isinstance(tools, list | tuple) else ()
        required = isinstance(allowed, Mapping) and allowed.get("mode") == "required"
    if not names or not all(names):
        raise ValueError(
            "tool_choice must be 'none', 'auto', 'required', "
            '{"type": "function", "function": {"name": ...}} or {"type": "allowed_tools", "allowed_tools": '
            f'{{"mode": ..., "tools": [...]}}}}, not {shortened(tool_choice)}.'
        )
    return tuple(dict.fromkeys(names)), required


def _name(tool: object) -> str:
    """The name in {"type": "function", "function": {"name": ...}}, "" if there is none."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def _as_shown(tool: Tool) -> dict[str, Any]:
    """As chat templates expect a tool, and no more of it than they need."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}
