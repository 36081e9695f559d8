"""Adapters in the layout of the peft library: adapter_config.json and adapter_model.safetensors, beside a base model.

A folder read here gives the base's Checkpoint, whose matrices become W_0 + s B A while they are read. So whatever takes
a model takes an adapter, and converting one writes the merged model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luciola.model.config import ModelConfig
from luciola.model.lora import Lora, merged, scaling
from luciola.text.tokenizer import Tokenizer
from luciola.text.untrusted import read_json, shortened
from luciola.weights import names, safetensors_file
from luciola.weights.checkpoint import Checkpoint
from luciola.weights.parts import Place
from luciola.weights.safetensors_file import Reader

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name; then comes the module's in Hugging Face's model
BASE = "base_model_name_or_path"

# Keys of adapter_config.json that change nothing once an adapter is trained. Any other must be as good as unset.
HARMLESS = {
    *("auto_mapping", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "target_modules", "target_parameters"),
    "task_type",
}
READ = {"peft_type", BASE, "r", "lora_alpha", "use_rslora", "init_lora_weights"}
EXPERT_NAMES = {"gate_proj", "up_proj", "down_proj"}
INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")  # others, pissa say, take B A out of W_0 beforehand


class NoBaseBelow(ValueError):
    """Adapters lie on top of one another without end, or too many: of no one of them in particular."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    return (folder / CONFIG).is_file() and not list(folder.glob("model*.safetensors*"))


def open_folder(folder: Path, open_base: Callable[[str], Checkpoint]) -> Checkpoint:
    """The model that an adapter makes of its base. `open_base` opens what the adapter names as its base.

    A tokenizer in the folder goes before the base's.

    Raises:
        ValueError: a file is missing or damaged, the base is not there or another model's, or the adapter is of a kind
            that is not supported; one sentence says which.
    """
    config = read_json(folder / CONFIG)
    scale = _scale(config, folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        hint = "only a pickle, which can run any code and is not read" if list(folder.glob("*.bin")) else "nothing"
        raise ValueError(f"{folder} has {CONFIG} and no {WEIGHTS} ({hint}); fetch the adapter again.")
    base = _base(config[BASE], folder, open_base)
    changes = _changes(Reader(folder / WEIGHTS), base, config["r"], scale)
    return replace(
        base,
        load_tokenizer=partial(Tokenizer.load, folder) if Tokenizer.present(folder) else base.load_tokenizer,
        blocks=lambda name: None if base.places[name].name in changes else base.blocks(name),
        changes={**base.changes, **{name: [*base.changes.get(name, ()), *new] for name, new in changes.items()}},
    )


def _scale(config: Mapping[str, Any], path: Path) -> float:
    """s = alpha / r or alpha / sqrt(r), from a configuration that says nothing else that matters."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {shortened(config.get('peft_type'))}; adapters are read from 'LORA'.")
    for key, value in config.items():
        if key not in HARMLESS | READ and value not in (None, False, {}, [], "none"):
            raise ValueError(
                f"{path}: {shortened(key)} = {shortened(value)} is not supported; merge the adapter into its base with "
                "peft (merge_and_unload) and load the result."
            )
    if config.get("init_lora_weights") not in INITIAL:
        raise ValueError(
            f"{path}: init_lora_weights = {shortened(config['init_lora_weights'])} changes the base as well; convert "
            "the adapter with peft (path_initial_model_for_weight_conversion)."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= 1 << 20:
        raise ValueError(f"{path}: r must be a whole number, at least 1, not {shortened(rank)}.")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        raise ValueError(f"{path}: lora_alpha must be a positive number, not {shortened(alpha)}.")
    if not isinstance(config.get(BASE), str) or not config[BASE]:
        raise ValueError(f"{path}: {BASE} must name the model that the adapter belongs to; put its folder there.")
    return scaling(rank, alpha, bool(config.get("use_rslora")))


def _base(named: str, folder: Path, open_base: Callable[[str], Checkpoint]) -> Checkpoint:
    try:
        return open_base(named)
    except NoBaseBelow:
        raise
    except ValueError as error:
        raise ValueError(
            f"the adapter {folder} belongs to the base {shortened(named)}, which cannot be opened: {error} If it has "
            f"moved, put its place into {BASE} of {folder / CONFIG}."
        ) from error


def _changes(file: Reader, base: Checkpoint, rank: int, scale: float) -> dict[str, list[Callable[[Tensor], None]]]:
    """For each parameter that is adapted, what adds s B A to its values."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in sorted(file.names):
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise ValueError(f"{file.path}: {shortened(name)} is no part of a LoRA adapter of linear layers.")
        shapes.setdefault(match[1], {})[match[2]] = file.header(name)[0]
    if not shapes:
        raise ValueError(f"{file.path} holds no adapter.")
    places = names.hugging_face(base.config, base.shapes)
    changes: dict[str, list[Callable[[Tensor], None]]] = {}
    for module, found in shapes.items():
        if module.removesuffix(".base_layer").endswith(".experts"):
            raise ValueError(
                f"{file.path} adapts all routed experts of {module.removesuffix('.base_layer')} at once, which is not "
                "supported; merge the adapter into its base with peft (merge_and_unload) and load the result."
            )
        place = places.get(f"{module}.weight")
        if place is None or len(place.shape) != 2 or place.name == "embed_tokens.weight":
            raise ValueError(f"{file.path}: the base model {base.path} has no linear layer {shortened(module)}.")
        if found.keys() != {"A", "B"}:
            raise ValueError(f"{file.path}: {module} has lora_{next(iter(found))} alone, and needs lora_A and lora_B.")
        (outputs, inputs), A, B = place.shape, found["A"], found["B"]
        if len(A) != 2 or len(B) != 2 or A[1] != inputs or B[0] != outputs or A[0] != B[1]:
            raise ValueError(
                f"{file.path}: lora_A {list(A)} and lora_B {list(B)} of {module} do not make up the "
                f"{list(place.shape)} of {base.path}; is that its base?"
            )
        if A[0] != rank:  # s would be another
            raise ValueError(
                f"{file.path}: lora_A of {module} has the rank {A[0]}, and {CONFIG} says r = {rank}; put the r that it "
                "was trained with there, or fetch the adapter again."
            )
        changes.setdefault(place.name, []).append(partial(_add, file, module, place, scale))
    return changes


def _add(file: Reader, module: str, place: Place, scale: float, parameter: Tensor) -> None:
    A_RI, B_OR = (file.tensor(f"{PREFIX}{module}.lora_{part}.weight") for part in "AB")
    for part, tensor in (("A", A_RI), ("B", B_OR)):
        if not tensor.isfinite().all():
            raise ValueError(f"{file.path} is damaged: lora_{part} of {module} is not finite; fetch it again.")
    index = place.index()
    parameter[index] = merged(parameter[index], A_RI, B_OR, scale)


def save(lora: Lora, config: ModelConfig, folder: Path) -> None:
    """Write the adapters of a model that has `config` into an existing folder.

    In a model with routed experts, transformers 5 stacks these into parameters, and peft takes any target module called
    gate_proj, up_proj or down_proj to mean them, never the linear layers of that name. There those are therefore
    written as target parameters, which peft knows by the ends of their full names.
    """
    section = lora.section
    misread = EXPERT_NAMES if config.n_routed_experts is not None else set()
    modules, parameters = set(), set()
    for name in lora.matrices:
        *_, parent, leaf = name.split(".")
        if leaf in misread:
            parameters.add(f"{parent}.{leaf}.weight")
        else:
            modules.add(leaf)
    tensors = {f"{PREFIX}model.{name}.lora_A.weight": matrix.A_RI for name, matrix in lora.matrices.items()}
    tensors |= {f"{PREFIX}model.{name}.lora_B.weight": matrix.B_OR for name, matrix in lora.matrices.items()}
    layout = {name: (tuple(tensor.shape), torch.float32) for name, tensor in tensors.items()}
    safetensors_file.write(folder / WEIGHTS, layout, lambda name: tensors[name])
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        BASE: lora.base,
        "r": section.rank,
        "lora_alpha": section.alpha,
        "lora_dropout": 0.0 if parameters else section.dropout,  # peft has none for parameters
        "use_rslora": section.rslora,
        "target_modules": sorted(modules) or None,
        "target_parameters": sorted(parameters) or None,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
