"""Counting the arithmetic: matrix-product FLOPs of a training step, the measure behind `mfu`."""

from __future__ import annotations

from luciola.model.config import ModelConfig
from luciola.model.transformer import Transformer


def forward_flops(model: Transformer, length: int, *, mtp: bool = False) -> float:
    """FLOPs of one token's forward pass in rows of `length` tokens: 2 a weight it meets, plus attention.

    Attention is counted causally (a token meets half of its row on average). Embedding look-ups count nothing. With
    `mtp` the multi-token prediction modules and their passes through the head are counted as well.
    """
    config = model.config
    weights = model.num_parameters(active=True)
    if not config.tie_word_embeddings:
        weights -= model.embed_tokens.weight.numel()
    layers = config.num_hidden_layers
    if mtp and model.mtp:
        weights += sum(p.numel() for p in model.mtp.parameters()) - _idle_experts(model)
        weights += len(model.mtp) * model.lm_head.weight.numel()
        layers += len(model.mtp)
    return 2.0 * weights + layers * length / 2 * attention_flops_per_pair(config)


def training_flops(model: Transformer, length: int, *, mtp: bool = False) -> float:
    """Forward and backward: three times the forward pass."""
    return 3.0 * forward_flops(model, length, mtp=mtp)


def attention_flops_per_pair(config: ModelConfig) -> float:
    """FLOPs of one layer for one (query, key) pair, expanded form: q.k and the weighted v over all heads."""
    if config.is_mla:
        widths = (config.qk_nope_head_dim or 0) + config.rope_dim + (config.v_head_dim or 0)
    else:
        widths = 2 * config.rope_dim
    return 2.0 * config.num_attention_heads * widths


def _idle_experts(model: Transformer) -> int:
    """Weights of the MTP modules' routed experts that one token does not meet."""
    config = model.config
    if config.n_routed_experts is None or config.num_experts_per_tok is None:
        return 0
    routed = sum(p.numel() for name, p in model.mtp.named_parameters() if ".experts." in name)
    return routed * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
