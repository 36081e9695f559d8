"""Log-probabilities of given tokens straight from hidden states, without keeping all logits.

    logp_n = l_n[t_n] - logsumexp(l_n),   l_n = W h_n / temperature;    d logp / d l = onehot(t) - softmax(l)

Rows go through the head in chunks small enough to stay in cache. Where the softmax of a whole call fits a modest
budget it is kept for the backward pass, overwritten there by the gradient (as DeepSeek LLM did, section 2.4 of its
report); beyond that it is computed again, so a vocabulary of 100,000 costs no more memory than one chunk.

Shapes: N rows (tokens), D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK_NUMBERS = 1 << 21  # logits in flight, 8 MiB in float32
TINY = 1e-37  # stands for probabilities of 0 in p log p
KEPT_NUMBERS = 1 << 26  # softmax values kept for backward, 256 MiB at the most


def _softmax(
    h_ND: Tensor, W_VD: Tensor, scale: float, targets_N: Tensor, out_NV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax of each row, float32 (in `out_NV` where given), and the log-probability of each row's target."""
    if out_NV is not None and h_ND.dtype == torch.float32:
        l_NV = torch.mm(h_ND, W_VD.T, out=out_NV)
    else:
        l_NV = (h_ND @ W_VD.T).float()
    if scale != 1.0:
        l_NV.mul_(scale)
    # log p = l - logsumexp(l), from the logits themselves because p may underflow. The largest probability is at least
    # 1/V, so it gives logsumexp(l) = max l - log max p without a second pass of exponentials.
    above_N = l_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1) - l_NV.amax(-1)
    p_NV = torch.softmax(l_NV, -1, out=l_NV if out_NV is None else out_NV)
    return p_NV, above_N + p_NV.amax(-1).log_()


class _LogProbsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_ND, W_VD, targets_N, scale, with_entropy):  # type: ignore[no-untyped-def]
        N, V = h_ND.shape[0], W_VD.shape[0]
        rows = max(1, CHUNK_NUMBERS // V)
        kept = N * V <= KEPT_NUMBERS and any(ctx.needs_input_grad)
        p_NV = h_ND.new_empty(N, V, dtype=torch.float32) if kept else None
        logp_N = h_ND.new_empty(N, dtype=torch.float32)
        entropy_N = torch.empty_like(logp_N) if with_entropy else None
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            out = None if p_NV is None else p_NV[part]
            p, logp_N[part] = _softmax(h_ND[part], W_VD, scale, targets_N[part], out)
            if entropy_N is not None:
                entropy_N[part] = -(p.clamp_min(TINY).log_().mul_(p)).sum(-1)
        ctx.scale, ctx.rows = scale, rows
        ctx.save_for_backward(h_ND, W_VD, targets_N, p_NV)
        if entropy_N is not None:
            ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx, g_N, _):  # type: ignore[no-untyped-def]
        h_ND, W_VD, targets_N, p_NV = ctx.saved_tensors
        needs_dh, needs_dW = ctx.needs_input_grad[:2]
        dh_ND = torch.empty_like(h_ND) if needs_dh else None
        # A sum over many chunks is kept in float32: bfloat16 would lose what each of them adds.
        dW_VD = torch.zeros_like(W_VD, dtype=torch.float32) if needs_dW and p_NV is None else None
        g_N1 = (g_N * ctx.scale).unsqueeze(-1)
        for start in range(0, h_ND.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            h, targets = h_ND[part], targets_N[part]
            p = _softmax(h, W_VD, ctx.scale, targets)[0] if p_NV is None else p_NV[part]
            dl = p.mul_(-g_N1[part]).scatter_add_(1, targets.unsqueeze(1), g_N1[part]).to(h.dtype)
            if dh_ND is not None:
                torch.mm(dl, W_VD, out=dh_ND[part])
            if dW_VD is not None:
                dW_VD += dl.T @ h
        if needs_dW and p_NV is not None:  # by now overwritten by dl
            dW_VD = p_NV.to(h_ND.dtype).T @ h_ND
        return dh_ND, None if dW_VD is None else dW_VD.to(W_VD.dtype), None, None, None


def token_logprobs(h_ND: Tensor, W_VD: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(W h / temperature)[target] of each row, (N,) float32, differentiable in h and W."""
    logp: Tensor = _LogProbsFunction.apply(h_ND, W_VD, targets_N, 1.0 / temperature, False)[0]
    return logp


def kept_logprobs(
    h_ND: Tensor, W_VD: Tensor, targets_N: Tensor, kept: Sequence[Tensor], temperature: float = 1.0
) -> Tensor:
    """Log-probability of each row's target among the tokens that sampling kept there, (N,) float32, differentiable.

        logp_n = l_n[t_n] - logsumexp over kept_n of l_n

    Only the kept logits are computed, so memory follows the number of kept tokens times D.

    Args:
        kept: ids of each row's kept tokens, its target among them.
    """
    counts_N = torch.tensor([len(ids) for ids in kept])
    rows_K, ids_K = torch.arange(len(kept)).repeat_interleave(counts_N), torch.cat(list(kept)).long()
    l_K = (h_ND.index_select(0, rows_K) * W_VD.index_select(0, ids_K)).sum(-1).float() / temperature
    l_N = l_K.new_zeros(len(kept)).index_add(0, rows_K, torch.where(ids_K == targets_N[rows_K], l_K, 0.0))
    most_N = l_K.new_full((len(kept),), -torch.inf).scatter_reduce(0, rows_K, l_K.detach(), "amax")
    sums_N = l_K.new_zeros(len(kept)).index_add(0, rows_K, (l_K - most_N[rows_K]).exp())
    return l_N - most_N - sums_N.log()


def token_logprobs_and_entropy(
    h_ND: Tensor, W_VD: Tensor, targets_N: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy of each row's distribution in nats, (N,) float32 without gradient."""
    logp, entropy = _LogProbsFunction.apply(h_ND, W_VD, targets_N, 1.0 / temperature, True)
    return logp, entropy
