"""Group-relative advantages: the group's mean reward is the baseline, so no critic is needed (DeepSeekMath, section
4.1.2).

Shapes: P prompts, G completions a prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-4  # keeps a group of nearly equal rewards from blowing up


def group_advantages(rewards_PG: Tensor, known_PG: Tensor, *, scale: bool = True) -> Tensor:
    """A = (R - mean) / (std + eps) within each group, 0 where the reward is not known.

    Args:
        rewards_PG: what each completion earned, float32.
        known_PG: False where the verifier failed (timeout, crash): such a completion neither learns nor counts in the
            statistics of its group.
        scale: divide by the group's standard deviation, the one with G - 1 (the paper's formula leaves it open, other
            implementations use it); False leaves it out (Dr. GRPO).

    Returns:
        Advantages (P, G). A group whose rewards are all equal has none.
    """
    known = known_PG.double()  # sums of float32 rewards are exact in it, and so is the mean of equal ones
    count_P1 = known.sum(1, keepdim=True)
    mean_P1 = (rewards_PG * known).sum(1, keepdim=True) / count_P1.clamp(min=1)
    centred_PG = (rewards_PG - mean_P1) * known
    if not scale:
        return centred_PG.float()
    variance_P1 = centred_PG.square().sum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)
    return (centred_PG / (variance_P1.sqrt() + EPS)).float()


def spread(rewards_PG: Tensor, known_PG: Tensor) -> Tensor:
    """Whether each group's known rewards differ at all, (P,): without a difference there is nothing to learn."""
    high = rewards_PG.masked_fill(~known_PG, -torch.inf).amax(1)
    low = rewards_PG.masked_fill(~known_PG, torch.inf).amin(1)
    return high > low
