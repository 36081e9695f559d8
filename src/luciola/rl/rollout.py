"""Rollouts: sample a group of completions for each prompt, have them judged, and turn the verdicts into rewards."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.engine.sampler import derived_seed
from luciola.engine.sequence import Completion
from luciola.recipe import GrpoRecipe
from luciola.rl.reward import refuse_failures, rewards
from luciola.tasks.base import Problem
from luciola.tasks.judge import judge
from luciola.text.tokenizer import Tokenizer
from luciola.verify.verdict import Verdict


@dataclass(slots=True)
class Rollout:
    """What one step sampled: P problems, G completions of each, in order.

    Attributes:
        prompts: token ids of each prompt.
        parts: what the rewards are the weighted sum of, (P, G) each.
        rewards_PG, known_PG: what each completion earned, and whether the verifiers could tell.
        seconds_sampling, seconds_verifying: wall time of the two halves.
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

    Raises ValueError when the verifiers fail on more than 5 % of the completions.
    """
    settings, task = recipe.rollout, recipe.task
    first = step * settings.prompts
    problems = [task.problem("train", first + i, recipe.seed) for i in range(settings.prompts)]
    prompts = [tokenizer.chat(task.messages(problem)) for problem in problems]
    params = [
        SamplingParams(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            n=settings.group_size,
            seed=derived_seed(recipe.seed, step, i),
            logprobs=True,
            routes=recipe.grpo.replay_routes,
        )
        for i in range(settings.prompts)
    ]
    began = time.perf_counter()
    completions = engine.generate(prompts, params)
    sampled = time.perf_counter()
    verdicts = judge(task, problems, [[c.text for c in group] for group in completions])
    earned = rewards(recipe.reward, problems, completions, verdicts)
    refuse_failures(earned.verdicts, step)
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
    )
