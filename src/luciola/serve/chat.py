"""POST /v1/chat/completions: replies whole or as they grow, the thinking apart from the answer."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from luciola import SamplingParams
from luciola.engine.sequence import Completion, Delta
from luciola.engine.thinking import thinking_tokens
from luciola.serve.errors import ApiError, naming
from luciola.serve.prompts import Prompt, chat_prompt, tools_of
from luciola.serve.protocol import ChatRequest
from luciola.serve.reasoning import ReasoningSplitter
from luciola.serve.replies import (
    Call,
    CallDelta,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatReply,
    FinishReason,
    ReplyMessage,
    TokenLogprob,
    Usage,
)
from luciola.serve.sampling import grammar_of, most_tokens, params_of, schema_of, strict, structured_of
from luciola.serve.service import Service
from luciola.serve.tool_calls import CallPiece, SpecialTokenFilter
from luciola.serve.usage import numbers_of, prompt_logprobs, usage_of
from luciola.text.chat import END_THINK


class ChatJob:
    """One request: its prompt, its parameters, and its replies in the making.

    Making it may render a foreign template and compile a grammar, which takes its time: not on the event loop.

    Raises:
        ApiError: the request does not go.
    """

    def __init__(self, service: Service, request: ChatRequest) -> None:
        self.service, self.request = service, request
        self.id, self.created = service.new_id("chatcmpl"), int(time.time())
        self._generated = 0  # tokens, also of a reply that is broken off
        self.tools = tools_of(request)
        self.prompt, self.params = self._prepared()
        self.choices = [Choice(self, index) for index in range(self.params.n)]

    def _prepared(self) -> tuple[Prompt, SamplingParams]:
        request, service = self.request, self.service
        try:
            if self.tools is None:
                grammar = grammar_of(request)
            else:
                form, tokenizer = service.tool_prompts.form, service.tokenizer
                grammar = self.tools.grammar(form, tokenizer, self.answer(), strict(request))
        except ValueError as error:
            raise naming(error, "tools") from error
        prompt = chat_prompt(service, request, self.tools, grammar is not None)
        service.check_room(prompt.ids, "messages")
        if grammar is not None and prompt.thinks:
            grammar = grammar.after(END_THINK)
        asked = most_tokens(request, None)
        if asked == 0:
            raise ApiError("a reply has at least 1 token: max_completion_tokens cannot be 0", param=_zero(request))
        if request.top_logprobs and not request.logprobs:
            raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
        if request.stream and request.prompt_logprobs is not None:
            raise ApiError("prompt_logprobs cannot be streamed; leave stream out", param="prompt_logprobs")
        params = params_of(
            request,
            service,
            max_tokens=service.max_tokens(asked, prompt.ids),
            logprobs=bool(request.logprobs),
            top_logprobs=request.top_logprobs if request.logprobs else None,
            grammar=grammar,
            thinking_budget=_budget(request) if prompt.thinks else None,
        )
        if self.tools is not None and service.tool_prompts.special:
            params = replace(params, skip_special_tokens=False)
        return prompt, params

    def answer(self) -> dict[str, Any] | None:
        """The schema of an answer beside calls."""
        field, wanted = structured_of(self.request)
        if wanted is not None:
            raise ApiError(f"{field} cannot be had beside tools that may be called; use response_format", param=field)
        schema = schema_of(self.request)
        return schema if isinstance(schema, dict) else None

    async def _deltas(self) -> AsyncGenerator[Delta, None]:
        run = self.service.run(
            self.id, [self.prompt.ids], [self.params], self.request.priority or 0, self.prompt.inside
        )
        async with aclosing(run) as deltas:
            async for _, delta in deltas:
                self._generated += len(delta.token_ids)
                yield delta

    def numbers(self) -> dict[str, int | str]:
        """For the access log."""
        return numbers_of([self.prompt.ids], [choice.completion for choice in self.choices], self._generated)

    def usage(self) -> Usage:
        """Of all completions."""
        done = [choice.completion for choice in self.choices if choice.completion is not None]
        return usage_of([self.prompt.ids], done)

    async def whole(self) -> bytes:
        """The reply once everything is there, as JSON."""
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                self.choices[delta.index].add(delta)
        first = self.choices[0].completion
        assert first is not None
        reply = ChatReply(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.service.settings.name,
            system_fingerprint=self.service.fingerprint,
            choices=[choice.whole() for choice in self.choices],
            usage=self.usage(),
        )
        if self.params.prompt_logprobs is not None:
            reply.prompt_logprobs = prompt_logprobs(self.service.texts, self.prompt.ids, first)
        if self.request.return_token_ids:
            reply.prompt_token_ids = self.prompt.ids
        return reply.json_bytes()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The reply as it grows: the JSON of each chunk."""
        first = True
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                for choice in self.choices[delta.index].grow(delta):
                    chunk = self._chunk([choice])
                    if first and self.request.return_token_ids:
                        chunk.prompt_token_ids = self.prompt.ids
                    first = False
                    yield chunk.json_bytes()
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            chunk = self._chunk([])
            chunk.usage = self.usage()
            yield chunk.json_bytes()

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.service.settings.name,
            system_fingerprint=self.service.fingerprint,
            choices=choices,
        )


class Choice:
    """One completion on its way to the client."""

    def __init__(self, job: ChatJob, index: int) -> None:
        request, service = job.request, job.service
        self.completion: Completion | None = None
        self._request, self._index, self._service = request, index, service
        apart = request.separate_reasoning is not False and request.reasoning_format != "none"
        separate = service.tokenizer.thinks and apart
        self._splitter = ReasoningSplitter(job.prompt.inside and separate, separate)
        self._thinking, self._content = "", ""
        tools, form = job.tools, service.tool_prompts.form
        self._parser = None if tools is None else tools.parser(form, answers=job.answer() is not None)
        unasked = not job.params.skip_special_tokens and request.skip_special_tokens is not False
        special = service.tool_prompts.special if unasked else ()
        self._filter = SpecialTokenFilter(special, form)
        self._opened = job.prompt.inside
        # All so far where thinking is not to be told, until it is over: its tokens are not told of, either.
        self._hidden: Delta | None = Delta(index, "", []) if separate and request.include_reasoning is False else None
        self._tokens: list[TokenLogprob] = []  # not sent yet
        self._ids: list[int] = []  # likewise
        self._begun = False

    def add(self, delta: Delta) -> ChatDelta:
        """Take in what is new; returns what of it can be shown."""
        thinking, content = self._splitter.push(self._filter.push(delta.text))
        if delta.completion is not None:
            self.completion = delta.completion
            for rest in (self._splitter.push(self._filter.end()), self._splitter.end()):
                thinking, content = thinking + rest[0], content + rest[1]
        self._note_tokens(delta)
        if self._hidden is not None:
            self._hide(delta, over=bool(content) or delta.completion is not None)
        pieces: list[CallPiece] = []
        if self._parser is not None:
            content, pieces = self._parser.push(content)
            if delta.completion is not None:
                last, more = self._parser.end()
                content, pieces = content + last, [*pieces, *more]
        if self._request.include_reasoning is False:
            thinking = ""
        self._thinking += thinking
        self._content += content
        shown = ChatDelta()
        if thinking:
            for name in self._service.settings.reasoning_fields:
                setattr(shown, name, thinking)
        if content:
            shown.content = content
        if pieces:
            shown.tool_calls = [CallDelta.model_validate(piece.delta()) for piece in pieces]
        return shown

    def grow(self, delta: Delta) -> Iterator[ChatChunkChoice]:
        """The chunks that a delta makes."""
        if not self._begun:
            self._begun = True
            yield self._choice(ChatDelta(role="assistant", content=""))
        shown = self.add(delta)
        if shown.model_fields_set or (self.completion is not None and (self._tokens or self._ids)):
            choice = self._choice(shown)
            if self._request.logprobs:
                choice.logprobs = ChatLogprobs(content=self._tokens)
            if self._request.return_token_ids:
                choice.token_ids = self._ids
            self._tokens, self._ids = [], []
            yield choice
        if self.completion is not None:
            last = self._choice(ChatDelta())
            last.finish_reason, last.stop_reason = self._finish(), self.completion.stop_reason
            yield last

    def whole(self) -> ChatChoice:
        """All of it."""
        completion = self.completion
        assert completion is not None
        message = ReplyMessage(role="assistant", content=self._content)
        if self._thinking:
            for name in self._service.settings.reasoning_fields:
                setattr(message, name, self._thinking)
        if self._parser is not None and self._parser.calls:
            message.tool_calls = [Call.model_validate(call) for call in self._parser.calls]
            message.content = self._content or None
        choice = ChatChoice(
            index=self._index,
            message=message,
            logprobs=ChatLogprobs(content=self._tokens) if self._request.logprobs else None,
            finish_reason=self._finish(),
            stop_reason=completion.stop_reason,
        )
        if self._request.return_token_ids:
            choice.token_ids = completion.token_ids
        return choice

    def _choice(self, delta: ChatDelta) -> ChatChunkChoice:
        return ChatChunkChoice(index=self._index, delta=delta, logprobs=None, finish_reason=None)

    def _finish(self) -> FinishReason:
        assert self.completion is not None
        if self._parser is not None and self._parser.whole and self.completion.finish_reason == "stop":
            return "tool_calls"
        return self.completion.finish_reason

    def _hide(self, delta: Delta, over: bool) -> None:
        """Forget what is likely of the thinking's tokens, once it is known which these are."""
        assert self._hidden is not None
        self._hidden.text += delta.text
        self._hidden.token_ids += delta.token_ids
        if over:
            tokens, text = self._hidden.token_ids, self._hidden.text
            self._tokens = self._tokens[thinking_tokens(self._service.tokenizer, tokens, text, self._opened) :]
            self._hidden = None

    def _note_tokens(self, delta: Delta) -> None:
        if self._request.return_token_ids:
            self._ids += delta.token_ids
        if delta.logprobs is None or not self._request.logprobs:
            return
        tops = delta.top_logprobs or [{}] * len(delta.token_ids)
        for token, logprob, top in zip(delta.token_ids, delta.logprobs, tops, strict=True):
            if token not in self._service.engine.eos_token_ids or self._request.ignore_eos:  # no part of the reply
                self._tokens.append(self._service.texts.entry(token, logprob, top))


def _budget(request: ChatRequest) -> int | None:
    if request.thinking_token_budget is None and request.thinking is not None:
        return request.thinking.budget_tokens
    return request.thinking_token_budget


def _zero(request: ChatRequest) -> str:
    """The field that asks for no token."""
    return next(name for name in ("max_completion_tokens", "max_tokens", "n_predict") if getattr(request, name) == 0)
