"""`luciola explain loss`: one optimiser step of a run, taken apart into what each completion adds to its loss.

The batch is drawn again by the trainer itself, in a copy of the run's folder: from a checkpoint, the weights and
(seed, step) a rollout is always the same. Of the steps in the log it is the last before which a checkpoint lies, or the
first of all, and its loss must be the one that was logged.

The loss is computed twice: by the trainer, and here from the terms of each token, completion by completion. P prompts,
G completions each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from luciola.recipe import GrpoRecipe, check, read_toml
from luciola.rl.advantage import LACKING
from luciola.rl.batch import Sample, per_sample
from luciola.rl.credit import shaped_rewards
from luciola.rl.equation import denominators, equation
from luciola.rl.grpo import trainer_of
from luciola.rl.objective import preference_losses, terms
from luciola.rl.rollout import Rollout
from luciola.rl.update import Part, kl_in_loss, losses, optimizer_steps, step_samples
from luciola.run.again import last_step, same_loss, standing_at
from luciola.text.tokenizer import Tokenizer
from luciola.train.schedule import learning_rate


@dataclass(slots=True)
class CompletionTerms:
    """What one completion is made into on its way to the loss; None where the update does not look at it.

    Attributes:
        group: number of its prompt among those of the optimiser step.
        replayed: it was sampled in an earlier step, and its advantage is that of its time.
        rewards: the parts before their weights; reward: their sum after what the objective does about long
            completions and a KL divergence in the reward. With process supervision there are `steps` instead, the
            reward of each step.
        known: whether the verifiers could tell.
        mean, deviation: of the known rewards of its group, or of their steps, the deviation with n - 1.
        advantage: mean over its tokens; all have the same but with process supervision and REINFORCE++.
        weight: w, of each token.
        ratio: mean over its tokens; clipped: share of tokens whose gradient the clip takes away.
        kl: mean of the KL estimate in the loss; masked: left out as off-policy; importance: mean c.
        contribution: what it adds to the loss; of a pair (DPO) each completion half.
    """

    group: int
    prompt: str
    completion: str
    tokens: int
    known: bool
    advantage: float
    weight: float
    replayed: bool = False
    verdict: str | None = None
    rewards: dict[str, float] | None = None
    reward: float | None = None
    steps: list[float] | None = None
    mean: float | None = None
    deviation: float | None = None
    ratio: float | None = None
    clipped: float | None = None
    kl: float | None = None
    masked: bool | None = None
    importance: float | None = None
    contribution: float = 0.0


@dataclass(slots=True)
class Explanation:
    """An optimiser step taken apart.

    Attributes:
        step: of the run, counted from 1; optimizer_step, optimizer_steps: its last one, and how many it has.
        equation: each part of the objective; denominators: the numbers in its aggregation.
        loss: the sum of all contributions; trainer_loss: what the trainer computes for the optimiser step.
        step_loss: mean of the trainer's losses over the optimiser steps; logged_loss: the same in metrics.jsonl.
        groups_without_spread: share of the rollout's groups that have nothing to learn from; lacking: what they lack.
    """

    run: str
    step: int
    optimizer_step: int
    optimizer_steps: int
    objective: str
    equation: dict[str, str]
    denominators: dict[str, int]
    completions: list[CompletionTerms]
    loss: float
    trainer_loss: float
    step_loss: float
    logged_loss: float | None
    groups_without_spread: float
    lacking: str

    @property
    def agrees(self) -> bool:
        """Whether the contributions sum up to the trainer's loss, and that is what was logged."""
        logged = self.logged_loss is None or same_loss(self.step_loss, self.logged_loss)
        return logged and same_loss(self.loss, self.trainer_loss)


def explain_loss(path: Path) -> Explanation:
    """Take the last optimiser step of one rollout of the run at `path` apart; the run is left as it is.

    Raises:
        ValueError: the folder is no reinforcement learning run, or one whose base is not pre-trained yet.
    """
    recipe = check(GrpoRecipe, read_toml(path / "recipe.toml"), where=str(path / "recipe.toml"))
    if recipe.base is not None and not (path / "base" / "summary.json").exists():
        raise ValueError(f"the run {path} has no loss yet: its base is still to be pre-trained; continue with --resume")
    done, logged = last_step(path)
    with standing_at(path, recipe, done) as run:
        trainer = trainer_of(run.recipe, run)  # type: ignore[arg-type]
        sampled = trainer.sample(done)
        model, reference = trainer.model, trainer.reference
        samples = step_samples(model, reference, sampled, recipe, done, trainer.replay, trainer.critic)
        waits = trainer.critic is not None and trainer.critic.warming_up(done)
        lr = 0.0 if waits else learning_rate(recipe.optim, done, recipe.grpo.steps)
        parts: list[Part] = []
        chosen: list[Sample] = []
        of_steps: list[float] = []
        for chosen in optimizer_steps(samples, recipe, done):
            if of_steps:
                trainer.optimizer.step(lr)
            parts = []
            for part in losses(model, reference, chosen, recipe):
                part.loss.loss.backward()
                trainer.optimizer.accumulate()
                parts.append(part)
            of_steps.append(sum(float(part.loss.loss.detach()) for part in parts))
        rows = _rows(samples, chosen, sampled, recipe, trainer.tokenizer)
        _earned(rows, samples, sampled, recipe, _penalties(trainer.reference, samples, recipe))
        for part in parts:
            _add_terms(rows, part, recipe)
    counted = [s for s in chosen if s.known and s.completion]
    completions = [rows[id(s)] for s in chosen]
    return Explanation(
        run=str(path),
        step=done + 1,
        optimizer_step=len(of_steps),
        optimizer_steps=len(of_steps),
        objective=recipe.objective.name,
        equation=equation(recipe),
        denominators=denominators(
            recipe.objective,
            sequences=len(counted),
            tokens=sum(len(s.completion) for s in counted),
            pairs=sum(s.pair is not None for s in chosen) // 2,
            longest=recipe.rollout.max_tokens,
        ),
        completions=completions,
        loss=math.fsum(row.contribution for row in completions),
        trainer_loss=of_steps[-1],
        step_loss=sum(of_steps) / len(of_steps),
        logged_loss=logged,
        groups_without_spread=1.0 - float(sampled.teaching(recipe.objective.advantage).float().mean()),
        lacking=LACKING.get(recipe.objective.advantage, f"all rewards{' of steps' if sampled.steps else ''} are equal"),
    )


def _rows(
    samples: list[Sample], chosen: list[Sample], sampled: Rollout, recipe: GrpoRecipe, tokenizer: Tokenizer
) -> dict[int, CompletionTerms]:
    """A row for each sample, by its `id`, with what is known before the loss."""
    numbers: dict[int, int] = {}
    for sample in chosen:
        numbers.setdefault(id(sample.prompt), len(numbers))
    return {
        id(s): CompletionTerms(
            group=numbers.get(id(s.prompt), -1),
            prompt=tokenizer.decode(s.prompt),
            completion=tokenizer.decode(s.completion),
            tokens=len(s.completion),
            known=s.known,
            advantage=float(s.advantages_T.mean()) if s.completion else 0.0,
            weight=s.weight,
            replayed=s.stale,
        )
        for s in samples
    }


def _penalties(reference: torch.nn.Module | None, samples: list[Sample], recipe: GrpoRecipe) -> dict[int, float]:
    """What the KL divergence takes from each reward, by the sample's `id`; empty where it is not in the reward."""
    objective = recipe.objective
    if not objective.beta or objective.kl_in != "reward":
        return {}
    fresh = [s for s in samples if not s.stale]
    found = per_sample(reference, fresh, recipe, replay=False)  # type: ignore[arg-type]
    return {
        id(s): objective.beta * float((torch.tensor(s.sampler_logp) - found[id(s)]).sum())
        for s in fresh
        if s.completion
    }


def _earned(
    rows: dict[int, CompletionTerms],
    samples: list[Sample],
    sampled: Rollout,
    recipe: GrpoRecipe,
    penalties: dict[int, float],
) -> None:
    """Rewards and what they are compared with; those of replayed groups are not kept."""
    rewards_PG, known_PG = shaped_rewards(sampled, recipe)
    P, G = rewards_PG.shape
    taken_PG = torch.tensor([penalties.get(id(s), 0.0) for s in samples[: P * G]]).view(P, G)
    rewards_PG = rewards_PG - taken_PG
    for i, sample in enumerate(samples[: P * G]):
        row, (p, g) = rows[id(sample)], divmod(i, G)
        row.verdict = sampled.verdicts[p][g].kind
        if sampled.steps:
            row.steps = [reward for _, reward in sampled.steps[p][g]]
            counted = [own for own, counts in zip(sampled.steps[p], known_PG[p].tolist(), strict=True) if counts]
            known = torch.tensor([reward for own in counted for _, reward in own], dtype=torch.double)
        else:
            row.rewards = {name: float(values_PG[p, g]) for name, values_PG in sampled.parts.items()}
            row.reward = float(rewards_PG[p, g])
            known = rewards_PG[p][known_PG[p]].double()
        row.mean = float(known.mean()) if len(known) else None
        row.deviation = float(known.std()) if len(known) > 1 else None


def _add_terms(rows: dict[int, CompletionTerms], part: Part, recipe: GrpoRecipe) -> None:
    """The terms of a micro-batch, gathered completion by completion."""
    objective, tokens = recipe.objective, part.tokens
    counts = part.batch.counts_S.tolist()

    def by_sample(x_N: Tensor) -> list[list[float]]:
        return [x.double().tolist() for x in x_N.detach().split(counts)]

    if objective.advantage == "pairs":
        if tokens.pair is None:
            return
        half_N = preference_losses(tokens, objective.beta)[tokens.pair] / 2
        for sample, of_pair in zip(part.batch.samples, by_sample(half_N), strict=True):
            rows[id(sample)].contribution = of_pair[0]
        return
    found = terms(tokens, objective)
    beta = objective.beta if kl_in_loss(recipe) else 0.0
    adds_N = -tokens.weights * (found.surrogate - beta * found.kl)
    columns = [by_sample(x) for x in (adds_N, found.ratio, found.clipped, found.kl, found.kept)]
    for sample, adds, ratio, clipped, kl, kept in zip(part.batch.samples, *columns, strict=True):
        row, n = rows[id(sample)], len(adds)
        row.contribution, row.ratio, row.clipped = math.fsum(adds), sum(ratio) / n, sum(clipped) / n
        row.kl = sum(kl) / n if beta else None
        row.masked = not all(kept) if objective.off_policy_delta else None
    if objective.importance_cap:
        capped_N = (tokens.old_logp - tokens.sampler_logp).exp().clamp(max=objective.importance_cap)
        for sample, weights in zip(part.batch.samples, by_sample(capped_N), strict=True):
            rows[id(sample)].importance = sum(weights) / len(weights)
