"""The core that all objectives share, on a flat list of completion tokens; maximised, so the loss is its negative.

    J = sum_t w_t ( M_t c_t s(rho_t, A_t) - beta D_t )

    A    advantage     advantage.py; it knows nothing of the policy
    rho  ratio         pi / pi_old of the token, or of its sequence
    s    clip          min(rho A, clip(rho) A)   |   sg[min(rho, cap)] A log pi   |   rho A or A log pi
    M, c corrections   off-policy sequences left out, truncated importance weights of replayed groups
    D    KL            an estimate of KL(pi || pi_ref) from the token alone
    w    aggregation   all denominators; they count over the whole optimiser step, so micro-batches change nothing

GRPO (DeepSeekMath, equation 3) and its descendants are choices for each part (`luciola.recipe.objective.NAMES`). DPO
alone compares two sequences, and has a loss of its own below.

Shapes: N completion tokens of many sequences, one after the other; S sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from luciola.recipe.objective import Aggregation, Clip, Kl, ObjectiveSection, Ratio

LOG_RATIO_LIMIT = 20.0  # exp beyond this only overflows


class Tokens(NamedTuple):
    """The tokens of some sequences as the loss sees them, (N,) each.

    Attributes:
        logp: log pi, which alone has a gradient.
        old_logp: log pi_old, the policy at the start of the step.
        sampler_logp: log-probability the token was sampled with; differs from old_logp in replayed groups only.
        sequence: number of the token's sequence, 0 to S - 1, in order.
        reference_logp: log pi_ref, None without a reference.
        pair: DPO only: number of the token's pair.
    """

    logp: Tensor
    old_logp: Tensor
    sampler_logp: Tensor
    advantages: Tensor
    weights: Tensor
    sequence: Tensor
    reference_logp: Tensor | None = None
    pair: Tensor | None = None


class Terms(NamedTuple):
    """The parts of the objective, (N,) each: ratio rho, the corrected surrogate M c s, KL estimate D, whether the clip
    cuts the token's gradient, and M as a truth value."""

    ratio: Tensor
    surrogate: Tensor
    kl: Tensor
    clipped: Tensor
    kept: Tensor


class Loss(NamedTuple):
    """The loss to descend, and sums over its tokens (not means) for logging."""

    loss: Tensor
    clipped: Tensor
    kl: Tensor
    masked: Tensor


def token_weights(lengths: Tensor, aggregation: Aggregation, known: Tensor, longest: int = 0) -> Tensor:
    """w of each sequence's tokens, from the lengths of all sequences of an optimiser step, (S,) float32.

    sequence: 1 / (S |o|)     token: 1 / sum |o|     constant: 1 / (S longest)     sequence_sum: 1 / S

    Sequences whose reward is not known, and empty ones, weigh nothing and do not count.
    """
    known = (known & (lengths > 0)).to(torch.float32)
    lengths = lengths.to(torch.float32)
    if aggregation == "token":
        return known / (known * lengths).sum().clamp(min=1)
    count = known.sum().clamp(min=1)
    if aggregation == "sequence":
        return known / (count * lengths.clamp(min=1))
    return known / (count * longest) if aggregation == "constant" else known / count


def importance_ratio(log_ratio_N: Tensor, sequence_N: Tensor, kind: Ratio) -> Tensor:
    """rho of each token, (N,): its own, or its sequence's (GSPO's geometric mean, RLOO's product)."""
    if kind in ("sequence_mean", "sequence"):
        log_ratio_N = _over_sequences(log_ratio_N, sequence_N, mean=kind == "sequence_mean")
    return log_ratio_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_surrogate(
    ratio_N: Tensor, logp_N: Tensor, advantages_N: Tensor, kind: Clip, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """s of each token, and whether the clip changes it, (N,) both."""
    if kind == "none":
        return ratio_N * advantages_N, torch.zeros_like(ratio_N, dtype=torch.bool)
    if kind == "weight":  # CISPO: every token keeps a gradient, only its weight is capped
        capped = ratio_N.detach().clamp(max=1.0 + high)
        return capped * advantages_N * logp_N, ratio_N > 1.0 + high
    clipped_ratio = ratio_N.clamp(1.0 - low, 1.0 + high)
    surrogate = torch.minimum(ratio_N * advantages_N, clipped_ratio * advantages_N)
    return surrogate, clipped_ratio * advantages_N < ratio_N * advantages_N


def kl_estimate(logp_N: Tensor, other_N: Tensor, kind: Kl = "k3") -> Tensor:
    """Estimator of KL(pi || other) from tokens sampled from pi, with r = other/pi: k1 = -log r, k2 = log^2 r / 2, and
    k3 = r - log r - 1, which is never negative. "unbiased" is k3 here; `terms` multiplies it by rho."""
    d = (other_N - logp_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if kind == "k1":
        return -d
    return d.square() / 2 if kind == "k2" else torch.expm1(d) - d


def off_policy_keep(tokens: Tokens, delta: float) -> Tensor:
    """M of each token, bool (N,): False where A < 0 and the mean log(pi_sampler / pi) of its sequence exceeds delta
    (DeepSeek-V3.2)."""
    drift_N = _over_sequences(tokens.sampler_logp - tokens.logp.detach(), tokens.sequence, mean=True)
    return (tokens.advantages >= 0) | (drift_N <= delta)


def terms(tokens: Tokens, objective: ObjectiveSection) -> Terms:
    """All parts of the objective for each token."""
    if objective.ratio == "none":  # plain likelihood, weighted: A log pi
        ratio, base = torch.ones_like(tokens.logp), tokens.logp
    else:
        log_ratio_N = tokens.logp - tokens.old_logp
        ratio = base = importance_ratio(log_ratio_N, tokens.sequence, objective.ratio)
    surrogate, clipped = clipped_surrogate(
        base, tokens.logp, tokens.advantages, objective.clip, objective.clip_low, objective.clip_high
    )
    kept = torch.ones_like(clipped)
    if objective.off_policy_delta:
        kept = off_policy_keep(tokens, objective.off_policy_delta)
        surrogate = surrogate * kept
    if objective.importance_cap:
        surrogate = surrogate * (tokens.old_logp - tokens.sampler_logp).exp().clamp(max=objective.importance_cap)
    kl = torch.zeros_like(tokens.logp)
    if objective.beta and objective.kl_in == "loss":
        assert tokens.reference_logp is not None
        kl = kl_estimate(tokens.logp, tokens.reference_logp, objective.kl)
        if objective.kl == "unbiased":
            kl = kl * ratio  # with its gradient: the whole has that of KL(pi || pi_ref), whoever sampled
    return Terms(ratio, surrogate, kl, clipped, kept)


def policy_loss(tokens: Tokens, objective: ObjectiveSection) -> Loss:
    """The loss of some whole sequences of a step."""
    if objective.advantage == "pairs":
        return preference_loss(tokens, objective.beta)
    part = terms(tokens, objective)
    beta = objective.beta if objective.kl_in == "loss" else 0.0
    loss = -(tokens.weights * (part.surrogate - beta * part.kl)).sum()
    return Loss(loss, part.clipped.sum().detach(), part.kl.sum().detach(), (~part.kept).sum().detach())


def preference_loss(tokens: Tokens, beta: float) -> Loss:
    """DPO: - sum over pairs w log sigma(beta (h+ - h-)), h = log pi(o) / pi_ref(o), the advantages being +1 and -1."""
    nothing = torch.zeros(())
    return Loss(preference_losses(tokens, beta).sum(), nothing, nothing, nothing)


def preference_losses(tokens: Tokens, beta: float) -> Tensor:
    """What each pair adds to DPO's loss, one number a pair; none where a step has found no pair."""
    if tokens.pair is None:
        return tokens.logp[:0]
    margins = _margins(tokens)
    weights = torch.zeros_like(margins).index_copy(0, tokens.pair, tokens.weights)
    return -(weights * F.logsigmoid(beta * margins))


def _margins(tokens: Tokens) -> Tensor:
    """h+ - h- of each pair."""
    assert tokens.reference_logp is not None and tokens.pair is not None
    signed_N = tokens.advantages * (tokens.logp - tokens.reference_logp)
    return signed_N.new_zeros(int(tokens.pair.max()) + 1).index_add(0, tokens.pair, signed_N)


def _over_sequences(x_N: Tensor, sequence_N: Tensor, *, mean: bool) -> Tensor:
    """Sum or mean of x over the token's sequence, at each token, (N,)."""
    counts_S = sequence_N.bincount()
    total_S = x_N.new_zeros(len(counts_S)).index_add(0, sequence_N, x_N)
    if mean:
        total_S = total_S / counts_S.clamp(min=1)
    return total_S.index_select(0, sequence_N)
