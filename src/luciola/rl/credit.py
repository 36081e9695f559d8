"""Credit: from the rewards of a rollout to the advantage of every token, as the objective asks for it."""

from __future__ import annotations

import torch
from torch import Tensor

from luciola.model.transformer import Transformer
from luciola.recipe import GrpoRecipe
from luciola.rl.advantage import (
    batch_scaled,
    global_advantages,
    group_advantages,
    leave_one_out,
    overlong_penalty,
    pairs,
    process_advantages,
    returns_with_kl,
    token_rewards,
)
from luciola.rl.batch import NOTHING, Sample, per_sample
from luciola.rl.ppo import Critic
from luciola.rl.rollout import Rollout


def sequences(
    rollout: Rollout, recipe: GrpoRecipe, reference: Transformer | None = None, critic: Critic | None = None
) -> list[Sample]:
    """The completions of a rollout with their advantages, group by group.

    Args:
        reference: pi_ref, needed where the KL divergence is part of the reward.
        critic: needed where the advantage is the critic's (PPO).
    """
    samples = _samples(rollout, recipe)
    rewards_PG, known_PG = shaped_rewards(rollout, recipe)
    for sample, known in zip(samples, known_PG.flatten().tolist(), strict=True):
        sample.known = known
    if recipe.objective.advantage == "pairs":
        return _paired(samples, rollout, known_PG)
    found = _advantages(samples, rewards_PG, rollout, recipe, reference, critic)
    for sample, advantages_T in zip(samples, found, strict=True):
        sample.advantages_T = advantages_T
    return samples


def shaped_rewards(rollout: Rollout, recipe: GrpoRecipe) -> tuple[Tensor, Tensor]:
    """Rewards, and whether they count, after what the objective does about long completions, (P, G) both."""
    longest, objective = recipe.rollout.max_tokens, recipe.objective
    rewards_PG, known_PG = rollout.rewards_PG, rollout.known_PG
    if objective.overlong == "penalty":
        lengths_PG = torch.tensor([[len(c.token_ids) for c in group] for group in rollout.completions])
        buffer = max(1, round(objective.overlong_buffer * longest))
        rewards_PG = rewards_PG + overlong_penalty(lengths_PG, longest, buffer)
    elif objective.overlong == "mask":
        cut_PG = torch.tensor([[c.finish_reason == "length" for c in group] for group in rollout.completions])
        known_PG = known_PG & ~cut_PG
    return rewards_PG, known_PG


def _samples(rollout: Rollout, recipe: GrpoRecipe) -> list[Sample]:
    samples = []
    for prompt, group in zip(rollout.prompts, rollout.completions, strict=True):
        for completion in group:
            logp, kept = completion.tempered_logprobs, completion.kept_tokens
            assert logp is not None
            if recipe.objective.keep_sampling_mask:
                assert kept is not None and completion.kept_logprobs is not None
                logp = completion.kept_logprobs
            samples.append(
                Sample(
                    prompt,
                    completion.token_ids,
                    logp,
                    logp,
                    NOTHING,
                    known=True,
                    routes_TLK=completion.routes if recipe.grpo.replay_routes else None,
                    kept=kept,
                )
            )
    return samples


def _advantages(
    samples: list[Sample],
    rewards_PG: Tensor,
    rollout: Rollout,
    recipe: GrpoRecipe,
    reference: Transformer | None,
    critic: Critic | None,
) -> list[Tensor]:
    """A of every token of every sample, (T,)."""
    objective, (P, G) = recipe.objective, rewards_PG.shape
    known_PG = torch.tensor([s.known for s in samples]).view(P, G)
    lengths = [len(s.completion) for s in samples]
    if objective.supervision == "process":
        advantages: list[Tensor] = []
        for p in range(P):
            group = slice(p * G, (p + 1) * G)
            advantages += process_advantages(rollout.steps[p], lengths[group], known_PG[p].tolist())
        return advantages
    rewards, kl = rewards_PG.flatten(), torch.zeros(sum(lengths)).split(lengths)
    if objective.beta and objective.kl_in == "reward":
        assert reference is not None
        found = per_sample(reference, samples, recipe, replay=False)
        kl = tuple(torch.tensor(s.old_logp) - found[id(s)] if s.completion else NOTHING for s in samples)
        rewards_PG = rewards_PG - objective.beta * torch.stack([k.sum() for k in kl]).view(P, G)
    if objective.advantage == "critic":
        assert critic is not None
        return critic.advantages(
            samples, [token_rewards(float(r), k, objective.beta) for r, k in zip(rewards, kl, strict=True)]
        )
    if objective.advantage == "global":
        returns = [returns_with_kl(float(r), k, objective.beta) for r, k in zip(rewards, kl, strict=True)]
        return global_advantages(returns, known_PG.flatten().tolist())
    match objective.advantage:
        case "leave_one_out":
            each_PG = leave_one_out(rewards_PG, known_PG)
        case "batch":
            each_PG = batch_scaled(rewards_PG, known_PG)
        case "correct":
            each_PG = (rollout.correct() & known_PG).float()
        case kind:
            each_PG = group_advantages(rewards_PG, known_PG, scale=kind == "group")
    return [a.expand(n) for a, n in zip(each_PG.flatten(), lengths, strict=True)]


def _paired(samples: list[Sample], rollout: Rollout, known_PG: Tensor) -> list[Sample]:
    """DPO: +1 for the right and -1 for the wrong completion of every pair, 0 for those without a partner."""
    correct_PG, G = rollout.correct(), known_PG.shape[1]
    written_PG = torch.tensor([bool(s.completion) for s in samples]).view_as(known_PG)
    for sample in samples:
        sample.advantages_T = torch.zeros(len(sample.completion))
    for p in range(len(correct_PG)):
        for number, (right, wrong) in enumerate(pairs(correct_PG[p], known_PG[p] & written_PG[p])):
            for place, sign in ((right, 1.0), (wrong, -1.0)):
                sample = samples[p * G + place]
                sample.pair, sample.advantages_T = number, torch.full((len(sample.completion),), sign)
    return samples
