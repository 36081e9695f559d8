"""The update half of a step: from judged completions to new weights.

The log-probabilities of the rollout serve as pi_old: engine and trainer run the same modules, so no second forward pass
is needed to recover them, and `kl/engine` measures on every step that this is true. With replayed routes each token
meets the experts it met when it was sampled. Groups replayed from earlier steps are older than pi_old, and where their
weights ask for it theirs is computed anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luciola.engine.sampler import derived_seed
from luciola.model import balance
from luciola.model.moe import Routing
from luciola.model.transformer import Transformer
from luciola.recipe import GrpoRecipe
from luciola.rl.batch import LogProbs, MicroBatch, Sample, logprobs, micro_batches, per_sample
from luciola.rl.credit import sequences
from luciola.rl.objective import Loss, Tokens, kl_estimate, policy_loss, token_weights
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
    """All optimiser steps of one rollout; returns their metrics, token sums turned into means. A critic learns from the
    same parts; while it warms up the policy's learning rate is 0."""
    samples = step_samples(model, reference, rollout, recipe, step, replay, critic)
    if critic is not None and critic.warming_up(step):
        lr = 0.0
    sums = _Sums()
    for number, chosen in enumerate(optimizer_steps(samples, recipe, step)):
        # in the first one the weights are still those that sampled
        _step(model, optimizer, reference, chosen, recipe, lr, sums, number == 0)
        if critic is not None:
            critic.learn(chosen, step)
    metrics = sums.metrics(recipe)
    if critic is not None:
        metrics |= critic.metrics(samples, step)
    if replay is not None:
        metrics["groups/replayed"] = len(samples) // recipe.rollout.group_size - len(rollout.prompts)
    metrics["groups/without_spread"] = 1.0 - float(rollout.teaching(recipe.objective.advantage).float().mean())
    metrics["lr"] = lr
    return metrics


def step_samples(
    model: Transformer,
    reference: Transformer | None,
    rollout: Rollout,
    recipe: GrpoRecipe,
    step: int,
    replay: Replay | None = None,
    critic: Critic | None = None,
) -> list[Sample]:
    """What a step learns from, group by group: its rollout, and the groups that `replay` adds to it."""
    new = sequences(rollout, recipe, reference, critic)
    if replay is None:
        return new
    per_group = recipe.rollout.group_size
    stale = replay.draw(recipe.seed, step)
    if recipe.objective.importance_cap:
        per_sample(model, stale, recipe, replace=True)
    replay.add([new[g : g + per_group] for g in range(0, len(new), per_group)])
    return new + stale


def optimizer_steps(samples: list[Sample], recipe: GrpoRecipe, step: int) -> Iterator[list[Sample]]:
    """The samples of each optimiser step: `updates_per_rollout` parts of whole groups, in an order drawn from (seed,
    step, epoch), gone through `epochs` times."""
    settings, per_group = recipe.grpo, recipe.rollout.group_size
    groups = len(samples) // per_group
    size = -(-groups // settings.updates_per_rollout)
    for epoch in range(settings.epochs):
        generator = torch.Generator().manual_seed(derived_seed(recipe.seed, step, epoch))
        order = (
            torch.randperm(groups, generator=generator).tolist() if settings.updates_per_rollout > 1 else range(groups)
        )
        for start in range(0, groups, size):
            yield [samples[g * per_group + j] for g in order[start : start + size] for j in range(per_group)]


class Part(NamedTuple):
    """A micro-batch of an optimiser step: its samples, its tokens as the loss saw them, and the loss with its graph."""

    batch: MicroBatch
    found: LogProbs
    tokens: Tokens
    loss: Loss


def losses(
    model: Transformer, reference: Transformer | None, chosen: list[Sample], recipe: GrpoRecipe
) -> Iterator[Part]:
    """The loss of an optimiser step on the chosen samples, micro-batch by micro-batch; the step's is their sum."""
    weigh(chosen, recipe)
    # A completion without advantage adds nothing to the policy's gradient; only a KL term still looks at it. An empty
    # one has no token to look at.
    written = [s for s in chosen if s.completion]
    useful = written if kl_in_loss(recipe) else [s for s in written if bool(s.advantages_T.any())]
    for batch in micro_batches(useful or written[:1], recipe.grpo.micro_batch_tokens):
        found = logprobs(model, batch, recipe, entropy=True)
        tokens = batch.tokens_N(found.logp_N)
        if reference is not None:
            with torch.no_grad():
                tokens = tokens._replace(reference_logp=logprobs(reference, batch, recipe, replay=False).logp_N)
        yield Part(batch, found, tokens, policy_loss(tokens, recipe.objective))


def kl_in_loss(recipe: GrpoRecipe) -> bool:
    """Whether the KL divergence from the reference is a term of the loss."""
    objective = recipe.objective
    return objective.beta > 0 and objective.kl_in == "loss" and objective.advantage != "pairs"


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
    for batch, found, tokens, result in losses(model, reference, chosen, recipe):
        result.loss.backward()
        optimizer.accumulate()
        sums.loss += float(result.loss.detach())
        sums.tokens += len(found.logp_N)
        sums.clipped += float(result.clipped)
        sums.masked += float(result.masked)
        if tokens.reference_logp is not None:
            estimate = kl_estimate(found.logp_N.detach(), tokens.reference_logp).sum()
            sums.kl += float(result.kl if kl_in_loss(recipe) else estimate)
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
