"""What a recipe starts from: tokenizer, shape and documents; and what `--dry-run` says about it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import luciola
from luciola import hardware
from luciola.recipe import PretrainRecipe, RecipeError, SftRecipe, check
from luciola.text.tokenizer import Tokenizer
from luciola.train import sft
from luciola.train.pretrain import build, describe, documents, make_tokenizer, pretrain

Make = Callable[..., PretrainRecipe]


def test_characters_are_those_of_the_data(recipe: Make, tmp_path: Path) -> None:
    """Found in files, or in a sample of the task's problems and solutions: nothing it writes is unknown."""
    tokenizer = make_tokenizer(recipe(tokenizer={"kind": "characters"}))
    task = recipe().task
    assert task is not None
    unknown = tokenizer.token_id("<unk>")
    for index in range(5000, 5100):
        assert unknown not in tokenizer.encode(task.problem("train", index, 0).prompt)
    (tmp_path / "a.txt").write_text("héllo")
    files = recipe(tokenizer={"kind": "characters"}, data={"source": "files", "paths": [str(tmp_path / "a.txt")]})
    assert make_tokenizer(files).decode(make_tokenizer(files).encode("héllo")) == "héllo"


def test_merges_are_learnt_from_the_data(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("tokenizer " * 100)
    data = {"source": "files", "paths": [str(tmp_path / "a.txt")]}
    tokenizer = make_tokenizer(recipe(tokenizer={"kind": "bpe", "vocab_size": 300}, data=data))
    assert len(tokenizer.encode("tokenizer")) == 1


def test_a_stored_tokenizer_is_taken_as_it_is(recipe: Make, tmp_path: Path) -> None:
    stored = Tokenizer.characters("xyz")
    stored.save(tmp_path / "tokenizer")
    found = make_tokenizer(recipe(tokenizer={"kind": "path", "path": str(tmp_path / "tokenizer")}))
    assert found.encode("zyx") == stored.encode("zyx")


def test_the_model_knows_its_tokenizers_special_tokens(recipe: Make) -> None:
    lm = build(recipe())
    assert lm.tokenizer is not None
    assert lm.config.vocab_size == lm.tokenizer.vocab_size
    assert lm.config.bos_token_id == lm.tokenizer.bos_token_id
    assert lm.config.eos_token_id == lm.tokenizer.eos_token_ids[0]


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(recipe: Make) -> None:
    shape: dict[str, Any] = recipe().model.config or {}
    with pytest.raises(ValueError, match=r"model.config.vocab_size = 10 is less than the tokenizer's \d+ tokens"):
        build(recipe(model={"config": shape | {"vocab_size": 10}}))
    with pytest.raises(RecipeError, match=r"hidden_sise"):
        build(recipe(model={"config": shape | {"hidden_sise": 10}}))


def test_different_seeds_are_different_models_and_data(recipe: Make) -> None:
    losses = []
    for seed in (0, 1, 0):
        run = pretrain(recipe(f"seed{len(losses)}", seed=seed, steps=1))
        losses.append(json.loads((run / "metrics.jsonl").read_text())["loss"])
    assert losses[0] == losses[2] != losses[1]


def test_a_model_without_tokenizer_cannot_read_text(recipe: Make, tmp_path: Path) -> None:
    luciola.LanguageModel(build(recipe()).model).save(tmp_path / "bare")
    bare = recipe().model_dump(exclude_none=True) | {"model": {"path": str(tmp_path / "bare")}}
    bare.pop("tokenizer")
    with pytest.raises(ValueError, match="has no tokenizer, so no text can be read for it"):
        documents(check(PretrainRecipe, bare, "test"), None)
    for key in ("optim", "data"):
        bare.pop(key)
    with pytest.raises(ValueError, match="has no tokenizer, so no conversation can be rendered"):
        sft.conversations(check(SftRecipe, bare, "test"), None)


def test_a_dry_run_counts_what_the_run_will_take(recipe: Make) -> None:
    planned = recipe()
    facts = describe(planned)
    model = build(planned).model
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["active_parameters"] == model.num_parameters(active=True) < facts["parameters"]
    assert facts["tokens"] == 12 * 2 * 4 * 80  # steps, accumulated batches, rows, length
    assert facts["dtype"].startswith("float32")
    assert facts["seconds"] > 0
    saving = describe(recipe(activation_checkpointing=True))
    assert facts["parameters"] * 16 < saving["memory_bytes"] < facts["memory_bytes"]


def test_fine_tuning_learns_the_answers(recipe: Make, tmp_path: Path) -> None:
    """From conversations: after a few steps the model answers as it was shown."""
    from luciola.engine.engine import Engine
    from luciola.engine.params import SamplingParams

    shape: dict[str, Any] = recipe().model.config or {}
    base = pretrain(recipe("base", steps=1, model={"config": shape | {"initializer_range": 0.2}}))
    chats = [{"question": f"{i}+0=?", "reply": str(i)} for i in range(10)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    data = {"source": "files", "paths": [str(tmp_path / "chats.jsonl")], "batch_size": 10, "sequence_length": 16}
    settings = recipe("tuned").model_dump(include={"run", "dtype", "optim"}) | {
        "steps": 60,
        "model": {"path": str(base)},
    }
    settings |= {"data": data | {"prompt_field": "question", "completion_field": "reply"}}
    lm = luciola.load(sft.sft(check(SftRecipe, settings, "test")))
    assert lm.tokenizer is not None
    asked = [lm.tokenizer.chat([{"role": "user", "content": chat["question"]}]) for chat in chats]
    answers = Engine(lm, dtype="model").generate(asked, SamplingParams(temperature=0.0, max_tokens=3))
    assert sum(a[0].text == chat["reply"] for a, chat in zip(answers, chats, strict=True)) >= 8


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "choose_dtype", lambda requested: (requested, "as requested"))
