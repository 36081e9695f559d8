"""What llama.cpp cannot compute, which is refused before anything is written, and what it computes differently."""

from __future__ import annotations

import json

from luciola.model.config import ModelConfig
from luciola.text.tokenizer import Tokenizer

# Depths by which llama.cpp's deepseek2 takes a model for one without query compression, whatever the file says.
LITE_DEPTHS = (26, 27)


def limits_groups(config: ModelConfig) -> bool:
    """Whether the choice of experts depends on their groups: not if all groups are kept, or each is one expert."""
    grouped = config.topk_method != "greedy" and config.topk_group < config.n_group
    return grouped and config.n_group != config.n_routed_experts


def departures(config: ModelConfig, tokenizer: Tokenizer | None = None) -> list[str]:
    """Where llama.cpp computes something else than this model or tokenizer, as sentences for the user."""
    found = []
    state = {} if tokenizer is None else json.loads(tokenizer.backend.to_str())
    if state.get("normalizer") == {"type": "NFC"}:
        found.append("llama.cpp does not compose accents: text in which they stand apart gets other tokens there.")
    if (state.get("pre_tokenizer") or {}).get("type") == "Metaspace":
        found.append("llama.cpp puts a space after special tokens and before a leading one; this tokenizer does not.")
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


def refuse_what_has_no_place(config: ModelConfig) -> None:
    """Raises ValueError where llama.cpp would not load the model or silently compute another one."""
    rope = config.rope_scaling
    kind = "" if rope is None else rope.rope_type
    yarn = rope if kind == "yarn" else None
    architecture, depth = config.family.gguf_architecture, config.num_hidden_layers
    no_place = {
        "head_dim other than hidden_size / num_attention_heads": architecture in ("qwen2", "deepseek")
        and config.rope_dim * config.num_attention_heads != config.hidden_size,
        "attention_bias": config.attention_bias and architecture in ("deepseek", "deepseek2", "qwen3"),
        "q_lora_rank in a model of 26 or 27 layers": config.q_lora_rank is not None
        and (depth in LITE_DEPTHS or depth + config.num_nextn_predict_layers in LITE_DEPTHS),
        "moe_layer_freq other than 1": config.n_routed_experts is not None and config.moe_layer_freq != 1,
        "norm_topk_prob": architecture == "deepseek" and config.norm_topk_prob,
        "norm_topk_prob together with routed_scaling_factor": config.scoring_func == "softmax"
        and config.norm_topk_prob
        and config.routed_scaling_factor != 1.0,
        "scoring_func 'sigmoid'": config.model_type != "deepseek_v3" and config.scoring_func == "sigmoid",
        "rope_scaling 'llama3'": kind == "llama3" and architecture != "llama",
        "rope_scaling 'linear'": kind == "linear" and architecture == "deepseek2",  # there it changes the scale as well
        "attention_factor in rope_scaling": config.is_mla and rope is not None and rope.attention_factor is not None,
        "truncate=False in rope_scaling": yarn is not None and not yarn.truncate,
        "beta_fast or beta_slow other than 32 and 1 in rope_scaling": yarn is not None
        and (yarn.beta_fast, yarn.beta_slow) != (32.0, 1.0),
        "mscale other than mscale_all_dim in rope_scaling": yarn is not None
        and config.is_mla
        and (yarn.mscale or 1.0) != (yarn.mscale_all_dim or 0.0),
    }
    refused = [what for what, found in no_place.items() if found]
    if refused:
        raise ValueError(
            f"llama.cpp's {architecture} models have no place for {', '.join(refused)}, which this model has"
        )
