"""Completions as micro-batches: whole sequences in one flat list, each prompt once, and their log-probabilities.

Shapes: T tokens of a micro-batch that the model reads, N completion tokens, L MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from luciola.model.layout import Layout
from luciola.model.logprobs import kept_logprobs, token_logprobs, token_logprobs_and_entropy
from luciola.model.moe import Routing
from luciola.model.transformer import Transformer
from luciola.recipe import GrpoRecipe
from luciola.rl.objective import Tokens

NOTHING = torch.zeros(0)


@dataclass(slots=True)
class Sample:
    """One completion with its prompt, as the update sees it; the samples of a group share the same list as prompt.

    Attributes:
        old_logp, sampler_logp: log pi_old and the log-probability it was sampled with, of each token; the same unless
            the sample is replayed.
        advantages_T: of each token.
        known: whether the verifier could tell.
        kept: of each token the ids that top_p and top_k left, where the objective keeps them.
        pair: DPO only: number of its pair in the group.
        stale: sampled in an earlier step.
        weight: of each of its tokens in the loss.
        values_T, returns_T: PPO only: V of each token as the critic had it, and G, which it is to learn.
    """

    prompt: list[int]
    completion: list[int]
    old_logp: list[float]
    sampler_logp: list[float]
    advantages_T: Tensor
    known: bool
    routes_TLK: Tensor | None = None
    kept: list[Tensor] | None = None
    pair: int | None = None
    stale: bool = False
    weight: float = 0.0
    values_T: Tensor = NOTHING
    returns_T: Tensor = NOTHING


class MicroBatch(NamedTuple):
    """Prompts and completions as one flat list, each prompt once, and for each completion token its source: the token
    whose state predicts it."""

    samples: list[Sample]
    tokens_1T: Tensor
    layout: Layout
    routes_1TLK: Tensor | None
    sources_N: Tensor
    targets_N: Tensor
    counts_S: Tensor

    def tokens_N(self, logp_N: Tensor) -> Tokens:
        """The completion tokens as the loss sees them."""
        numbers: dict[tuple[int, int], int] = {}
        pairs = [numbers.setdefault((id(s.prompt), s.pair), len(numbers)) for s in self.samples if s.pair is not None]
        return Tokens(
            logp=logp_N,
            old_logp=torch.tensor([x for s in self.samples for x in s.old_logp]),
            sampler_logp=torch.tensor([x for s in self.samples for x in s.sampler_logp]),
            advantages=torch.cat([s.advantages_T for s in self.samples]),
            weights=self._each(torch.tensor([s.weight for s in self.samples])),
            sequence=self._each(torch.arange(len(self.samples))),
            pair=self._each(torch.tensor(pairs)) if len(pairs) == len(self.samples) else None,
        )

    @property
    def stale_N(self) -> Tensor:
        """Whether each completion token was sampled in an earlier step."""
        return self._each(torch.tensor([s.stale for s in self.samples]))

    def _each(self, x_S: Tensor) -> Tensor:
        return x_S.repeat_interleave(self.counts_S)


class LogProbs(NamedTuple):
    """Of each completion token log pi, where asked for the entropy of its distribution; the routings of MoE layers."""

    logp_N: Tensor
    entropy_N: Tensor | None
    routings: list[Routing]


def micro_batches(chosen: Sequence[Sample], most_tokens: int) -> Iterator[MicroBatch]:
    """Cut sequences into batches whose rows hold at most `most_tokens` slots, padding included; samples of a group stay
    together, groups of like length meet, so that prompts are shared and little is padded. A pair is never parted."""
    groups: dict[int, list[Sample]] = {}
    for sample in chosen:
        groups.setdefault(id(sample.prompt), []).append(sample)
    batch: list[Sample] = []
    longest = 0
    by_length = sorted((sorted(group, key=_length) for group in groups.values()), key=lambda group: _length(group[-1]))
    for unit in (unit for group in by_length for unit in _units(group)):
        longest = max(longest, *map(_length, unit))
        if batch and (len(batch) + len(unit)) * longest > most_tokens:
            yield _collate(batch)
            batch, longest = [], max(map(_length, unit))
        batch += unit
    if batch:
        yield _collate(batch)


def logprobs(
    model: Transformer, batch: MicroBatch, recipe: GrpoRecipe, *, entropy: bool = False, replay: bool = True
) -> LogProbs:
    """One forward pass at the temperature of the rollout, with the experts of the rollout if `replay`."""
    hidden = model.hidden(batch.tokens_1T, layout=batch.layout, routes_BTLK=batch.routes_1TLK if replay else None)
    states_ND = hidden.states[0].index_select(0, batch.sources_N)
    head, temperature = model.lm_head.weight, recipe.rollout.temperature
    entropy_N = None
    if entropy:
        logp_N, entropy_N = token_logprobs_and_entropy(states_ND, head, batch.targets_N, temperature)
    if recipe.objective.keep_sampling_mask:
        kept = [ids for s in batch.samples for ids in s.kept or ()]
        logp_N = kept_logprobs(states_ND, head, batch.targets_N, kept, temperature)
    elif not entropy:
        logp_N = token_logprobs(states_ND, head, batch.targets_N, temperature)
    return LogProbs(logp_N, entropy_N, hidden.routings)


@torch.no_grad()
def per_sample(
    model: Transformer, samples: Sequence[Sample], recipe: GrpoRecipe, *, replay: bool = True, replace: bool = False
) -> dict[int, Tensor]:
    """log pi of each sample's tokens, (T,), by the sample's `id`; with `replace` it becomes the sample's pi_old."""
    found: dict[int, Tensor] = {}
    written = [s for s in samples if s.completion]
    for batch in micro_batches(written, recipe.grpo.micro_batch_tokens):
        parts = logprobs(model, batch, recipe, replay=replay).logp_N.split(batch.counts_S.tolist())
        for sample, logp_T in zip(batch.samples, parts, strict=True):
            found[id(sample)] = logp_T
            if replace:
                sample.old_logp = logp_T.tolist()
    return found


def _length(sample: Sample) -> int:
    """Tokens the model reads: the last one is only predicted."""
    return len(sample.prompt) + len(sample.completion) - 1


def _units(group: list[Sample]) -> list[list[Sample]]:
    """The samples of a group one by one, or those of a pair together."""
    units: dict[int, list[Sample]] = {}
    for sample in group:
        units.setdefault(id(sample) if sample.pair is None else sample.pair, []).append(sample)
    return list(units.values())


def _collate(batch: list[Sample]) -> MicroBatch:
    tokens: list[int] = []
    routes: list[Tensor] = []
    rows, sources = [], []
    prompt: list[int] | None = None
    prompt_row = np.empty(0, dtype=np.int64)
    for sample in batch:
        read = len(sample.completion) - 1
        if sample.prompt is not prompt:
            prompt = sample.prompt
            prompt_row = np.arange(len(tokens), len(tokens) + len(prompt))
            tokens += prompt
            if sample.routes_TLK is not None:
                routes.append(sample.routes_TLK[: len(prompt)])
        own = np.arange(len(tokens), len(tokens) + read)
        tokens += sample.completion[:-1]
        if sample.routes_TLK is not None:
            routes.append(sample.routes_TLK[len(prompt) :])
        rows.append(np.concatenate((prompt_row, own)))
        sources += [prompt_row[-1:], own]
    return MicroBatch(
        samples=batch,
        tokens_1T=torch.tensor([tokens]),
        layout=Layout(torch.from_numpy(np.concatenate(rows)).split([len(row) for row in rows])),
        routes_1TLK=torch.cat(routes).unsqueeze(0) if routes else None,
        sources_N=torch.from_numpy(np.concatenate(sources)),
        targets_N=torch.tensor([token for sample in batch for token in sample.completion]),
        counts_S=torch.tensor([len(sample.completion) for sample in batch]),
    )
