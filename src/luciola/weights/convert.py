"""From one file format to another, parameter by parameter: the model is never in memory as a whole."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from luciola.run import publish_file, publish_folder
from luciola.text.tokenizer import FILES
from luciola.weights import gguf, hf
from luciola.weights.checkpoint import Checkpoint, outline
from luciola.weights.parts import Place, take

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def stored_kind(source: Checkpoint) -> str:
    """The type in which most of the source's bytes are stored; f32 for GGUF's quantised ones, bf16 for FP8."""
    sizes: Counter[str] = Counter()
    for stored in source.stored.values():
        sizes[stored.kind] += stored.nbytes
    return {"F16": "f16", "BF16": "bf16", hf.FP8: "bf16"}.get(sizes.most_common(1)[0][0], "f32")


def without_mtp(source: Checkpoint) -> Checkpoint:
    """The same checkpoint without its multi-token prediction layers."""
    config = source.config.model_copy(update={"num_nextn_predict_layers": 0})
    layers = outline(config, source.path)
    kept = {name: source.stored[name] for name in source.placement(config, layers, source.stored)}
    return replace(source, config=config, stored=kept)


def convert(
    source: Checkpoint, destination: Path, to: str, kind: str, progress: Callable[[str], None] = lambda name: None
) -> None:
    """Write the model at `destination`: to "hf" a folder, to "gguf" a file; whole, or not at all.

    `kind` is f32, f16 or bf16, for GGUF also q8_0. `progress` is told the name of each parameter that is read.

    Raises:
        ValueError: the other format has no place for something, or a value is beyond what `kind` can hold.
    """
    read = _Parameters(source, DTYPES[kind] if to == "hf" else torch.float32, progress)
    tokenizer = source.load_tokenizer()
    if to == "gguf":
        if destination.is_dir():
            raise ValueError(
                f"{destination} is a folder where a GGUF file is to be written; give a name ending in .gguf."
            )
        with publish_file(destination) as unfinished:
            name = destination.stem
            gguf.write(unfinished, source.config, source.shapes, read, kind, tokenizer, name)
        return
    with publish_folder(destination) as folder:
        eos = () if tokenizer is None else tokenizer.eos_token_ids
        hf.write(folder, source.config, source.shapes, read, DTYPES[kind], eos_token_ids=eos)
        if source.format == "hf":
            for file in (*FILES, "generation_config.json"):
                if (source.path / file).is_file():
                    shutil.copyfile(source.path / file, folder / file)
        elif tokenizer is not None:
            tokenizer.save(folder)


class _Parameters:
    """Parameters of the source by place; the last one is kept, since its other parts are asked for next."""

    def __init__(self, source: Checkpoint, dtype: torch.dtype, progress: Callable[[str], None]) -> None:
        self._source, self._dtype, self._progress = source, dtype, progress
        self._name, self._last = "", torch.empty(0)

    def __call__(self, place: Place) -> Tensor:
        if place.name != self._name:
            self._last = torch.empty(0)  # before the next is allocated
            dtype = torch.float32 if place.name.endswith(hf.ROUTER_BIAS) else self._dtype
            self._name, self._last = place.name, self._source.parameter(place.name, dtype)
            self._progress(place.name)
            if dtype == torch.float16 and not torch.isfinite(self._last).all():
                raise ValueError(f"{place.name} has values beyond 65504, the most that f16 can hold; use bf16 or f32.")
        return take(self._last, place)
