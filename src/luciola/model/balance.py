"""Keeping experts evenly used: the selection bias of V3 and the balance losses of DeepSeekMoE, V2 and V3.

Shapes: B sequences, T time, E routed experts, K chosen a token. `mask_BT` marks real tokens (padding must not vote).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from luciola.model.moe import MoE, Routing


def load(routing: Routing, mask_BT: Tensor | None = None) -> Tensor:
    """How many tokens went to each expert, (E,) float32."""
    indices, E = routing.indices_BTK, routing.scores_BTE.shape[-1]
    if mask_BT is not None:
        indices = indices[mask_BT]
    return torch.bincount(indices.flatten(), minlength=E).float()


def max_violation(load_E: Tensor) -> float:
    """How far the busiest expert is above the mean: (max - mean) / mean; 0 is perfect balance (V3 report, section
    4.5.3)."""
    mean = load_E.mean()
    return float((load_E.max() - mean) / mean) if mean > 0 else 0.0


@torch.no_grad()
def update_bias(layer: MoE, load_E: Tensor, speed: float) -> None:
    """b_i += speed * sign(mean load - load_i), over the whole batch of a finished step (V3 report, section 2.1.2)."""
    layer.gate.e_score_correction_bias += speed * torch.sign(load_E.mean() - load_E)


def _fractions(routing: Routing, mask_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per sequence f_BE = E/(K T) * tokens of each expert (1 when even), and P_BE = the mean affinity share."""
    indices_BTK, scores_BTE = routing
    B, T, E = scores_BTE.shape
    mask = scores_BTE.new_ones(B, T) if mask_BT is None else mask_BT.to(scores_BTE.dtype)
    tokens_B1 = mask.sum(1, keepdim=True).clamp(min=1)
    chosen_BE = scores_BTE.new_zeros(B, E)
    votes = mask.unsqueeze(-1).expand_as(indices_BTK).flatten(1)
    chosen_BE.scatter_add_(1, indices_BTK.flatten(1), votes)
    f_BE = chosen_BE * E / (indices_BTK.shape[-1] * tokens_B1)
    share_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
    P_BE = (share_BTE * mask.unsqueeze(-1)).sum(1) / tokens_B1
    return f_BE, P_BE


def expert_loss(routings: Iterable[Routing], mask_BT: Tensor | None = None) -> Tensor:
    """Sequence-wise balance loss, mean over sequences, summed over layers: sum_i f_i P_i, 1 a layer when even.

    DeepSeekMoE paper, equations 12 to 14; V3 report, equations 17 to 20 (affinities normalised to a share first). The
    counts carry no gradient, it flows through P alone. Multiply by the paper's alpha.
    """
    terms = [(f_BE * P_BE).sum(-1).mean() for f_BE, P_BE in (_fractions(r, mask_BT) for r in routings)]
    return torch.stack(terms).sum()


def device_loss(routings: Iterable[Routing], groups: int, mask_BT: Tensor | None = None) -> Tensor:
    """Device-level balance loss over `groups` of consecutive experts: sum_d mean(f in d) * sum(P in d) (V2 paper, eq.
    26 to 28)."""
    terms = []
    for routing in routings:
        f_BE, P_BE = _fractions(routing, mask_BT)
        f_BG = f_BE.unflatten(-1, (groups, -1)).mean(-1)
        P_BG = P_BE.unflatten(-1, (groups, -1)).sum(-1)
        terms.append((f_BG * P_BG).sum(-1).mean())
    return torch.stack(terms).sum()


def communication_loss(routings: Iterable[Routing], groups: int, limit: int, mask_BT: Tensor | None = None) -> Tensor:
    """Balance of what each device receives: f''_d = D/(M T) * tokens sent to d, times sum(P in d) (V2 paper, eq. 29 to
    31).

    `limit` is M, the most devices a token may be sent to (topk_group).
    """
    terms = []
    for routing in routings:
        _, P_BE = _fractions(routing, mask_BT)
        B, T, E = routing.scores_BTE.shape
        mask = P_BE.new_ones(B, T) if mask_BT is None else mask_BT.to(P_BE.dtype)
        sent_BTG = P_BE.new_zeros(B, T, groups)
        sent_BTG.scatter_(-1, routing.indices_BTK // (E // groups), 1.0)
        tokens_B1 = mask.sum(1, keepdim=True).clamp(min=1)
        f_BG = (sent_BTG * mask.unsqueeze(-1)).sum(1) * groups / (limit * tokens_B1)
        P_BG = P_BE.unflatten(-1, (groups, -1)).sum(-1)
        terms.append((f_BG * P_BG).sum(-1).mean())
    return torch.stack(terms).sum()
