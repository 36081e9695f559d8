"""Cache bytes a token and the largest batch that fits: MHA, GQA, MQA and MLA at DeepSeek-V2's size, measured.

The engine's own caches are allocated and written to, row by row until they fill the given memory, each kind in a
process of its own; their storage and the growth of the process's resident memory are read. Weights take no part: a
cache depends on the configuration alone.

DeepSeek-V2 (report, abstract and section 3.2.3) publishes a cache 93.3 % smaller than DeepSeek 67B's and 5.76 times its
generation throughput. Neither is a ratio of MLA to MHA: DeepSeek 67B has grouped queries (8 of 64 heads, 95 layers),
and the V2 that is deployed quantises its cache to 6 bits a number on average. Sixteen bits for both leave 82.2 %; six
against sixteen give 93.3 %. The throughput is of a node of eight GPUs with FP8 weights, where the larger batch is one
cause among several: it can be set beside the batches here, not derived from them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luciola.bench.turns import Step, machine, take_turns
from luciola.engine.cache import PagedCache
from luciola.engine.engine import BLOCK_SIZE
from luciola.model.config import ModelConfig

PEERS: tuple[str, ...] = ()
MEMORY, CONTEXT = 1 << 30, 256  # rows of 256 tokens in 1 GiB, in the proportion of 4,096 tokens in 16 GiB
DEPLOYED_BITS = 6  # of a number in the cache of the DeepSeek-V2 that is deployed; here they are bfloat16

_PLAIN: dict[str, Any] = {"model_type": "llama", "vocab_size": 102_400, "max_position_embeddings": 4096}
_V2_PLAIN = _PLAIN | {
    "hidden_size": 5120,
    "intermediate_size": 12_288,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "head_dim": 128,
}
SHAPES: dict[str, dict[str, Any]] = {
    "MHA": _V2_PLAIN | {"num_key_value_heads": 128},
    "GQA": _V2_PLAIN | {"num_key_value_heads": 8},
    "MQA": _V2_PLAIN | {"num_key_value_heads": 1},
    "MLA": {
        "model_type": "deepseek_v2",
        "vocab_size": 102_400,
        "hidden_size": 5120,
        "intermediate_size": 12_288,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 4096,
    },
    "DeepSeek 67B": _PLAIN
    | {
        "hidden_size": 8192,
        "intermediate_size": 22_016,
        "num_hidden_layers": 95,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def run() -> dict[str, Any]:
    """Bytes a token and largest batch of each kind; MLA's saving and batch against the others' and the published."""
    contenders = {
        kind: (f"{__name__}:measurement", {"shape": shape, "memory": MEMORY, "context": CONTEXT})
        for kind, shape in SHAPES.items()
    }
    said = {kind: turns[0].said for kind, turns in take_turns(contenders, rounds=1, warmup=0).items()}
    storage = {kind: measured["storage_bytes_per_token"] for kind, measured in said.items()}
    batch = {kind: measured["largest_batch"] for kind, measured in said.items()}
    deployed = storage["MLA"] * DEPLOYED_BITS / 16
    return {
        **said,
        "saving": {f"MLA against {kind}": 1 - storage["MLA"] / storage[kind] for kind in SHAPES if kind != "MLA"},
        "saving_at_6_bits": {"MLA against DeepSeek 67B": 1 - deployed / storage["DeepSeek 67B"]},
        "published_saving": {"MLA against DeepSeek 67B": 0.933},
        "batch_ratio": {"MLA against DeepSeek 67B": batch["MLA"] / batch["DeepSeek 67B"]},
        "published_throughput_ratio": {"MLA against DeepSeek 67B": 5.76},
        "batch_memory_bytes": MEMORY,
        "batch_context": CONTEXT,
        **machine(),
    }


def measurement(shape: dict[str, Any], memory: int, context: int) -> Step:
    """A step that measures one kind of cache in this process."""
    config = ModelConfig.model_validate(shape)

    return lambda: fill(config, memory, context)


def allocate(config: ModelConfig, rows: int, columns: int) -> list[Tensor]:
    """The engine's cache in bfloat16, every page of it written to."""
    blocks, layers, cpu = rows * columns // BLOCK_SIZE, config.num_hidden_layers, torch.device("cpu")
    cache = PagedCache(config, layers, blocks, BLOCK_SIZE, rows, torch.bfloat16, cpu)
    return [pool.zero_() for pool in cache.pools]


def fill(config: ModelConfig, memory: int, context: int) -> dict[str, float]:
    """Add rows of `context` tokens until the process has grown by more than `memory` bytes.

    Returns:
        `largest_batch`, the rows that fitted; `storage_bytes_per_token` and `resident_bytes_per_token` of all rows.
    """
    allocate(config, 1, BLOCK_SIZE)  # what a first time takes besides
    before = resident_bytes()
    rows: list[list[Tensor]] = []
    while resident_bytes() - before <= memory:
        rows.append(allocate(config, 1, context))
    tokens = len(rows) * context
    return {
        "storage_bytes_per_token": sum(map(_storage, rows)) / tokens,
        "resident_bytes_per_token": (resident_bytes() - before) / tokens,
        "largest_batch": len(rows) - 1,
    }


def resident_bytes() -> int:
    """Memory of this process that is in RAM now.

    Raises:
        ValueError: the system has no /proc to ask.
    """
    statm = Path("/proc/self/statm")
    if not statm.exists():
        raise ValueError("the cache comparison reads resident memory from /proc, which this system lacks; use Linux")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _storage(tensors: list[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
