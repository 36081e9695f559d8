"""`luciola pretrain`: a new model, or a stored one, on a task's texts or on files."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from luciola import hardware
from luciola.data.documents import Documents, TaskDocuments, TextDocuments, read_texts
from luciola.data.packing import Rows
from luciola.model.config import ModelConfig
from luciola.model.flops import training_flops
from luciola.model.language_model import LanguageModel, load
from luciola.model.lora import Lora, trained_parameters
from luciola.model.transformer import Transformer
from luciola.recipe import LoraSection, PretrainRecipe, SftRecipe, check
from luciola.run import Run, publish_folder
from luciola.text.bpe import train_bpe
from luciola.text.tokenizer import Tokenizer
from luciola.train.loop import TrainRecipe, fit
from luciola.weights import peft

PROGRAM_BYTES = 300 << 20  # the interpreter with torch, before any model
SURVEYED_DOCUMENTS = 2000  # a task's documents from which a new tokenizer learns its characters or merges


def pretrain(recipe: PretrainRecipe, resume: bool = False) -> Path:
    """Run the recipe; returns the run folder, whose `model/` holds the result in Hugging Face layout."""
    began = time.perf_counter()
    with Run.create(recipe, "pretrain", resume) as run:
        if run.finished:
            return run.path
        lm = build(recipe)
        check_length(lm.config, recipe)
        lm.model.to(getattr(torch, run.dtype))
        rows = training_rows(recipe, documents(recipe, lm.tokenizer))
        earlier = fit(lm.model, rows, recipe, run, "pre-training")
        finish(run, lm, earlier + time.perf_counter() - began)
    return run.path


def training_rows(recipe: TrainRecipe, documents: Documents) -> Rows:
    """Documents packed as the recipe's [data] section says."""
    data = recipe.data
    cut = data.source == "files"
    return Rows(documents, data.packing, data.sequence_length, data.batch_size, recipe.seed, truncate=cut)


def check_length(config: ModelConfig, recipe: TrainRecipe) -> None:
    """ValueError where rows would be longer than the model's context."""
    length, context = recipe.data.sequence_length, config.max_position_embeddings
    if length > context:
        raise ValueError(
            f"data.sequence_length = {length} is longer than the model's context of {context} tokens; lower it, or "
            "raise max_position_embeddings of a new model"
        )


def finish(run: Run, lm: LanguageModel, seconds: float, lora: Lora | None = None) -> None:
    """Write the model, the summary and the curves of a run that came to its end."""
    save_model(run, lm, lora)
    logged = run.metrics()
    run.summary({"loss": logged[-1]["loss"], "tokens": sum(m["tokens"] for m in logged), "seconds": round(seconds, 1)})
    run.plot()


def save_model(run: Run, lm: LanguageModel, lora: Lora | None) -> None:
    """The run's `model/`: the whole model, or its adapters, which load with their base."""
    if lora is None:
        lm.save(run.model_folder)
        return
    with publish_folder(run.model_folder) as folder:
        peft.save(lora, lm.config, folder)


def build(recipe: PretrainRecipe) -> LanguageModel:
    """The model a recipe starts from: fresh weights from its seed with a tokenizer made for its data, or a stored
    model."""
    if recipe.model.path is not None:
        return load(recipe.model.path)
    tokenizer = make_tokenizer(recipe)
    return LanguageModel.create(model_config(recipe, tokenizer), tokenizer, recipe.seed)


def model_config(recipe: PretrainRecipe, tokenizer: Tokenizer) -> ModelConfig:
    """The recipe's `model.config`, checked; a vocab_size left out is the tokenizer's."""
    given = {"vocab_size": tokenizer.vocab_size, **(recipe.model.config or {})}
    given.setdefault("bos_token_id", tokenizer.bos_token_id)
    given.setdefault("eos_token_id", next(iter(tokenizer.eos_token_ids), None))
    given.setdefault("pad_token_id", tokenizer.pad_token_id)
    config = check(ModelConfig, given, where="model.config")
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.config.vocab_size = {config.vocab_size} is less than the tokenizer's "
            f"{tokenizer.vocab_size} tokens; "
            "raise it or leave it out"
        )
    return config


def make_tokenizer(recipe: PretrainRecipe) -> Tokenizer:
    """The tokenizer of a new model, from the recipe's [tokenizer] section."""
    section = recipe.tokenizer
    assert section is not None  # the recipe's own check
    if section.kind == "path":
        assert section.path is not None
        return Tokenizer.load(Path(section.path))
    if section.kind == "bpe":
        assert section.vocab_size is not None
        return train_bpe(_texts(recipe), section.vocab_size)
    alphabet = section.alphabet
    if alphabet is None:
        alphabet = "".join(sorted(_characters(_texts(recipe))))
    return Tokenizer.characters(alphabet)


def _characters(texts: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for text in texts:
        found |= set(text)
    return found


def _texts(recipe: PretrainRecipe) -> Iterator[str]:
    """What a new tokenizer learns from: the files, or a sample of the task's problems and solutions."""
    if recipe.data.source == "files":
        yield from read_texts(recipe.data.paths, recipe.data.field)
        return
    assert recipe.task is not None  # the recipe's own check
    for index in range(SURVEYED_DOCUMENTS):
        problem = recipe.task.problem("train", index, recipe.seed)
        for message in recipe.task.messages(problem):
            yield message["content"]
        yield recipe.task.solution(problem, random.Random(f"{recipe.seed}/{index}/solution"))


def documents(recipe: PretrainRecipe, tokenizer: Tokenizer | None) -> Documents:
    """The documents of the recipe's [data] section."""
    if tokenizer is None:
        raise ValueError(f"the model {recipe.model.path} has no tokenizer, so no text can be read for it")
    if recipe.data.source == "files":
        return TextDocuments(recipe.data.paths, recipe.data.field, tokenizer)
    assert recipe.task is not None  # the recipe's own check
    return TaskDocuments(recipe.task, tokenizer, recipe.seed, recipe.data.error_rate)


def describe(recipe: PretrainRecipe) -> dict[str, Any]:
    """What a run would take, without starting it: parameters, tokens, and estimates of memory and time.

    Memory is the program itself, weights, gradients, both moments (16 bytes a parameter in float32) and the activations
    of one batch; time assumes that matrix products run at a third of this machine's measured peak.
    """
    if recipe.model.path is not None:
        model, config = (lm := load(recipe.model.path)).model, lm.config
    else:
        config = model_config(recipe, make_tokenizer(recipe))
        with torch.device("meta"):
            model = Transformer(config)
    return estimate(model, config, recipe)


def estimate(model: Transformer, config: ModelConfig, recipe: TrainRecipe) -> dict[str, Any]:
    """The figures of `describe` for a model that is there (or on the meta device)."""
    length, rows = recipe.data.sequence_length, recipe.data.batch_size
    tokens = recipe.steps * recipe.accumulate * rows * length
    stored = sum(p.numel() for p in model.parameters())
    dtype, reason = hardware.choose_dtype(recipe.dtype)
    per_token = activation_bytes(config, recipe.activation_checkpointing)
    flops = tokens * training_flops(model, length, mtp=recipe.mtp_weight > 0)
    peak = hardware.gemm_peak(dtype)
    lora = recipe.lora if isinstance(recipe, SftRecipe) else None
    states, trained = state_bytes(model, dtype, lora)
    return {
        "parameters": stored,
        **({"trained_parameters": trained} if lora is not None else {}),
        "active_parameters": model.num_parameters(active=True),
        "tokens": tokens,
        "dtype": f"{dtype} ({reason})",
        "memory_bytes": PROGRAM_BYTES + int(states + rows * length * per_token),
        "seconds": flops / (peak / 3),
    }


def state_bytes(model: Transformer, dtype: str, lora: LoraSection | None) -> tuple[int, int]:
    """Bytes of weights, gradients and moments, and how many parameters are trained. With adapters the weights are there
    twice, W and W_0, and the rest belongs to A and B."""
    stored = sum(p.numel() for p in model.parameters())
    if lora is None:
        return stored * (16 if dtype == "float32" else 20), stored
    trained = trained_parameters(model, lora)
    return stored * (8 if dtype == "float32" else 4) + trained * 16, trained


def activation_bytes(config: ModelConfig, checkpointing: bool) -> float:
    """Estimated bytes of activations kept for one token, float32: about 20 hidden-widths and the inner widths a
    layer."""
    inner = config.intermediate_size
    if config.n_routed_experts and config.moe_intermediate_size and config.num_experts_per_tok:
        active = config.num_experts_per_tok * (config.moe_intermediate_size + config.hidden_size // 3)
        inner = max(inner, active + (config.n_shared_experts or 0) * config.moe_intermediate_size)
    layer = 20 * config.hidden_size + 4 * inner
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    kept = layers * config.hidden_size + layer if checkpointing else layers * layer
    return 4.0 * (kept + min(config.vocab_size, 2 * config.hidden_size))
