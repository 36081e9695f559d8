"""`luciola grpo`: reinforcement learning with rule-based rewards only, as R1-Zero was trained, whatever the objective.

A step is a rollout (prompts x group_size completions), its verdicts, and one or more updates. The run starts from a
stored model, or from a base that it pre-trains first.
"""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from luciola import hardware
from luciola.engine.engine import Engine
from luciola.engine.sampler import NotFiniteError
from luciola.evaluate.run import Evaluation, evaluate
from luciola.model.config import ModelConfig
from luciola.model.flops import forward_flops
from luciola.model.language_model import LanguageModel, load
from luciola.model.lora import Lora
from luciola.model.transformer import Transformer
from luciola.recipe import GrpoRecipe
from luciola.rl.ppo import Critic
from luciola.rl.replay import Replay
from luciola.rl.rollout import Rollout, rollout
from luciola.rl.update import update
from luciola.run import Run, atomic_write
from luciola.tasks.base import encoded
from luciola.text.tokenizer import Tokenizer
from luciola.train import pretrain as pretraining
from luciola.train import state
from luciola.train.optim import Optimizer
from luciola.train.schedule import learning_rate
from luciola.train.stopping import Diverged, stop_on_signal
from luciola.verify import own
from luciola.weights.opening import full_name


def grpo(recipe: GrpoRecipe, resume: bool = False) -> Path:
    """Run the recipe; returns the run folder, whose `model/` holds the result and `summary.json` the final table."""
    with Run.create(recipe, "grpo", resume) as run:
        if run.finished:
            return run.path
        trainer = trainer_of(recipe, run)
        before = trainer.before()
        trainer.fit()
        pretraining.save_model(run, trainer.lm, trainer.lora)
        after = trainer.evaluate()
        _write_held_out(run, before, after)
        run.summary(_table(recipe, run, before["figures"], after.figures, trainer.seconds()))
        run.plot()
    return run.path


def trainer_of(recipe: GrpoRecipe, run: Run) -> _Trainer:
    """The trainer where the run's newest checkpoint left it, or at its start."""
    check_own(recipe)  # before an hour of pre-training, not after it
    lm = starting_model(recipe, run)
    if recipe.rollout.max_tokens >= lm.config.max_position_embeddings:
        raise ValueError(
            f"rollout.max_tokens = {recipe.rollout.max_tokens} does not fit into the model's context of "
            f"{lm.config.max_position_embeddings} tokens beside a prompt; lower it"
        )
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"the model {recipe.model.path if recipe.model else run.path} has no tokenizer to write prompts with"
        )
    lm.model.to(getattr(torch, run.dtype))
    return _Trainer(recipe, run, lm, tokenizer)


def check_own(recipe: GrpoRecipe) -> None:
    """Raise ValueError unless every reward function of one's own is there."""
    for name in recipe.reward.own:
        own.check(name)


def _table(
    recipe: GrpoRecipe, run: Run, before: dict[str, Any], after: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Both evaluations with what was spent to get there (tokens trained on or sampled, seconds), and all `seconds`."""
    logged = run.metrics()
    spent = sum(m[f"seconds/{part}"] for m in logged for part in ("rollout", "verify", "update"))
    after = {**after, "training_tokens": sum(m["tokens"] for m in logged), "training_seconds": round(spent, 1)}
    if recipe.base is not None:
        base = json.loads((_base_folder(recipe) / "summary.json").read_text())
        before = {**before, "training_tokens": base["tokens"], "training_seconds": base["seconds"]}
        seconds += base["seconds"]
    return {"before": before, "after": after, "seconds": round(seconds, 1)}


def _write_held_out(run: Run, before: dict[str, Any], after: Evaluation) -> None:
    """`heldout.jsonl`: every held-out problem with the greedy completion before and after, to be read side by side."""
    rows = [
        {"prompt": row.problem.prompt, "truth": row.problem.truth, "before": old, "after": new}
        for row, old, new in zip(after.judged, before["greedy"], _greedy(after), strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write(run.path / "heldout.jsonl", lines)


def _greedy(evaluation: Evaluation) -> list[dict[str, str]]:
    return [{"completion": row.greedy.text, "verdict": row.greedy.verdict.kind} for row in evaluation.judged]


def _base_folder(recipe: GrpoRecipe) -> Path:
    section = recipe.base_recipe().run
    return Path(section.folder, section.name)


def _base_name(recipe: GrpoRecipe) -> str:
    """The model that adapters belong to."""
    if recipe.base is not None:
        return full_name(str(_base_folder(recipe)))
    assert recipe.model is not None and recipe.model.path is not None  # the recipe's own check
    return full_name(recipe.model.path)


def starting_model(recipe: GrpoRecipe, run: Run) -> LanguageModel:
    """The model RL starts from; a base named by the recipe is pre-trained in `base/` unless that is finished
    already."""
    if recipe.base is None:
        assert recipe.model is not None and recipe.model.path is not None  # the recipe's own check
        return load(recipe.model.path)
    folder = _base_folder(recipe)
    if not (folder / "summary.json").exists():
        pretraining.pretrain(recipe.base_recipe(), resume=True)
    return load(folder)


class _Trainer:
    """The state of a GRPO run between its steps."""

    def __init__(self, recipe: GrpoRecipe, run: Run, lm: LanguageModel, tokenizer: Tokenizer) -> None:
        hardware.keep_freed_memory()
        self.recipe, self.run, self.lm, self.tokenizer = recipe, run, lm, tokenizer
        self.model: Transformer = lm.model
        self.model.activation_checkpointing = recipe.activation_checkpointing
        self.lora: Lora | None = None
        if recipe.lora is not None:
            self.lora = Lora(self.model, recipe.lora, recipe.seed, _base_name(recipe))
        self.optimizer = Optimizer(self.model, recipe.optim, self.lora)
        self.critic = None if recipe.critic is None else Critic(self.model, recipe)
        self.engine = Engine(lm, dtype="model")
        self.reference: Transformer | None = None
        self.reference_lora = {} if self.lora is None else self.lora.state()
        if recipe.objective.beta:
            self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.replay = Replay(recipe.grpo.replay, recipe.rollout.prompts) if recipe.grpo.replay else None
        restored = state.restore(run, self.model, self.optimizer)
        self.start, self.facts = restored.step, restored.facts
        self._began: float = time.perf_counter() - self.facts.get("seconds", 0.0)
        if self.reference is not None and "reference" in restored.extra:
            self._restore_reference(restored.extra["reference"])
        if self.critic is not None and "critic" in restored.extra:
            self.critic.restore(restored.extra["critic"])
        if self.replay is not None and "replay" in restored.extra:
            self.replay.restore(restored.extra["replay"])

    def _restore_reference(self, saved: dict[str, torch.Tensor]) -> None:
        assert self.reference is not None
        if self.lora is None:
            self.reference.load_state_dict(saved)
        else:
            self.reference_lora = saved
            self.lora.merge_into(saved, dict(self.reference.named_modules()))

    def before(self) -> dict[str, Any]:
        """The held-out `figures` and `greedy` completions of the model as it came; measured once, kept with the run."""
        kept = self.run.path / "before.json"
        if kept.exists():
            result: dict[str, Any] = json.loads(kept.read_text())
            return result
        assert self.start == 0, "a checkpoint without the evaluation that precedes it"
        measured = self.evaluate()
        result = {"figures": measured.figures, "greedy": _greedy(measured)}
        atomic_write(kept, json.dumps(result, indent=2) + "\n")
        return result

    def evaluate(self) -> Evaluation:
        """The held-out evaluation of the model as it is now."""
        section = self.recipe.evaluate
        return evaluate(
            self.lm,
            self.recipe.task,
            problems=section.problems,
            samples=section.samples,
            temperature=section.temperature,
            top_p=section.top_p,
            max_tokens=self.recipe.rollout.max_tokens,
            seed=self.recipe.seed,
            engine=self.engine,
        )

    def fit(self) -> None:
        """All remaining steps."""
        recipe, run, steps = self.recipe, self.run, self.recipe.grpo.steps
        with stop_on_signal() as stop, run.progress(steps, "GRPO", self.start) as advance:
            for step in range(self.start, steps):
                metrics = self.step(step)
                done = step + 1
                if recipe.evaluate.every and done % recipe.evaluate.every == 0 and done < steps:
                    figures = self.evaluate().figures
                    wanted = ("accuracy", "format_rate", "mean_length")  # programs have no format rate
                    metrics |= {f"evaluate/{name}": figures[name] for name in wanted if name in figures}
                run.log(done, metrics)
                every, stopping = recipe.run.checkpoint_every, stop.requested  # asked once: who stops has saved
                if done == steps or stopping or (every and done % every == 0):
                    self.save(done)
                right = metrics["verdict/correct"] / (recipe.rollout.prompts * recipe.rollout.group_size)
                advance(f"right {right:.0%}  reward {metrics['reward/mean']:.3f}")
                if stopping and done < steps:
                    raise KeyboardInterrupt

    def step(self, step: int) -> dict[str, Any]:
        """One rollout and its updates; returns the step's metrics."""
        recipe = self.recipe
        began = time.perf_counter()
        sampled = self.sample(step)
        updating = time.perf_counter()
        lr = learning_rate(recipe.optim, step, recipe.grpo.steps)
        metrics = update(
            self.model, self.optimizer, self.reference, sampled, recipe, step, lr, self.replay, self.critic
        )
        ended = time.perf_counter()
        # The critic first: its values spoil the policy's loss, and not the other way round.
        for name in ("critic/loss", "critic/grad_norm", "loss", "grad_norm"):
            if not math.isfinite(metrics.get(name, 0.0)):
                raise Diverged(name, metrics[name], step + 1, state.last_checkpoint(self.run))
        self.run.samples(step + 1, sampled.samples())
        tokens = sum(len(c.token_ids) for group in sampled.completions for c in group)
        return {
            **metrics,
            **sampled.metrics(),
            "tokens": tokens,
            "tokens_per_second": tokens / (ended - began),
            "seconds/rollout": sampled.seconds_sampling,
            "seconds/verify": sampled.seconds_verifying,
            "seconds/update": ended - updating,
            "memory/peak_bytes": hardware.peak_memory_bytes(),
        }

    def sample(self, step: int) -> Rollout:
        """The rollout of a step, before which the reference is refreshed where that is due."""
        refresh = self.recipe.grpo.reference_refresh
        if self.reference is not None and refresh and step > 0 and step % refresh == 0:
            self.reference.load_state_dict(self.model.state_dict())
            self.reference_lora = {} if self.lora is None else self.lora.state()
        try:
            return rollout(self.engine, self.tokenizer, self.recipe, step)
        except NotFiniteError as error:
            raise Diverged("a logit", math.nan, step + 1, state.last_checkpoint(self.run)) from error

    def seconds(self) -> float:
        """Time spent on the run so far, in earlier processes (up to their last checkpoint) and in this one."""
        return time.perf_counter() - self._began

    def save(self, done: int) -> None:
        """A checkpoint after `done` steps."""
        extra = {}
        if self.reference is not None:
            extra["reference"] = _untied(self.reference) if self.lora is None else self.reference_lora
        if self.critic is not None:
            extra["critic"] = self.critic.state()
        if self.replay is not None:
            extra["replay"] = self.replay.state()
        state.save(self.run, done, self.model, self.optimizer, facts={"seconds": self.seconds()}, extra=extra)


def _untied(model: Transformer) -> dict[str, torch.Tensor]:
    """The model's tensors, each with memory of its own (a tied head shares the embedding's)."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def describe(recipe: GrpoRecipe) -> dict[str, Any]:
    """What a run would take, without starting it; base and RL together. See `luciola.train.pretrain.describe`.

    Raises:
        ValueError: what would stop the run at its beginning: a model or a reward function that is not there.
    """
    check_own(recipe)
    if recipe.base is not None:
        base = pretraining.describe(recipe.base_recipe())
        tokenizer = pretraining.make_tokenizer(recipe.base_recipe())
        config = pretraining.model_config(recipe.base_recipe(), tokenizer)
        with torch.device("meta"):
            model = Transformer(config)
    else:
        assert recipe.model is not None and recipe.model.path is not None  # the recipe's own check
        lm = load(recipe.model.path)
        base, model, config = {"tokens": 0, "seconds": 0.0, "memory_bytes": 0}, lm.model, lm.config
        tokenizer = lm.tokenizer  # type: ignore[assignment]
    rl = estimate(model, config, tokenizer, recipe)
    return rl | {
        "tokens": base["tokens"] + rl["tokens"],
        "memory_bytes": max(base["memory_bytes"], rl["memory_bytes"]),
        "seconds": base["seconds"] + rl["seconds"],
    }


def estimate(model: Transformer, config: ModelConfig, tokenizer: Tokenizer, recipe: GrpoRecipe) -> dict[str, Any]:
    """The figures of `describe` for RL alone, of a model that is there (or on the meta device)."""
    dtype, reason = hardware.choose_dtype(recipe.dtype)
    settings = recipe.rollout
    prompt = len(encoded(tokenizer, recipe.task, recipe.task.problem("train", 0, recipe.seed)))
    length = prompt + settings.max_tokens
    sequences = settings.prompts * settings.group_size
    # At the most: completions may end early. Rollout and update read a prompt once for its whole group.
    tokens = recipe.grpo.steps * settings.prompts * (prompt + settings.group_size * settings.max_tokens)
    # A forward pass to sample, three (forward and backward) to learn, one more for a reference.
    passes = 1 + recipe.grpo.epochs * (3 + (recipe.objective.beta > 0))
    if recipe.critic is not None:  # another model to train, which first assesses the rollout
        passes += 1 + recipe.grpo.epochs * 3
    peak = hardware.gemm_peak(dtype)
    stored = sum(p.numel() for p in model.parameters())
    states, trained = pretraining.state_bytes(model, dtype, recipe.lora)
    others = stored * (4 * (recipe.objective.beta > 0) + 16 * (recipe.critic is not None))
    cache = sequences * length * config.cached_per_token_and_layer * config.num_hidden_layers * 4
    slots = min(recipe.grpo.micro_batch_tokens, sequences * length)
    activations = slots * pretraining.activation_bytes(config, recipe.activation_checkpointing)
    return {
        "parameters": stored,
        **({"trained_parameters": trained} if recipe.lora is not None else {}),
        "active_parameters": model.num_parameters(active=True),
        "tokens": tokens,
        "dtype": f"{dtype} ({reason})",
        "memory_bytes": pretraining.PROGRAM_BYTES + int(states + others + cache + activations),
        "seconds": tokens * passes * forward_flops(model, length) / (peak / 3),
    }
