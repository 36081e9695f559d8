"""What a pipeline would take, stage by stage, without starting it: the trainers' own estimates."""

from __future__ import annotations

from typing import Any

import torch

from luciola import hardware
from luciola.model.config import ModelConfig
from luciola.model.flops import forward_flops
from luciola.model.language_model import load
from luciola.model.transformer import Transformer
from luciola.recipe import GrpoRecipe, PipelineRecipe, PretrainRecipe, RejectionRecipe, SftRecipe
from luciola.recipe.pipeline import Stage
from luciola.rl import grpo
from luciola.text.tokenizer import Tokenizer
from luciola.train import pretrain

Shape = tuple[Transformer, ModelConfig, Tokenizer]  # of a model that need not be there yet


def describe(recipe: PipelineRecipe, stages: list[Stage]) -> list[tuple[Stage, dict[str, Any]]]:
    """Every stage with `parameters`, `tokens` and `seconds` (see `luciola.train.pretrain.describe`).

    Where a stored model or a data file is not on this machine, `tokens` as far as they follow from the recipe alone,
    and `missing`, a sentence.

    Raises:
        ValueError: there is no such reward function as a stage's recipe names.
    """
    shapes: dict[str, Shape | str] = {}
    for name, stored in (("base", recipe.model), ("student_base", recipe.student_model)):
        if stored is not None and stored.path is not None:
            shapes[name] = _stored(stored.path)
    found = []
    for stage in stages:
        if isinstance(stage.recipe, GrpoRecipe):
            grpo.check_own(stage.recipe)
        if isinstance(stage.recipe, PretrainRecipe):
            shapes[stage.name] = _new(stage.recipe)
        else:
            assert stage.start is not None  # the plan's own check
            shapes[stage.name] = shapes[stage.start]
        found.append((stage, _figures(stage, shapes[stage.name])))
    return found


def _figures(stage: Stage, shape: Shape | str) -> dict[str, Any]:
    if isinstance(shape, str):
        return {"tokens": _tokens(stage), "missing": shape}
    model, config, tokenizer = shape
    try:
        match stage.recipe:
            case PretrainRecipe() | SftRecipe():
                return pretrain.estimate(model, config, stage.recipe)
            case GrpoRecipe():
                return grpo.estimate(model, config, tokenizer, stage.recipe)
            case RejectionRecipe():
                return _sampling(model, tokenizer, stage.recipe)
    except ValueError as error:
        return {"tokens": _tokens(stage), "missing": str(error)}


def _sampling(model: Transformer, tokenizer: Tokenizer, recipe: RejectionRecipe) -> dict[str, Any]:
    """The figures of rejection sampling: a forward pass a token, at the most (completions may end early)."""
    settings = recipe.rollout
    prompt = len(tokenizer.chat(recipe.task.messages(recipe.task.problem("train", 0, recipe.seed))))
    tokens = recipe.steps * settings.prompts * (prompt + settings.group_size * settings.max_tokens)
    dtype, _ = hardware.choose_dtype(recipe.dtype)
    flops = tokens * forward_flops(model, prompt + settings.max_tokens)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
        "seconds": flops / (hardware.gemm_peak(dtype) / 3),
    }


def _tokens(stage: Stage) -> int:
    """The most tokens that a stage's recipe allows, prompts of rollouts not counted."""
    recipe = stage.recipe
    if isinstance(recipe, PretrainRecipe | SftRecipe):
        return recipe.steps * recipe.accumulate * recipe.data.batch_size * recipe.data.sequence_length
    steps = recipe.grpo.steps if isinstance(recipe, GrpoRecipe) else recipe.steps
    return steps * recipe.rollout.prompts * recipe.rollout.group_size * recipe.rollout.max_tokens


def _new(recipe: PretrainRecipe) -> Shape | str:
    if recipe.model.path is not None:
        return _stored(recipe.model.path)
    tokenizer = pretrain.make_tokenizer(recipe)
    config = pretrain.model_config(recipe, tokenizer)
    with torch.device("meta"):
        return Transformer(config), config, tokenizer


def _stored(path: str) -> Shape | str:
    try:
        lm = load(path)
    except ValueError as error:
        return str(error)
    return f"{path} has no tokenizer" if lm.tokenizer is None else (lm.model, lm.config, lm.tokenizer)
