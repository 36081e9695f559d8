"""A GRPO run small enough for a test: answers of one token to sums of small numbers, from a model made in a moment."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luciola import hardware
from luciola.model.language_model import LanguageModel
from luciola.recipe import GrpoRecipe, check
from luciola.text.tokenizer import Tokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 8,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12, "n_shared_experts": 1, "first_k_dense_replace": 1, "initializer_range": 0.15,
}  # fmt: skip
TINY: dict[str, Any] = {
    "dtype": "float32",
    "task": {
        "name": "arithmetic", "max_value": 4, "phrasing": "symbols", "answer_form": "last_number",
        "held_out_fraction": 0.3,
    },
    "rollout": {"prompts": 4, "group_size": 8, "max_tokens": 2},
    "grpo": {"steps": 8},
    "optim": {"lr": 3e-3},
    "evaluate": {"problems": 4, "samples": 2},
}  # fmt: skip


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    """A random model, an untrained policy: about one answer in fifteen is right."""
    tokenizer = Tokenizer.characters("012345678+=? ")
    return LanguageModel.create(SHAPE | {"vocab_size": tokenizer.vocab_size}, tokenizer)


@pytest.fixture
def recipe(lm: LanguageModel, tmp_path: Path) -> Callable[..., GrpoRecipe]:
    """`recipe(name, section={key: value} ...)`: the tiny recipe with some settings changed."""
    lm.save(tmp_path / "start")

    def make(name: str = "tiny", checkpoint_every: int = 2, **changes: dict[str, Any]) -> GrpoRecipe:
        run = {"name": name, "folder": str(tmp_path), "checkpoint_every": checkpoint_every, "keep_checkpoints": 2}
        settings = {"run": run} | TINY | ({} if "base" in changes else {"model": {"path": str(tmp_path / "start")}})
        return check(GrpoRecipe, settings | {k: settings.get(k, {}) | v for k, v in changes.items()}, "test")

    return make


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak behind `mfu` is measured anew in every run; not in these."""
    monkeypatch.setattr(hardware, "gemm_peak", lambda dtype: 1e12)
