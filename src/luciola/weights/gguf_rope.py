"""How stretched rotary frequencies stand in a GGUF file, in both directions.

Linear stretching and YaRN are numbers in the metadata; Llama 3.1's is a tensor of factors.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from luciola.model.config import ModelConfig, RopeScaling, yarn_temperature
from luciola.model.rope import frequencies
from luciola.text.untrusted import shortened
from luciola.weights.gguf_file import GGUFFile

FACTORS = "rope_freqs.weight"  # what Llama 3.1's stretched frequencies are divided by, (head_dim / 2,)
PARAMETERS = "luciola.rope_scaling"  # and the parameters which that table came from, as JSON

_OF_YARN = ("original_context_length", "yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier", "attn_factor")


def metadata_of_scaling(config: ModelConfig) -> dict[str, Any]:
    """The metadata that states `config.rope_scaling`, without the architecture in front of its keys."""
    rope = config.rope_scaling
    if rope is None or rope.rope_type == "llama3":
        return {}
    data: dict[str, Any] = {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": rope.factor}
    if rope.rope_type == "yarn":
        length = rope.original_max_position_embeddings or config.max_position_embeddings
        data["rope.scaling.original_context_length"] = length
        data |= {"rope.scaling.yarn_beta_fast": rope.beta_fast, "rope.scaling.yarn_beta_slow": rope.beta_slow}
        if config.is_mla:
            data["rope.scaling.yarn_log_multiplier"] = 0.1 * (rope.mscale_all_dim or 0.0)
        else:  # llama.cpp multiplies cosine and sine by the usual temperature of its own accord
            factor = frequencies(config)[1] / yarn_temperature(rope.factor, 1.0)
            data |= {} if factor == 1.0 else {"rope.scaling.attn_factor": factor}
    return data


def factors_of(config: ModelConfig) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """The tensor by which llama.cpp divides the frequencies of Llama 3.1; None where there is no such scaling."""
    if config.rope_scaling is None or config.rope_scaling.rope_type != "llama3":
        return None
    plain = frequencies(config.model_copy(update={"rope_scaling": None}))[0]
    return (plain / frequencies(config)[0]).numpy()


def read_scaling(file: GGUFFile, mla: bool) -> dict[str, Any] | None:
    """`rope_scaling` as config.json has it; None where nothing is stretched, or by Llama 3.1's table.

    Raises:
        ValueError: another kind of stretching, or a key beside it that this version does not know.
    """
    architecture = file.metadata["general.architecture"]
    prefix = f"{architecture}.rope.scaling."
    data = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    if f"{architecture}.rope.scale_linear" in file.metadata:  # the key of 2023
        data.setdefault("factor", file.metadata[f"{architecture}.rope.scale_linear"])
    if FACTORS in file.tensors:
        return None
    kind = data.pop("type", "linear" if "factor" in data else "none")  # llama.cpp's default
    data.pop("finetuned", None)
    known = ("factor", *(_OF_YARN if kind == "yarn" else ("original_context_length",)))
    for name in data:
        if name not in known and data[name]:
            key = f"{prefix}{shortened(name)[1:-1]}"
            raise ValueError(f"{file.path} states {key} beside scaling of type {kind!r}, which cannot be read.")
    if kind == "none":
        return None
    scaling = {"type": kind, "factor": shortest(data.get("factor"))}
    if kind == "linear":
        return None if scaling["factor"] in (0.0, 1.0) else scaling
    if kind != "yarn":
        raise ValueError(
            f"{file.path} stretches its rotary frequencies by {shortened(kind)}, which cannot be read from GGUF."
        )
    scaling["original_max_position_embeddings"] = data.get("original_context_length")
    for name in ("beta_fast", "beta_slow"):
        scaling |= {name: shortest(data[f"yarn_{name}"])} if f"yarn_{name}" in data else {}
    log_multiplier, factor = data.get("yarn_log_multiplier"), data.get("attn_factor")
    if mla:
        if not isinstance(log_multiplier, float) or not log_multiplier:
            raise ValueError(
                f"{file.path} stretches by YaRN and does not state {prefix}yarn_log_multiplier, without which programs "
                "scale attention differently; use the model's folder in Hugging Face layout instead."
            )
        mscale = round(log_multiplier / 0.1, 6)
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    if not mla and isinstance(factor, float) and isinstance(scaling["factor"], float):
        scaling["attention_factor"] = round(factor * yarn_temperature(scaling["factor"], 1.0), 6)
    return scaling


def shortest(value: Any) -> Any:
    """For a float the shortest decimal with the same float32: 1e-05 was stored as 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def with_llama3_scaling(config: ModelConfig, file: GGUFFile) -> ModelConfig:
    """Llama 3.1's scaling is stored as the factors themselves; they must be those of the parameters stated beside
    them, or of the published ones."""
    factors = torch.from_numpy(file.tensor(FACTORS))
    plain = frequencies(config)[0]
    stated = file.metadata.get(PARAMETERS)
    published = {"rope_type": "llama3", "factor": float(factors.max()), "original_max_position_embeddings": 8192}
    try:
        parameters = published if stated is None else json.loads(stated)
        stretched = config.model_copy(update={"rope_scaling": RopeScaling.model_validate(parameters)})
        fits = factors.shape == plain.shape and torch.allclose(plain / factors, frequencies(stretched)[0], rtol=1e-4)
    except (ValueError, TypeError, AssertionError, RecursionError):
        fits = False
    if not fits:
        raise ValueError(f"{file.path} stretches its rotary frequencies by a table other than Llama 3.1's.")
    return stretched
