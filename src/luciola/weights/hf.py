"""Hugging Face layout: config.json, *.safetensors and generation_config.json, read and written one tensor at a time.

Only safetensors are read: a pickle (`pytorch_model.bin`) runs whatever code its author put into it.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luciola.model.config import ModelConfig
from luciola.model.transformer import Transformer
from luciola.text.tokenizer import Tokenizer
from luciola.text.untrusted import read_json, shortened
from luciola.weights import names, safetensors_file
from luciola.weights.checkpoint import Checkpoint, Stored, config_from
from luciola.weights.families import FAMILIES
from luciola.weights.parts import Place, Shape, take
from luciola.weights.safetensors_file import Reader

SHARD_BYTES = 5_000_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FP8_BLOCK = 128  # DeepSeek-V3 report, section 3.3: one scale for each 128 x 128 weights
FP8, SCALES = "F8_E4M3", "_scale_inv"
BYTES_OF = {"F32": 4, "F64": 8, "F16": 2, "BF16": 2, FP8: 1}  # bytes of a number
SCALE_KINDS = ("F32", "BF16", "F8_E8M0")  # the last: powers of two
EMBEDDED = "embed_tokens.weight"  # in memory
EMBEDDING, HEAD = f"model.{EMBEDDED}", "lm_head.weight"
ROUTER_BIAS = "e_score_correction_bias"


def open_folder(folder: Path) -> Checkpoint:
    """The model in a Hugging Face folder.

    FP8 weights are multiplied by their block scales. A DeepSeek-V3 folder whose config.json announces MTP layers that
    its files lack, as transformers writes them, is read without MTP.

    Raises:
        ValueError: a missing or malformed file, tensors that are missing, unknown or misshapen, a weight format or
            model type which is not supported.
    """
    data = read_json(folder / "config.json")
    files = _readers(folder)
    config = _without_lost_mtp(_config(data, folder / "config.json"), files)
    tensors = _Tensors(folder, files, _fp8_block(data, folder))
    stored = {
        name: stored
        for name, stored in tensors.stored().items()
        if not names.is_copy(name, config, files)
        and 0 not in stored.shape  # transformers writes an absent expert as nothing
    }
    moe_layers = sum(map(config.is_moe_layer, range(min(config.num_hidden_layers, len(stored)))))
    if moe_layers * (config.n_routed_experts or 0) > len(stored):
        raise ValueError(
            f"{folder}: {config.n_routed_experts} experts are announced and only {len(stored)} tensors are there."
        )

    def read(name: str) -> Tensor:
        tensor = tensors.read(name)
        repeated = name == EMBEDDING and config.tie_word_embeddings and HEAD in files
        if repeated and not torch.equal(tensor, tensors.read(HEAD).to(tensor.dtype)):
            raise ValueError(
                f"{folder}: tie_word_embeddings makes the embedding the head, and {HEAD} is another tensor; set it to "
                "false in config.json."
            )
        return tensor

    def tokenizer() -> Tokenizer | None:
        return Tokenizer.load(folder) if Tokenizer.present(folder) else None

    return Checkpoint(folder, "hf", config, stored, names.hugging_face, read, tokenizer)


def save(
    model: Transformer, folder: Path, *, eos_token_ids: Sequence[int] = (), shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the model into an existing folder, in shards of at most `shard_bytes` (a larger tensor has its own).

    `eos_token_ids`, the tokenizer's, go into generation_config.json; without them the config's are used.
    """
    state = model.state_dict()
    write(
        folder,
        model.config,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        lambda place: take(state[place.name], place),
        lambda name: state[name].dtype,
        eos_token_ids=eos_token_ids,
        shard_bytes=shard_bytes,
    )


def write(
    folder: Path,
    config: ModelConfig,
    shapes: Mapping[str, Shape],
    tensor: Callable[[Place], Tensor],
    dtype: Callable[[str], torch.dtype],
    *,
    eos_token_ids: Sequence[int] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model whose parameters have these `shapes` into an existing folder, holding one tensor in memory.

    `tensor` gives the part of a parameter that stands at a place, in the type that `dtype` gives for the parameter.
    """
    places = names.hugging_face(config, shapes)
    shards = _shards(
        {name: math.prod(place.shape) * dtype(place.name).itemsize for name, place in places.items()}, shard_bytes
    )
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = {name: (places[name].shape, dtype(places[name].name)) for name in shard}
        safetensors_file.write(folder / file, layout, lambda name: tensor(places[name]))
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(sum(shard.values()) for shard in shards)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    eos = list(eos_token_ids) or config.eos_token_id
    eos = eos[0] if isinstance(eos, list) and len(eos) == 1 else eos
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": config.pad_token_id}
    _write_json(folder / "config.json", {**config.to_hf(), "torch_dtype": str(dtype(EMBEDDED)).removeprefix("torch.")})
    _write_json(folder / "generation_config.json", {name: value for name, value in ids.items() if value is not None})


def _shards(sizes: Mapping[str, int], limit: int) -> list[dict[str, int]]:
    shards: list[dict[str, int]] = [{}]
    room = limit
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = size
        room -= size
    return shards


def _config(data: Mapping[str, Any], path: Path) -> ModelConfig:
    """The configuration; code that a folder brings along (`auto_map`) is never run, so only known families load."""
    if "auto_map" in data and str(data.get("model_type")) not in FAMILIES:
        found = shortened(data.get("model_type"))
        raise ValueError(
            f"{path}: model_type {found} asks for code of its own (auto_map), which is not run; "
            f"this version reads {', '.join(FAMILIES)}"
        )
    config = config_from(data, path)
    for name in config.family.stated if config.n_routed_experts is not None else ():
        if data.get(name) is None:
            raise ValueError(f"{path} does not state {name}, for which programs assume different values; add it.")
    return config


def _without_lost_mtp(config: ModelConfig, files: Iterable[str]) -> ModelConfig:
    """transformers announces one MTP layer in every V3 config it writes, and drops its tensors."""
    first = f"model.layers.{config.num_hidden_layers}."
    if config.num_nextn_predict_layers and not any(name.startswith(first) for name in files):
        return config.model_copy(update={"num_nextn_predict_layers": 0})
    return config


def _fp8_block(data: Mapping[str, Any], folder: Path) -> tuple[int, int] | None:
    """The block shape of FP8 weights; None for plain ones."""
    scheme = data.get("quantization_config")
    if scheme is None:
        return None
    method = scheme.get("quant_method") if isinstance(scheme, dict) else scheme
    if method != "fp8":
        raise ValueError(
            f"{folder} is quantised by {shortened(method)}; of quantised folders only DeepSeek's 'fp8' can be read."
        )
    block = scheme.get("weight_block_size") if isinstance(scheme, dict) else None
    block = [FP8_BLOCK, FP8_BLOCK] if block is None else block
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ValueError(
            f"{folder / 'config.json'}: weight_block_size must be the rows and columns of a block, such as "
            f"[128, 128], not {shortened(block)}."
        )
    return block[0], block[1]


def _readers(folder: Path) -> dict[str, Reader]:
    """The file of every tensor, from the header of the single file or from the index.

    Where both are there the index is of an earlier version, as transformers leaves it behind.
    """
    weight_map = _weight_map(folder / INDEX) if (folder / INDEX).is_file() else None
    if (folder / SINGLE).is_file():
        reader = Reader(folder / SINGLE)
        return dict.fromkeys(reader.names, reader)
    if weight_map is not None:
        readers = {file: Reader(_beside(folder, file)) for file in dict.fromkeys(weight_map.values())}
        for name, file in weight_map.items():
            if name not in readers[file].names:
                raise ValueError(f"{folder / file} lacks {name}, which {INDEX} puts there; fetch it again.")
        for file, reader in readers.items():
            for name in reader.names:
                if weight_map.get(name) != file:
                    raise ValueError(f"{folder / file} holds {name}, which {INDEX} puts elsewhere; fetch it again.")
        return {name: readers[file] for name, file in weight_map.items()}
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ValueError(
            f"{folder} holds its weights only as a pickle, which can run any code and is not read; convert it with "
            "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)."
        )
    raise ValueError(f"{folder} has no {SINGLE} and no {INDEX}; is it a model in Hugging Face layout?")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map from tensor names to files.")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index} names {shortened(file)}; it may only name .safetensors files beside it.")
    return weight_map


def _beside(folder: Path, file: str) -> Path:
    if not file.isprintable() or not (folder / file).is_file():
        raise ValueError(f"{folder}: {shortened(file)}, which {INDEX} names, is missing; fetch the folder again.")
    return folder / file


class _Tensors:
    """The tensors of a folder, read one at a time; FP8 weights are multiplied by their scales on the way."""

    def __init__(self, folder: Path, readers: Mapping[str, Reader], block: tuple[int, int] | None) -> None:
        self._folder, self._readers, self._block = folder, readers, block
        self._last: Reader | None = None

    def stored(self) -> dict[str, Stored]:
        """How every weight lies in its file, from the headers alone."""
        headers = {name: reader.header(name) for name, reader in self._readers.items()}
        scales = {f"{name}{SCALES}": name for name, (_, kind) in headers.items() if kind == FP8}
        for name, weight in scales.items():
            if self._block is None or name not in headers:
                raise ValueError(
                    f"{self._folder}: {weight} is stored in FP8, but {name} or quantization_config is missing."
                )
        for name, (shape, kind) in headers.items():
            known = SCALE_KINDS if name in scales else BYTES_OF
            if kind not in known or (name in scales and len(shape) != 2):
                raise ValueError(
                    f"{self._readers[name].path}: tensor {name} is stored as {kind} of shape {list(shape)}; "
                    f"it is read from {', '.join(known)}, and FP8's scales have two axes."
                )
        return {
            name: Stored(shape, kind, math.prod(shape) * BYTES_OF[kind])
            for name, (shape, kind) in headers.items()
            if name not in scales
        }

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._tensor(name)
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        assert self._block is not None
        try:
            return dequantize_blocks(tensor, self._tensor(f"{name}{SCALES}"), self._block)
        except ValueError as error:
            raise ValueError(f"{self._readers[name].path}: {name}: {error}") from error

    def _tensor(self, name: str) -> Tensor:
        reader = self._readers[name]
        if self._last is not None and self._last is not reader:
            self._last.release()
        self._last = reader
        return reader.tensor(name)


def dequantize_blocks(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Float32 values of an FP8 weight (M, N): each block times its scale; blocks at the edge are cut."""
    if weight.ndim != 2:
        raise ValueError(f"FP8 weights have rows and columns, and the shape here is {list(weight.shape)}")
    rows, columns = weight.shape
    block = min(block[0], rows), min(block[1], columns)  # a hostile one would be spread over all memory below
    expected = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"FP8 scales of shape {list(scales.shape)} where {list(expected)} are needed for {[rows, columns]}"
        )
    spread = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float().mul_(spread)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
