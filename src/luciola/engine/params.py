"""What a request may ask of sampling, each setting checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from luciola.engine.grammar import Grammar
from luciola.text.untrusted import shortened

MOST = 2**63 - 1  # that tensors of int64 hold
MOST_SAMPLES = 65_536  # of one prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt. Numbers may be numpy's, whole ones at most 2**63 - 1; sequences are copied to tuples.

    Args:
        max_tokens: most new tokens of a completion, at least 1.
        min_tokens: before that many tokens neither an end token (unless `ignore_eos`) nor one of `stop_token_ids` is
            drawn; at most `max_tokens`. A text that its grammar lets go on no further ends earlier all
            the same.
        temperature: 0 takes the likeliest token; 1 samples from the model as it is.
        top_p: sample among the likeliest tokens that together reach this probability; 1 keeps all.
        top_k: sample among this many likeliest tokens; 0, or more than there are, keeps all.
        min_p: sample among the tokens at least this times as likely as the likeliest; 0 keeps all.
        repetition_penalty: positive logits of tokens of the prompt and the completion are divided by it, negative ones
            multiplied; 0.01 to 1,000,000, 1 is none (CTRL, section 4.1).
        presence_penalty: subtracted from the logit of every token generated before; -2 to 2, 0 is none.
        frequency_penalty: subtracted once for every time it was generated; -2 to 2, 0 is none.
        logit_bias: token id -> what is added to its logit, -100 to 100; kept as (token, bias) pairs in order of tokens.
        n: completions of each prompt, up to 65,536.
        seed: same seed, same completions; None draws a fresh one.
        stop: texts that end a completion; they are not part of its `text`.
        skip_special_tokens: leave special tokens out of the text; the one that ends a completion is left out anyway.
        stop_token_ids: tokens that end a completion like the model's end token.
        logprobs: record the log-probability of every token.
        top_logprobs: record this many likeliest tokens of each position with their log-probabilities; implies
            `logprobs`.
        prompt_logprobs: record the log-probability of every token of the prompt, and this many likeliest tokens at each
            place; None: nothing. The prompt is then read anew, whatever of it is in the cache.
        ignore_eos: go on past the model's end token (for timing).
        routes: record the experts of every token (for replay in a GRPO update).
        kept_tokens: record at every token which ones top_k, top_p and min_p left to draw from; implies `logprobs`.
        speculate: let the engine draft tokens ahead where it can; the distribution is the same either way.
        grammar: what the text must follow, or None.
        thinking_budget: after so many tokens between `<think>`, with which the prompt ends or the text begins, and
            `</think>` the engine writes `</think>` in the model's place; 0 or more, None: no bound.

    Raises:
        ValueError: a setting out of its range, or two that contradict each other; the sentence names it.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    n: int = 1
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    skip_special_tokens: bool = True
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    routes: bool = False
    kept_tokens: bool = False
    speculate: bool = True
    grammar: Grammar | None = None
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        if self.stop is None or isinstance(self.stop, str):
            self._set("stop", () if self.stop is None else (self.stop,))
        self._set("logit_bias", _pairs(self.logit_bias))
        for name, kind in (
            ("stop", "texts, none empty"),
            ("stop_token_ids", "token ids, whole numbers from 0 to 2**63 - 1"),
        ):
            value = getattr(self, name)
            if isinstance(value, str | bytes) or not isinstance(value, Iterable):
                raise ValueError(f"{name}={shortened(value)} must be a list of {kind}")
            self._set(name, tuple(value))
        checks: list[tuple[bool, str, str]] = [
            (_whole(self.max_tokens, 1), "max_tokens", "a whole number from 1 to 2**63 - 1"),
            (_whole(self.min_tokens, 0), "min_tokens", "a whole number from 0 to 2**63 - 1"),
            (_within(self.temperature, 0.0, math.inf), "temperature", "0 or a finite positive number"),
            (_within(self.top_p, 0.0, 1.0) and self.top_p > 0, "top_p", "above 0 and at most 1"),
            (_whole(self.top_k, 0), "top_k", "0 (all tokens) or a whole number up to 2**63 - 1"),
            (_within(self.min_p, 0.0, 1.0), "min_p", "between 0 (all tokens) and 1"),
            # Beyond these, float32 could make infinities of sound logits.
            (_within(self.repetition_penalty, 0.01, 1e6), "repetition_penalty", "between 0.01 and 1000000; 1 is none"),
            (_within(self.presence_penalty, -2.0, 2.0), "presence_penalty", "between -2 and 2; 0 is none"),
            (_within(self.frequency_penalty, -2.0, 2.0), "frequency_penalty", "between -2 and 2; 0 is none"),
            (_whole(self.n, 1) and self.n <= MOST_SAMPLES, "n", f"a whole number from 1 to {MOST_SAMPLES}"),
            (self.seed is None or _whole(self.seed), "seed", "a whole number below 2**63 in size, or None"),
            (all(isinstance(s, str) and s for s in self.stop), "stop", "a list of texts, none empty"),
            (
                all(_whole(t, 0) for t in self.stop_token_ids),
                "stop_token_ids",
                "a list of token ids, whole numbers from 0 to 2**63 - 1",
            ),
            (_whole(self.top_logprobs, 0), "top_logprobs", "0 (none) or a whole number up to 2**63 - 1"),
            (
                self.prompt_logprobs is None or _whole(self.prompt_logprobs, 0),
                "prompt_logprobs",
                "a whole number from 0 to 2**63 - 1, or None",
            ),
            (
                self.grammar is None or isinstance(self.grammar, Grammar),
                "grammar",
                "a Grammar, such as Grammar.json(schema) or Grammar.regex(pattern), or None",
            ),
            (
                self.thinking_budget is None or _whole(self.thinking_budget, 0),
                "thinking_budget",
                "a whole number from 0 to 2**63 - 1, or None",
            ),
            *(
                (isinstance(getattr(self, flag), bool | np.bool_), flag, "True or False")
                for flag in (
                    "logprobs",
                    "ignore_eos",
                    "routes",
                    "kept_tokens",
                    "speculate",
                    "skip_special_tokens",
                )
            ),
        ]
        for ok, name, expected in checks:
            if not ok:
                raise ValueError(f"{name}={shortened(getattr(self, name))} must be {expected}")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}")
        self._set("stop_token_ids", tuple(dict.fromkeys(int(t) for t in self.stop_token_ids)))
        self._set("logprobs", bool(self.logprobs or self.top_logprobs or self.kept_tokens))

    @property
    def penalises(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def needs_history(self) -> bool:
        """Whether sampling must be told what was generated so far."""
        return self.penalises or self.min_tokens > 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError when a token named here, `top_logprobs` or `prompt_logprobs` goes beyond a model's
        vocabulary."""
        named = (("logit_bias", tuple(dict(self.logit_bias))), ("stop_token_ids", self.stop_token_ids))
        for name, tokens in named:
            if tokens and max(tokens) >= vocab_size:
                raise ValueError(f"{name} names token {max(tokens)}, outside the vocabulary of {vocab_size}")
        for name, count in (("top_logprobs", self.top_logprobs), ("prompt_logprobs", self.prompt_logprobs or 0)):
            if count > vocab_size:
                raise ValueError(f"{name}={count} must be at most the vocabulary's size, {vocab_size}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _pairs(bias: object) -> tuple[tuple[int, float], ...]:
    """A logit bias as (token, bias) pairs, ascending by token; pairs are taken too, so that `replace` works."""
    given = shortened(bias)
    complaint = f"logit_bias={given} must map token ids, whole numbers from 0, to numbers between -100 and 100"
    if bias is None:
        return ()
    if not isinstance(bias, Mapping | tuple | list):
        raise ValueError(complaint)
    entries = list(bias.items()) if isinstance(bias, Mapping) else list(bias)
    pairs: dict[int, float] = {}
    for entry in entries:
        if not (isinstance(entry, tuple | list) and len(entry) == 2):
            raise ValueError(complaint)
        token, value = entry
        if not _whole(token, 0):
            raise ValueError(f"logit_bias has token {shortened(token)}; tokens must be whole numbers, 0 to 2**63 - 1")
        if not _within(value, -100.0, 100.0):
            raise ValueError(
                f"logit_bias of token {token} is {shortened(value)}; it must be a number between -100 and 100"
            )
        if int(token) in pairs:
            raise ValueError(f"logit_bias names token {token} twice; give each token once")
        pairs[int(token)] = float(value)
    return tuple(sorted(pairs.items()))


def _whole(value: object, least: int = -MOST) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and least <= int(value) <= MOST  # type: ignore[call-overload]


def _within(value: object, least: float, most: float) -> bool:
    """Whether `value` is a finite number in [least, most]."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    try:
        return number and math.isfinite(value) and least <= value <= most  # type: ignore[arg-type, operator]
    except OverflowError:  # a whole number that no float holds
        return False
