"""The update half of a GRPO step: from a judged rollout to new weights.

The log-probabilities of the rollout serve as pi_old: engine and trainer run the same modules, so no second forward pass
is needed to recover them, and `kl/engine` measures on every step that this is true. With replayed routes each token
meets the experts it met when it was sampled.

Shapes: T tokens of a micro-batch that the model reads, N completion tokens, L MoE layers, K experts a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luciola.engine.sampler import derived_seed
from luciola.model import balance
from luciola.model.layout import Layout
from luciola.model.logprobs import token_logprobs, token_logprobs_and_entropy
from luciola.model.moe import Routing
from luciola.model.transformer import Transformer
from luciola.recipe import GrpoRecipe
from luciola.rl.advantage import group_advantages, spread
from luciola.rl.objective import grpo_loss, kl_estimate, token_weights
from luciola.rl.rollout import Rollout
from luciola.train.optim import Optimizer


@dataclass(slots=True)
class Sample:
    """One completion with its prompt, as the update sees it."""

    prompt: list[int]
    completion: list[int]
    old_logp: list[float]
    advantage: float
    known: bool
    routes_TLK: Tensor | None
    weight: float = 0.0


class MicroBatch(NamedTuple):
    """Prompts and completions as one flat list, each prompt once, and for each completion token its source: the token
    whose state predicts it."""

    tokens_1T: Tensor
    layout: Layout
    routes_1TLK: Tensor | None
    sources_N: Tensor
    targets_N: Tensor
    old_logp_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor


def sequences(rollout: Rollout, recipe: GrpoRecipe) -> list[Sample]:
    """The completions of a rollout with their advantages, group by group."""
    advantages_PG = group_advantages(rollout.rewards_PG, rollout.known_PG, scale=recipe.grpo.scale_rewards)
    found = []
    for p, (prompt, group) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        for g, completion in enumerate(group):
            assert completion.tempered_logprobs is not None
            routes = completion.routes if recipe.grpo.replay_routes else None
            found.append(
                Sample(
                    prompt,
                    completion.token_ids,
                    completion.tempered_logprobs,
                    float(advantages_PG[p, g]),
                    bool(rollout.known_PG[p, g]),
                    routes,
                )
            )
    return found


def micro_batches(chosen: Sequence[Sample], most_tokens: int) -> Iterator[MicroBatch]:
    """Cut sequences into batches whose rows hold at most `most_tokens` slots, padding included; samples of a group stay
    together, groups of like length meet, so that prompts are shared and little is padded."""
    groups: dict[int, list[Sample]] = {}
    for sample in chosen:
        groups.setdefault(id(sample.prompt), []).append(sample)
    batch: list[Sample] = []
    longest = 0
    by_length = sorted((sorted(group, key=_length) for group in groups.values()), key=lambda group: _length(group[-1]))
    for sample in itertools.chain.from_iterable(by_length):
        longest = max(longest, _length(sample))
        if batch and (len(batch) + 1) * longest > most_tokens:
            yield _collate(batch)
            batch, longest = [], _length(sample)
        batch.append(sample)
    if batch:
        yield _collate(batch)


def _length(sample: Sample) -> int:
    """Tokens the model reads: the last one is only predicted."""
    return len(sample.prompt) + len(sample.completion) - 1


def _collate(batch: list[Sample]) -> MicroBatch:
    tokens: list[int] = []
    routes: list[Tensor] = []
    rows, sources, old = [], [], []
    prompt: list[int] | None = None
    prompt_row = torch.empty(0, dtype=torch.long)
    for sample in batch:
        read = len(sample.completion) - 1
        if sample.prompt is not prompt:
            prompt = sample.prompt
            prompt_row = torch.arange(len(tokens), len(tokens) + len(prompt))
            tokens += prompt
            if sample.routes_TLK is not None:
                routes.append(sample.routes_TLK[: len(prompt)])
        own = torch.arange(len(tokens), len(tokens) + read)
        tokens += sample.completion[:-1]
        if sample.routes_TLK is not None:
            routes.append(sample.routes_TLK[len(prompt) :])
        rows.append(torch.cat((prompt_row, own)))
        sources.append(torch.cat((prompt_row[-1:], own)))
        old += sample.old_logp
    counts = torch.tensor([len(sample.completion) for sample in batch])
    return MicroBatch(
        tokens_1T=torch.tensor([tokens]),
        layout=Layout(rows),
        routes_1TLK=torch.cat(routes).unsqueeze(0) if routes else None,
        sources_N=torch.cat(sources),
        targets_N=torch.tensor([token for sample in batch for token in sample.completion]),
        old_logp_N=torch.tensor(old),
        advantages_N=torch.tensor([sample.advantage for sample in batch]).repeat_interleave(counts),
        weights_N=torch.tensor([sample.weight for sample in batch]).repeat_interleave(counts),
    )


def update(
    model: Transformer,
    optimizer: Optimizer,
    reference: Transformer | None,
    rollout: Rollout,
    recipe: GrpoRecipe,
    step: int,
    lr: float,
) -> dict[str, Any]:
    """All optimiser steps of one rollout; returns their metrics, token sums turned into means.

    A rollout is cut into `updates_per_rollout` parts of whole groups, in an order drawn from (seed, step, epoch), and
    gone through `epochs` times.
    """
    settings, groups = recipe.grpo, len(rollout.prompts)
    everything = sequences(rollout, recipe)
    size, per_group = groups // settings.updates_per_rollout, recipe.rollout.group_size
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
    metrics = sums.metrics(recipe.grpo.beta > 0)
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
    loads: list[Tensor] | None = None

    def metrics(self, with_reference: bool) -> dict[str, Any]:
        tokens = max(1, self.tokens)
        values: dict[str, Any] = {
            "loss": self.loss / self.steps,
            "grad_norm": self.norm / self.steps,
            "clip_fraction": self.clipped / tokens,
            "entropy": self.entropy / tokens,
            "kl/engine": self.engine_kl / max(1, self.engine_tokens),
        }
        if with_reference:
            values["kl/reference"] = self.kl / tokens
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
    settings = recipe.grpo
    lengths = torch.tensor([len(s.completion) for s in chosen])
    known = torch.tensor([s.known for s in chosen])
    for sequence, weight in zip(chosen, token_weights(lengths, settings.aggregation, known).tolist(), strict=True):
        sequence.weight = weight
    # A completion without advantage adds nothing to the policy's gradient; only the KL term still looks at it.
    useful = chosen if settings.beta else [s for s in chosen if s.advantage != 0.0]
    for batch in micro_batches(useful or chosen[:1], settings.micro_batch_tokens):
        hidden = model.hidden(batch.tokens_1T, layout=batch.layout, routes_BTLK=batch.routes_1TLK)
        states_ND = hidden.states[0].index_select(0, batch.sources_N)
        logp_N, entropy_N = token_logprobs_and_entropy(
            states_ND, model.lm_head.weight, batch.targets_N, recipe.rollout.temperature
        )
        reference_N = None if reference is None else _reference_logprobs(reference, batch, recipe.rollout.temperature)
        result = grpo_loss(
            logp_N,
            batch.old_logp_N,
            batch.advantages_N,
            batch.weights_N,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            beta=settings.beta,
            reference_logp_N=reference_N,
        )
        result.loss.backward()
        optimizer.accumulate()
        sums.loss += float(result.loss.detach())
        sums.tokens += len(logp_N)
        sums.clipped += float(result.clipped)
        sums.kl += float(result.kl)
        sums.entropy += float(entropy_N.sum())
        if fresh:
            sums.engine_kl += float(kl_estimate(batch.old_logp_N.double(), logp_N.detach().double()).sum())
            sums.engine_tokens += len(logp_N)
        _count_experts(hidden.routings, batch, sums)
    sums.norm += optimizer.step(lr)
    sums.steps += 1


def _reference_logprobs(reference: Transformer, batch: MicroBatch, temperature: float) -> Tensor:
    with torch.no_grad():
        states_ND = reference.hidden(batch.tokens_1T, layout=batch.layout).states[0].index_select(0, batch.sources_N)
        return token_logprobs(states_ND, reference.lm_head.weight, batch.targets_N, temperature)


def _count_experts(routings: list[Routing], batch: MicroBatch, sums: _Sums) -> None:
    if not routings:
        return
    # Each prediction counts, so the end of a prompt once for every completion that begins there.
    at_sources = (Routing(*(x.index_select(1, batch.sources_N) for x in routing)) for routing in routings)
    loads = [balance.load(routing) for routing in at_sources]
    sums.loads = loads if sums.loads is None else [a + b for a, b in zip(sums.loads, loads, strict=True)]
