"""The peft library computes the same from an adapter of ours, and ours from one of peft's."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import luciola
from luciola.model.language_model import LanguageModel
from luciola.model.lora import Lora
from luciola.recipe import LoraSection
from luciola.weights import peft as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 2, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "initializer_range": 0.2,
}  # fmt: skip
TOKENS = torch.randint(48, (2, 11), generator=torch.Generator().manual_seed(0))


def theirs(base: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.mark.parametrize("shape", [LLAMA, V3], ids=["llama", "deepseek_v3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_ours_and_computes_the_same(shape: dict[str, Any], rslora: bool, tmp_path: Path) -> None:
    LanguageModel.create(shape).save(tmp_path / "base")
    lm = luciola.load(tmp_path / "base")
    lora = Lora(lm.model, LoraSection(rank=4, alpha=6.0, rslora=rslora), 0, str(tmp_path / "base"))
    plain = lm.model(TOKENS).detach()
    with torch.no_grad():
        for matrix in lora.matrices.values():
            matrix.B_OR.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    lora.merge()
    (tmp_path / "adapter").mkdir()
    ours.save(lora, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "adapter")
    loaded = {name for name, p in model.named_parameters() if "lora_B" in name and p.any()}
    assert len(loaded) == len(lora.matrices), "peft has found a place for every adapter"
    with torch.no_grad():
        adapted, unmerged = lm.model(TOKENS), model(TOKENS).logits
        assert (adapted - plain).abs().max() > 0.1
        torch.testing.assert_close(adapted, unmerged, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapted, model.merge_and_unload()(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [LLAMA, V3], ids=["llama", "deepseek_v3"])
def test_ours_loads_pefts_and_computes_the_same(shape: dict[str, Any], tmp_path: Path) -> None:
    LanguageModel.create(shape).save(tmp_path / "base")
    settings = peft.LoraConfig(
        r=3, lora_alpha=7, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False, use_rslora=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(theirs(tmp_path / "base"), settings).eval()
        model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        adapted = luciola.load(tmp_path / "adapter").model(TOKENS)
        torch.testing.assert_close(adapted, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
        assert (adapted - luciola.load(tmp_path / "base").model(TOKENS)).abs().max() > 0.1
