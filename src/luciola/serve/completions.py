"""POST /v1/completions: texts gone on from as they are, as one reply or as they grow."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import cast

from luciola import SamplingParams
from luciola.engine.grammar import Grammar
from luciola.engine.sequence import Completion, Delta
from luciola.serve.errors import ApiError
from luciola.serve.prompts import check_known, encoded
from luciola.serve.protocol import MAX_CHOICES, CompletionRequest
from luciola.serve.replies import TextChoice, TextLogprobs, TextReply, Usage
from luciola.serve.sampling import grammar_of, most_tokens, params_of
from luciola.serve.service import Service
from luciola.serve.tokens import TokenTexts, finite
from luciola.serve.usage import numbers_of, prompt_logprobs, usage_of

DEFAULT_TOKENS = 16  # OpenAI's


class TextJob:
    """One request: its prompts, their parameters, and their completions in the making.

    Making it may tokenise much and compile a grammar, which takes its time: not on the event loop.

    Raises:
        ApiError: the request does not go.
    """

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        self.service, self.request = service, request
        self.id, self.created = service.new_id("cmpl"), int(time.time())
        self._generated = 0  # tokens, also of a reply that is broken off
        given = _prompts(request.prompt)
        self.prompts = [self._tokens(prompt, name) for name, prompt in given]
        self.texts = [self._text(prompt) for _, prompt in given] if request.echo else []
        if len(self.prompts) * (request.n or 1) > MAX_CHOICES:
            raise ApiError(f"prompts times n may be at most {MAX_CHOICES} completions", param="prompt")
        self.scores = bool(request.echo) and request.logprobs is not None  # the prompt's tokens have log-probabilities
        grammar = grammar_of(request)
        self.params = [self._params(ids, grammar) for ids in self.prompts]
        n = self.params[0].n
        self.choices = [TextInTheMaking(self, i, j) for i in range(len(self.prompts)) for j in range(n)]

    def _tokens(self, prompt: str | list[int], name: str) -> list[int]:
        if isinstance(prompt, str):
            ids = encoded(self.service, prompt, name, begin=self.request.add_special_tokens is not False)
        else:
            ids = prompt
            check_known(self.service, ids, name)
        self.service.check_room(ids, name)
        return ids

    def _text(self, prompt: str | list[int]) -> str:
        """What is echoed: a text as it was given, of token ids all that they spell."""
        return prompt if isinstance(prompt, str) else self.service.tokenizer.decode(prompt, False)

    def _params(self, ids: list[int], grammar: Grammar | None) -> SamplingParams:
        request = self.request
        asked = most_tokens(request, DEFAULT_TOKENS)
        if asked == 0 and not request.echo:
            raise ApiError("max_tokens=0 goes with echo: true, which scores the prompt alone", param="max_tokens")
        chosen = {"prompt_logprobs": max(request.logprobs or 0, request.prompt_logprobs or 0)} if self.scores else {}
        return params_of(
            request,
            self.service,
            max_tokens=max(1, self.service.max_tokens(asked, ids)),
            logprobs=request.logprobs is not None,
            top_logprobs=request.logprobs,
            grammar=grammar,
            **chosen,
        )

    async def _deltas(self) -> AsyncGenerator[tuple[TextInTheMaking, Delta], None]:
        n = self.params[0].n
        run = self.service.run(self.id, self.prompts, self.params, self.request.priority or 0)
        async with aclosing(run) as deltas:
            async for i, delta in deltas:
                self._generated += len(delta.token_ids)
                yield self.choices[i * n + delta.index], delta

    async def whole(self) -> bytes:
        """The reply once everything is there, as JSON."""
        async with aclosing(self._deltas()) as deltas:
            async for choice, delta in deltas:
                choice.add(delta)
        reply = self._reply([choice.whole() for choice in self.choices])
        reply.usage = self.usage()
        return reply.json_bytes()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The reply as it grows: the JSON of each chunk."""
        async with aclosing(self._deltas()) as deltas:
            async for choice, delta in deltas:
                choice.add(delta)
                for part in choice.grow():
                    yield self._reply([part]).json_bytes()
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            reply = self._reply([])
            reply.usage = self.usage()
            yield reply.json_bytes()

    def numbers(self) -> dict[str, int | str]:
        """For the access log."""
        return numbers_of(self.prompts, [choice.completion for choice in self.choices], self._generated)

    def usage(self) -> Usage:
        """Of all completions."""
        done = [choice.completion for choice in self.choices if choice.completion is not None]
        usage = usage_of(self.prompts, done)
        if most_tokens(self.request, DEFAULT_TOKENS) == 0:
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage

    def _reply(self, choices: list[TextChoice]) -> TextReply:
        return TextReply(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.service.settings.name,
            system_fingerprint=self.service.fingerprint,
            choices=choices,
        )


class TextInTheMaking:
    """One completion on its way to the client: the text and tokens not sent yet."""

    def __init__(self, job: TextJob, prompt: int, index: int) -> None:
        self.completion: Completion | None = None
        self._job, self._prompt = job, job.prompts[prompt]
        self._number = prompt * job.params[0].n + index
        self._silent = most_tokens(job.request, DEFAULT_TOKENS) == 0  # a token is drawn all the same, and thrown away
        self._text = ""
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._tops: list[dict[int, float]] = []
        self._offset = 0  # characters that stand before the tokens not sent yet
        self._decoder = job.service.tokenizer.stream(job.request.skip_special_tokens is not False)
        self._echo = job.texts[prompt] if job.request.echo else None  # until it has been sent
        self._sent = False  # whether anything was

    def add(self, delta: Delta) -> None:
        """Take in what is new."""
        self.completion = delta.completion
        if self._silent:
            return
        self._text += delta.text
        self._ids += delta.token_ids
        self._logprobs += delta.logprobs or []
        self._tops += delta.top_logprobs or []

    def grow(self) -> Iterator[TextChoice]:
        """The chunks that can be sent now. A prompt whose tokens are scored waits for the end of its completion, which
        brings the scores."""
        if self._job.scores and self.completion is None:
            return
        if self._text or self._echo is not None or self.completion is not None:
            choice = self._choice()
            if self.completion is not None:
                self._finish(choice)
            yield choice

    def whole(self) -> TextChoice:
        """All of it."""
        choice = self._choice()
        self._finish(choice)
        return choice

    def _choice(self) -> TextChoice:
        request = self._job.request
        choice = TextChoice(index=self._number, text=self._text, logprobs=None, finish_reason=None)
        if self._echo is not None:
            choice.text = self._echo + choice.text
        if request.logprobs is not None:
            choice.logprobs = self._table(self._echo)
        if request.return_token_ids:
            choice.token_ids = self._ids
            if not self._sent:
                choice.prompt_token_ids = self._prompt
        self._echo, self._sent = None, True
        self._text, self._ids, self._logprobs, self._tops = "", [], [], []
        return choice

    def _finish(self, choice: TextChoice) -> None:
        completion, request = self.completion, self._job.request
        assert completion is not None
        choice.finish_reason = "length" if self._silent else completion.finish_reason
        choice.stop_reason = completion.stop_reason
        if request.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(self._job.service.texts, self._prompt, completion)

    def _table(self, echo: str | None) -> TextLogprobs:
        texts = self._job.service.texts
        ids, logprobs = list(self._ids), [finite(value) for value in self._logprobs]
        tops: list[dict[int, float] | None] = list(self._tops or [{}] * len(ids))
        known: list[float | None] = list(logprobs)
        offsets: list[int] = []
        if echo is not None and self.completion is not None and self.completion.prompt_logprobs is not None:
            offsets = self._offsets_of_prompt(echo)
            self._offset = len(echo)
            ids = [*self._prompt, *ids]
            known = [*(None if p is None else finite(p) for p in self.completion.prompt_logprobs), *known]
            tops = [*(self.completion.prompt_top_logprobs or []), *tops]
        for token in self._ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.push(token))
        wanted = self._job.request.logprobs
        return TextLogprobs(
            tokens=texts.texts(ids),
            token_logprobs=known,
            top_logprobs=[_with_own(texts, *place) for place in zip(ids, known, tops, strict=True)] if wanted else None,
            text_offset=offsets,
        )

    def _offsets_of_prompt(self, text: str) -> list[int]:
        """Where each of its tokens begins in the prompt's text; the parts of a character all where that does."""
        decoder = self._job.service.tokenizer.stream(skip_special_tokens=False)
        lengths = [len(decoder.push(token)) for token in self._prompt]
        # What the tokenizer has put before the text (a bos token, a blank) is not echoed.
        place = len(text) - sum(lengths) - len(decoder.flush())
        offsets = []
        for length in lengths:
            offsets.append(max(0, place))
            place += length
        return offsets


def _with_own(
    texts: TokenTexts, token: int, logprob: float | None, top: dict[int, float] | None
) -> dict[str, float] | None:
    """The likeliest tokens of a place, and the one that stands there, as OpenAI lists them."""
    return None if top is None or logprob is None else texts.table({token: logprob, **top})


def _prompts(given: str | list[int] | list[str] | list[list[int]]) -> list[tuple[str, str | list[int]]]:
    """Each prompt with the name of its place in the request."""
    if isinstance(given, str):
        return [("prompt", given)]
    if isinstance(given[0], int):
        return [("prompt", given)]
    return [(f"prompt[{i}]", one) for i, one in enumerate(cast("list[str | list[int]]", given))]
