"""Replay: groups of earlier rollouts that a step learns from again.

The completions keep the log-probabilities they were sampled with, so that ratios stay honest, and the experts and
advantages of their time. What is kept goes into the checkpoint: a resumed run draws the same groups.

Shapes: S samples, N their tokens one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from luciola.engine.sampler import derived_seed
from luciola.rl.batch import Sample

DRAW = 7  # tells the seed of the draw from those of the rollout's own order


class Replay:
    """The newest groups with anything to learn from, at most `most`, of which a step draws `share` times `most`."""

    def __init__(self, share: float, most: int) -> None:
        self.number, self.most = max(1, round(share * most)), most
        self.groups: list[list[Sample]] = []

    def add(self, groups: list[list[Sample]]) -> None:
        """Keep those of a step's groups that have an advantage anywhere; the oldest make room."""
        self.groups += [group for group in groups if any(bool(s.advantages_T.any()) for s in group)]
        self.groups = self.groups[-self.most :]

    def draw(self, seed: int, step: int) -> list[Sample]:
        """The samples of some groups, drawn without repetition from (seed, step), marked as stale."""
        generator = torch.Generator().manual_seed(derived_seed(seed, step, DRAW))
        chosen = torch.randperm(len(self.groups), generator=generator)[: self.number].tolist()
        drawn = [sample for g in chosen for sample in self.groups[g]]
        for sample in drawn:
            sample.stale, sample.old_logp = True, sample.sampler_logp
        return drawn

    def state(self) -> dict[str, Tensor]:
        """Everything kept, as tensors."""
        samples = [sample for group in self.groups for sample in group]
        facts = [
            {"group": g, "prompt": group[0].prompt, "lengths": [len(s.completion) for s in group],
             "known": [s.known for s in group], "pairs": [s.pair for s in group]}
            for g, group in enumerate(self.groups)
        ]  # fmt: skip
        tensors = {
            "facts": torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8),
            "completions_N": torch.tensor([x for s in samples for x in s.completion], dtype=torch.long),
            "sampler_logp_N": torch.tensor([x for s in samples for x in s.sampler_logp], dtype=torch.float64),
            "advantages_N": torch.cat([torch.zeros(0), *(s.advantages_T for s in samples)]),
        }
        for i, sample in enumerate(samples):
            if sample.routes_TLK is not None:
                tensors[f"routes.{i}"] = sample.routes_TLK
            if sample.kept is not None:
                tensors[f"kept.{i}"] = torch.cat([torch.zeros(0, dtype=torch.long), *sample.kept])
                tensors[f"kept_counts.{i}"] = torch.tensor([len(ids) for ids in sample.kept], dtype=torch.long)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.groups, place = [], 0
        names = ("completions_N", "sampler_logp_N", "advantages_N")
        number = 0
        for facts in json.loads(bytes(tensors["facts"].tolist())):
            group, prompt = [], facts["prompt"]
            for length, known, pair in zip(facts["lengths"], facts["known"], facts["pairs"], strict=True):
                completion, logp, advantages = (tensors[name][place : place + length] for name in names)
                kept = tensors.get(f"kept.{number}")
                group.append(
                    Sample(
                        prompt, completion.tolist(), logp.tolist(), logp.tolist(), advantages.clone(), known,
                        routes_TLK=tensors.get(f"routes.{number}"),
                        kept=None if kept is None else list(kept.split(tensors[f"kept_counts.{number}"].tolist())),
                        pair=pair,
                    )
                )  # fmt: skip
                place, number = place + length, number + 1
            self.groups.append(group)
