"""`luciola sft`: supervised fine-tuning of a stored model or of adapters; the loss is on what the assistant says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from luciola.data.documents import Conversations, Documents, TaskDocuments
from luciola.model.language_model import load
from luciola.model.lora import Lora
from luciola.recipe import SftRecipe
from luciola.run import Run
from luciola.text.tokenizer import Tokenizer
from luciola.train.loop import fit
from luciola.train.pretrain import check_length, estimate, finish, training_rows
from luciola.weights.opening import full_name


def sft(recipe: SftRecipe, resume: bool = False) -> Path:
    """Run the recipe; returns the run folder, whose `model/` holds the model in Hugging Face layout, or its adapters in
    peft's."""
    began = time.perf_counter()
    with Run.create(recipe, "sft", resume) as run:
        if run.finished:
            return run.path
        assert recipe.model.path is not None  # the recipe's own check
        lm = load(recipe.model.path)
        check_length(lm.config, recipe)
        lm.model.to(getattr(torch, run.dtype))
        lora = None
        if recipe.lora is not None:
            lora = Lora(lm.model, recipe.lora, recipe.seed, full_name(recipe.model.path))
        rows = training_rows(recipe, conversations(recipe, lm.tokenizer))
        earlier = fit(lm.model, rows, recipe, run, "fine-tuning", lora)
        finish(run, lm, earlier + time.perf_counter() - began, lora)
    return run.path


def conversations(recipe: SftRecipe, tokenizer: Tokenizer | None) -> Documents:
    """The conversations of the recipe's [data] section, rendered for the model."""
    if tokenizer is None:
        raise ValueError(f"the model {recipe.model.path} has no tokenizer, so no conversation can be rendered for it")
    data = recipe.data
    if data.source == "files":
        return Conversations(data.paths, tokenizer, data.messages_field, data.prompt_field, data.completion_field)
    assert recipe.task is not None  # the recipe's own check
    return TaskDocuments(recipe.task, tokenizer, recipe.seed, data.error_rate, completion_only=True)


def describe(recipe: SftRecipe) -> dict[str, Any]:
    """What a run would take, without starting it (see `luciola.train.pretrain.describe`)."""
    assert recipe.model.path is not None  # the recipe's own check
    lm = load(recipe.model.path)
    conversations(recipe, lm.tokenizer)  # says now what is wrong with the data
    return estimate(lm.model, lm.config, recipe)
