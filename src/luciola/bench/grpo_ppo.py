"""GRPO and PPO from the same checkpoint to the same held-out accuracy: memory, seconds and samples that each needs.

PPO's critic is a second model of the policy's size (DeepSeekMath, section 4.1): its weights, gradients and moments have
to be held, and it reads every completion twice, to value it and to learn from it. Both take the same rollouts, rewards,
clip, aggregation and learning rate of the policy. Each trains in a process of its own, and they take turns step by
step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from luciola import hardware
from luciola.bench.subjects import quickstart_base
from luciola.bench.turns import Step, machine, take_turns
from luciola.engine.engine import Engine
from luciola.evaluate.run import evaluate
from luciola.model.language_model import LanguageModel, load
from luciola.recipe import GrpoRecipe, assemble, read_toml, resolve
from luciola.rl.ppo import Critic
from luciola.rl.rollout import rollout
from luciola.rl.update import update
from luciola.train.optim import Optimizer
from luciola.train.schedule import learning_rate

PEERS: tuple[str, ...] = ()
SEEDS = (0, 1, 2, 3, 4)
TARGET = 0.95  # held-out problems answered right, greedily
# The quickstart's task and settings. Time to a target needs a learning rate that does not depend on the last step.
SETTINGS = [
    "grpo.steps=30",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
    "evaluate.every=1",
    "evaluate.problems=200",
    *("objective.clip_low=0.2", "objective.clip_high=0.28", "objective.aggregation=token"),  # of both alike
]
METHODS: dict[str, list[str]] = {
    "grpo": ["objective.name=grpo"],
    "ppo": ["objective.name=ppo", "critic.lam=1", "critic.optim.lr=3e-4"],
}


def run(model: str | None = None) -> dict[str, Any]:
    """What each needed, median over the seeds, and PPO's as multiples of GRPO's.

    Args:
        model: where both start; without one the quickstart's base, which is pre-trained at first use.

    Raises:
        ValueError: the model has no tokenizer, or answers as many problems right before it is trained.
    """
    start = model or str(quickstart_base())
    before = accuracy(load(start), recipe(start, SEEDS[0], METHODS["grpo"]))
    if before >= TARGET:
        raise ValueError(
            f"the model {start} answers {before:.0%} of the held-out problems right before any training, and "
            f"{TARGET:.0%} is the target; give a --model with more to learn"
        )
    outcomes: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for seed in SEEDS:
        recipes = {name: recipe(start, seed, parts) for name, parts in METHODS.items()}
        contenders = {
            name: (f"{__name__}:contender", {"recipe": each, "target": TARGET}) for name, each in recipes.items()
        }
        turns = take_turns(contenders, rounds=recipes["grpo"].grpo.steps, warmup=0)
        for name, taken in turns.items():
            outcomes[name].append(taken[-1].said)
    return {**report(outcomes, TARGET), "accuracy_before": before, "seeds": len(SEEDS), "model": start, **machine()}


def recipe(model: str, seed: int, parts: Sequence[str]) -> GrpoRecipe:
    """The quickstart's reinforcement learning with the parts of a method, from a stored model."""
    table = read_toml(resolve("recipes/quickstart.toml"))
    del table["base"]
    return assemble(GrpoRecipe, table | {"model": {"path": model}}, [f"seed={seed}", *SETTINGS, *parts], "bench")


def contender(recipe: GrpoRecipe, target: float) -> Step:
    """Training by the recipe, a step at a time, with an evaluation after every few; idle once it is at the target.

    A step returns the outcome so far: `reached`, `steps`, `samples`, `seconds` (of training, evaluations not counted),
    `accuracies` of all evaluations, `peak_memory_bytes` of the process, `training_bytes`, and of a critic
    `explained_variance` in the last step.
    """
    hardware.keep_freed_memory()
    assert recipe.model is not None and recipe.model.path is not None  # as this file makes its recipes
    lm = load(recipe.model.path)
    tokenizer, optimizer = lm.tokenizer, Optimizer(lm.model, recipe.optim)
    assert tokenizer is not None  # `run` has evaluated it
    critic = None if recipe.critic is None else Critic(lm.model, recipe)
    engine = Engine(lm, dtype="model")
    optimizers = [optimizer] if critic is None else [optimizer, critic.optimizer]

    outcome: dict[str, Any] = {"reached": False, "steps": 0, "samples": 0, "seconds": 0.0, "accuracies": []}

    def step() -> dict[str, Any]:
        if not outcome["reached"]:
            number, began = outcome["steps"], time.perf_counter()
            sampled = rollout(engine, tokenizer, recipe, number)
            lr = learning_rate(recipe.optim, number, recipe.grpo.steps)
            metrics = update(lm.model, optimizer, None, sampled, recipe, number, lr, critic=critic)
            outcome["seconds"] += time.perf_counter() - began
            outcome["steps"] += 1
            outcome["samples"] += sum(map(len, sampled.completions))
            if outcome["steps"] % recipe.evaluate.every == 0:
                outcome["accuracies"].append(accuracy(lm, recipe, engine))
                outcome["reached"] = outcome["accuracies"][-1] >= target
            outcome["peak_memory_bytes"] = hardware.peak_memory_bytes()
            if critic is not None:
                outcome["explained_variance"] = metrics["critic/explained_variance"]
            outcome["training_bytes"] = sum(map(training_bytes, optimizers))
        return outcome

    return step


def accuracy(lm: LanguageModel, recipe: GrpoRecipe, engine: Engine | None = None) -> float:
    """The share of held-out problems that the model answers right, greedily."""
    found = evaluate(
        lm,
        recipe.task,
        problems=recipe.evaluate.problems,
        samples=0,
        max_tokens=recipe.rollout.max_tokens,
        seed=recipe.seed,
        engine=engine,
    )
    return float(found.figures["accuracy"])


def training_bytes(optimizer: Optimizer) -> int:
    """Weights, their gradients and both moments of what an optimiser trains, in float32."""
    gradients = sum(p.nbytes for p in optimizer.masters.values())
    return gradients + sum(tensor.nbytes for tensor in optimizer.state().values())


def report(outcomes: Mapping[str, Sequence[Mapping[str, Any]]], target: float) -> dict[str, Any]:
    """Medians of each method over its seeds, and `ppo_over_grpo` of them.

    Where a seed never reached the target, its method has no median seconds, steps and samples, for those of the others
    would flatter it; `conclusion` says so.
    """
    result: dict[str, Any] = {"target": target}
    short = []
    for name, runs in outcomes.items():
        reached = [run["reached"] for run in runs]
        best = statistics.median(max(run["accuracies"]) for run in runs)
        result[name] = {"reached": sum(reached), "best_accuracy": best}
        for figure in ("seconds", "steps", "samples"):
            result[name][figure] = statistics.median(run[figure] for run in runs) if all(reached) else None
        result[name]["seconds_per_step"] = statistics.median(run["seconds"] / run["steps"] for run in runs)
        for figure in ("peak_memory_bytes", "training_bytes"):
            result[name][figure] = max(run[figure] for run in runs)
        result[name] |= {f"{figure}_each": [run[figure] for run in runs] for figure in ("seconds", "steps")}
        if all("explained_variance" in run for run in runs):
            result[name]["explained_variance"] = statistics.median(run["explained_variance"] for run in runs)
        if not all(reached):
            most = max(run["steps"] for run in runs)
            short.append(f"{name} did so with {sum(reached)} of {len(runs)} seeds within {most} steps")
    ours, theirs = result["grpo"], result["ppo"]
    names = ("seconds", "steps", "samples", "seconds_per_step", "peak_memory_bytes", "training_bytes")
    ratios = {name: theirs[name] / ours[name] for name in names if ours[name] is not None and theirs[name] is not None}
    if short:
        conclusion = f"no comparison of time to {target:.0%}: " + "; ".join(short)
    else:
        conclusion = f"both reached {target:.0%} with every seed"
    return {**result, "ppo_over_grpo": ratios, "conclusion": conclusion}
