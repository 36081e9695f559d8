"""What a model file holds, told from its headers: sizes, types, tokenizer, chat template; no weights are read."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from luciola.model.config import ModelConfig
from luciola.model.transformer import Transformer
from luciola.text.tokenizer import Tokenizer
from luciola.weights.checkpoint import Blank, Checkpoint

EXAMPLE = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\n2"},
    {"role": "user", "content": "And twice that?"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiply two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}


def inspect(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts about a checkpoint as plain JSON values; None where something does not apply.

    `parameters` counts the main model, `active_parameters` those that one token meets, `mtp_parameters` what
    multi-token prediction adds. `cache` is what one token leaves in the engine's cache. `tensors` are sorted by size.
    """
    config = checkpoint.config
    with torch.device("meta"), Blank(torch.float32):
        model = Transformer(config)
    total, active = model.num_parameters(), model.num_parameters(active=True)
    mtp = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("mtp."))
    sizes: Counter[str] = Counter()
    for stored in checkpoint.stored.values():
        sizes[stored.kind] += stored.nbytes
    numbers = config.cached_per_token_and_layer * config.num_hidden_layers
    tensors = sorted(checkpoint.stored.items(), key=lambda item: -item[1].nbytes)
    return {
        "path": str(checkpoint.path),
        "format": {"hf": "Hugging Face folder", "gguf": "GGUF file"}[checkpoint.format],
        "adapted": f"{len(checkpoint.changes)} matrices by LoRA" if checkpoint.changes else None,
        "family": config.model_type,
        "architecture": config.family.architecture,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "attention": _attention(config),
        "feed_forward": _feed_forward(config),
        "context": config.max_position_embeddings,
        "rope": _rope(config),
        "parameters": total,
        "active_parameters": active,
        "mtp_parameters": mtp or None,
        "types": {kind: f"{nbytes:,} bytes" for kind, nbytes in sizes.most_common()},
        "cache": {
            "numbers_per_token": numbers,
            "bytes_per_token_bfloat16": 2 * numbers,
            "bytes_per_token_float32": 4 * numbers,
        },
        **_tokenizer(checkpoint.load_tokenizer(), config),
        "tensors": [
            {"name": name, "shape": list(stored.shape), "kind": stored.kind, "bytes": stored.nbytes}
            for name, stored in tensors
        ],
    }


def _attention(config: ModelConfig) -> str:
    heads = config.num_attention_heads
    if config.is_mla:
        queries = f", queries {config.q_lora_rank}" if config.q_lora_rank else ""
        return f"MLA, {heads} heads, latent {config.kv_lora_rank} + rotary key {config.rope_dim}{queries}"
    window = "" if config.sliding_window is None else f", window {config.sliding_window}"
    return f"GQA, {heads} query heads, {config.num_key_value_heads} key heads of {config.rope_dim}{window}"


def _feed_forward(config: ModelConfig) -> str:
    dense = f"SwiGLU of {config.intermediate_size}"
    if config.n_routed_experts is None:
        return dense
    experts = (
        f"{config.n_routed_experts} experts of {config.moe_intermediate_size}, {config.num_experts_per_tok} a token, "
        f"{config.n_shared_experts} shared, {config.scoring_func} gate"
    )
    first = next((n for n in range(config.num_hidden_layers) if config.is_moe_layer(n)), config.num_hidden_layers)
    return f"{experts}; before layer {first} {dense}" if first else experts


def _rope(config: ModelConfig) -> str:
    scaling = config.rope_scaling
    stretched = "" if scaling is None else f", {scaling.rope_type} x {scaling.factor:g}"
    return f"theta {config.rope_theta:g}{stretched}"


def _tokenizer(tokenizer: Tokenizer | None, config: ModelConfig) -> dict[str, Any]:
    if tokenizer is None:
        return {"tokenizer": None, "chat_template": None, "chat_example": None}

    def named(*ids: int | None) -> str | None:
        known = [token_id for token_id in ids if token_id is not None]
        return ", ".join(f"{n} {tokenizer.decode([n], skip_special_tokens=False)!r}" for n in known) or None

    facts = {
        "tokens": tokenizer.vocab_size,
        "rows_without_token": config.vocab_size - tokenizer.vocab_size,
        "bos": named(tokenizer.bos_token_id),
        "eos": named(*tokenizer.eos_token_ids),
        "padding": named(tokenizer.pad_token_id),
    }
    if tokenizer.chat_template is None:
        return {"tokenizer": facts, "chat_template": None, "chat_example": None}
    try:
        example = tokenizer.render(EXAMPLE)
        facts["tools_in_template"] = _takes_tools(tokenizer, example)
    except ValueError as error:
        example = f"cannot be rendered: {error}"
    return {"tokenizer": facts, "chat_template": tokenizer.chat_template, "chat_example": example}


def _takes_tools(tokenizer: Tokenizer, without: str) -> bool:
    try:
        return tokenizer.render(EXAMPLE, tools=[TOOL]) != without
    except ValueError:
        return False
