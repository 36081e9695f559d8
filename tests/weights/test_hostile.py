"""Model files made to do harm: no wait, no flood of memory, nothing read outside, and a sentence that says why."""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

import luciola
from luciola.text.tokenizer import Tokenizer
from luciola.weights import hf
from luciola.weights.convert import convert
from luciola.weights.gguf_file import GGUFFile
from luciola.weights.opening import open_checkpoint

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = {"model_type": "llama", "vocab_size": 32, **SHAPE}
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    luciola.LanguageModel.create(CONFIG, Tokenizer.characters("0123456789+-*/=() abc")).save(tmp_path / "m")
    return tmp_path / "m"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / hf.SINGLE)
    change(tensors)
    save_file(tensors, folder / hf.SINGLE)


def refused(path: Path, match: str) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=match) as error:
        luciola.load(path)
    assert str(error.value).isprintable()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "evil", "auto_map": {"AutoModel": "x.Y"}}, "asks for code of its own .*which is not run"),
        ({"model_type": ["llama"], "auto_map": {}}, "asks for code of its own"),
        ({"model_type": "x" * 10**6}, r"model_type 'xxx.* \.\.\. is not supported"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: Input should be less than or equal to 1000"),
        ({"vocab_size": 2**31}, "vocab_size: Input should be less than"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 2}, "announced sizes cannot be built"),
        ({"vocab_size": 20}, r"embed_tokens\.weight should have shape \[20, 16\] and has \[32, 16\]"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": 1e-320}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0}}, "beta_fast"),
        ({"model_type": "qwen2", "max_window_layers": "x"}, "max_window_layers must be a number"),
        ({"model_type": "qwen2", "layer_types": 5}, "layer_types a list"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight is another tensor; set it to false"),
        (
            {"n_routed_experts": 2**30, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "model_type": "deepseek"},
            "1073741824 experts are announced",
        ),
    ],
)
def test_configs(changes: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder / "config.json", **changes)
    refused(folder, message)


def test_texts_that_readers_could_take_in_two_ways(folder: Path) -> None:
    whole = (folder / "config.json").read_text()
    for text, message in (
        (whole.replace("{", '{"rms_norm_eps": 1,', 1), "the key 'rms_norm_eps' appears twice"),
        (whole.replace("{", '{"rope_theta": NaN,', 1), "NaN is no number in JSON"),
        (whole.replace("{", '{"a\\n": 1,', 1), r"the key 'a\\n' is not printable"),
        ("[" * 10**6, "recursion"),
        ('{"a":' * 10**6, "recursion"),
    ):
        (folder / "config.json").write_text(text)
        refused(folder, message)


def test_sizes_out_of_all_proportion(folder: Path) -> None:
    for name, limit in (("config.json", "32 MB"), ("tokenizer_config.json", "32 MB"), ("tokenizer.json", "128 MB")):
        whole = (folder / name).read_bytes()
        os.truncate(folder / name, 200 << 20)
        refused(folder, f"{name} has more than {limit}")
        (folder / name).write_bytes(whole)
    tensors = {f"model.layers.{layer}.x{n}": torch.zeros(1) for layer in range(1000) for n in range(9)}
    save_file(tensors, folder / hf.SINGLE)
    edit(folder / "config.json", num_hidden_layers=1000)
    refused(folder, "is missing")


@pytest.mark.parametrize("name", ["config.json", hf.SINGLE, "tokenizer.json", "tokenizer_config.json"])
def test_a_folder_in_place_of_a_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", hf.SINGLE, "tokenizer.json", "."])
def test_what_may_not_be_read(name: str, folder: Path) -> None:
    mode = (folder / name).stat().st_mode
    (folder / name).chmod(0)
    refused(folder, r"[Pp]ermission denied")
    (folder / name).chmod(mode)


def test_links_of_hugging_face_s_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    shutil.copytree(folder, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert luciola.load(snapshot).tokenizer is not None
    (blobs / hf.SINGLE).unlink()
    refused(snapshot, f"has no {hf.SINGLE}")


def test_a_file_of_another_kind(folder: Path) -> None:
    refused(folder / hf.SINGLE, "does not begin with GGUF; of a model in Hugging Face layout give the folder")
    refused(Path("x" * 5000), "File name too long")


@pytest.mark.parametrize("block", [[0, 128], [-1, 128], [128], [1.5, 1], "ab", 7, {}, True])
def test_blocks_of_fp8_that_are_none(block: Any, folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": block})
    refused(folder, "weight_block_size must be the rows and columns of a block")


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (torch.tensor([[float("nan")]]), f"tensor {UP} holds values that are not finite"),
        (torch.tensor([[1e38]]), f"tensor {UP} holds values that are not finite"),
        (torch.ones(1, 1, dtype=torch.int32), "is stored as I32"),
        (torch.ones(1), "scales have two axes"),
        (torch.ones(2, 1), r"scales of shape \[2, 1\] where \[1, 1\] are needed"),
    ],
)
def test_scales_of_fp8(scales: torch.Tensor, message: str, folder: Path) -> None:
    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP] = torch.full(tensors[UP].shape, 240.0).to(torch.float8_e4m3fn)
        tensors[f"{UP}_scale_inv"] = scales

    edit_tensors(folder, quantize)
    edit(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [2**40, 2**40]})
    refused(folder, message)


def test_scales_without_a_weight_have_no_place(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({f"{UP}_scale_inv": torch.ones(1, 1)}))
    refused(folder, f"{UP}_scale_inv has no place")


def test_tensors_that_the_index_does_not_name(folder: Path) -> None:
    names, shard = list(load_file(folder / hf.SINGLE)), "model-00001-of-00001.safetensors"
    (folder / hf.SINGLE).rename(folder / shard)
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names[1:], shard)}))
    refused(folder, f"holds {names[0]}, which {hf.INDEX} puts elsewhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": 5}, "eos_token must be a token's text, not 5"),
        ({"chat_template": 5}, "chat_template must be text"),
        ({"chat_template": [1]}, "chat_template must be text"),
    ],
)
def test_tokenizer_configs(changes: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder / "tokenizer_config.json", **changes)
    refused(folder, message)


@pytest.mark.parametrize("eos", ["2", [1, "x"], -1, 2**31, 1.5, {}, True])
def test_ids_that_are_none(eos: Any, folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=eos)
    refused(folder, r"generation_config\.json: eos_token_id must be a token id")


def test_tokenizers(folder: Path) -> None:
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "model": {**whole["model"], "vocab": {"a": 2**32 - 1}}}))
    refused(folder, "the tokenizer has 4294967296 tokens and the model rows for 32")
    path.write_text(json.dumps({**whole, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}))
    refused(folder, "not a tokenizer the `tokenizers` library can read")  # it panics, with an exception that is none
    path.write_text(json.dumps({**whole, "model": {**whole["model"], "unk_token": "nope"}}))
    tokenizer = luciola.load(folder).tokenizer
    assert tokenizer is not None
    with pytest.raises(ValueError, match="cannot encode 'é': Unk token"):
        tokenizer.encode("é")


def written(path: Path, **metadata: int) -> Path:
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writer.add_uint32(f"general.{key}", value)
    writer.add_tensor("x", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [0, 3, 48, 2**17, 2**31])
def test_alignments_that_are_none(alignment: int, tmp_path: Path) -> None:
    refused(written(tmp_path / "m.gguf", alignment=alignment) if alignment else _zero(tmp_path), "its alignment is no")


def _zero(tmp_path: Path) -> Path:
    path = written(tmp_path / "m.gguf", alignment=64)
    path.write_bytes(path.read_bytes().replace(struct.pack("<II", 4, 64), struct.pack("<II", 4, 0)))
    return path


def test_keys_that_appear_twice(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", one=1, two=2)
    assert GGUFFile(path).metadata["general.two"] == 2
    path.write_bytes(path.read_bytes().replace(b"general.two", b"general.one"))
    refused(path, "the key general.one appears twice")


def test_what_a_gguf_file_must_state(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    convert(open_checkpoint(folder), path, "gguf", "f32")
    path.write_bytes(path.read_bytes().replace(b"layer_norm_rms_epsilon", b"layer_norm_rms_epsilom"))
    refused(path, r"does not state llama\.attention\.layer_norm_rms_epsilon")
