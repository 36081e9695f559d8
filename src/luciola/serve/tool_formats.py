"""How models of different families write a call of a tool, and the grammar of such calls.

A format is told by the pieces of markup around a call's name and its arguments; the grammar is made of the same
pieces, and so are the parser (`tool_calls.py`) and the description in a prompt (`tool_prompts.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from luciola.engine.grammar import Grammar, json_rule
from luciola.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: unique in a request.
        description: for the model, or "".
        parameters: the JSON schema of its arguments, an object's.
        strict: whether a schema with keywords that cannot be enforced is refused, rather than enforced without them.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class CallFormat:
    """The text of calls: `open`, then for each call `before`, its name, `between`, its arguments in JSON and `after`,
    with `separator` between calls, then `close`.

    Attributes:
        marker: the text at whose first occurrence calls begin; `open + before` begins with it.
        anywhere: whether calls may follow other text; else they begin the completion.
        parallel: whether there may be several.
    """

    marker: str
    before: str
    between: str
    after: str
    open: str = ""
    separator: str = ""
    close: str = ""
    anywhere: bool = True
    parallel: bool = True

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """The text of calls, each a name and its arguments in JSON."""
        texts = [self.before + name + self.between + arguments + self.after for name, arguments in calls]
        return self.open + self.separator.join(texts) + self.close


HERMES = CallFormat(  # Hermes 2 Pro, Qwen 2.5 and 3, and what models without a format of their own are asked for
    marker="<tool_call>",
    before='<tool_call>\n{"name": "',
    between='", "arguments": ',
    after="}\n</tool_call>",
    separator="\n",
)
DEEPSEEK_V3 = CallFormat(  # and R1
    marker="<｜tool▁calls▁begin｜>",
    open="<｜tool▁calls▁begin｜>",
    before="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    between="\n```json\n",
    after="\n```<｜tool▁call▁end｜>",
    separator="\n",
    close="<｜tool▁calls▁end｜>",
)
DEEPSEEK_V3_1 = replace(
    DEEPSEEK_V3,
    before="<｜tool▁call▁begin｜>",
    between="<｜tool▁sep｜>",
    after="<｜tool▁call▁end｜>",
    separator="",
)
LLAMA_3 = CallFormat(
    marker="{", before='{"name": "', between='", "parameters": ', after="}", anywhere=False, parallel=False
)
MISTRAL = CallFormat(
    marker="[TOOL_CALLS]",
    open="[TOOL_CALLS] [",
    before='{"name": "',
    between='", "arguments": ',
    after="}",
    separator=", ",
    close="]",
)
MISTRAL_TEKKEN = replace(MISTRAL, open="[TOOL_CALLS][")
MISTRAL_ARGS = CallFormat(marker="[TOOL_CALLS]", before="[TOOL_CALLS]", between="[ARGS]", after="")

# Texts of which a chat template holds all, and the format that it then speaks; the first that fits.
_SIGNS: list[tuple[tuple[str, ...], CallFormat]] = [
    (("<tool_call>",), HERMES),
    (("<｜tool▁sep｜>", "```json"), DEEPSEEK_V3),
    (("<｜tool▁sep｜>",), DEEPSEEK_V3_1),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL_ARGS),
    (("[TOOL_CALLS] [",), MISTRAL),
    (("[TOOL_CALLS]",), MISTRAL_TEKKEN),
    (('"name": ', '"parameters": ', "ipython"), LLAMA_3),
]


def recognised(template: str | None) -> CallFormat:
    """The format of calls that a chat template speaks; Hermes' when it speaks none."""
    return next((form for signs, form in _SIGNS if all(sign in (template or "") for sign in signs)), HERMES)


def special_names(tokenizer: Tokenizer) -> dict[str, int]:
    """The special tokens, which are dropped from decoded text unless it is asked otherwise, by name."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return {token.content: token_id for token_id, token in added.items() if token.special}


# Blank space that models leave behind their thinking; more would let a small one stay there.
_BLANK = r"/[ \n]{0,2}/"


def call_grammar(
    form: CallFormat,
    tools: Sequence[Tool],
    tokenizer: Tokenizer,
    *,
    required: bool,
    parallel: bool,
    answer: Mapping[str, Any] | None = None,
    strict: bool = False,
) -> Grammar:
    """The completions in which every call is one of a tool in `tools`, with arguments that fit its schema.

    Args:
        required: whether there are only calls, one at least; else there may be text alone, or text and then calls.
        parallel: whether there may be several calls.
        answer: the JSON schema of a completion without calls, which has no text in front of calls then; None: any text.
        strict: whether that schema is refused if it has keywords that cannot be enforced.

    Raises:
        ValueError: a schema that cannot be enforced; the sentence names the tool.
    """
    special = special_names(tokenizer)
    first = (form.open + form.before).removeprefix(form.marker)
    more = f"({_literal(form.separator + form.before, special)} call)*" if parallel and form.parallel else ""
    calls = f"{_literal(first, special)} call {more} {_literal(form.close, special)}"
    marker = _literal(form.marker, special)
    only_calls = f"{_BLANK} {marker} {calls}"
    if required:
        rules = [f"start: {only_calls}"]
    elif answer is not None:
        rules = [f"start: answer | {only_calls}", f"answer: {json_rule(answer, lenient=not strict)}"]
    elif not form.anywhere:
        rules = [f"start: TEXT | {only_calls}", rf"TEXT: /\s*([^\s{re.escape(form.marker)}](?s:.*))?/"]
    elif form.marker in special:
        rules = [f"start: TEXT | TEXT {marker} {calls}", "TEXT: /(?s:.*)/"]
    else:  # as soon as the marker is complete, a lazy lexeme ends
        rules = [f"start: TEXT | text_and_marker {calls}", "TEXT: /(?s:.*)/", f"text_and_marker[lazy]: TEXT {marker}"]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        begin, end = _literal(tool.name + form.between, special), _literal(form.after, special)
        rules.append(f"call_{i}: {begin} {_arguments(tool)} {end}")
    try:
        return Grammar.lark("\n".join(rules))
    except ValueError as error:
        for tool in tools:
            try:
                Grammar.lark(f"start: {_arguments(tool)}")
            except ValueError as fault:
                raise _unusable(tool, fault) from fault
        raise ValueError(f"tools cannot be used together: {error}") from error


def _arguments(tool: Tool) -> str:
    try:
        return json_rule(tool.parameters, lenient=not tool.strict)
    except ValueError as error:
        raise _unusable(tool, error) from error


def _unusable(tool: Tool, error: ValueError) -> ValueError:
    reason = str(error).removeprefix("grammar cannot be used: ").removeprefix("schema ")
    return ValueError(f"tools: the parameters of '{tool.name}' cannot be used: {reason}")


def _literal(text: str, special: Mapping[str, int]) -> str:
    """A text as it stands in a rule of a Lark grammar; special tokens in it are named by id, as they have no text."""
    names = [name for name in special if name in text]
    parts = (
        re.split("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")", text) if names else [text]
    )
    return " ".join(
        f"<[{special[part]}]>" if part in special else json.dumps(part, ensure_ascii=False) for part in parts if part
    )
