"""Hugging Face layout: config.json, *.safetensors and generation_config.json, read and written one tensor at a time.

Only safetensors are read: a pickle (`pytorch_model.bin`) runs whatever code its author put into it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from luciola.model.config import ModelConfig
from luciola.model.transformer import Transformer
from luciola.weights import names
from luciola.weights.build import build, config_from

SHARD_BYTES = 5_000_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FP8_BLOCK = 128  # DeepSeek-V3 report, section 3.3: one scale for each 128 x 128 weights


def load(folder: Path, dtype: torch.dtype | None = None) -> Transformer:
    """The model in a Hugging Face folder, its weights converted to `dtype` (None: float32, as training wants them).

    FP8 weights are multiplied by their block scales. A DeepSeek-V3 folder whose config.json announces MTP layers that
    its files lack, as transformers writes them, loads without MTP.

    Raises:
        ValueError: a missing or malformed file, tensors that are missing, unknown or misshapen, a weight format or
            model type which is not supported.
    """
    data = _read_json(folder / "config.json")
    files = _tensor_files(folder)
    config = _without_lost_mtp(config_from(data, folder / "config.json"), files)
    tensors = _Tensors(folder, files, _fp8_block(data, folder))
    shapes = {
        name: shape
        for name, shape in tensors.shapes().items()
        if not names.is_copy(name, config) and 0 not in shape  # transformers writes the absent shared expert as nothing
    }
    try:
        return build(config, dtype, names.hugging_face, shapes, tensors.read)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def save(
    model: Transformer, folder: Path, *, eos_token_ids: Sequence[int] = (), shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the model into an existing folder, in shards of at most `shard_bytes` (a larger tensor has its own).

    `eos_token_ids`, the tokenizer's, go into generation_config.json; without them the config's are used.
    """
    config, state = model.config, model.state_dict()
    places = names.hugging_face(config, state)
    shards = _shards({name: state[place.name][place.index] for name, place in places.items()}, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    eos = list(eos_token_ids) or config.eos_token_id
    eos = eos[0] if isinstance(eos, list) and len(eos) == 1 else eos
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": config.pad_token_id}
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    _write_json(folder / "config.json", {**config.to_hf(), "torch_dtype": dtype})
    _write_json(folder / "generation_config.json", {name: value for name, value in ids.items() if value is not None})


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _without_lost_mtp(config: ModelConfig, files: Mapping[str, str]) -> ModelConfig:
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
            f"{folder} is quantised by {method!r}; of quantised folders only DeepSeek's 'fp8' can be read."
        )
    rows, columns = scheme.get("weight_block_size") or (FP8_BLOCK, FP8_BLOCK)
    return int(rows), int(columns)


def _tensor_files(folder: Path) -> dict[str, str]:
    """The file of every tensor, from the index or from the header of the single file."""
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX} has no weight_map from tensor names to files.")
        for file in set(weight_map.values()):
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{folder / INDEX} names {file!r}; it may only name .safetensors files beside it.")
            if not (folder / file).is_file():
                raise ValueError(f"{folder / file} is missing, which {INDEX} names; fetch the folder again.")
        return weight_map
    if (folder / SINGLE).is_file():
        with _opened(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), SINGLE)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ValueError(
            f"{folder} holds its weights only as a pickle, which can run any code and is not read; convert it with "
            "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)."
        )
    raise ValueError(f"{folder} has no {SINGLE} and no {INDEX}; is it a model in Hugging Face layout?")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again.") from error


class _Tensors:
    """The tensors of a folder, read one at a time; FP8 weights are multiplied by their scales on the way."""

    def __init__(self, folder: Path, files: Mapping[str, str], block: tuple[int, int] | None) -> None:
        self._files = files
        self._block = block
        self._opened = {file: _opened(folder / file) for file in dict.fromkeys(files.values())}

    def shapes(self) -> dict[str, list[int]]:
        """The shape of every weight, from the files' headers alone."""
        weights = [name for name in self._files if not name.endswith("_scale_inv")]
        return {name: self._from_file(name, "get_slice").get_shape() for name in weights}

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._from_file(name, "get_tensor")
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        scales = f"{name}_scale_inv"
        if self._block is None or scales not in self._files:
            raise ValueError(f"{name} is stored in FP8, but {scales} or quantization_config is missing.")
        return dequantize_blocks(tensor, self._from_file(scales, "get_tensor"), self._block)

    def _from_file(self, name: str, method: Literal["get_slice", "get_tensor"]) -> Any:
        try:
            return getattr(self._opened[self._files[name]], method)(name)
        except SafetensorError as error:
            raise ValueError(f"{self._files[name]} lacks {name}, which {INDEX} puts there; fetch it again.") from error


def dequantize_blocks(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Float32 values of an FP8 weight (M, N): each block times its scale; blocks at the edge are cut."""
    rows, columns = weight.shape
    expected = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"FP8 scales of shape {list(scales.shape)} where {list(expected)} are needed for {[rows, columns]}"
        )
    spread = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * spread


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; is {path.parent} a model in Hugging Face layout?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
