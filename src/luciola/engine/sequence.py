"""A sequence is one completion in the making: its tokens, its blocks, and what has been recorded of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from luciola.engine.params import SamplingParams
from luciola.engine.thinking import thinking_tokens

if TYPE_CHECKING:
    from luciola.engine.grammar import GrammarState
    from luciola.engine.sampler import History, UniformStream
    from luciola.engine.speculate import Pace
    from luciola.engine.thinking import Thinking
    from luciola.engine.writer import Writer
    from luciola.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "abort"]


@dataclass(slots=True)
class Completion:
    """One continuation of a prompt.

    Attributes:
        text: the decoded tokens, without special tokens (unless `skip_special_tokens=False`) and without the stop text.
        token_ids: every token generated, the end token included.
        finish_reason: "stop" (end token, stop token or stop text, or a grammar that is complete), "length" (max_tokens,
        or the end of the model's context or of the cache), "abort".
        stop_reason: which stop text, or which of `stop_token_ids`, ended it; None where nothing of these did.
        logprobs: log-probability of each token under the model at temperature 1 (with `logprobs=True`).
        tempered_logprobs: the same at the sampling temperature: what a policy-gradient ratio needs.
        top_logprobs: for each token the likeliest ones, id to log-probability (with `top_logprobs`).
        prompt_logprobs: log-probability of each token of the prompt, None for the first (with `prompt_logprobs=`).
        prompt_top_logprobs: for each of these the likeliest tokens, id to log-probability; None for the first.
        routes: experts of each prompt and generated token but the last, (T - 1, MoE layers, K) int16 (with
        `routes=True`).
        kept_tokens: for each token the ids it was drawn from (with `kept_tokens=True`), ascending.
        kept_logprobs: log-probability of each token among those, at the sampling temperature.
        cached_tokens: tokens of the prompt that a prefix in the cache saved from being computed.
        drafted, accepted: tokens that speculation has guessed for it, and how many of them were right.
        arrived, begun: when the engine was given it and when it began with it, as `time.perf_counter` tells; 0: never.
        thinking_tokens: tokens up to the end of its thinking, `</think>` included: all of them where that has not come,
        0 where it does not think.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None = None
    tempered_logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    routes: Tensor | None = field(default=None, repr=False, compare=False)
    kept_tokens: list[Tensor] | None = field(default=None, repr=False, compare=False)
    kept_logprobs: list[float] | None = None
    cached_tokens: int = field(default=0, compare=False)
    drafted: int = field(default=0, compare=False)
    accepted: int = field(default=0, compare=False)
    arrived: float = field(default=0.0, compare=False)
    begun: float = field(default=0.0, compare=False)
    thinking_tokens: int = 0
    stop_reason: int | str | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None


@dataclass(slots=True)
class Delta:
    """What a step added to completion number `index` of a request.

    Attributes:
        text: what has become certain; a text that may become a stop text is held back, so it may lag behind the tokens.
        token_ids: the new tokens.
        logprobs, top_logprobs: of these tokens, as in `Completion`, where the parameters ask for them.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    completion: Completion | None = None  # with the last delta: the whole


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion of a request.

    Attributes:
        order: when it is its turn; lower comes first, and is preempted last.
        tokens: prompt and generated tokens.
        computed: how many of them the cache holds.
        blocks: the blocks that hold them, first to last.
        keys: keys of those blocks that are full and published; `root` stands before the first of them.
        drafts: tokens that speculation expects next, checked by the coming step.
        row: its row in the block table while it runs, else -1; `tabled` of its blocks stand there.
        leader: the sequence whose prompt is the same and is computed for this one, too, until it is.
    """

    prompt_length: int
    params: SamplingParams
    index: int
    max_tokens: int
    tokens: list[int]
    stream: UniformStream
    order: tuple[int, int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    root: bytes = b""
    drafts: list[int] = field(default_factory=list)
    row: int = -1
    tabled: int = 0
    leader: Sequence | None = None
    followers: list[Sequence] = field(default_factory=list)
    cached_tokens: int | None = None
    logprobs: list[float] = field(default_factory=list)
    tempered: list[float] = field(default_factory=list)
    kept: list[tuple[Tensor, float]] = field(default_factory=list)
    top: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)  # where they are asked for: so far
    prompt_top: list[dict[int, float] | None] = field(default_factory=list)
    routes: list[tuple[Tensor, int, int]] = field(default_factory=list)  # rows start to end of a step's routes
    routed: int = 0
    finish: FinishReason | None = None
    stop_reason: int | str | None = None
    error: Exception | None = None
    done: bool = False  # it has ended, and all that is to be known of it is there
    writer: Writer | None = None  # where the text is looked at while it grows
    history: History | None = None
    grammar: GrammarState | None = None
    opened: bool = False  # its prompt ends in the midst of thinking
    thinking: Thinking | None = None  # where that is to be ended, until it is over
    pace: Pace | None = None
    drafted: int = 0
    accepted: int = 0
    arrived: float = 0.0
    begun: float = 0.0
    listener: Callable[[Delta | Exception], None] | None = None
    told: int = 0  # tokens that the listener has been told of

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens that the model has not read yet; 1 for one that is being continued."""
        return len(self.tokens) - self.computed

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still to be recorded."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_length

    @property
    def ended(self) -> bool:
        """Whether nothing is to be done for it any more."""
        return self.finish is not None or self.error is not None

    def allowed_V(self, V: int, offset: int) -> Tensor | None:
        """The tokens that may come next, `offset` drafts further on, (V,) bool; None: all.

        Behind drafts, none of which a sequence with a grammar has, nothing is forced yet.
        """
        token = self.thinking.forced(self.grammar) if self.thinking is not None and offset == 0 else None
        if token is not None:
            forced_V = torch.zeros(V, dtype=torch.bool)
            forced_V[token] = True
            return forced_V
        return None if self.grammar is None else self.grammar.allowed_V()

    def completion(self, tokenizer: Tokenizer | None) -> Completion:
        """What it has come to."""
        params, tokens = self.params, self.tokens[self.prompt_length :]
        text = "" if tokenizer is None else tokenizer.decode(tokens)
        return Completion(
            text=text if self.writer is None else self.writer.text,
            token_ids=tokens,
            finish_reason=self.finish or "abort",
            logprobs=self.logprobs if params.logprobs else None,
            tempered_logprobs=self.tempered if params.logprobs else None,
            top_logprobs=self.top if params.top_logprobs else None,
            routes=torch.cat([x[start:end] for x, start, end in self.routes]) if self.routes else None,
            kept_tokens=[ids for ids, _ in self.kept] if params.kept_tokens else None,
            kept_logprobs=[logp for _, logp in self.kept] if params.kept_tokens else None,
            cached_tokens=self.cached_tokens or 0,
            drafted=self.drafted,
            accepted=self.accepted,
            arrived=self.arrived,
            begun=self.begun,
            thinking_tokens=0 if tokenizer is None else thinking_tokens(tokenizer, tokens, text, self.opened),
            stop_reason=self.stop_reason,
            prompt_logprobs=None if params.prompt_logprobs is None else self.prompt_logprobs,
            prompt_top_logprobs=None if params.prompt_logprobs is None else self.prompt_top,
        )

    def tell(self, tokenizer: Tokenizer | None) -> None:
        """Tell the listener what is new since it was told last."""
        assert self.listener is not None
        if self.error is not None:
            self.listener(self.error)
            return
        params, told = self.params, self.told
        tokens = self.tokens[self.prompt_length + told :]
        self.told += len(tokens)
        text = self.writer.take() if self.writer is not None else ""
        logprobs = self.logprobs[told:] if params.logprobs else None
        top = self.top[told:] if params.top_logprobs else None
        whole = self.completion(tokenizer) if self.finish is not None else None
        self.listener(Delta(self.index, text, tokens, logprobs, top, whole))
