"""Adapters as files: what was trained comes back bit for bit, and what is damaged or foreign is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import luciola
from luciola.model.language_model import LanguageModel
from luciola.model.lora import Lora
from luciola.recipe import LoraSection
from luciola.text.tokenizer import Tokenizer
from luciola.weights import peft
from luciola.weights.convert import convert
from luciola.weights.opening import open_checkpoint

MOE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 8,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12, "n_shared_experts": 1, "first_k_dense_replace": 1, "initializer_range": 0.2,
}  # fmt: skip
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tokenizer = Tokenizer.characters("0123456789+= ")
    LanguageModel.create(MOE | {"vocab_size": tokenizer.vocab_size}, tokenizer).save(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return adapter_of(base, tmp_path / "adapter", 0)[0]


def adapter_of(base: Path, folder: Path, seed: int) -> tuple[Path, LanguageModel]:
    """An adapter's folder, and the model that it was saved from."""
    lm = luciola.load(base)
    lora = Lora(lm.model, LoraSection(rank=3, alpha=5.0, rslora=seed % 2 == 1), seed, str(base))
    with torch.no_grad():
        for matrix in lora.matrices.values():
            matrix.B_OR.copy_(matrix.A_RI.mean() * torch.arange(matrix.B_OR.numel()).view_as(matrix.B_OR).cos())
    lora.merge()
    folder.mkdir()
    peft.save(lora, lm.config, folder)
    return folder, lm


def same(a: LanguageModel, b: LanguageModel) -> None:
    theirs = dict(b.model.named_parameters())
    for name, parameter in a.model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize("seed", [0, 1])
def test_an_adapter_comes_back_merged_to_the_same_bits(base: Path, tmp_path: Path, seed: int) -> None:
    folder, trained = adapter_of(base, tmp_path / "new", seed)
    loaded = luciola.load(folder)
    same(loaded, trained)
    assert loaded.tokenizer is not None
    assert not torch.equal(
        loaded.model.layers[0].mlp.down_proj.weight, luciola.load(base).model.layers[0].mlp.down_proj.weight
    )  # type: ignore[union-attr]


def test_converted_and_saved_it_is_a_whole_model(adapter: Path, tmp_path: Path) -> None:
    merged = luciola.load(adapter)
    convert(open_checkpoint(adapter), tmp_path / "converted", "hf")
    merged.save(tmp_path / "saved")
    for folder in ("converted", "saved"):
        same(luciola.load(tmp_path / folder), merged)
        assert luciola.load(tmp_path / folder).tokenizer is not None
        assert not (tmp_path / folder / peft.CONFIG).exists()
    convert(open_checkpoint(adapter), tmp_path / "converted.gguf", "gguf", "f32")
    same(luciola.load(tmp_path / "converted.gguf"), merged)


def test_an_adapter_on_an_adapter(adapter: Path, tmp_path: Path) -> None:
    folder, trained = adapter_of(adapter, tmp_path / "second", 1)
    same(luciola.load(folder), trained)


def test_in_bfloat16_the_sum_is_rounded_once(adapter: Path) -> None:
    exact, rounded = luciola.load(adapter), luciola.load(adapter, dtype="bfloat16")
    for (name, a), (_, b) in zip(exact.model.named_parameters(), rounded.model.named_parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b), name


def test_an_adapter_of_single_experts_reaches_them(adapter: Path, base: Path) -> None:
    """peft on a model whose experts are modules of their own writes such names."""
    A, B = torch.randn(3, 16), torch.randn(12, 3)
    name = "base_model.model.model.layers.1.mlp.experts.2.up_proj"
    save_file({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, adapter / peft.WEIGHTS)
    before, after = (luciola.load(x).model.layers[1].mlp.experts.gate_up_proj for x in (base, adapter))  # type: ignore[union-attr]
    expected = before.detach().clone()
    expected[2, 12:] += 5.0 / 3 * B @ A
    torch.testing.assert_close(after.detach(), expected)
    assert torch.equal(after[:2], before[:2])


def test_quantised_matrices_that_are_adapted_are_float32(adapter: Path, base: Path, tmp_path: Path) -> None:
    convert(open_checkpoint(base), tmp_path / "base.gguf", "gguf", "q8_0")
    change(adapter, **{peft.BASE: str(tmp_path / "base.gguf")})
    kept = luciola.load(adapter, quantized=True).model
    assert torch.equal(
        kept.layers[0].mlp.up_proj.weight,  # type: ignore[union-attr]
        luciola.load(adapter).model.layers[0].mlp.up_proj.weight,  # type: ignore[union-attr]
    )


def change(adapter: Path, **keys: Any) -> None:
    config = json.loads((adapter / peft.CONFIG).read_text())
    (adapter / peft.CONFIG).write_text(json.dumps(config | keys))


def tensors(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    found = load_file(adapter / peft.WEIGHTS)
    edit(found)
    save_file(found, adapter / peft.WEIGHTS)


def flip(adapter: Path) -> None:
    content = bytearray((adapter / peft.WEIGHTS).read_bytes())
    content[-1] ^= 1
    (adapter / peft.WEIGHTS).write_bytes(content)


A_NAME, B_NAME = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"
FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda a: change(a, peft_type="IA3"), "peft_type is 'IA3'; adapters are read from 'LORA'"),
    (lambda a: change(a, use_dora=True), "'use_dora' = True is not supported; merge the adapter into its base"),
    (lambda a: change(a, modules_to_save=["lm_head"]), "'modules_to_save' = .'lm_head'. is not supported"),
    (lambda a: change(a, rank_pattern={"q_proj": 8}), "'rank_pattern' = .* is not supported"),
    (lambda a: change(a, init_lora_weights="pissa"), "init_lora_weights = 'pissa' changes the base as well"),
    (lambda a: change(a, r=0), "r must be a whole number, at least 1, not 0"),
    (lambda a: change(a, lora_alpha="16"), "lora_alpha must be a positive number, not '16'"),
    (lambda a: change(a, **{peft.BASE: None}), f"{peft.BASE} must name the model"),
    (
        lambda a: change(a, **{peft.BASE: "gone"}),
        "belongs to the base 'gone', which cannot be opened: gone does not exist",
    ),
    (lambda a: change(a, r=2), r"lora_A of .* has the rank 3, and adapter_config.json says r = 2; put the r"),
    (lambda a: (a / peft.CONFIG).write_text("{"), "is not valid JSON"),
    (lambda a: (a / peft.WEIGHTS).unlink(), f"has adapter_config.json and no {peft.WEIGHTS}"),
    (lambda a: (a / peft.WEIGHTS).write_bytes(b"12345678901"), "is not a whole safetensors file"),
    (flip, "is damaged: tensor .* is not as it was written"),
    (lambda a: tensors(a, lambda t: t.pop(A_NAME)), "has lora_B alone, and needs lora_A and lora_B"),
    (lambda a: tensors(a, lambda t: t[A_NAME].fill_(torch.nan)), "is damaged: lora_A of .*q_proj is not finite"),
    (lambda a: tensors(a, lambda t: t.update({A_NAME: torch.ones(2, 16)})), r"lora_A \[2, 16\] and lora_B \[16, 3\]"),
    (lambda a: tensors(a, lambda t: t.update({"x.lora_A.weight": torch.ones(1)})), "'x.lora_A.weight' is no part"),
    (
        lambda a: tensors(a, lambda t: t.update({n.replace("s.0", "s.7"): t.pop(n) for n in (A_NAME, B_NAME)})),
        "has no linear layer",
    ),
    (lambda a: save_file({}, a / peft.WEIGHTS), "holds no adapter"),
]


@pytest.mark.parametrize(("damage", "said"), FAULTS, ids=[said[:40] for _, said in FAULTS])
def test_what_is_damaged_or_foreign_is_refused(adapter: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(adapter)
    with pytest.raises(ValueError, match=said):
        luciola.load(adapter)


def test_an_adapter_below_which_there_is_no_base_is_told_in_one_sentence(adapter: Path, tmp_path: Path) -> None:
    copies = [tmp_path / f"copy{i}" for i in range(9)]
    for copy, base in zip(copies, [*copies[1:], adapter], strict=True):
        shutil.copytree(adapter, copy)
        change(copy, **{peft.BASE: str(base)})
    with pytest.raises(ValueError) as too_many:
        luciola.load(copies[0])
    change(copies[1], **{peft.BASE: str(copies[0])})
    change(adapter, **{peft.BASE: str(adapter / ".." / "adapter")})
    for folder in (adapter, copies[0]):
        with pytest.raises(ValueError, match=f"the adapter .*{folder.name} is its own base.*; put the model") as ring:
            luciola.load(folder)
        assert str(ring.value).count(".json") == 1 and "cannot be opened" not in str(ring.value)
    assert "copy0 lies on top of more than 7 others" in str(too_many.value)
    assert "cannot be opened" not in str(too_many.value)


def test_a_pickle_is_not_read(adapter: Path) -> None:
    (adapter / peft.WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="only a pickle, which can run any code and is not read"):
        luciola.load(adapter)
