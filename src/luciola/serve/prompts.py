"""A request's messages as the token ids that the model goes on from, and whether its reply begins with thinking."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from luciola.serve.errors import ApiError, naming
from luciola.serve.protocol import AssistantMessage, Conversation, Message, RefusalPart, Templated, TextPart
from luciola.serve.service import Service
from luciola.serve.tools import ToolUse
from luciola.text.chat import END_THINK, THINK
from luciola.text.tokenizer import Tokenizer
from luciola.text.untrusted import shortened


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads.

    Attributes:
        thinks: whether the reply may begin with thinking.
        inside: whether it is in its thinking from the first token on, as the prompt has opened it.
    """

    ids: list[int]
    thinks: bool = False
    inside: bool = False


def encoded(service: Service, text: str, where: str, begin: bool = False) -> list[int]:
    """The token ids of a request's text. One that is too long for the context whatever its tokens are is not looked at.

    Raises:
        ApiError: it is so long, or the tokenizer has no tokens for it.
    """
    most = service.context * service.tokenizer.longest
    if len(text) > most:
        raise ApiError(
            f"{where} has {len(text)} characters; the model's context of {service.context} tokens holds {most} at "
            "most: shorten it",
            param=where,
            code="context_length_exceeded",
        )
    try:
        return service.tokenizer.encode(text, begin=begin)
    except ValueError as error:
        raise ApiError(str(error), param=where) from error


def check_known(service: Service, ids: Iterable[int], field: str) -> None:
    """Raises ApiError for a token id that the model does not have."""
    beyond = next((token for token in ids if token >= service.vocab_size), None)
    if beyond is not None:
        raise ApiError(f"{field} has {beyond}, outside the vocabulary of {service.vocab_size}", param=field)


def tools_of(request: Conversation) -> ToolUse | None:
    """What the request says of tools; None when none may be called.

    Raises:
        ApiError: it makes no sense.
    """
    given = request.model_dump(include={"tools", "tool_choice", "parallel_tool_calls"}, exclude_none=True)
    try:
        return ToolUse.read(given.pop("tools", None), **given)
    except ValueError as error:
        raise naming(error, "tools") from error


def chat_prompt(service: Service, request: Templated, use: ToolUse | None, constrained: bool) -> Prompt:
    """Render the messages and tools by the chat template.

    A thinking that is switched off, in a template without such a switch, is opened and closed again at once. One that
    must come before a `constrained` answer is opened, so that it does.

    Raises:
        ApiError: the template refuses the messages, or the last one cannot be gone on from.
    """
    tokenizer = service.tokenizer
    try:
        messages, tools = service.tool_prompts.prepare(as_dicts(request.messages), () if use is None else use.given)
    except ValueError as error:
        raise naming(error, "messages") from error
    switch = _switch(request)
    variables = dict(request.chat_template_kwargs or {})
    if switch is not None:
        variables |= {"thinking": switch, "enable_thinking": switch}  # DeepSeek's name and Qwen's
    if request.reasoning_effort not in (None, "none"):
        variables["reasoning_effort"] = request.reasoning_effort
    last = request.messages[-1]
    goes_on = bool(request.continue_final_message or (isinstance(last, AssistantMessage) and last.prefix))
    if goes_on and not isinstance(last, AssistantMessage):
        raise ApiError("continue_final_message needs a last message of the assistant to go on from", param="messages")
    generate = request.add_generation_prompt is not False or goes_on
    try:
        text = tokenizer.render(
            messages[:-1] if goes_on else messages, add_generation_prompt=generate, tools=tools, variables=variables
        )
    except ValueError as error:
        raise ApiError(str(error), param="messages") from error
    thinks = tokenizer.thinks and switch is not False and generate and not _ends(text, END_THINK)
    if goes_on:
        assert isinstance(last, AssistantMessage)
        text = _with_beginning(text, last)
        inside = text.rfind(THINK) > text.rfind(END_THINK) and bool(_reasoning(last)) and not flat(last.content)
        return Prompt(encoded(service, text, "messages"), inside, inside)
    template = tokenizer.chat_template or ""
    if switch is False and tokenizer.thinks and generate:
        if _ends(text, THINK):
            text += _blank(tokenizer) + END_THINK + _blank(tokenizer)
        elif not _ends(text, END_THINK) and "thinking" not in template:
            text += THINK + _blank(tokenizer) + END_THINK + _blank(tokenizer)
    inside = thinks and _ends(text, THINK)
    if thinks and constrained and not inside:
        text, inside = text + THINK, True
    return Prompt(encoded(service, text, "messages"), thinks, inside)


def as_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as chat templates take them. By DeepSeek's rule the reasoning of earlier turns is left out, but for
    turns that called tools, whose reasoning the model still needs."""
    found: list[dict[str, Any]] = []
    for message in messages:
        entry = message.model_dump(exclude_none=True, exclude={"reasoning", "reasoning_content", "prefix"})
        entry["content"] = flat(message.content)
        if entry["role"] == "developer":
            entry["role"] = "system"
        if isinstance(message, AssistantMessage):
            calls = bool(message.tool_calls)
            if not calls:
                entry.pop("tool_calls", None)
            if calls and (reasoning := _reasoning(message)):
                entry["reasoning_content"] = reasoning
        found.append(entry)
    return found


def flat(content: str | Sequence[TextPart | RefusalPart] | None) -> str:
    """A message's text, also where it comes in parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _reasoning(message: AssistantMessage) -> str:
    return message.reasoning_content or message.reasoning or ""


def _with_beginning(text: str, last: AssistantMessage) -> str:
    """The prompt with what the assistant has said already."""
    reasoning, content = _reasoning(last), flat(last.content)
    opened = _ends(text, THINK)
    if reasoning:
        text += ("" if opened else THINK) + reasoning + (END_THINK if content else "")
    elif opened:
        text += END_THINK
    return text + content


def _switch(request: Templated) -> bool | None:
    """Whether the request wants thinking; None: it says nothing of it."""
    given = request.chat_template_kwargs or {}
    switches = {name: given[name] for name in ("thinking", "enable_thinking") if given.get(name) is not None}
    for name, wanted in switches.items():
        if not isinstance(wanted, bool):
            field = f"chat_template_kwargs.{name}"
            raise ApiError(f"{field} must be true or false, not {shortened(wanted)}", param=field)
    if request.thinking is not None:
        return request.thinking.type == "enabled"
    if switches:
        return bool(next(iter(switches.values())))
    return None if request.reasoning_effort is None else request.reasoning_effort != "none"


def _ends(text: str, tag: str) -> bool:
    return text.rstrip().endswith(tag)


def _blank(tokenizer: Tokenizer) -> str:
    return "" if tokenizer.lacks("\n") else "\n\n"
