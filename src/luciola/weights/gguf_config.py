"""A model's configuration as GGUF metadata, in both directions.

llama.cpp's keys begin with the architecture, "deepseek2.embedding_length"; the tables below leave that out. What a GGUF
file has no key for and cannot do without is refused when writing rather than left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luciola.model.config import ModelConfig
from luciola.text.untrusted import shortened
from luciola.weights.checkpoint import config_from
from luciola.weights.families import FAMILIES
from luciola.weights.families.windows import FULL, SLIDING
from luciola.weights.gguf_file import GGUFFile
from luciola.weights.gguf_limits import limits_groups, refuse_what_has_no_place
from luciola.weights.gguf_rope import (
    FACTORS,
    PARAMETERS,
    metadata_of_scaling,
    read_scaling,
    shortest,
    with_llama3_scaling,
)

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
LAYER_TYPES = "luciola.layer_types"  # which of Qwen's layers have the window; llama.cpp has no place for it


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    """The metadata of a model with this configuration: plain int, float, bool and str values.

    Raises:
        ValueError: llama.cpp's form of this family has no place for something; one sentence names the field.
    """
    refuse_what_has_no_place(config)
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
    data |= metadata_of_scaling(config)
    architecture = config.family.gguf_architecture
    whole = {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in data.items()}
    if config.n_routed_experts is not None and not config.n_shared_experts:
        whole[NO_SHARED_EXPERT] = True
    if config.sliding_window is not None:
        windows = (config.window(layer) is not None for layer in range(config.num_hidden_layers))
        whole[LAYER_TYPES] = [SLIDING if window else FULL for window in windows]
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        whole[PARAMETERS] = config.rope_scaling.model_dump_json(exclude_defaults=True)
    return whole


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
        return shortest(metadata.get(f"{architecture}.{key}", default))

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
        data |= _read_experts(data, metadata, get("expert_group_count", 0))
    data |= _read_windows(file, data)
    data["rope_scaling"] = read_scaling(file, mla)
    config = config_from(dict.fromkeys(FAMILIES[data["model_type"]].defaults) | data, file.path)
    if get("rope.dimension_count", config.rope_dim) != config.rope_dim:
        raise ValueError(f"{file.path} rotates only part of each head, which this version cannot do.")
    if get("attention.value_length", config.rope_dim) != config.rope_dim and not mla:
        raise ValueError(f"{file.path} has values of another width than keys, which this version cannot do.")
    config = config if mla else config.model_copy(update={"head_dim": config.rope_dim})
    return with_llama3_scaling(config, file) if FACTORS in tensors else config


def _read_experts(data: Mapping[str, Any], metadata: Mapping[str, Any], groups: object) -> dict[str, Any]:
    """What llama.cpp says otherwise than a config.json: zeros for what is absent, and how experts are chosen."""
    return {
        "topk_method": "group_limited_greedy" if groups else "greedy",
        "norm_topk_prob": bool(data.get("norm_topk_prob")),
        "n_shared_experts": 0 if metadata.get(NO_SHARED_EXPERT) is True else data.get("n_shared_experts"),
        "routed_scaling_factor": data.get("routed_scaling_factor") or None,
        "n_group": data.get("n_group") or None,
        "topk_group": data.get("topk_group") or None,
    }


def _read_windows(file: GGUFFile, data: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's layers have the window that this project has written, and none in files by others, as in llama.cpp."""
    types = file.metadata.get(LAYER_TYPES)
    if not data["model_type"].startswith("qwen"):
        return {}
    return {"sliding_window": None} if types is None else {"use_sliding_window": True, "layer_types": types}


def _model_type(file: GGUFFile, architecture: str) -> str:
    """Hugging Face's family: some share one architecture in GGUF."""
    if architecture == "llama":
        return "mistral" if "llama.attention.sliding_window" in file.metadata else "llama"
    if architecture == "deepseek2":
        function = file.metadata.get("deepseek2.expert_gating_func", 0)
        biased = any("exp_probs_b" in name for name in file.tensors)
        return "deepseek_v3" if function == SIGMOID or (not function and biased) else "deepseek_v2"
    return architecture


def _difference(whole: object, part: object) -> int | None:
    return whole - part if isinstance(whole, int) and isinstance(part, int) else None
