"""Hugging Face layout: config.json, *.safetensors and generation_config.json, read and written one tensor at a time.

Only safetensors are read: a pickle (`pytorch_model.bin`) runs whatever code its author put into it.
"""

import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from luciola.model.config import ModelConfig
from luciola.model.transformer import Transformer
from luciola.text.json_files import printable, read_json, shortened
from luciola.text.tokenizer import Tokenizer
from luciola.weights import names
from luciola.weights.checkpoint import Checkpoint, Stored, config_from
from luciola.weights.families import FAMILIES
from luciola.weights.parts import Place, Shape, take

SHARD_BYTES = 5_000_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FP8_BLOCK = 128  # DeepSeek-V3 report, section 3.3: one scale for each 128 x 128 weights
FP8, SCALES = "F8_E4M3", "_scale_inv"
KINDS = {"F32": 4, "F64": 8, "F16": 2, "BF16": 2, FP8: 1}  # bytes of a number
SCALE_KINDS = ("F32", "BF16", "F8_E8M0")  # the last: powers of two
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROUTER_BIAS = "e_score_correction_bias"
CHECKSUMS = "luciola.crc32"  # in a file's metadata; other programs pass over it
RELEASE_BYTES = 32 << 20
LONGEST_NAME = 200


def open_folder(folder: Path) -> Checkpoint:
    """The model in a Hugging Face folder.

    FP8 weights are multiplied by their block scales. A DeepSeek-V3 folder whose config.json announces MTP layers that
    its files lack, as transformers writes them, is read without MTP.

    Raises:
        ValueError: a missing or malformed file, tensors that are missing, unknown or misshapen, a weight format or
            model type which is not supported.
    """
    data = read_json(folder / "config.json")
    files = _tensor_files(folder)
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
        model.embed_tokens.weight.dtype,
        eos_token_ids=eos_token_ids,
        shard_bytes=shard_bytes,
    )


def write(
    folder: Path,
    config: ModelConfig,
    shapes: Mapping[str, Shape],
    tensor: Callable[[Place], Tensor],
    dtype: torch.dtype,
    *,
    eos_token_ids: Sequence[int] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model whose parameters have these `shapes` into an existing folder, holding one shard in memory.

    `tensor` gives the part of a parameter that stands at a place, in `dtype` (router biases in float32).
    """
    places = names.hugging_face(config, shapes)
    shards = _shards({name: _nbytes(place, dtype) for name, place in places.items()}, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: tensor(places[name]) for name in shard}
        save_file(tensors, folder / file, {"format": "pt", CHECKSUMS: json.dumps(_checksums(tensors))})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(sum(shard.values()) for shard in shards)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    eos = list(eos_token_ids) or config.eos_token_id
    eos = eos[0] if isinstance(eos, list) and len(eos) == 1 else eos
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": config.pad_token_id}
    _write_json(folder / "config.json", {**config.to_hf(), "torch_dtype": str(dtype).removeprefix("torch.")})
    _write_json(folder / "generation_config.json", {name: value for name, value in ids.items() if value is not None})


def _nbytes(place: Place, dtype: torch.dtype) -> int:
    is_bias = place.name.endswith(ROUTER_BIAS)
    return math.prod(place.shape) * (torch.float32 if is_bias else dtype).itemsize


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


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: checksum(tensor) for name, tensor in tensors.items()}


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a contiguous tensor's dtype, shape and bytes."""
    start = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    return zlib.crc32(tensor.detach().flatten().view(torch.uint8).numpy().data, start)


def _config(data: Mapping[str, Any], path: Path) -> ModelConfig:
    """The configuration; code that a folder brings along (`auto_map`) is never run, so only known families load."""
    if "auto_map" in data and str(data.get("model_type")) not in FAMILIES:
        found = shortened(data.get("model_type"))
        raise ValueError(
            f"{path}: model_type {found} asks for code of its own (auto_map), which is not run; "
            f"this version reads {', '.join(FAMILIES)}"
        )
    return config_from(data, path)


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


def _tensor_files(folder: Path) -> dict[str, str]:
    """The file of every tensor, from the header of the single file or from the index.

    Where both are there the index is of an earlier version, as transformers leaves it behind.
    """
    weight_map = _weight_map(folder / INDEX) if (folder / INDEX).is_file() else None
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_names(folder / SINGLE), SINGLE)
    if weight_map is not None:
        held = {file: _names(_beside(folder, file)) for file in dict.fromkeys(weight_map.values())}
        for name, file in weight_map.items():
            if name not in held[file]:
                raise ValueError(f"{folder / file} lacks {name}, which {INDEX} puts there; fetch it again.")
        for file, found in held.items():
            for name in found:
                if weight_map.get(name) != file:
                    raise ValueError(f"{folder / file} holds {name}, which {INDEX} puts elsewhere; fetch it again.")
        return weight_map
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


def _names(path: Path) -> set[str]:
    """The tensors in a file; none has a name that would garble the sentence of an error."""
    with _opened(path) as file:
        found = set(file.keys())
    odd = next((name for name in found if not name.isprintable() or len(name) > LONGEST_NAME), None)
    if odd is not None:
        raise ValueError(f"{path} is damaged: no tensor of a model is called {shortened(odd)}; fetch it again.")
    return found


def _opened(path: Path) -> Any:
    try:
        path.open("rb").close()  # safetensors itself calls a file that may not be read a missing one
        return safe_open(path, framework="pt")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {printable(error.strerror or str(error))}.") from error
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({printable(str(error))}); fetch it again."
        ) from error


class _Tensors:
    """The tensors of a folder, read one at a time; FP8 weights are multiplied by their scales on the way."""

    def __init__(self, folder: Path, files: Mapping[str, str], block: tuple[int, int] | None) -> None:
        self._folder, self._files, self._block = folder, files, block
        self._opened = {file: _opened(folder / file) for file in dict.fromkeys(files.values())}
        self._touched: Counter[str] = Counter()
        self._checksums = {file: self._checksums_of(file) for file in self._opened}

    def _checksums_of(self, file: str) -> dict[str, int]:
        """Those that this project writes; other files have none."""
        text = (self._opened[file].metadata() or {}).get(CHECKSUMS)
        if text is None:
            return {}
        try:
            checksums = json.loads(text)
            whole = set(self._opened[file].keys()) == checksums.keys()
            if whole and all(type(known) is int for known in checksums.values()):
                return dict(checksums)
        except (ValueError, AttributeError, RecursionError):
            pass
        raise ValueError(f"{self._folder / file} is damaged: its checksums are not readable; fetch it again.")

    def stored(self) -> dict[str, Stored]:
        """How every weight lies in its file, from the headers alone."""
        headers = {}
        for name in self._files:
            slice_ = self._from_file(name, "get_slice")
            headers[name] = tuple(slice_.get_shape()), slice_.get_dtype()
        scales = {f"{name}{SCALES}": name for name, (_, kind) in headers.items() if kind == FP8}
        for name, weight in scales.items():
            if self._block is None or name not in headers:
                raise ValueError(
                    f"{self._folder}: {weight} is stored in FP8, but {name} or quantization_config is missing."
                )
        for name, (shape, kind) in headers.items():
            known = SCALE_KINDS if name in scales else KINDS
            if kind not in known or (name in scales and len(shape) != 2):
                raise ValueError(
                    f"{self._folder / self._files[name]}: tensor {name} is stored as {kind} of shape {list(shape)}; "
                    f"it is read from {', '.join(known)}, and FP8's scales have two axes."
                )
        return {
            name: Stored(shape, kind, math.prod(shape) * KINDS[kind])
            for name, (shape, kind) in headers.items()
            if name not in scales
        }

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._from_file(name, "get_tensor")
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        assert self._block is not None
        try:
            return dequantize_blocks(tensor, self._from_file(f"{name}{SCALES}", "get_tensor"), self._block)
        except ValueError as error:
            raise ValueError(f"{self._folder / self._files[name]}: {name}: {error}") from error

    def _from_file(self, name: str, method: Literal["get_slice", "get_tensor"]) -> Any:
        file = self._files[name]
        try:
            found = getattr(self._opened[file], method)(name)
        except SafetensorError as error:
            raise ValueError(
                f"{self._folder / file} lacks {name}, which {INDEX} puts there; fetch it again."
            ) from error
        if method == "get_tensor":
            known = self._checksums[file].get(name)
            if known is not None and known != checksum(found):
                raise ValueError(
                    f"{self._folder / file} is damaged: tensor {name} is not as it was written; fetch it again."
                )
            self._release(file, found.nbytes)
        return found

    def _release(self, file: str, nbytes: int) -> None:
        """Map the files anew now and then: pages of a mapping stay in memory for as long as it is open."""
        self._touched[file] += nbytes
        if self._touched.total() > RELEASE_BYTES:
            self._opened |= {touched: _opened(self._folder / touched) for touched in self._touched}
            self._touched.clear()


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
    return weight.float() * spread


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
