"""What every route shares: the engine, who may use it and for how long, and the requests that are running."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from luciola import Engine, LanguageModel, SamplingParams
from luciola.engine.sequence import Delta
from luciola.model.quant_layers import is_quantised
from luciola.serve.errors import ApiError, overloaded, shutting_down, unknown_model
from luciola.serve.metrics import Metrics
from luciola.serve.tokens import TokenTexts
from luciola.serve.tool_prompts import ToolPrompts

log = logging.getLogger("luciola.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a model is offered.

    Args:
        name: of the model, as clients call it.
        aliases: other names that mean it.
        max_tokens: most tokens of a completion, whatever a request asks for; None: as many as the context holds.
        max_queue: completions that may wait for their first token; more are refused with 429.
        request_seconds: after which a request is given up.
        temperature, top_p: where a request leaves them out.
        page_temperature, page_top_p, system, history: what the chat page starts from: its sampling, a system message,
            and whether the model is shown earlier turns.
        reasoning_fields: names under which the thinking stands in a reply.
    """

    name: str
    aliases: tuple[str, ...] = ()
    max_tokens: int | None = None
    max_queue: int = 256
    request_seconds: float = 600.0
    temperature: float = 1.0
    top_p: float = 1.0
    page_temperature: float = 0.6
    page_top_p: float = 0.95
    system: str = ""
    history: bool = True
    reasoning_fields: tuple[str, ...] = ("reasoning_content", "reasoning")


class Service:
    """One model, served.

    Raises:
        ValueError: the model has no tokenizer.
    """

    def __init__(self, lm: LanguageModel, engine: Engine, settings: Settings) -> None:
        if lm.tokenizer is None:
            raise ValueError(f"{settings.name} has no tokenizer files, so that no text can be given to it")
        self.tokenizer, self.engine, self.settings = lm.tokenizer, engine, settings
        self.vocab_size = lm.config.vocab_size
        # Tokens of a prompt with its answer: the model's context, or what the cache has room for (the last token is
        # never read).
        self.context = min(lm.config.max_position_embeddings, engine.max_cached_tokens + 1)
        self.tool_prompts = ToolPrompts.of(lm.tokenizer)
        self.texts = TokenTexts(lm.tokenizer)
        self.metrics = Metrics(engine, settings.name)
        self.created = int(time.time())
        self.fingerprint = f"luciola-{_precision(engine)}"
        self._waiting = 0  # completions that have been taken in and have no token yet
        self._thinking: dict[str, threading.Event] = {}

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for a model that is not this one."""
        if name is not None and name != self.settings.name and name not in self.settings.aliases:
            raise unknown_model(name, self.settings.name)

    def check_room(self, ids: Sequence[int], where: str) -> None:
        """Raises ApiError for a prompt that leaves no room to answer."""
        if not ids:
            raise ApiError(f"{where} is empty; give at least one token", param=where)
        if len(ids) >= self.context:
            raise ApiError(
                f"{where} has {len(ids)} tokens; this server's context of {self.context} leaves no room to answer: "
                "shorten it",
                param=where,
                code="context_length_exceeded",
            )

    def max_tokens(self, asked: int | None, ids: Sequence[int]) -> int:
        """Most tokens that a completion may have."""
        room = self.context - len(ids)
        return min(n for n in (asked, self.settings.max_tokens, room) if n is not None)

    def new_id(self, prefix: str) -> str:
        return f"{prefix}-{uuid.uuid4().hex}"

    def stop_thinking(self, request_id: str) -> bool:
        """Have the thinking of a running request end now; False if there is no such request."""
        event = self._thinking.get(request_id)
        if event is not None:
            event.set()
        return event is not None

    async def run(
        self,
        request_id: str,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        priority: int = 0,
        inside: bool | None = None,
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yield what each step adds to the completions of each prompt: (number of the prompt, delta). Closed early, it
        ends them, and their part of the cache is free within a step. `inside`: as for `Engine.stream_async`.

        Raises:
            ApiError: too many are waiting already, a prompt or parameter does not go, or the time is over.
        """
        count = sum(p.n for p in params)
        if self._waiting and self._waiting + count > self.settings.max_queue:
            raise overloaded(self._waiting)
        news: asyncio.Queue[tuple[int, Delta] | Exception] = asyncio.Queue()
        event = self._thinking[request_id] = threading.Event()
        seconds = self.settings.request_seconds
        late = ApiError(f"the request took longer than the {seconds:g} seconds that this server gives", 504)
        timer = asyncio.get_running_loop().call_later(seconds, news.put_nowait, late)
        readers = [
            asyncio.create_task(self._read(news, i, ids, p, priority, event, inside))
            for i, (ids, p) in enumerate(zip(prompts, params, strict=True))
        ]
        watches = [self.metrics.watch(len(ids)) for ids in prompts]
        self._waiting += count
        unstarted = {(i, j) for i, p in enumerate(params) for j in range(p.n)}
        left = count
        try:
            while left:
                item = await news.get()
                if isinstance(item, Exception):
                    raise item
                i, delta = item
                if (i, delta.index) in unstarted:
                    unstarted.discard((i, delta.index))
                    self._waiting -= 1
                watches[i].tokens(delta.index, len(delta.token_ids), delta.completion)
                if delta.completion is not None:
                    left -= 1
                    if delta.completion.finish_reason == "abort":
                        raise shutting_down()
                yield i, delta
        except ValueError as error:
            left = 0  # refused, so that nothing has begun
            raise ApiError(str(error)) from error
        finally:
            if left:
                self.metrics.left(left)
            self._waiting -= len(unstarted)
            del self._thinking[request_id]
            timer.cancel()
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def _read(
        self,
        news: asyncio.Queue[tuple[int, Delta] | Exception],
        i: int,
        ids: list[int],
        params: SamplingParams,
        priority: int,
        stop_thinking: threading.Event,
        inside: bool | None,
    ) -> None:
        try:
            async with aclosing(self.engine.stream_async(ids, params, priority, stop_thinking, inside)) as deltas:
                async for delta in deltas:
                    news.put_nowait((i, delta))
        except Exception as error:
            if not isinstance(error, ValueError):
                log.exception("a request failed")
                error = ApiError(f"the request failed: {type(error).__name__}", 500)
            news.put_nowait(error)


def _precision(engine: Engine) -> str:
    """In what form the weights are computed with."""
    bits = min((choice.bits for choice in engine.quantization.choices), default=32) if engine.quantization else 32
    if bits <= 8:
        return f"int{bits}"
    return "quantized" if is_quantised(engine.model) else str(engine.dtype).removeprefix("torch.")
