"""A pre-training small enough to be run, killed and run again within a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luciola import hardware
from luciola.recipe import PretrainRecipe, check

TINY: dict[str, Any] = {
    "steps": 12,
    "accumulate": 2,
    "dtype": "float32",
    "task": {"name": "arithmetic", "max_digits": 1},
    "tokenizer": {"kind": "characters", "alphabet": "0123456789+=? \nWhatisCalcuepmH."},
    "data": {"batch_size": 4, "error_rate": 0.1, "packing": "segments", "sequence_length": 80},
    "optim": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 2},
    "model": {
        "config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4,
            "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1,
        },
    },
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., PretrainRecipe]:
    """`recipe(name, key=value ...)`: the tiny recipe with other settings, its run folder in a temporary place."""

    def make(name: str = "tiny", checkpoint_every: int = 3, **changes: Any) -> PretrainRecipe:
        run = {"name": name, "folder": str(tmp_path), "checkpoint_every": checkpoint_every, "keep_checkpoints": 2}
        return check(PretrainRecipe, TINY | {"run": run} | changes, "test")

    return make


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak behind `mfu` is measured anew in every run; not in these."""
    monkeypatch.setattr(hardware, "gemm_peak", lambda dtype: 1e12)
