"""The update half of a step: from judged completions to new weights.

The log-probabilities of the rollout serve as pi_old: engine and trainer run the same modules, so no second forward pass
is needed to recover them, and `kl/engine` measures on every step that this is true. With replayed routes each token
meets the experts it met when it was sampled. Groups replayed from earlier steps are older than pi_old, and where their
weights ask for it theirs is computed anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luciola.engine.sampler import derived_seed
from luciola.model import balance
from luciola.model.moe import Routing
from luciola.model.transformer import Transformer
from luciola.recipe import GrpoRecipe
from luciola.rl.advantage import spread
from luciola.rl.batch import MicroBatch, Sample, logprobs, micro_batches, per_sample
from luciola.rl.credit import sequences
from luciola.rl.objective import kl_estimate, policy_loss, token_weights
from luciola.rl.ppo import Critic
from luciola.rl.replay import Replay
from luciola.rl.rollout import Rollout
from luciola.train.optim import Optimizer


def update(
    model: Transformer,
    optimizer: Optimizer,
    reference: Transformer | None,
    rollout: Rollout,
    recipe: GrpoRecipe,
    step: int,
    lr: float,
    replay: Replay | None = None,
    critic: Critic | None = None,
) -> dict[str, Any]:
    """All optimiser steps of one rollout; returns their metrics, token sums turned into means.

    A rollout, with the groups that `replay` adds to it, is cut into `updates_per_rollout` parts of whole groups, in an
    order drawn from (seed, step, epoch), and gone through `epochs` times. A critic learns from the same parts; while it
    warms up the policy is only measured.
    """
    settings, objective = recipe.grpo, recipe.objective
    new = sequences(rollout, recipe, reference, critic)
    if critic is not None and critic.warming_up(step):
        lr = 0.0
    per_group = recipe.rollout.group_size
    everything = new
    if replay is not None:
        stale = replay.draw(recipe.seed, step)
        if objective.importance_cap:
            per_sample(model, stale, recipe, replace=True)
        everything = new + stale
        replay.add([new[g : g + per_group] for g in range(0, len(new), per_group)])
    groups = len(everything) // per_group
    size = -(-groups // settings.updates_per_rollout)
    sums = _Sums()
    for epoch in range(settings.epochs):
        generator = torch.Generator().manual_seed(derived_seed(recipe.seed, step, epoch))
        order = (
            torch.randperm(groups, generator=generator).tolist() if settings.updates_per_rollout > 1 else range(groups)
        )
        for start in range(0, groups, size):
            chosen = [everything[g * per_group + j] for g in order[start : start + size] for j in range(per_group)]
            fresh = epoch == 0 and start == 0  # the weights are still those that sampled
            _step(model, optimizer, reference, chosen, recipe, lr, sums, fresh)
            if critic is not None:
                critic.learn(chosen, step)
    metrics = sums.metrics(recipe)
    if critic is not None:
        metrics |= critic.metrics(new, step)
    if replay is not None:
        metrics["groups/replayed"] = (len(everything) - len(new)) // per_group
    metrics["groups/without_spread"] = 1.0 - float(spread(rollout.rewards_PG, rollout.known_PG).float().mean())
    metrics["lr"] = lr
    return metrics


@dataclass(slots=True)
class _Sums:
    """Sums over the tokens and optimiser steps of one rollout."""

    loss: float = 0.0
    norm: float = 0.0
    steps: int = 0
    tokens: int = 0
    clipped: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    engine_kl: float = 0.0
    engine_tokens: int = 0
    masked: float = 0.0
    loads: list[Tensor] | None = None

    def metrics(self, recipe: GrpoRecipe) -> dict[str, Any]:
        tokens = max(1, self.tokens)
        values: dict[str, Any] = {
            "loss": self.loss / self.steps,
            "grad_norm": self.norm / self.steps,
            "clip_fraction": self.clipped / tokens,
            "entropy": self.entropy / tokens,
            "kl/engine": self.engine_kl / max(1, self.engine_tokens),
        }
        if recipe.objective.beta:
            values["kl/reference"] = self.kl / tokens
        if recipe.objective.off_policy_delta:
            values["off_policy/masked"] = self.masked / tokens
        if self.loads:
            values["expert_load/max_violation"] = max(balance.max_violation(load) for load in self.loads)
        return values


def _step(
    model: Transformer,
    optimizer: Optimizer,
    reference: Transformer | None,
    chosen: list[Sample],
    recipe: GrpoRecipe,
    lr: float,
    sums: _Sums,
    fresh: bool,
) -> None:
    """One optimiser step on the chosen sequences."""
    settings, objective = recipe.grpo, recipe.objective
    weigh(chosen, recipe)
    # A completion without advantage adds nothing to the policy's gradient; only a KL term still looks at it. An empty
    # one has no token to look at.
    with_kl = objective.beta > 0 and objective.kl_in == "loss" and objective.advantage != "pairs"
    written = [s for s in chosen if s.completion]
    useful = written if with_kl else [s for s in written if bool(s.advantages_T.any())]
    for batch in micro_batches(useful or written[:1], settings.micro_batch_tokens):
        found = logprobs(model, batch, recipe, entropy=True)
        tokens = batch.tokens_N(found.logp_N)
        if reference is not None:
            with torch.no_grad():
                tokens = tokens._replace(reference_logp=logprobs(reference, batch, recipe, replay=False).logp_N)
        result = policy_loss(tokens, recipe.objective)
        result.loss.backward()
        optimizer.accumulate()
        sums.loss += float(result.loss.detach())
        sums.tokens += len(found.logp_N)
        sums.clipped += float(result.clipped)
        sums.masked += float(result.masked)
        if tokens.reference_logp is not None:
            estimate = kl_estimate(found.logp_N.detach(), tokens.reference_logp).sum()
            sums.kl += float(result.kl if with_kl else estimate)
        assert found.entropy_N is not None
        sums.entropy += float(found.entropy_N.sum())
        if fresh:
            sampled, now = (x[~batch.stale_N].double() for x in (tokens.old_logp, found.logp_N.detach()))
            sums.engine_kl += float(kl_estimate(sampled, now).sum())
            sums.engine_tokens += len(now)
        _count_experts(found.routings, batch, sums)
    sums.norm += optimizer.step(lr)
    sums.steps += 1


def weigh(chosen: list[Sample], recipe: GrpoRecipe) -> None:
    """Give each sequence of an optimiser step the weight w of its tokens; all denominators are here."""
    objective = recipe.objective
    if objective.advantage == "pairs":
        count = sum(s.pair is not None for s in chosen) / 2
        for sequence in chosen:
            sequence.weight = 0.0 if sequence.pair is None else 1.0 / count
        return
    lengths = torch.tensor([len(s.completion) for s in chosen])
    known = torch.tensor([s.known for s in chosen])
    weights = token_weights(lengths, objective.aggregation, known, recipe.rollout.max_tokens)
    for sequence, weight in zip(chosen, weights.tolist(), strict=True):
        sequence.weight = weight


def _count_experts(routings: list[Routing], batch: MicroBatch, sums: _Sums) -> None:
    if not routings:
        return
    # Each prediction counts, so the end of a prompt once for every completion that begins there.
    at_sources = (Routing(*(x.index_select(1, batch.sources_N) for x in routing)) for routing in routings)
    loads = [balance.load(routing) for routing in at_sources]
    sums.loads = loads if sums.loads is None else [a + b for a, b in zip(sums.loads, loads, strict=True)]
