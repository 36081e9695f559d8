"""Hugging Face folders: what is written comes back exactly, and what is wrong with a folder is said by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from luciola.model.config import ModelConfig
from luciola.model.transformer import Transformer
from luciola.weights import hf, names
from luciola.weights.parts import take

SHAPE = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = ModelConfig(model_type="llama", **SHAPE, num_key_value_heads=1, head_dim=8)
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8}
EXPERTS["first_k_dense_replace"] = 1
V2_LITE = ModelConfig(model_type="deepseek_v2", **SHAPE, **LATENT, **EXPERTS)
V3 = ModelConfig(model_type="deepseek_v3", **SHAPE, **LATENT, **EXPERTS, q_lora_rank=6, num_nextn_predict_layers=2)
TIED = LLAMA.model_copy(update={"tie_word_embeddings": True})
FAMILIES = pytest.mark.parametrize("config", [LLAMA, TIED, V2_LITE, V3], ids=["llama", "tied", "v2-lite", "v3"])


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def load(folder: Path, dtype: torch.dtype | None = None) -> Transformer:
    return hf.open_folder(folder).model(dtype)


def saved(config: ModelConfig, folder: Path, **options: Any) -> Transformer:
    model = random_model(config)
    folder.mkdir(exist_ok=True)
    hf.save(model, folder, **options)
    return model


def assert_same(loaded: Transformer, model: Transformer) -> None:
    assert loaded.config == model.config
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@FAMILIES
def test_round_trip_is_exact(config: ModelConfig, tmp_path: Path) -> None:
    model = saved(config, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "generation_config.json", hf.SINGLE]
    assert_same(load(tmp_path), model)


@FAMILIES
def test_shards_hold_every_tensor_once_and_stay_within_their_limit(config: ModelConfig, tmp_path: Path) -> None:
    model = saved(config, tmp_path, shard_bytes=3000)
    index = json.loads((tmp_path / hf.INDEX).read_text())
    shards = {file: load_file(tmp_path / file) for file in set(index["weight_map"].values())}
    assert len(shards) > 1
    assert {name: file for file, shard in shards.items() for name in shard} == index["weight_map"]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards.values()]
    assert all(size <= 3000 or len(shard) == 1 for size, shard in zip(sizes, shards.values(), strict=True))
    assert sum(sizes) == index["metadata"]["total_size"]
    assert_same(load(tmp_path), model)


@FAMILIES
def test_tensors_on_disk_cover_every_parameter_exactly_once(config: ModelConfig) -> None:
    state = random_model(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    covered = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for place in names.hugging_face(config, shapes_of(state)).values():
        covered[place.name][place.index()] += 1
    assert all(torch.equal(count, torch.ones_like(count)) for count in covered.values())


def test_names_on_disk_are_those_of_the_published_weights(tmp_path: Path) -> None:
    saved(V3, tmp_path)
    with safe_open(tmp_path / hf.SINGLE, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    published = {
        "model.embed_tokens.weight": (29, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (29, 16),
        "model.layers.0.mlp.gate_proj.weight": (24, 16),
        "model.layers.0.self_attn.q_a_proj.weight": (6, 16),
        "model.layers.0.self_attn.q_a_layernorm.weight": (6,),
        "model.layers.0.self_attn.q_b_proj.weight": (16, 6),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (12, 16),
        "model.layers.0.self_attn.kv_b_proj.weight": (20, 8),
        "model.layers.1.mlp.gate.weight": (4, 16),
        "model.layers.1.mlp.gate.e_score_correction_bias": (4,),
        "model.layers.1.mlp.shared_experts.up_proj.weight": (8, 16),
        "model.layers.1.mlp.experts.3.gate_proj.weight": (8, 16),
        "model.layers.1.mlp.experts.0.down_proj.weight": (16, 8),
        "model.layers.2.enorm.weight": (16,),
        "model.layers.2.hnorm.weight": (16,),
        "model.layers.2.eh_proj.weight": (16, 32),
        "model.layers.2.shared_head.norm.weight": (16,),
        "model.layers.3.input_layernorm.weight": (16,),
        "model.layers.3.mlp.experts.3.up_proj.weight": (8, 16),
    }
    assert published.items() <= found.items()


def test_gate_and_up_rows_of_an_expert_keep_their_order(tmp_path: Path) -> None:
    model = saved(V3, tmp_path)
    on_disk = load_file(tmp_path / hf.SINGLE)
    fused = model.state_dict()["layers.1.mlp.experts.gate_up_proj"][2]
    assert torch.equal(on_disk["model.layers.1.mlp.experts.2.gate_proj.weight"], fused[:8])
    assert torch.equal(on_disk["model.layers.1.mlp.experts.2.up_proj.weight"], fused[8:])


def test_dtype_converts_weights_but_not_router_biases(tmp_path: Path) -> None:
    saved(V3, tmp_path)
    half = load(tmp_path, torch.bfloat16)
    for name, tensor in half.state_dict().items():
        assert tensor.dtype == (torch.float32 if name.endswith("correction_bias") else torch.bfloat16), name
    (tmp_path / "half").mkdir()
    hf.save(half, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load(tmp_path / "half").embed_tokens.weight.dtype == torch.float32


def edit_tensors(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / hf.SINGLE)
    edit(tensors)
    save_file(tensors, folder / hf.SINGLE)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(4)
        tensors["model.norm.weight"] = torch.zeros(17)

    saved(V3, tmp_path)
    edit_tensors(tmp_path, edit)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert "model.layers.1.mlp.experts.3.up_proj.weight is missing" in str(error.value)
    assert "model.layers.0.self_attn.q_norm.weight has no place" in str(error.value)
    assert "model.norm.weight should have shape [16] and has [17]" in str(error.value)


def test_copies_in_published_folders_are_passed_over(tmp_path: Path) -> None:
    model = saved(V3, tmp_path)
    copies = {"model.layers.2.embed_tokens.weight": (29, 16), "model.layers.2.shared_head.head.weight": (29, 16)}
    copies["model.layers.0.self_attn.rotary_emb.inv_freq"] = (2,)
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(shape) for name, shape in copies.items()}))
    assert_same(load(tmp_path), model)


def test_mtp_can_be_left_out_by_the_config(tmp_path: Path) -> None:
    saved(V3, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    assert len(load(tmp_path).mtp) == 1


def test_announced_mtp_layers_without_tensors_are_left_out_but_half_a_layer_is_an_error(tmp_path: Path) -> None:
    saved(V3, tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.2.eh_proj.weight"))
    with pytest.raises(ValueError, match=r"model\.layers\.2\.eh_proj\.weight is missing"):
        load(tmp_path)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(("model.layers.2.", "model.layers.3."))]:
            del tensors[name]

    edit_tensors(tmp_path, drop)
    assert load(tmp_path).config.num_nextn_predict_layers == 0


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    saved(LLAMA, tmp_path)
    (tmp_path / hf.SINGLE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only as a pickle.*save_pretrained"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 7])
def test_an_index_may_only_name_files_beside_it(name: object, tmp_path: Path) -> None:
    saved(LLAMA, tmp_path / "inner")
    saved(LLAMA, tmp_path)
    (tmp_path / "inner" / hf.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=r"may only name \.safetensors files beside it"):
        load(tmp_path / "inner")


def test_an_index_which_names_what_is_not_there(tmp_path: Path) -> None:
    saved(LLAMA, tmp_path, shard_bytes=3000)
    index = json.loads((tmp_path / hf.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = {**index["weight_map"], "model.norm.weight": files[0]}
    (tmp_path / hf.INDEX).write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        load(tmp_path)
    (tmp_path / files[0]).unlink()
    with pytest.raises(ValueError, match=f"{files[0]}.* is missing"):
        load(tmp_path)
    (tmp_path / hf.INDEX).write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        load(tmp_path)


def test_a_cut_file_is_a_value_error(tmp_path: Path) -> None:
    saved(LLAMA, tmp_path)
    content = (tmp_path / hf.SINGLE).read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        (tmp_path / hf.SINGLE).write_bytes(content[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            load(tmp_path)


def test_configs_that_cannot_be_built_name_the_field(tmp_path: Path) -> None:
    saved(LLAMA, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def rejected(match: str, **changes: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=match) as error:
            load(tmp_path)
        assert "\n" not in str(error.value)

    rejected("model_type 'mamba' is not supported", model_type="mamba")
    rejected("sliding_window", sliding_window=128)
    rejected("hidden_size", hidden_size=-1)
    rejected("'awq'.*only DeepSeek's 'fp8'", quantization_config={"quant_method": "awq"})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load(tmp_path)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40))
def test_fp8_blocks_are_multiplied_by_their_scales(rows: int, columns: int) -> None:
    block = (16, 8)
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 16), -(-columns // 8))
    values = hf.dequantize_blocks(weight, scales, block)
    for row in range(rows):
        for column in range(columns):
            assert values[row, column] == weight[row, column].float() * scales[row // 16, column // 8]


def test_fp8_folder(tmp_path: Path) -> None:
    model = saved(V3, tmp_path)
    expected: dict[str, torch.Tensor] = {}

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight") and "eh_proj" not in name]:
            scale = torch.full((-(-tensors[name].shape[0] // 128), 1), 0.25)
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            expected[name] = tensors[name].float() * 0.25
            tensors[name + "_scale_inv"] = scale

    edit_tensors(tmp_path, quantize)
    with pytest.raises(ValueError, match="stored in FP8"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(tmp_path)
    state = loaded.state_dict()
    for name, place in names.hugging_face(V3, shapes_of(model.state_dict())).items():
        value = expected.get(name, take(model.state_dict()[place.name], place))
        assert torch.equal(take(state[place.name], place), value), name


def test_eos_ids_of_the_tokenizer_go_into_the_generation_config(tmp_path: Path) -> None:
    def eos() -> object:
        return json.loads((tmp_path / "generation_config.json").read_text()).get("eos_token_id")

    saved(LLAMA, tmp_path)
    assert eos() is None
    saved(LLAMA.model_copy(update={"eos_token_id": 5}), tmp_path)
    assert eos() == 5
    saved(LLAMA, tmp_path, eos_token_ids=[3])
    assert eos() == 3
    saved(LLAMA, tmp_path, eos_token_ids=[3, 4])
    assert eos() == [3, 4]
