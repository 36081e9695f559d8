"""From prompts and parameters to sequences: everything that can be refused is refused here, before anything runs."""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Iterable
from collections.abc import Sequence as Many

from luciola.engine.grammar import GrammarCompiler
from luciola.engine.params import SamplingParams
from luciola.engine.sampler import History, UniformStream
from luciola.engine.scheduler import PATIENCE
from luciola.engine.sequence import Sequence
from luciola.engine.stopping import StopTexts
from luciola.engine.thinking import Thinking, closing_tokens, opens, thought
from luciola.engine.writer import Writer
from luciola.model.config import ModelConfig
from luciola.text.tokenizer import Tokenizer

Prompt = str | Many[int]


class Requests:
    """Makes sequences for a model whose cache holds `most` tokens and whose texts end with one of `ends`."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None, most: int, ends: Iterable[int]) -> None:
        self._config, self._tokenizer, self._most, self._ends = config, tokenizer, most, sorted(ends)
        self._numbers = itertools.count()
        self._first = threading.Lock()
        self._made: GrammarCompiler | None = None

    def sequences(
        self,
        prompts: Many[Prompt],
        params: SamplingParams | Many[SamplingParams] | None,
        priority: int,
        streamed: bool = False,
        stop_thinking: threading.Event | None = None,
        inside: bool | None = None,
    ) -> list[list[Sequence]]:
        """The sequences of each prompt; those after the first wait for its prompt to be read. `inside` says whether the
        prompts end in the midst of thinking; None: those that end with `<think>`.

        Raises:
            ValueError: as `Engine.generate` says.
        """
        if params is None:
            params = SamplingParams()
        settings = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if not isinstance(settings, list | tuple) or not all(isinstance(p, SamplingParams) for p in settings):
            raise ValueError("params must be SamplingParams, one for all prompts or one for each")
        if len(settings) != len(prompts):
            raise ValueError(f"{len(settings)} sampling params for {len(prompts)} prompts; give one, or one for each")
        if isinstance(priority, bool) or not isinstance(priority, int) or priority < 0:
            raise ValueError(f"priority={priority!r} must be a whole number, 0 (first) or more")
        groups = []
        for i, (prompt, p) in enumerate(zip(prompts, settings, strict=True)):
            ids = self._tokens(prompt, i)
            room = self._room(ids, i)
            if p.stop and self._tokenizer is None:
                raise ValueError("stop texts need a tokenizer, and this model has none")
            p.check_vocabulary(self._config.vocab_size)
            stops = StopTexts(p.stop)
            opened = inside
            if opened is None:
                opened = self._tokenizer is not None and opens(self._tokenizer, ids)
            close = self._closing(p, stop_thinking)
            spent = thought(self._tokenizer, ids) if inside and self._tokenizer is not None and close else 0
            grammar = None if p.grammar is None else self._compiler.start(p.grammar)
            rows = []
            for j in range(p.n):
                number = next(self._numbers)
                row = Sequence(
                    prompt_length=len(ids),
                    params=p,
                    index=j,
                    max_tokens=min(p.max_tokens, room),
                    tokens=list(ids),
                    stream=UniformStream(p.seed, j, ids),
                    order=(number + priority * PATIENCE, number),
                )
                row.grammar = None if grammar is None else grammar.fork()
                row.opened = opened
                if self._tokenizer is not None and close:
                    row.thinking = Thinking(self._tokenizer, close, opened, spent, p.thinking_budget, stop_thinking)
                row.history = History(ids) if p.needs_history else None
                if self._tokenizer is not None and (p.stop or streamed or not p.skip_special_tokens):
                    row.writer = Writer(self._tokenizer, stops, p.skip_special_tokens)
                if p.prompt_logprobs is not None:
                    row.prompt_logprobs, row.prompt_top = [None], [None]  # nothing foretells the first token
                rows.append(row)
            for row in rows[1:]:
                row.leader = rows[0]
            rows[0].followers = rows[1:]
            groups.append(rows)
        return groups

    def _room(self, ids: list[int], i: int) -> int:
        context = self._config.max_position_embeddings
        if len(ids) >= context:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens; the model's context of {context} leaves no room to answer"
            )
        if len(ids) > self._most:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens; the cache has room for {self._most}: "
                "give the engine more max_cached_tokens"
            )
        return min(context - len(ids), self._most - len(ids) + 1)

    def _tokens(self, prompt: Prompt, i: int) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("this model has no tokenizer; give prompts as lists of token ids")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"prompt {i} has half a character (a lone surrogate) at place {error.start}; take it out"
                ) from error
            ids = self._tokenizer.encode(prompt)
        else:
            try:
                listed = list(prompt)
                if isinstance(prompt, bytes | bytearray) or any(isinstance(t, bool) for t in listed):
                    raise TypeError("bytes and truth values count as numbers in Python, and are no tokens")
                ids = [operator.index(t) for t in listed]
            except TypeError as error:
                raise ValueError(f"prompt {i} is neither a text nor a list of token ids (whole numbers)") from error
        if not ids:
            raise ValueError(f"prompt {i} is empty; give at least one token")
        if min(ids) < 0 or max(ids) >= self._config.vocab_size:
            bad = next(t for t in ids if not 0 <= t < self._config.vocab_size)
            raise ValueError(f"prompt {i} has token {bad}, outside the vocabulary of {self._config.vocab_size}")
        return ids

    def _closing(self, p: SamplingParams, stop_thinking: threading.Event | None) -> list[int]:
        """The tokens that end the thinking of a completion where somebody may want that; else, or where a model does
        not think, none."""
        if p.thinking_budget is None and stop_thinking is None:
            return []
        close = [] if self._tokenizer is None else closing_tokens(self._tokenizer)
        if p.thinking_budget is not None and not close:
            raise ValueError("thinking_budget cannot be kept: this model does not think; leave it out")
        barred = {*p.stop_token_ids, *(() if p.ignore_eos else self._ends)} if p.min_tokens else set()
        if barred & {*close}:
            if p.thinking_budget is not None:
                raise ValueError(
                    "min_tokens forbids a token of </think> that stop_token_ids names; leave out one of them"
                )
            return []
        return close

    @property
    def _compiler(self) -> GrammarCompiler:
        if self._tokenizer is None:
            raise ValueError("a grammar needs a tokenizer, and this model has none")
        with self._first:  # of several threads one makes it
            if self._made is None:
                self._made = GrammarCompiler(self._tokenizer, self._config.vocab_size, self._ends)
        return self._made
