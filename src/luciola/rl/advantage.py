"""Advantages from rewards alone: what a completion is compared with stands in for a critic (DeepSeekMath, section 4.1).

Each function takes what every completion earned and whether that is known: where the verifier failed (timeout, crash) a
completion neither learns nor counts in any statistics.

Shapes: P prompts, G completions a prompt, T tokens of one completion.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luciola.recipe.objective import Advantage

EPS = 1e-4  # keeps a group of nearly equal rewards from blowing up


def group_advantages(rewards_PG: Tensor, known_PG: Tensor, *, scale: bool = True) -> Tensor:
    """A = (R - mean) / (std + eps) within each group, 0 where the reward is not known.

    Args:
        rewards_PG: what each completion earned, float32.
        known_PG: False where the verifier failed.
        scale: divide by the group's standard deviation, the one with G - 1 (the paper's formula leaves it open, other
            implementations use it); False leaves it out (Dr. GRPO).

    Returns:
        Advantages (P, G). A group whose rewards are all equal has none.
    """
    centred_PG, count_P1 = _centred(rewards_PG, known_PG)
    if not scale:
        return centred_PG.float()
    variance_P1 = centred_PG.square().sum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)
    return (centred_PG / (variance_P1.sqrt() + EPS)).float()


def leave_one_out(rewards_PG: Tensor, known_PG: Tensor) -> Tensor:
    """A = R minus the mean of the others in its group = G / (G - 1) (R - mean): RLOO, (P, G)."""
    centred_PG, count_P1 = _centred(rewards_PG, known_PG)
    return (centred_PG * count_P1 / (count_P1 - 1).clamp(min=1)).float()


def batch_scaled(rewards_PG: Tensor, known_PG: Tensor) -> Tensor:
    """A = (R - mean of its group) / (std over the whole rollout + eps), (P, G): easy groups are not blown up."""
    centred_PG, _ = _centred(rewards_PG, known_PG)
    known = rewards_PG[known_PG].double()
    deviation = known.std() if len(known) > 1 else torch.zeros(())
    return (centred_PG / (deviation + EPS)).float()


def global_advantages(returns: Sequence[Tensor], known: Sequence[bool]) -> list[Tensor]:
    """A_t = (return_t - mean) / (std + eps) over all tokens of the rollout whose reward is known (REINFORCE++).

    Args:
        returns: of each completion what each of its tokens is credited with, (T,).
    """
    counted = [r.double() for r, k in zip(returns, known, strict=True) if k]
    every = torch.cat(counted) if counted else torch.zeros(0, dtype=torch.double)
    if len(every) < 2 or bool((every == every[0]).all()):
        return [torch.zeros(len(r)) for r in returns]
    mean, deviation = every.mean(), every.std() + EPS
    return [((r.double() - mean) / deviation * k).float() for r, k in zip(returns, known, strict=True)]


def process_advantages(
    steps: Sequence[Sequence[tuple[int, float]]], lengths: Sequence[int], known: Sequence[bool]
) -> list[Tensor]:
    """A_t = the sum of the normalised rewards of all steps that end at token t or later (DeepSeekMath, section 4.1.3).

    Args:
        steps: of each completion of ONE group, (index of the last token, reward) of its steps.
        lengths: tokens of each completion.

    Rewards are normalised over all steps of all completions of the group, by the deviation with n - 1.
    """
    every = torch.tensor([r for own, k in zip(steps, known, strict=True) if k for _, r in own], dtype=torch.double)
    flat = len(every) < 2 or bool((every == every[0]).all())
    advantages = []
    for own, length, counts in zip(steps, lengths, known, strict=True):
        earned_T = torch.zeros(length, dtype=torch.double)
        for end, reward in own if counts and not flat else ():
            earned_T[end] += (reward - every.mean()) / (every.std() + EPS)
        advantages.append(earned_T.flip(0).cumsum(0).flip(0).float())
    return advantages


def token_rewards(reward: float, kl_T: Tensor, beta: float) -> Tensor:
    """r_t of each token: - beta times its own KL estimate, and R besides for the last one, (T,)."""
    rewards_T = -beta * kl_T
    rewards_T[-1:] += reward
    return rewards_T


def returns_with_kl(reward: float, kl_T: Tensor, beta: float) -> Tensor:
    """What each token is credited with: R - beta times the KL estimates of this token and all later ones, (T,)."""
    return reward - beta * kl_T.flip(0).cumsum(0).flip(0)


def overlong_penalty(lengths_PG: Tensor, longest: int, buffer: int) -> Tensor:
    """DAPO's soft punishment, (P, G): 0 up to `longest - buffer` tokens, from there evenly down to -1 at `longest`."""
    return ((longest - buffer - lengths_PG) / buffer).clamp(-1.0, 0.0)


def pairs(correct_G: Tensor, known_G: Tensor) -> list[tuple[int, int]]:
    """Right against wrong completions of a group, the first with the first, as many as there are of both."""
    right = (correct_G & known_G).nonzero().flatten().tolist()
    wrong = (~correct_G & known_G).nonzero().flatten().tolist()
    return list(zip(right, wrong, strict=False))


def teaching(kind: Advantage, rewards_PG: Tensor, known_PG: Tensor, correct_PG: Tensor) -> Tensor:
    """Whether each group has what an advantage of this kind is made from, (P,): see `LACKING`.

    Args:
        correct_PG: which completions are right.
    """
    match kind:
        case "critic":
            return known_PG.any(1)
        case "global":
            return known_PG.any(1) & spread(rewards_PG.view(1, -1), known_PG.view(1, -1))
        case "correct":
            return (correct_PG & known_PG).any(1)
        case "pairs":
            return (correct_PG & known_PG).any(1) & (~correct_PG & known_PG).any(1)
        case _:
            return spread(rewards_PG, known_PG)


# What is said of a group that has nothing to learn from, where it is not that all its rewards are equal.
LACKING: dict[Advantage, str] = {
    "critic": "no reward is known",
    "global": "no reward is known, or all of the rollout are equal",
    "correct": "of the completions none is right",
    "pairs": "of the completions none is right, or none wrong",
}


def spread(rewards_PG: Tensor, known_PG: Tensor) -> Tensor:
    """Whether each group's known rewards differ at all, (P,): what a baseline of the group needs."""
    high = rewards_PG.masked_fill(~known_PG, -torch.inf).amax(1)
    low = rewards_PG.masked_fill(~known_PG, torch.inf).amin(1)
    return high > low


def _centred(rewards_PG: Tensor, known_PG: Tensor) -> tuple[Tensor, Tensor]:
    """R minus its group's mean, 0 where it is not known, (P, G); and how many are known in each group, (P, 1)."""
    known = known_PG.double()  # sums of float32 rewards are exact in it, and so is the mean of equal ones
    count_P1 = known.sum(1, keepdim=True)
    mean_P1 = (rewards_PG * known).sum(1, keepdim=True) / count_P1.clamp(min=1)
    return (rewards_PG - mean_P1) * known, count_P1
