"""What a GGUF file holds in 8 or 4 bits stays so in memory, and is the same model as in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, LlamaFileType

from luciola.model.config import ModelConfig
from luciola.model.language_model import LanguageModel, load
from luciola.model.quant_layers import QuantExperts, QuantLinear, quantize_model
from luciola.weights import gguf
from luciola.weights.parts import take

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LATENT = {
    "model_type": "deepseek_v3",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 0,
}


def write(path: Path, config: dict[str, object], kind: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("Q4_0", "Q4_1"):  # we write no 4-bit files ourselves
        monkeypatch.setitem(gguf.TYPES, name.lower(), (GGMLQuantizationType[name], LlamaFileType[f"MOSTLY_{name}"]))
    model = LanguageModel.create(ModelConfig.from_hf(config)).model
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    gguf.write(path, model.config, shapes, lambda p: take(state[p.name], p), lambda name: kind, None, "test")
    return path


@pytest.mark.parametrize("config", [LLAMA, LLAMA | {"attention_bias": True}, LATENT], ids=["llama", "bias", "latent"])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_matrices_stay_as_they_are(
    config: dict[str, object], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.gguf", config, kind, monkeypatch)
    floats, quantised = load(path).model, load(path, quantized=True).model
    layers = {name: module for name, module in quantised.named_modules() if isinstance(module, QuantLinear)}
    assert "lm_head" in layers
    assert "layers.0.self_attn.o_proj" in layers
    for name, layer in layers.items():
        assert torch.equal(layer.weight.quantized.dequantize(), floats.get_parameter(f"{name}.weight")), name
    for name, module in quantised.named_modules():
        if isinstance(module, QuantExperts):
            for part in ("gate_up_proj", "down_proj"):
                stack = getattr(module, part).quantized.dequantize()
                assert torch.equal(stack, floats.get_parameter(f"{name}.{part}"))
    assert any(isinstance(module, QuantExperts) for module in quantised.modules()) == (config is LATENT)
    tokens = torch.arange(48).view(2, 24)
    with torch.inference_mode():
        assert torch.allclose(floats(tokens), quantised(tokens), atol=1e-4)


def test_what_is_not_quantised_in_the_file_is_float_and_can_be_quantised_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.gguf", LLAMA | {"intermediate_size": 272}, "q8_0", monkeypatch)  # not whole blocks of 32
    model = load(path, quantized=True).model
    assert isinstance(model.layers[0].mlp.gate_proj, QuantLinear)
    assert isinstance(model.layers[0].mlp.down_proj, torch.nn.Linear)
    after, report = quantize_model(model, 8)
    assert isinstance(after.layers[0].mlp.down_proj, QuantLinear)
    assert [choice.name for choice in report.choices] == [f"layers.{i}.mlp.down_proj.weight" for i in range(2)]


def test_damaged_scales_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", LLAMA, "q8_0", monkeypatch)
    info = gguf.GGUFFile(path).tensors["blk.1.ffn_up.weight"]
    content = bytearray(path.read_bytes())
    content[info.start : info.start + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: tensor blk\.1\.ffn_up\.weight"):
        load(path, quantized=True)


def test_a_quantised_model_is_not_saved_as_if_it_were_whole(tmp_path: Path) -> None:
    model, _ = quantize_model(LanguageModel.create(ModelConfig.from_hf(LLAMA | {"hidden_size": 256})).model, 8)
    with pytest.raises(ValueError, match="save the one that it was made from"):
        LanguageModel(model).save(tmp_path / "model")
