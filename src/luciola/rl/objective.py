"""The GRPO objective on a flat list of completion tokens (DeepSeekMath, equation 3; maximised, so the loss is its
negative).

    J = sum_t w_t { min[ rho_t A_t, clip(rho_t, 1 - eps_low, 1 + eps_high) A_t ] - beta D_t }
    rho_t = pi(o_t) / pi_old(o_t),     D_t = pi_ref/pi - log(pi_ref/pi) - 1     (unbiased, never negative; eq. 4)

The denominators are all in w: 1 / (sequences * tokens of its own sequence) for the paper's length-normalised form, 1 /
all tokens for the token mean. Both count over the whole optimiser step, so micro-batches change nothing.

Shapes: N completion tokens of many sequences, one after the other.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # exp beyond this only overflows


class Loss(NamedTuple):
    """The loss to descend, and sums over its tokens (not means) for logging."""

    loss: Tensor
    clipped: Tensor
    kl: Tensor


def token_weights(lengths: Tensor, aggregation: Literal["sequence", "token"], known: Tensor) -> Tensor:
    """w of each sequence's tokens, from the lengths of all sequences of an optimiser step, (sequences,) float32.

    Sequences whose reward is not known weigh nothing and do not count.
    """
    known = known.to(torch.float32)
    lengths = lengths.to(torch.float32)
    if aggregation == "sequence":
        return known / (known.sum().clamp(min=1) * lengths)
    return known / (known * lengths).sum().clamp(min=1)


def kl_estimate(logp_N: Tensor, other_N: Tensor) -> Tensor:
    """Estimator of KL(pi || other) from tokens sampled from pi: r - log r - 1 with r = other/pi. Never negative."""
    d = (other_N - logp_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(d) - d


def grpo_loss(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    beta: float = 0.0,
    reference_logp_N: Tensor | None = None,
) -> Loss:
    """The loss of some tokens of a step. `old_logp_N` are the log-probabilities the tokens were sampled with."""
    log_ratio = (logp_N - old_logp_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.minimum(ratio * advantages_N, clipped_ratio * advantages_N)
    kl = torch.zeros_like(logp_N)
    if beta:
        assert reference_logp_N is not None
        kl = kl_estimate(logp_N, reference_logp_N)
    loss = -(weights_N * (surrogate - beta * kl)).sum()
    binding = clipped_ratio * advantages_N < ratio * advantages_N
    return Loss(loss, binding.sum().detach(), kl.sum().detach())
