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
V2_LITE = V3 | {"model_type": "deepseek_v2", "q_lora_rank": None, "topk_method": "greedy", "norm_topk_prob": False}
TOKENS = torch.randint(48, (2, 11), generator=torch.Generator().manual_seed(0))


def theirs(base: Path) -> Any:
    """The base in transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def exported(shape: dict[str, Any], folder: Path, **section: Any) -> LanguageModel:
    """A base in `folder`/base, and in `folder`/adapter adapters that move every matrix; the model with both."""
    LanguageModel.create(shape).save(folder / "base")
    lm = luciola.load(folder / "base")
    lora = Lora(lm.model, LoraSection(rank=4, alpha=6.0, **section), 0, str(folder / "base"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for matrix in lora.matrices.values():
            matrix.B_OR.normal_(std=0.2, generator=generator)
    lora.merge()
    (folder / "adapter").mkdir()
    ours.save(lora, lm.config, folder / "adapter")
    return lm


def in_peft(folder: Path, **settings: Any) -> Any:
    """What `exported` wrote, as peft loads it; a warning that something found no place is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*(missing adapter keys|did not match|unexpected|no parameter).*")
        return peft.PeftModel.from_pretrained(theirs(folder / "base"), folder / "adapter", **settings)


@pytest.mark.parametrize("shape", [LLAMA, V2_LITE, V3], ids=["llama", "deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_ours_and_computes_the_same(shape: dict[str, Any], rslora: bool, tmp_path: Path) -> None:
    lm = exported(shape, tmp_path, rslora=rslora)
    model = in_peft(tmp_path)
    with torch.no_grad():
        adapted, unmerged = lm.model(TOKENS), model(TOKENS).logits
        assert (adapted - luciola.load(tmp_path / "base").model(TOKENS)).abs().max() > 0.1
        torch.testing.assert_close(adapted, unmerged, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapted, model.merge_and_unload()(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["down_proj"], ["gate_proj", "kv_b_proj"]], ids=str)
def test_single_targets_of_a_model_with_experts_are_those_that_peft_adapts(targets: list[str], tmp_path: Path) -> None:
    """Even feed-forward layers alone, whose names mean the routed experts to peft."""
    lm = exported(V3, tmp_path, target_modules=targets)
    with torch.no_grad():
        torch.testing.assert_close(lm.model(TOKENS), in_peft(tmp_path)(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [LLAMA, V3], ids=["llama", "deepseek_v3"])
def test_peft_goes_on_training_ours_and_we_read_what_it_saves(shape: dict[str, Any], tmp_path: Path) -> None:
    exported(shape, tmp_path, dropout=0.1)
    model = in_peft(tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "trained")
    before, after = (luciola.load(tmp_path / name).model(TOKENS).detach() for name in ("adapter", "trained"))
    assert (before - after).abs().max() > 0.1
    torch.testing.assert_close(after, model(TOKENS).logits.detach(), rtol=1e-4, atol=1e-4)


def created(shape: dict[str, Any], folder: Path, targets: list[str] | str) -> Any:
    """A base in `folder`/base, and in `folder`/adapter adapters that peft made; its model."""
    LanguageModel.create(shape).save(folder / "base")
    settings = peft.LoraConfig(
        r=3, lora_alpha=7, lora_dropout=0.0, target_modules=targets, init_lora_weights=False, use_rslora=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(theirs(folder / "base"), settings).eval()
        model.save_pretrained(folder / "adapter")
    return model


ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


@pytest.mark.parametrize(("shape", "targets"), [(LLAMA, "all-linear"), (V3, ATTENTION)], ids=["llama", "deepseek_v3"])
def test_ours_loads_pefts_and_computes_the_same(
    shape: dict[str, Any], targets: list[str] | str, tmp_path: Path
) -> None:
    model = created(shape, tmp_path, targets)
    with torch.no_grad():
        adapted = luciola.load(tmp_path / "adapter").model(TOKENS)
        torch.testing.assert_close(adapted, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
        assert (adapted - luciola.load(tmp_path / "base").model(TOKENS)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            "all-linear",
            "'alpha_pattern' = .*gate_up_proj.* is not supported; merge the adapter into its base with peft",
        ),
        (["down_proj"], "adapts all routed experts of model.layers.1.mlp.experts at once, which is not supported"),
    ],
    ids=["all-linear", "down_proj"],
)
def test_an_adapter_of_stacked_experts_is_refused(targets: list[str] | str, said: str, tmp_path: Path) -> None:
    created(V3, tmp_path, targets)
    with pytest.raises(ValueError, match=said):
        luciola.load(tmp_path / "adapter")
