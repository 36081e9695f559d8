"""From one file format to another, parameter by parameter: the model is never in memory as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from luciola.run import publish_file, publish_folder
from luciola.run.publish import is_of_model
from luciola.text.tokenizer import FILES, MORE_TEMPLATES
from luciola.weights import gguf, hf
from luciola.weights.checkpoint import Checkpoint, outline
from luciola.weights.parts import Place, take

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def stored_kind(source: Checkpoint, parameter: str) -> str:
    """The smallest type that holds a parameter as it is stored; bf16 for FP8 (DeepSeek's own script), f32 for GGUF's
    quantised ones."""
    kinds = {source.stored[name].kind for name in source.parts[parameter]}
    known = {"F16": "f16", "BF16": "bf16", hf.FP8: "bf16"}
    return known.get(kinds.pop(), "f32") if len(kinds) == 1 else "f32"


def without_mtp(source: Checkpoint) -> Checkpoint:
    """The same checkpoint without its multi-token prediction layers."""
    config = source.config.model_copy(update={"num_nextn_predict_layers": 0})
    layers = outline(config, source.path)
    kept = {name: source.stored[name] for name in source.placement(config, layers, source.stored)}
    return replace(source, config=config, stored=kept)


def convert(
    source: Checkpoint,
    destination: Path,
    to: str,
    kind: str | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Write the model at `destination`: to "hf" a folder, to "gguf" a file; whole, or not at all.

    `kind` is f32, f16 or bf16, for GGUF also q8_0; None: each parameter's `stored_kind`. `progress` is told the name of
    each parameter that is read.

    Raises:
        ValueError: the other format has no place for something, a value is beyond what `kind` can hold, or something
            else than a model would be overwritten.
    """
    _refuse_to_overwrite(source, destination, to)
    kinds = {name: kind or stored_kind(source, name) for name in source.parts}
    kinds |= {name: "f32" for name in kinds if name.endswith(hf.ROUTER_BIAS)}
    tokenizer = source.load_tokenizer()
    if to == "gguf":
        read = _Parameters(source, lambda name: torch.float32, progress)
        with publish_file(destination) as unfinished:
            name = destination.stem
            gguf.write(unfinished, source.config, source.shapes, read, kinds.__getitem__, tokenizer, name)
        return
    read = _Parameters(source, lambda name: DTYPES[kinds[name]], progress)
    with publish_folder(destination) as folder:
        eos = () if tokenizer is None else tokenizer.eos_token_ids
        hf.write(folder, source.config, source.shapes, read, lambda name: DTYPES[kinds[name]], eos_token_ids=eos)
        if source.format == "hf" and not source.changes:  # an adapter may have brought a tokenizer of its own
            for file in (*FILES, "generation_config.json"):
                if (source.path / file).is_file():
                    shutil.copyfile(source.path / file, folder / file)
            if (source.path / MORE_TEMPLATES).is_dir():
                shutil.copytree(source.path / MORE_TEMPLATES, folder / MORE_TEMPLATES)
        elif tokenizer is not None:
            tokenizer.save(folder)


def _refuse_to_overwrite(source: Checkpoint, destination: Path, to: str) -> None:
    """Before any work: the model that is being read, and whatever is no model."""
    if destination.exists() and destination.samefile(source.path):
        raise ValueError(f"{destination} is the model itself; choose another name to write to.")
    if to == "hf":
        if destination.is_file():
            raise ValueError(f"{destination} is a file where a folder is to be written; choose another name.")
        there = list(destination.iterdir()) if destination.is_dir() else []
        is_model = (destination / "config.json").is_file()
        foreign = [entry.name for entry in there if not (is_model and is_of_model(entry))]
        if foreign:
            raise ValueError(
                f"{destination} holds {foreign[0]}, which replacing the folder would delete; choose a new folder."
            )
        return
    if destination.is_dir():
        raise ValueError(f"{destination} is a folder where a GGUF file is to be written; give a name ending in .gguf.")
    if destination.is_file():
        with destination.open("rb") as file:
            if file.read(4) not in (b"GGUF", b""):
                raise ValueError(f"{destination} is no GGUF file, which would be overwritten; choose another name.")


class _Parameters:
    """Parameters of the source by place; the last one is kept, since its other parts are asked for next."""

    def __init__(
        self, source: Checkpoint, dtype: Callable[[str], torch.dtype], progress: Callable[[str], None]
    ) -> None:
        self._source, self._dtype, self._progress = source, dtype, progress
        self._name, self._last = "", torch.empty(0)

    def __call__(self, place: Place) -> Tensor:
        if place.name != self._name:
            self._last = torch.empty(0)  # before the next is allocated
            self._name, self._last = place.name, self._source.parameter(place.name, self._dtype(place.name))
            self._progress(place.name)
        return take(self._last, place)
