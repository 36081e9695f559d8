"""Rollouts: sample a group of completions for each prompt, have them judged, and turn the verdicts into rewards."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.engine.sampler import derived_seed
from luciola.engine.sequence import Completion
from luciola.recipe import GrpoRecipe, RolloutSection
from luciola.recipe.objective import Advantage
from luciola.rl.advantage import teaching
from luciola.rl.reward import by_function, grouped, refuse_failures, rewards
from luciola.tasks.base import GradesSteps, Problem, Task, encoded, stops_of
from luciola.tasks.judge import by_task
from luciola.text.tokenizer import Tokenizer
from luciola.text.untrusted import shortened
from luciola.verify.verdict import Verdict


@dataclass(slots=True)
class Rollout:
    """What one step sampled: P problems, G completions of each, in order.

    Attributes:
        prompts: token ids of each prompt.
        steps: process supervision only: of each completion (index of the last token, reward) of its steps.
        refilled: groups without anything to learn from that dynamic sampling has replaced.
        parts: what the rewards are the weighted sum of, (P, G) each.
        rewards_PG, known_PG: what each completion earned, and whether the verifiers could tell.
        seconds_sampling: wall time until the last completion was there.
        seconds_verifying: from then on until the last verdict: what sampling did not hide.
    """

    problems: list[Problem]
    prompts: list[list[int]]
    completions: list[list[Completion]]
    verdicts: list[list[Verdict]]
    parts: dict[str, Tensor]
    rewards_PG: Tensor
    known_PG: Tensor
    seconds_sampling: float
    seconds_verifying: float
    steps: list[list[list[tuple[int, float]]]] = field(default_factory=list)
    refilled: int = 0

    def teaching(self, kind: Advantage) -> Tensor:
        """Whether each group has what its advantages are made from, (P,); with process supervision that is a difference
        between rewards of steps."""
        if not self.steps:
            return teaching(kind, self.rewards_PG, self.known_PG, self.correct())
        of_groups = [
            {reward for steps, counts in zip(group, known, strict=True) if counts for _, reward in steps}
            for group, known in zip(self.steps, self.known_PG.tolist(), strict=True)
        ]
        return torch.tensor([len(different) > 1 for different in of_groups])

    def correct(self) -> Tensor:
        """Which completions are right, (P, G)."""
        return torch.tensor([[v.kind == "correct" for v in group] for group in self.verdicts])

    def metrics(self) -> dict[str, Any]:
        """Rewards, verdicts by kind, lengths."""
        flat = [c for group in self.completions for c in group]
        verdicts = Counter(v.kind for group in self.verdicts for v in group)
        known = self.rewards_PG[self.known_PG]
        lengths = [len(c.token_ids) for c in flat]
        return {
            "reward/mean": float(known.mean()) if len(known) else 0.0,
            "reward/std": float(known.std()) if len(known) > 1 else 0.0,
            **{
                f"reward/{name}": float(values_PG[self.known_PG].mean()) if len(known) else 0.0
                for name, values_PG in self.parts.items()
            },
            **{f"verdict/{kind}": verdicts[kind] for kind in ("correct", "wrong", "no_answer", "timeout", "crash")},
            "completion/length": sum(lengths) / len(lengths),
            "completion/max_length": max(lengths),
            "completion/truncated": sum(c.finish_reason == "length" for c in flat) / len(flat),
            **({"groups/refilled": self.refilled} if self.refilled else {}),
        }

    def samples(self, groups: int = 2, each: int = 2) -> list[dict[str, Any]]:
        """A few completions to read, spread over the step's groups."""
        places = np.linspace(0, len(self.problems) - 1, min(groups, len(self.problems))).astype(int)
        return [
            {
                "prompt": self.problems[p].prompt,
                "truth": self.problems[p].truth,
                "completion": self.completions[p][g].text,
                "verdict": self.verdicts[p][g].kind,
                "detail": self.verdicts[p][g].detail,
                "reward": float(self.rewards_PG[p, g]),
                "rewards": {name: float(values_PG[p, g]) for name, values_PG in self.parts.items()},
                "finish_reason": self.completions[p][g].finish_reason,
            }
            for p in places
            for g in range(min(each, len(self.completions[p])))
        ]


def rollout(engine: Engine, tokenizer: Tokenizer, recipe: GrpoRecipe, step: int) -> Rollout:
    """Sample and judge the groups of step `step`, a pure function of the weights and (seed, step).

    With dynamic sampling (DAPO) groups that are not `teaching` are replaced by those of new problems, at most
    `objective.refills` times; those that then still teach nothing stay.

    Raises ValueError when verifiers that something is learnt from fail on more than 5 % of the completions, or give a
    reward that is no number.
    """
    most, kind = recipe.rollout.prompts, recipe.objective.advantage
    found = _round(engine, tokenizer, recipe, step, 0, most)
    for number in range(1, recipe.objective.refills + 1):
        flat = (~found.teaching(kind)).nonzero().flatten().tolist()
        if not flat:
            break
        new = _round(engine, tokenizer, recipe, step, number, len(flat))
        useful = new.teaching(kind).nonzero().flatten().tolist()
        found = _replaced(found, flat, new, useful)
    return found


def sampling(settings: RolloutSection, task: Task, seeds: Iterable[int], **recorded: Any) -> list[SamplingParams]:
    """How to sample a group for each seed; `recorded` says what else is kept of a completion."""
    return [
        SamplingParams(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            n=settings.group_size,
            seed=seed,
            stop=stops_of(task),
            **recorded,
        )
        for seed in seeds
    ]


def _round(engine: Engine, tokenizer: Tokenizer, recipe: GrpoRecipe, step: int, number: int, count: int) -> Rollout:
    """Groups for the first `count` problems of round `number`; every round has problems and seeds of its own."""
    settings, task, objective = recipe.rollout, recipe.task, recipe.objective
    place = number * settings.prompts
    first = step * settings.prompts * (objective.refills + 1) + place
    problems = [task.problem("train", first + i, recipe.seed) for i in range(count)]
    prompts = [encoded(tokenizer, task, problem) for problem in problems]
    params = sampling(
        settings,
        task,
        [derived_seed(recipe.seed, step, place + i) for i in range(count)],
        logprobs=True,
        routes=recipe.grpo.replay_routes,
        kept_tokens=objective.keep_sampling_mask,
    )
    began = time.perf_counter()
    with ExitStack() as stack:
        judging = stack.enter_context(by_task(task, problems))
        calling = {name: stack.enter_context(by_function(name, problems)) for name in recipe.reward.own}

        def ended(i: int, completion: Completion) -> None:
            for each in (judging, *calling.values()):  # they may begin while the rest is sampled
                each.add(i, completion.text)

        completions = engine.generate(prompts, params, ended=ended)
        sampled = time.perf_counter()
        texts, sizes = [[c.text for c in group] for group in completions], [len(group) for group in completions]
        judged, graded = judging.each(texts), recipe.learns_from_verdicts
        verdicts = refuse_failures(judged, problems, sizes, step) if graded else grouped(judged, sizes)
        called = {name: refuse_failures(each.each(texts), problems, sizes, step) for name, each in calling.items()}
    earned = rewards(recipe.reward, problems, completions, verdicts, called, step, graded)
    _refuse_no_numbers(earned.total_PG, completions, step)
    steps = []
    if objective.supervision == "process":
        assert isinstance(task, GradesSteps)  # the recipe's own check
        steps = [
            [step_ends(tokenizer, c.token_ids, task.grade_steps(problem, c.text)) for c in group]
            for problem, group in zip(problems, completions, strict=True)
        ]
    return Rollout(
        problems=problems,
        prompts=prompts,
        completions=completions,
        verdicts=earned.verdicts,
        parts=earned.parts,
        rewards_PG=earned.total_PG,
        known_PG=earned.known_PG,
        seconds_sampling=sampled - began,
        seconds_verifying=time.perf_counter() - sampled,
        steps=steps,
    )


def _replaced(old: Rollout, places: list[int], new: Rollout, useful: list[int]) -> Rollout:
    """`old` with its groups at the first of `places` replaced by the `useful` ones of `new`."""
    order = list(range(len(old.prompts)))
    for place, g in zip(places, useful, strict=False):
        order[place] = len(order) + g

    def merged(a: Any, b: Any) -> Any:
        return torch.cat((a, b))[order] if isinstance(a, Tensor) else [[*a, *b][g] for g in order] if a else []

    lists = ("problems", "prompts", "completions", "verdicts", "rewards_PG", "known_PG", "steps")
    return replace(
        old,
        **{name: merged(getattr(old, name), getattr(new, name)) for name in lists},
        parts={name: merged(old.parts[name], new.parts[name]) for name in old.parts},
        seconds_sampling=old.seconds_sampling + new.seconds_sampling,
        seconds_verifying=old.seconds_verifying + new.seconds_verifying,
        refilled=old.refilled + min(len(places), len(useful)),
    )


def _refuse_no_numbers(rewards_PG: Tensor, completions: list[list[Completion]], step: int) -> None:
    """One NaN among the rewards would make a whole group's advantages NaN, and the weights after them."""
    bad = (~rewards_PG.isfinite()).nonzero().tolist()
    if bad:
        p, g = bad[0]
        raise ValueError(
            f"the reward of a completion of step {step + 1} is {float(rewards_PG[p, g])}, not a finite number "
            f"(completion: {shortened(completions[p][g].text)}); the run has stopped before it could learn from it; "
            "mend the reward function"
        )


def step_ends(tokenizer: Tokenizer, token_ids: list[int], steps: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """(characters, reward) of each step as (index of the token that holds its last character, reward)."""
    if not token_ids:
        return []
    lengths = [len(tokenizer.decode(token_ids[: t + 1])) for t in range(len(token_ids))]
    last = len(token_ids) - 1
    return [(next((t for t, n in enumerate(lengths) if n >= end), last), reward) for end, reward in steps]
