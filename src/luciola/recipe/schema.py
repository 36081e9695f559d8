"""Every key of a recipe: its type, default, limits, unit and meaning.

The documentation of recipes is generated from the descriptions here. All models are frozen and refuse unknown keys. A
recipe holds settings only: what they resolve to on a machine (the dtype behind "auto", say) stands in the run folder.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from luciola.recipe.objective import NEEDS_GROUP, ObjectiveSection
from luciola.tasks import TaskConfig
from luciola.tasks.base import GradesSteps
from luciola.verify.style import Language

Dtype = Literal["auto", "float32", "bfloat16"]
Count = Annotated[int, Field(ge=1)]  # at least one
CountOrZero = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A table of a recipe: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+=-]*", name):
        raise ValueError("must be a folder's name of letters, digits and ._+=- that starts with none of .+=-")
    return name


class RunSection(Section):
    """Where the run is kept, and how often."""

    name: Annotated[str, AfterValidator(_folder_name)] = Field(
        description="name of the run: its folder below run.folder"
    )
    folder: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        "runs", description="folder of all runs, relative to where luciola is started"
    )
    checkpoint_every: CountOrZero = Field(50, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: Count = Field(2, description="newest checkpoints kept; older ones are deleted")
    tensorboard: bool = Field(False, description="also write TensorBoard event files (extra: tensorboard)")


class ModelSection(Section):
    """The model to start from: a fresh one of this shape, or a stored one."""

    config: dict[str, Any] | None = Field(None, description="shape of a new model, in Hugging Face's field names")
    path: str | None = Field(None, description="a stored model: Hugging Face folder, GGUF file, or run folder")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.config is None) == (self.path is None):
            raise ValueError("give exactly one of config (a new model) and path (a stored one)")
        return self


class TokenizerSection(Section):
    """The tokenizer of a new model."""

    kind: Literal["characters", "bpe", "path"] = Field(
        "characters", description="characters: one token each; bpe: trained on the data; path: read from a folder"
    )
    alphabet: str | None = Field(
        None, description="characters only: the characters; left out: those that the data uses"
    )
    vocab_size: Annotated[int, Field(ge=257)] | None = Field(
        None, description="bpe only: number of tokens, the 256 bytes and the special tokens included"
    )
    path: str | None = Field(None, description="path only: a folder with tokenizer.json")

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        needed = {"characters": None, "bpe": "vocab_size", "path": "path"}[self.kind]
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"kind = '{self.kind}' needs {needed}")
        for key, kind in (("alphabet", "characters"), ("vocab_size", "bpe"), ("path", "path")):
            if getattr(self, key) is not None and kind != self.kind:
                raise ValueError(f"{key} belongs to kind = '{kind}', not '{self.kind}'")
        return self


class _DataSection(Section):
    """What pre-training and fine-tuning data have in common."""

    source: Literal["task", "files"] = Field("task", description="task: written by the task; files: read from paths")
    paths: list[str] = Field([], description="files only: text, JSON-lines or Parquet files, or folders of them")
    error_rate: Share = Field(
        0.0, description="task only: probability that a step of a worked solution is wrong; RL can mend it"
    )
    sequence_length: Annotated[int, Field(ge=2)] = Field(128, description="tokens in a row")
    batch_size: Count = Field(128, description="rows in a batch; a step takes batch_size * accumulate rows")

    @model_validator(mode="after")
    def _fits_source(self) -> Self:
        if self.source == "files" and not self.paths:
            raise ValueError("source = 'files' needs paths")
        if self.source == "task" and self.paths:
            raise ValueError("paths belongs to source = 'files', not 'task'")
        return self


class PretrainDataSection(_DataSection):
    """The text of pre-training."""

    field: str = Field("text", description="files only: the field of a JSON record that holds the text")
    packing: Literal["pad", "stream", "segments"] = Field(
        "pad",
        description="pad: one document a row; stream: documents end to end; segments: the same without attention "
        "across their borders",
    )


class SftDataSection(_DataSection):
    """The conversations of supervised fine-tuning; the loss is on the assistant's tokens only."""

    messages_field: str = Field("messages", description="files only: the field with a list of role/content messages")
    prompt_field: str | None = Field(None, description="files only: the user's turn, instead of messages_field")
    completion_field: str | None = Field(None, description="files only: the assistant's turn; goes with prompt_field")
    packing: Literal["pad", "segments"] = Field(
        "pad", description="pad: one conversation a row; segments: several, without attention across their borders"
    )

    @model_validator(mode="after")
    def _fields_in_pairs(self) -> Self:
        if (self.prompt_field is None) != (self.completion_field is None):
            raise ValueError("prompt_field and completion_field go together: give both or neither")
        return self


class OptimSection(Section):
    """AdamW with decoupled weight decay, and its learning-rate schedule."""

    lr: Positive = Field(1e-3, description="peak learning rate")
    weight_decay: Amount = Field(0.1, description="decoupled weight decay of matrices; norms and biases have none")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="decay of the first and second moment"
    )
    eps: Positive = Field(1e-8, description="added to the root of the second moment")
    clip_grad_norm: Amount = Field(1.0, description="largest global gradient norm; 0: no clipping")
    schedule: Literal["constant", "cosine", "multi-step", "wsd", "linear"] = Field(
        "constant",
        description="after the warm-up: constant; cosine or linear down to lr * final_lr_ratio; multi-step: jumps at "
        "80 % and 90 % of the steps (DeepSeek LLM, section 2.3); wsd: stable, then falling over the last fifth",
    )
    warmup_steps: CountOrZero = Field(0, description="steps of linear rise from 0 to lr")
    final_lr_ratio: Share = Field(0.1, description="last learning rate as a share of lr; not used by constant")


class FineTuningOptimSection(OptimSection):
    """The same for a model that has learnt already, which the large steps of pre-training would undo."""

    lr: Positive = Field(1e-5, description="peak learning rate; models of a few million parameters bear 3e-4")


class LoraSection(Section):
    """Low-rank adaptation: only a thin addition to each matrix is trained (Hu et al., 2021)."""

    rank: Count = Field(16, description="inner width of each addition B A")
    alpha: Positive = Field(32.0, description="B A is multiplied by alpha / rank")
    rslora: bool = Field(False, description="by alpha / sqrt(rank) instead (rsLoRA), for high ranks")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the inputs of A set to 0 in training; 0 in RL, where it would be another policy"
    )
    target_modules: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="names such as 'q_proj'; left out: all linear layers of attention, MLP and shared experts"
    )


class _TrainingSettings(Section):
    """What every way of training by next-token prediction sets at the top of its recipe."""

    steps: Count = Field(description="optimiser steps")
    accumulate: Count = Field(1, description="batches whose gradients are added up before a step")
    dtype: Dtype = Field("auto", description="of the arithmetic (weights stay float32); auto: the faster here")
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, a third slower"
    )
    mtp_weight: Amount = Field(0.3, description="weight of the multi-token prediction loss (V3 report, section 2.2)")
    bias_update_speed: Amount = Field(
        0.001, description="step of the expert biases that balance the load (V3 report, section 2.1.2); 0: fixed"
    )
    balance_loss: Amount = Field(0.0001, description="weight of the sequence-wise balance loss (V3 report, eq. 17)")
    device_balance_loss: Amount = Field(
        0.0,
        description="weight of the device-level balance loss (V2 paper, eq. 26); each of n_group groups is a device",
    )
    communication_balance_loss: Amount = Field(
        0.0, description="weight of the communication balance loss (V2 paper, eq. 29), with at most topk_group devices"
    )


class Pretraining(_TrainingSettings):
    """Pre-training without its surroundings: the [base] of a GRPO recipe, which inherits run, task and seed."""

    model: ModelSection = Field(description="the model to train")
    tokenizer: TokenizerSection | None = Field(None, description="of a new model; a stored one brings its own")
    data: PretrainDataSection = Field(PretrainDataSection(), description="the text")
    optim: OptimSection = Field(OptimSection(), description="optimiser")

    @model_validator(mode="after")
    def _tokenizer_known(self) -> Self:
        if self.model.config is not None and self.tokenizer is None:
            raise ValueError("a new model (model.config) needs a [tokenizer] section, for example kind = 'characters'")
        if self.model.path is not None and self.tokenizer is not None:
            raise ValueError("a stored model (model.path) brings its own tokenizer: leave the [tokenizer] section out")
        return self


class PretrainRecipe(Pretraining):
    """`luciola pretrain`: next-token prediction on a task's texts or on files."""

    kind: ClassVar[str] = "pretrain"

    seed: int = Field(0, ge=0, description="seed of the weights, the data's order and everything random")
    run: RunSection = Field(description="where the run is kept")
    task: TaskConfig | None = Field(None, description="the task that writes it, when data.source = 'task'")

    @model_validator(mode="after")
    def _task_given(self) -> Self:
        _needs_task(self.data, self.task)
        return self


class SftRecipe(_TrainingSettings):
    """`luciola sft`: supervised fine-tuning of a stored model on conversations."""

    kind: ClassVar[str] = "sft"

    seed: int = Field(0, ge=0, description="seed of the data's order and everything random")
    run: RunSection = Field(description="where the run is kept")
    task: TaskConfig | None = Field(None, description="the task that writes them, when data.source = 'task'")
    model: ModelSection = Field(description="the model to fine-tune (model.path)")
    data: SftDataSection = Field(SftDataSection(), description="the conversations")
    lora: LoraSection | None = Field(None, description="train adapters; left out: all weights")
    optim: FineTuningOptimSection = Field(FineTuningOptimSection(), description="optimiser")

    @model_validator(mode="after")
    def _stored_model(self) -> Self:
        _needs_stored_model(self.model)
        _needs_task(self.data, self.task)
        return self


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
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", name):
        raise ValueError("must name a function as module:function")
    return name


class RewardSection(Section):
    """What a completion earns: a weighted sum of parts, each logged under its name. With objective.supervision =
    'process' its steps earn instead: accuracy and format are then logged and teach nothing, the others are refused."""

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
            _needs_stored_model(self.model)
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

    def base_recipe(self) -> PretrainRecipe:
        """The pre-training of [base] as a recipe of its own, kept in the folder `base` inside this run's."""
        assert self.base is not None
        run = self.run.model_copy(update={"name": "base", "folder": f"{self.run.folder}/{self.run.name}"})
        return PretrainRecipe(seed=self.seed, run=run, task=self.task, **dict(self.base))


def _needs_stored_model(model: ModelSection) -> None:
    if model.path is None:
        raise ValueError("this kind of run starts from a stored model: give model.path instead of model.config")


def _needs_task(data: _DataSection, task: object) -> None:
    if data.source == "task" and task is None:
        raise ValueError("data.source = 'task' needs a [task] section, for example name = 'arithmetic'")
