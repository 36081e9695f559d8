"""A model's configuration as GGUF metadata, in both directions.

llama.cpp's keys begin with the architecture, "deepseek2.embedding_length"; the tables below leave that out. What a GGUF
file has no key for and cannot do without is refused when writing rather than left out.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from luciola.model.config import ModelConfig, RopeScaling, yarn_temperature
from luciola.model.rope import frequencies
from luciola.text.json_files import shortened
from luciola.weights.checkpoint import config_from
from luciola.weights.families import FAMILIES
from luciola.weights.gguf_file import GGUFFile

FIELDS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "nextn_predict_layers": "num_nextn_predict_layers",
}
REQUIRED = ("context_length", "attention.layer_norm_rms_epsilon")  # where ModelConfig's defaults would be a guess
GQA_FIELDS = {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}
MLA_FIELDS = {
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.q_lora_rank": "q_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim",
}
EXPERT_FIELDS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
TOKEN_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers for the gating function

# llama.cpp always adds a shared expert. A model without one is written with one of zeros, and marked.
NO_SHARED_EXPERT = "luciola.no_shared_expert"
ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3.1's stretched frequencies are divided by, (head_dim / 2,)
ROPE_SCALING = "luciola.rope_scaling"  # and the parameters which that table came from, as JSON


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    """The metadata of a model with this configuration: plain int, float, bool and str values.

    Raises:
        ValueError: llama.cpp's form of this family has no place for something; one sentence names the field.
    """
    _refuse_what_has_no_place(config)
    fields = FIELDS | (MLA_FIELDS if config.is_mla else GQA_FIELDS)
    values = config.model_dump(exclude_none=True)
    data = {theirs: values[ours] for theirs, ours in fields.items() if ours in values}
    data["vocab_size"] = config.vocab_size
    data["block_count"] = config.num_hidden_layers + config.num_nextn_predict_layers
    if not config.num_nextn_predict_layers:
        del data["nextn_predict_layers"]
    if config.is_mla:
        rank, rope = config.kv_lora_rank or 0, config.rope_dim
        data["attention.q_lora_rank"] = config.q_lora_rank or 0
        data |= {"attention.head_count_kv": 1, "attention.key_length": rank + rope, "attention.value_length": rank}
        data["attention.key_length_mla"] = (config.qk_nope_head_dim or 0) + rope
        data["attention.value_length_mla"] = config.v_head_dim
    else:
        data |= dict.fromkeys(
            ("attention.key_length", "attention.value_length", "rope.dimension_count"), config.rope_dim
        )
    if config.n_routed_experts is not None:
        data |= {theirs: values[ours] for theirs, ours in EXPERT_FIELDS.items() if ours in values}
        data["expert_gating_func"] = SIGMOID if config.scoring_func == "sigmoid" else SOFTMAX
        data["expert_shared_count"] = config.n_shared_experts or 1
        if not limits_groups(config):
            del data["expert_group_count"], data["expert_group_used_count"]
    elif config.is_mla:  # the loader of deepseek2 asks for these even where every layer is dense
        data |= {"leading_dense_block_count": data["block_count"], "expert_shared_count": 0}
        data["expert_feed_forward_length"] = config.intermediate_size
    data |= _rope_scaling(config)
    architecture = config.family.gguf_architecture
    whole = {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in data.items()}
    if config.n_routed_experts is not None and not config.n_shared_experts:
        whole[NO_SHARED_EXPERT] = True
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        whole[ROPE_SCALING] = config.rope_scaling.model_dump_json(exclude_defaults=True)
    return whole


def limits_groups(config: ModelConfig) -> bool:
    """Whether the choice of experts depends on their groups: not if all groups are kept, or each is one expert."""
    grouped = config.topk_method != "greedy" and config.topk_group < config.n_group
    return grouped and config.n_group != config.n_routed_experts


def departures(config: ModelConfig) -> list[str]:
    """Where llama.cpp computes something else than this model, as sentences for the user."""
    found = []
    if limits_groups(config) and config.topk_method == "group_limited_greedy":
        found.append(
            "llama.cpp scores a group of experts by its two best, DeepSeek-V2 by its best one: some tokens will meet "
            "other experts there."
        )
    if config.sliding_window is not None:
        found.append(
            f"llama.cpp attends to all tokens where this model sees the last {config.sliding_window}: beyond that "
            "length its answers differ."
        )
    return found


def _refuse_what_has_no_place(config: ModelConfig) -> None:
    rope = config.rope_scaling
    kind = "" if rope is None else rope.rope_type
    architecture = config.family.gguf_architecture
    mscales = set() if rope is None or not config.is_mla else {rope.mscale or 1.0, rope.mscale_all_dim or 0.0}
    usual_width = config.rope_dim * config.num_attention_heads == config.hidden_size
    no_place = {
        "head_dim other than hidden_size / num_attention_heads": architecture in ("qwen2", "deepseek")
        and not usual_width,
        "attention_bias": config.attention_bias and (config.is_mla or architecture == "qwen3"),
        "mlp_bias": config.mlp_bias and architecture != "llama",
        "moe_layer_freq other than 1": config.n_routed_experts is not None and config.moe_layer_freq != 1,
        "norm_topk_prob": architecture == "deepseek" and bool(config.norm_topk_prob),
        "scoring_func 'sigmoid'": architecture == "deepseek" and config.scoring_func == "sigmoid",
        "rope_scaling 'llama3'": kind == "llama3" and architecture != "llama",
        "rope_scaling 'linear'": kind == "linear" and architecture == "deepseek2",  # there it changes the scale as well
        "truncate=False in rope_scaling": kind == "yarn" and rope is not None and not rope.truncate,
        "attention_factor in rope_scaling": config.is_mla and rope is not None and rope.attention_factor is not None,
        "mscale other than mscale_all_dim in rope_scaling": kind == "yarn" and len(mscales) > 1,
    }
    refused = [what for what, found in no_place.items() if found]
    if refused:
        raise ValueError(
            f"llama.cpp's {architecture} models have no place for {', '.join(refused)}, which this model has"
        )


def _rope_scaling(config: ModelConfig) -> dict[str, Any]:
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


def rope_factors(config: ModelConfig) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """The tensor by which llama.cpp divides the frequencies of Llama 3.1; None where there is no such scaling."""
    if config.rope_scaling is None or config.rope_scaling.rope_type != "llama3":
        return None
    plain = frequencies(config.model_copy(update={"rope_scaling": None}))[0]
    return (plain / frequencies(config)[0]).numpy()


def config_of(file: GGUFFile) -> ModelConfig:
    """The ModelConfig that a file's metadata and tensors amount to.

    Raises:
        ValueError: another architecture than those in `families/`, or a model that this version cannot build.
    """
    metadata, tensors = file.metadata, file.tensors
    architecture = metadata.get("general.architecture")
    known = sorted({family.gguf_architecture for family in FAMILIES.values()})
    if metadata.get("split.count", 0) not in (0, 1):
        raise ValueError(
            f"{file.path} is one part of a model in {metadata['split.count']} files; join them with llama.cpp's "
            "llama-gguf-split --merge."
        )
    if architecture not in known:
        raise ValueError(
            f"{file.path} holds a {shortened(architecture)} model; readable from GGUF are {', '.join(known)}."
        )
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{file.path} is not a whole GGUF file (token_embd.weight is missing); fetch it again.")

    for key in REQUIRED:
        if f"{architecture}.{key}" not in metadata:
            raise ValueError(f"{file.path} does not state {architecture}.{key}, as every model does; fetch it again.")

    def get(key: str, default: Any = None) -> Any:
        return _shortest(metadata.get(f"{architecture}.{key}", default))

    mla, experts = get("attention.kv_lora_rank") is not None, bool(get("expert_count"))
    if experts and architecture in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"{file.path} holds a {architecture!r} model with experts (Mixtral), which cannot be read.")
    fields = FIELDS | (MLA_FIELDS if mla else GQA_FIELDS) | (EXPERT_FIELDS if experts else {})
    data = {ours: get(theirs) for theirs, ours in fields.items() if f"{architecture}.{theirs}" in metadata}
    data |= {ours: metadata[theirs] for theirs, ours in TOKEN_IDS.items() if theirs in metadata}
    data["model_type"] = _model_type(file, str(architecture))
    data["num_hidden_layers"] = _difference(get("block_count"), get("nextn_predict_layers", 0))
    data["vocab_size"] = tensors["token_embd.weight"].shape[0]
    data["tie_word_embeddings"] = "output.weight" not in tensors
    if FAMILIES[data["model_type"]].qkv_bias is None:
        data["attention_bias"] = "blk.0.attn_q.bias" in tensors
    data["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if mla:
        data["q_lora_rank"] = data.get("q_lora_rank") or None
        data["v_head_dim"] = get("attention.value_length_mla", get("attention.value_length"))
        key_length = get("attention.key_length_mla", get("attention.key_length"))
        data["qk_nope_head_dim"] = _difference(key_length, get("rope.dimension_count"))
    if experts:
        data["topk_method"] = "group_limited_greedy" if get("expert_group_count", 0) else "greedy"
        data["norm_topk_prob"] = bool(get("expert_weights_norm"))
        data["n_shared_experts"] = 0 if metadata.get(NO_SHARED_EXPERT) is True else data.get("n_shared_experts")
        data["routed_scaling_factor"] = data.get("routed_scaling_factor") or None  # 0 stands for none
        data["n_group"], data["topk_group"] = data.get("n_group") or None, data.get("topk_group") or None
    data["rope_scaling"] = _read_rope_scaling(file, mla)
    config = config_from({"sliding_window": None} | data, file.path)
    if not mla:
        config = config.model_copy(update={"head_dim": config.rope_dim})
    if get("rope.dimension_count", config.rope_dim) != config.rope_dim:
        raise ValueError(f"{file.path} rotates only part of each head, which this version cannot do.")
    if get("attention.value_length", config.rope_dim) != config.rope_dim and not mla:
        raise ValueError(f"{file.path} has values of another width than keys, which this version cannot do.")
    return _with_llama3_scaling(config, file) if ROPE_FACTORS in tensors else config


def _model_type(file: GGUFFile, architecture: str) -> str:
    """Hugging Face's family: some share one architecture in GGUF."""
    if architecture == "llama":
        return "mistral" if "llama.attention.sliding_window" in file.metadata else "llama"
    if architecture == "deepseek2":
        sigmoid = file.metadata.get("deepseek2.expert_gating_func") == SIGMOID
        return "deepseek_v3" if sigmoid or any("exp_probs_b" in name for name in file.tensors) else "deepseek_v2"
    return architecture


def _difference(whole: object, part: object) -> int | None:
    return whole - part if isinstance(whole, int) and isinstance(part, int) else None


def _read_rope_scaling(file: GGUFFile, mla: bool) -> dict[str, Any] | None:
    prefix = f"{file.metadata['general.architecture']}.rope.scaling."
    data = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    kind = data.get("type", "none")
    if kind == "none" or ROPE_FACTORS in file.tensors:
        return None
    scaling = {"type": kind, "factor": _shortest(data.get("factor"))}
    if kind == "linear":
        return scaling
    if kind != "yarn":
        raise ValueError(
            f"{file.path} stretches its rotary frequencies by {shortened(kind)}, which cannot be read from GGUF."
        )
    scaling["original_max_position_embeddings"] = data.get("original_context_length")
    for name in ("beta_fast", "beta_slow"):
        scaling |= {name: _shortest(data[f"yarn_{name}"])} if f"yarn_{name}" in data else {}
    log_multiplier, factor = data.get("yarn_log_multiplier"), data.get("attn_factor")
    if mla and isinstance(log_multiplier, float) and log_multiplier:
        mscale = round(log_multiplier / 0.1, 6)
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    if not mla and isinstance(factor, float) and isinstance(scaling["factor"], float):
        scaling["attention_factor"] = round(factor * yarn_temperature(scaling["factor"], 1.0), 6)
    return scaling


def _shortest(value: Any) -> Any:
    """For a float the shortest decimal with the same float32: 1e-05 was stored as 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _with_llama3_scaling(config: ModelConfig, file: GGUFFile) -> ModelConfig:
    """Llama 3.1's scaling is stored as the factors themselves; they must be those of the parameters stated beside
    them, or of the published ones."""
    factors = torch.from_numpy(file.tensor(ROPE_FACTORS))
    plain = frequencies(config)[0]
    stated = file.metadata.get(ROPE_SCALING)
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
