"""Every key of a recipe: its type, default, limits, unit and meaning; those of reinforcement learning stand in grpo.py.

The documentation of recipes is generated from the descriptions here. All models are frozen and refuse unknown keys. A
recipe holds settings only: what they resolve to on a machine (the dtype behind "auto", say) stands in the run folder.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from luciola.tasks import TaskConfig

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
        needs_stored_model(self.model)
        _needs_task(self.data, self.task)
        return self


def needs_stored_model(model: ModelSection) -> None:
    """Raises ValueError where a model of its own shape is given to what goes on with a stored one."""
    if model.path is None:
        raise ValueError("this kind of run starts from a stored model: give model.path instead of model.config")


def _needs_task(data: _DataSection, task: object) -> None:
    if data.source == "task" and task is None:
        raise ValueError("data.source = 'task' needs a [task] section, for example name = 'arithmetic'")
