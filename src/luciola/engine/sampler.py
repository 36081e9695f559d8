"""From logits to the next token: temperature, top-k, top-p, and randomness that belongs to the request alone.

A sample draws by inverse transform from one uniform number a step. The numbers of sample j of a request come from a
Philox stream keyed by (seed, j, prompt), so a request's randomness does not depend on what else is in the batch, and
different prompts of one call do not share their luck.

Shapes: B rows (samples being generated), V vocabulary.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 64  # uniform numbers drawn from a stream at a time
COLD = 1e-6  # temperatures below are taken as 0: logits divided by them can overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt.

    Args:
        max_tokens: most new tokens of a completion, at least 1.
        temperature: 0 takes the likeliest token; 1 samples from the model as it is.
        top_p: sample among the likeliest tokens that together reach this probability; 1 keeps all.
        top_k: sample among this many likeliest tokens; 0 keeps all.
        n: completions of each prompt.
        seed: same seed, same completions; None draws a fresh one.
        stop: texts that end a completion; they are not part of its `text`.
        logprobs: record the log-probability of every token.
        ignore_eos: go on past the model's end token (for timing).
        routes: record the experts of every token (for replay in a GRPO update).
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int | None = None
    stop: Sequence[str] = field(default=())
    logprobs: bool = False
    ignore_eos: bool = False
    routes: bool = False

    def __post_init__(self) -> None:
        if self.stop is None or isinstance(self.stop, str):
            object.__setattr__(self, "stop", () if self.stop is None else (self.stop,))
        checks: list[tuple[bool, str, str]] = [
            (_whole(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "a whole number, at least 1"),
            (
                _number(self.temperature) and 0.0 <= self.temperature < float("inf"),
                "temperature",
                "0 or a finite positive number",
            ),
            (_number(self.top_p) and 0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1"),
            (_whole(self.top_k) and self.top_k >= 0, "top_k", "0 (all tokens) or a positive whole number"),
            (_whole(self.n) and self.n >= 1, "n", "a whole number, at least 1"),
            (self.seed is None or _whole(self.seed), "seed", "a whole number or None"),
            (all(isinstance(s, str) and s for s in self.stop), "stop", "a list of texts, none empty"),
        ]
        for ok, name, expected in checks:
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {expected}")


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class NotFiniteError(ValueError):
    """The model's logits are infinite or NaN, so that there is nothing to sample from."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are not finite numbers: its weights are damaged, or their training went astray"
        )


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from (seed, step, item, ...): the same parts, the same seed, on every machine."""
    state = np.random.SeedSequence([part % 2**64 for part in parts]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


class UniformStream:
    """The uniform numbers of one sample, in [0, 1)."""

    def __init__(self, seed: int | None, sample: int, prompt: Sequence[int]) -> None:
        digest = hashlib.blake2b(np.asarray(prompt, dtype=np.int64).tobytes(), digest_size=8).digest()
        entropy = secrets.randbits(64) if seed is None else seed % 2**64
        key = np.random.SeedSequence((entropy, sample, int.from_bytes(digest, "little")))
        self._generator = np.random.Generator(np.random.Philox(key))

    def block(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """The next BLOCK numbers."""
        return self._generator.random(BLOCK, dtype=np.float32)


class Settings(NamedTuple):
    """The sampling parameters of a batch as columns, each (B, 1); None where no row uses the feature."""

    temperature: Tensor
    greedy: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> Settings:
        """Gather the settings of each row."""
        greedy = torch.tensor([p.temperature < COLD for p in rows])[:, None]
        top_k = torch.tensor([p.top_k for p in rows])[:, None]
        top_p = torch.tensor([p.top_p for p in rows])[:, None]
        return cls(
            torch.tensor([p.temperature if p.temperature >= COLD else 1.0 for p in rows])[:, None],
            greedy if bool(greedy.any()) else None,
            top_k if bool((top_k > 0).any()) else None,
            top_p if bool((top_p < 1).any()) else None,
        )

    def keep(self, rows: Tensor) -> Settings:
        """The settings of a subset of rows."""
        return Settings(*(None if column is None else column[rows] for column in self))  # type: ignore[arg-type]


class Sampled(NamedTuple):
    """The tokens drawn, (B,) int64; their log-probability under the model, and at the sampling temperature, (B,) or
    None."""

    tokens: Tensor
    logprobs: Tensor | None
    tempered_logprobs: Tensor | None


def truncate(p_BV: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Zero all but the top k tokens, then all but the smallest head of the distribution that reaches top_p."""
    V = p_BV.shape[-1]
    most = V if top_k is None or bool((top_k == 0).any()) else int(top_k.max())
    sorted_p, order = p_BV.topk(min(most, V), dim=-1)
    if top_k is not None:
        rank = torch.arange(sorted_p.shape[-1], device=p_BV.device)
        sorted_p = sorted_p.masked_fill((rank >= top_k) & (top_k > 0), 0.0)
    if top_p is not None:
        before = sorted_p.cumsum(-1) - sorted_p
        sorted_p = sorted_p.masked_fill(before >= top_p * sorted_p.sum(-1, keepdim=True), 0.0)
    return torch.zeros_like(p_BV).scatter_(-1, order, sorted_p)


def sample(logits_BV: Tensor, settings: Settings, uniform_B: Tensor, logprobs: bool) -> Sampled:
    """Draw one token a row. Log-probabilities are of the whole vocabulary, before top-k and top-p cut it.

    Raises:
        NotFiniteError: a row's logits are infinite or NaN.
    """
    tempered = logits_BV / settings.temperature
    p_BV = tempered.softmax(-1)
    kept_BV = p_BV
    if settings.top_k is not None or settings.top_p is not None:
        kept_BV = truncate(p_BV, settings.top_k, settings.top_p)
    cumulative_BV = kept_BV.cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    if not bool(total_B1.isfinite().all()):
        raise NotFiniteError
    # Rounding can lift the product onto the total, above which nothing lies.
    threshold_B1 = torch.minimum(uniform_B.unsqueeze(1) * total_B1, total_B1.nextafter(total_B1.new_zeros(())))
    tokens_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True)
    if settings.greedy is not None:
        tokens_B1 = torch.where(settings.greedy, logits_BV.argmax(-1, keepdim=True), tokens_B1)
    if not logprobs:
        return Sampled(tokens_B1.squeeze(1), None, None)
    warm = _logprobs(tempered, p_BV, tokens_B1)
    if bool((settings.temperature == 1.0).all()):
        return Sampled(tokens_B1.squeeze(1), warm, warm)
    return Sampled(tokens_B1.squeeze(1), _logprobs(logits_BV, logits_BV.softmax(-1), tokens_B1), warm)


def _logprobs(logits_BV: Tensor, p_BV: Tensor, tokens_B1: Tensor) -> Tensor:
    """Log-probability of each row's token, by the same arithmetic as `luciola.model.logprobs`."""
    above_B1 = logits_BV.gather(1, tokens_B1) - logits_BV.amax(-1, keepdim=True)
    return (above_B1 + p_BV.amax(-1, keepdim=True).log()).squeeze(1)
