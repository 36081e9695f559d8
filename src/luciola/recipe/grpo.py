"""Keys of a `luciola grpo` recipe beside those that all recipes share (schema.py) and its objective (objective.py)."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from luciola.recipe.objective import IMITATION, NEEDS_GROUP, ObjectiveSection
from luciola.recipe.schema import (
    Amount,
    Count,
    CountOrZero,
    Dtype,
    FineTuningOptimSection,
    LoraSection,
    ModelSection,
    Positive,
    Pretraining,
    PretrainRecipe,
    RunSection,
    Section,
    Share,
    needs_stored_model,
)
from luciola.tasks import TaskConfig
from luciola.tasks.base import GradesSteps
from luciola.verify.style import Language


class RolloutSection(Section):
    """The completions sampled in each step."""

    prompts: Count = Field(16, description="prompts a step")
    group_size: Count = Field(
        16, description="completions a prompt; at least 2 where the advantage compares a completion with its group"
    )
    max_tokens: Count = Field(256, description="longest completion, in tokens; leave room for the longest right answer")
    temperature: Positive = Field(1.0, description="sampling temperature")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus sampling; 1: off")
    top_k: CountOrZero = Field(0, description="sample among this many likeliest tokens; 0: off")


class GrpoSection(Section):
    """The steps of reinforcement learning (DeepSeekMath, section 4.1; R1, section 2.2.1)."""

    steps: Count = Field(50, description="rollouts, each followed by its updates")
    updates_per_rollout: Count = Field(1, description="optimiser steps on a rollout, on a share of its groups each")
    epochs: Count = Field(1, description="passes over a rollout")
    reference_refresh: CountOrZero = Field(0, description="steps until the policy becomes the reference; 0: never")
    replay: Share = Field(0.0, description="groups of earlier rollouts added to a step, as a share of rollout.prompts")
    replay_routes: bool = Field(True, description="the update uses the experts that the rollout chose")
    micro_batch_tokens: Count = Field(8192, description="tokens, padding included, in one forward and backward pass")


def _function_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", name) or ".py:" in name:
        raise ValueError("must name a function as module:function, a file without its folder and .py")
    return name


class RewardSection(Section):
    """What a completion earns: a weighted sum of parts, each logged under its name. With objective.supervision =
    'process' its steps earn instead, and with rft and dpo verdicts alone teach: accuracy and format are then only
    logged, the others are refused."""

    accuracy: Amount = Field(1.0, description="weight of a right answer")
    format: Amount = Field(0.1, description="weight of the form <think>...</think><answer>...</answer>")
    length: Amount = Field(
        0.0, description="weight of brevity within a group, from 0.5 to -0.5; a wrong answer never earns by it"
    )
    repetition: Amount = Field(0.0, description="weight of minus the share of three-word sequences that are repeats")
    language: Amount = Field(0.0, description="weight of the share of the thinking's words in target_language")
    target_language: Language = Field("en", description="en: words in Latin letters; zh: Han characters")
    own: dict[Annotated[str, AfterValidator(_function_name)], Annotated[float, Field(allow_inf_nan=False)]] = Field(
        {}, description='weight of each function (prompt, completion, truth) -> number: "module:function" = 0.5'
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        weights = (self.accuracy, self.format, self.length, self.repetition, self.language, *self.own.values())
        if not any(weights):
            raise ValueError("all weights are 0, so that nothing would be learnt; raise accuracy, format or another")
        return self


class CriticSection(Section):
    """PPO's value model, as large as the policy and begun from its weights, with an optimiser of its own."""

    gamma: Share = Field(1.0, description="discount of a reward, per token that it lies ahead")
    lam: Share = Field(
        0.95,
        description="lambda of the generalised advantage estimate: 1: rewards alone, less the value; 0: the next "
        "token's value instead of all that follows",
    )
    value_clip: Amount = Field(
        0.2, description="a value may leave that of the rollout by this much before its loss ends to reward it; 0: any"
    )
    warmup_steps: CountOrZero = Field(0, description="first steps in which the critic learns alone, the policy stays")
    optim: FineTuningOptimSection = Field(FineTuningOptimSection(), description="the critic's optimiser")


class EvaluateSection(Section):
    """The held-out evaluation before and after a run, and during it."""

    every: CountOrZero = Field(0, description="steps between evaluations during the run; 0: before and after only")
    problems: Count = Field(256, description="held-out problems")
    samples: CountOrZero = Field(8, description="completions a problem: the k of pass@k and maj@k; 0: greedy only")
    temperature: Amount = Field(0.6, description="sampling temperature; 0: greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(0.95, description="nucleus sampling")


class GrpoRecipe(Section):
    """`luciola grpo`: reinforcement learning from verifiable rewards, of a stored model or of one pre-trained first."""

    kind: ClassVar[str] = "grpo"

    seed: int = Field(0, ge=0, description="seed of the weights, the problems and everything random")
    dtype: Dtype = Field("auto", description="of the arithmetic (weights stay float32); auto: the faster here")
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, a third slower"
    )
    run: RunSection = Field(description="where the run is kept")
    task: TaskConfig = Field(description="the problems and their verifier")
    base: Pretraining | None = Field(None, description="pre-train the model first; inherits seed, run and task")
    model: ModelSection | None = Field(None, description="the model to start from (model.path)")
    rollout: RolloutSection = Field(RolloutSection(), description="sampling")
    grpo: GrpoSection = Field(GrpoSection(), description="the steps")
    objective: ObjectiveSection = Field(ObjectiveSection(), description="what they maximise")
    reward: RewardSection = Field(RewardSection(), description="rewards")
    lora: LoraSection | None = Field(None, description="train adapters; left out: all weights")
    optim: FineTuningOptimSection = Field(FineTuningOptimSection(), description="optimiser")
    evaluate: EvaluateSection = Field(EvaluateSection(), description="held-out evaluation")
    critic: CriticSection | None = Field(
        None,
        validate_default=True,
        description="the value model of objective.advantage = 'critic' (PPO), which alone has one",
    )

    @field_validator("critic", mode="after")
    @classmethod
    def _critic_where_there_is_one(cls, critic: CriticSection | None, others: ValidationInfo) -> CriticSection | None:
        objective = others.data.get("objective")
        if objective is None:
            return critic  # its own check says what is wrong
        if objective.advantage == "critic":
            return critic or CriticSection()
        if critic is not None:
            raise ValueError(
                f"belongs to objective.advantage = 'critic', not '{objective.advantage}': set objective.name = 'ppo', "
                "or leave the [critic] section out"
            )
        return None

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.base is None) == (self.model is None):
            raise ValueError("give exactly one of model.path (a stored model) and [base] (pre-train one first)")
        if self.model is not None:
            needs_stored_model(self.model)
        return self

    @model_validator(mode="after")
    def _one_policy(self) -> Self:
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout = {self.lora.dropout:g} would update another policy than the one that sampled; set it "
                "to 0 (it is for fine-tuning)"
            )
        return self

    @model_validator(mode="after")
    def _updates_share_the_prompts(self) -> Self:
        prompts, updates = self.rollout.prompts, self.grpo.updates_per_rollout
        if prompts % updates:
            raise ValueError(
                f"grpo.updates_per_rollout = {updates} must divide rollout.prompts = {prompts} (whole groups)"
            )
        return self

    @model_validator(mode="after")
    def _objective_has_what_it_needs(self) -> Self:
        rollout, objective = self.rollout, self.objective
        if rollout.group_size < 2 and objective.advantage in NEEDS_GROUP:
            raise ValueError(
                f"rollout.group_size = {rollout.group_size} must be at least 2: objective.advantage = "
                f"'{objective.advantage}' compares a completion with its group"
            )
        if self.grpo.reference_refresh and objective.beta == 0:
            raise ValueError(
                "grpo.reference_refresh needs a reference, which objective.beta = 0 does without; raise it"
            )
        if objective.keep_sampling_mask and rollout.top_p == 1 and rollout.top_k == 0:
            raise ValueError(
                "objective.keep_sampling_mask has nothing to keep where rollout.top_p = 1 and top_k = 0 leave every "
                "token; lower one of them, or leave it out"
            )
        if objective.supervision == "process" and not isinstance(self.task, GradesSteps):
            raise ValueError(
                f"objective.supervision = 'process' needs a task that grades steps, which '{self.task.name}' does not; "
                "choose task.name = 'arithmetic', or 'outcome'"
            )
        ignored = [name for name in ("length", "repetition", "language") if getattr(self.reward, name)]
        ignored += ["own"] if any(self.reward.own.values()) else []
        if objective.supervision == "process" and ignored:
            raise ValueError(
                f"reward.{ignored[0]} would be ignored: objective.supervision = 'process' learns from the rewards of "
                "steps alone; leave it out, or choose 'outcome'"
            )
        if objective.advantage in IMITATION and ignored:
            raise ValueError(
                f"reward.{ignored[0]} would be ignored: objective.advantage = '{objective.advantage}' learns from "
                f"{IMITATION[objective.advantage]}; leave it out, or choose another objective.name"
            )
        if self.critic is not None and self.lora is not None:
            raise ValueError(
                "[lora] trains adapters of one model, and PPO's critic is a second one that is trained in full: leave "
                "[lora] out, or choose another objective.name"
            )
        if self.critic is not None and self.grpo.replay:
            raise ValueError(
                f"grpo.replay = {self.grpo.replay} brings back advantages of a critic that has learnt since: leave it "
                "out with objective.advantage = 'critic' (PPO)"
            )
        if self.critic is not None and self.critic.warmup_steps >= self.grpo.steps:
            raise ValueError(
                f"critic.warmup_steps = {self.critic.warmup_steps} must be less than grpo.steps = {self.grpo.steps}: "
                "the policy would never learn"
            )
        if objective.importance_cap and not self.grpo.replay:
            raise ValueError(
                "objective.importance_cap weighs replayed groups, and grpo.replay = 0 has none; raise it, or leave the "
                "cap out"
            )
        return self

    @property
    def learns_from_verdicts(self) -> bool:
        """Whether what the task's verifier says teaches anything, or is only logged."""
        return bool(self.reward.accuracy or self.reward.length) or self.objective.advantage in IMITATION

    def base_recipe(self) -> PretrainRecipe:
        """The pre-training of [base] as a recipe of its own, kept in the folder `base` inside this run's."""
        assert self.base is not None
        run = self.run.model_copy(update={"name": "base", "folder": f"{self.run.folder}/{self.run.name}"})
        return PretrainRecipe(seed=self.seed, run=run, task=self.task, **dict(self.base))
