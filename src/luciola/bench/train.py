"""Training steps a second of a 12M-parameter V3-style model: luciola and transformers, same weights and data.

Both do the whole step in float32: forward, cross-entropy, backward, clipping, fused AdamW. Neither compiles anything.
"""

from __future__ import annotations

from typing import Any

import torch

from luciola import hardware
from luciola.bench.turns import Step, compare, machine, take_turns
from luciola.model.config import ModelConfig
from luciola.model.flops import training_flops
from luciola.model.transformer import Transformer

PEERS = ("transformers",)
ROUNDS, WARMUP = 12, 3
BATCH, LENGTH = 8, 256

SHAPE: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "initializer_range": 0.02,
}


def run(against: str = PEERS[0]) -> dict[str, Any]:
    """Tokens a second of both, their ratio, and the share of the measured GEMM peak that each reaches."""
    turns = take_turns({"luciola": (f"{__name__}:luciola", {}), against: (f"{__name__}:{against}", {})}, ROUNDS, WARMUP)
    result = compare(turns, "luciola", against)
    model = Transformer(ModelConfig.model_validate(SHAPE))
    tokens = BATCH * LENGTH
    flops = tokens * training_flops(model, LENGTH)
    peak = hardware.gemm_peak("float32")
    for name in ("luciola", against):
        taken = result.pop(f"{name}_seconds")
        result[f"{name}_tokens_per_second"] = tokens / taken
        result[f"{name}_share_of_peak"] = flops / taken / peak
    return {
        **result,
        "gemm_peak_gflops": peak / 1e9,
        "gflop_per_step": flops / 1e9,
        "parameters": model.num_parameters(),
        "active_parameters": model.num_parameters(active=True),
        "batch": BATCH,
        "length": LENGTH,
        **machine(against),
    }


def _tokens() -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def luciola() -> Step:
    """A step of our own loop."""
    from luciola.data.packing import Batch
    from luciola.recipe import PretrainRecipe
    from luciola.train.loop import train_step
    from luciola.train.optim import Optimizer

    recipe = PretrainRecipe.model_validate(
        {
            "run": {"name": "bench"},
            "steps": 10**6,
            "model": {"config": SHAPE},
            "tokenizer": {"kind": "characters"},
            "data": {"source": "files", "paths": ["none"], "sequence_length": LENGTH, "batch_size": BATCH},
            "balance_loss": 0.0,
            "bias_update_speed": 0.0,
        }
    )
    hardware.keep_freed_memory()
    model = Transformer(ModelConfig.model_validate(SHAPE))
    model.initialize(0)
    optimizer = Optimizer(model, recipe.optim)
    tokens = _tokens()
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), None)

    def step() -> None:
        train_step(model, optimizer, [batch], recipe, 0)

    return step


def transformers() -> Step:
    """The same with transformers' own model and loss."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    fields = ModelConfig.model_validate(SHAPE).to_hf()
    fields.pop("architectures")
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**fields)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    tokens = _tokens()

    def step() -> None:
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
