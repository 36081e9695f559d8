"""A pipeline small enough for a test: every stage a few steps of a model of a few thousand parameters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luciola import hardware
from luciola.recipe import PipelineRecipe, check
from luciola.run import curves

SHAPE: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "kv_lora_rank": 8,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6, "initializer_range": 0.15,
}  # fmt: skip
SUMS: dict[str, Any] = {
    "name": "arithmetic", "max_value": 4, "phrasing": "symbols", "answer_form": "last_number",
    "held_out_fraction": 0.3,
}  # fmt: skip
BASE: dict[str, Any] = {
    "steps": 40,
    "run": {"checkpoint_every": 20},
    "model": {"config": SHAPE},
    "tokenizer": {"kind": "characters", "alphabet": "0123456789+-=? "},
    "data": {"batch_size": 16, "sequence_length": 40, "error_rate": 0.3},
    "optim": {"lr": 1e-2},
}
SFT: dict[str, Any] = {"steps": 4, "data": {"batch_size": 4, "sequence_length": 40}, "optim": {"lr": 1e-3}}
RL: dict[str, Any] = {
    "rollout": {"prompts": 4, "group_size": 4, "max_tokens": 12},
    "grpo": {"steps": 3},
    "optim": {"lr": 1e-3},
    "evaluate": {"problems": 4, "samples": 0},
}
TINY: dict[str, Any] = {
    "dtype": "float32",
    "task": {"name": "mixture", "parts": {"sums": SUMS, "differences": SUMS | {"operations": ["-"]}}},
    "evaluate": {"problems": 8, "max_tokens": 12},
    "base": BASE,
    "cold_start": SFT,
    "reasoning_rl": RL | {"task": SUMS},
    "rejection": {
        "steps": 3,
        "rollout": {"prompts": 4, "group_size": 4, "max_tokens": 12},
        "select": {"well_formed": False},
        "general": {"rows": 3, "task": SUMS},
    },
    "sft": SFT,
    "rl_all": RL,
    "student_base": BASE | {"model": {"config": SHAPE | {"hidden_size": 16}}},
    "distill": SFT,
    "student_rl": RL,
}


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., PipelineRecipe]:
    """`tiny(name, stage={...} ...)`: the small pipeline with some tables replaced, or left out (None)."""

    def make(name: str = "tiny", **changes: Any) -> PipelineRecipe:
        run = {"name": name, "folder": str(tmp_path), "checkpoint_every": 1}
        settings = {"run": run} | TINY | changes
        return check(PipelineRecipe, json.loads(json.dumps({k: v for k, v in settings.items() if v is not None})), "t")

    return make


@pytest.fixture(autouse=True)
def _only_what_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage would measure the peak behind `mfu` and draw its curves; not in these."""
    monkeypatch.setattr(hardware, "gemm_peak", lambda dtype: 1e12)
    monkeypatch.setattr(curves, "draw", lambda *_, **__: None)
