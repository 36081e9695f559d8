"""An evaluation that was killed goes on and ends with the same numbers; another is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from luciola.evaluate import folder, run
from luciola.evaluate.run import Evaluation, evaluate
from luciola.model.language_model import LanguageModel
from luciola.tasks.arithmetic import Arithmetic
from luciola.text.tokenizer import Tokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "kv_lora_rank": 8,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    tokenizer = Tokenizer.characters("0123456789+=? Whatisplumdnec.'CH")
    return LanguageModel.create(SHAPE | {"vocab_size": tokenizer.vocab_size}, tokenizer)


def measured(lm: LanguageModel, kept: Path | None = None, **options: Any) -> Evaluation:
    return evaluate(lm, Arithmetic(), problems=10, samples=2, max_tokens=5, temperature=1.0, kept=kept, **options)


def texts(result: Evaluation) -> list[list[str]]:
    return [[attempt.text for attempt in row.attempts] for row in result.judged]


def test_the_numbers_do_not_depend_on_how_many_are_asked_together(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(lm)
    monkeypatch.setattr(run, "AT_ONCE", 1)
    alone = measured(lm)
    assert texts(whole) == texts(alone)
    assert {**whole.figures, "seconds": 0} == {**alone.figures, "seconds": 0}


@pytest.mark.parametrize("size", [0.0, 0.1, 0.45, 0.99, 1.0])
def test_a_file_cut_anywhere_is_gone_on_with(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float
) -> None:
    """What kill -9 leaves is a prefix of the file, perhaps in the middle of a line."""
    monkeypatch.setattr(run, "AT_ONCE", 9)  # three problems of three completions
    kept = tmp_path / "sums.jsonl"
    first = measured(lm, kept)
    content = kept.read_bytes()
    kept.write_bytes(content[: int(len(content) * size)])
    asked: list[int] = []
    again = measured(lm, kept, advance=lambda note, count: asked.append(count))
    assert texts(again) == texts(first)
    assert {**again.figures, "seconds": 0} == {**first.figures, "seconds": 0}
    assert sum(asked) == 10
    lines = kept.read_bytes().splitlines()
    assert len(lines) == len(content.splitlines()) == 10


def test_problems_of_another_task_are_refused(lm: LanguageModel, tmp_path: Path) -> None:
    measured(lm, tmp_path / "sums.jsonl")
    with pytest.raises(ValueError, match="holds other problems"):
        measured(lm, tmp_path / "sums.jsonl", seed=3)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    folder.begin(tmp_path / "new", {"seed": 1, "model": "a"})
    folder.begin(tmp_path / "new", {"seed": 1, "model": "a"})
    with pytest.raises(ValueError, match=r"other settings \(seed = 1 there, 2 here\); give another --output"):
        folder.begin(tmp_path / "new", {"seed": 2, "model": "a"})


def test_of_other_task_settings_only_the_key_that_differs_is_named(tmp_path: Path) -> None:
    tasks = {"sums": {"name": "arithmetic", "max_value": 4}, "words": {"name": "reasoning_gym", "tasks": ["ab"]}}
    folder.begin(tmp_path / "new", {"tasks": tasks})
    other = {**tasks, "sums": {"name": "arithmetic", "max_value": 9}}
    with pytest.raises(ValueError, match=r"other settings \(tasks\.sums\.max_value = 4 there, 9 here\); give"):
        folder.begin(tmp_path / "new", {"tasks": other})
    with pytest.raises(ValueError, match=r"other settings \(tasks = sums, words there, sums here\); give"):
        folder.begin(tmp_path / "new", {"tasks": {"sums": tasks["sums"]}})


def test_a_step_of_training_changes_the_fingerprint(lm: LanguageModel) -> None:
    before = folder.fingerprint(lm.model)
    assert folder.fingerprint(lm.model) == before
    with torch.no_grad():
        parameter = next(p for p in lm.model.parameters() if p.ndim == 2)
        parameter[0, 0] += 1e-3
        changed = folder.fingerprint(lm.model)
        parameter[0, 0] -= 1e-3
    assert changed != before
