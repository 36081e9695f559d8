"""A step taken apart row by row is the step that the run has made, and the run is left as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luciola.recipe import PretrainRecipe, SftRecipe, check
from luciola.run import read_records
from luciola.run.again import last_step
from luciola.train.explain import TrainingExplanation, explain_training
from luciola.train.pretrain import build, documents, pretrain, training_rows
from luciola.train.sft import sft

Make = Callable[..., PretrainRecipe]


def logged(path: Path, step: int) -> dict[str, Any]:
    return next(record for record in read_records(path / "metrics.jsonl") if record["step"] == step)


def files(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def explained(path: Path, kind: str) -> TrainingExplanation:
    before = files(path)
    found = explain_training(path, kind)
    assert files(path) == before
    assert found.agrees
    assert found.loss == pytest.approx(logged(path, found.step)["loss"], rel=1e-5)
    assert found.denominators["N"] == sum(row.trained for row in found.rows)
    for row in found.rows:
        assert row.contribution == pytest.approx((row.mean or 0.0) * row.trained / found.denominators["N"])
    return found


@pytest.mark.parametrize("packing", ["pad", "stream", "segments"])
def test_rows_of_pre_training(recipe: Make, packing: str) -> None:
    """With experts, a prediction module and two batches a step; the last step has a checkpoint only after it."""
    given = recipe("run", data={"batch_size": 4, "error_rate": 0.1, "packing": packing, "sequence_length": 80})
    path = pretrain(given)
    found = explained(path, "pretrain")
    assert found.step == 10  # checkpoints 9 and 12 of 12 are there
    assert len(found.rows) == 8
    assert found.mtp_loss == pytest.approx(logged(path, 10)["loss/mtp"], rel=1e-5)
    assert found.equation["loss"] == "L_main + 0.3 / D sum_k L_k + 0.0001 sum over layers L_bal"
    assert all((row.documents is not None) == (packing == "segments") for row in found.rows)


def test_a_row_by_hand(recipe: Make) -> None:
    """Of the first step, whose weights are those of the start: no checkpoint is needed."""
    given = recipe("run", checkpoint_every=0, steps=2, accumulate=1, mtp_weight=0.0)
    found = explained(pretrain(given), "pretrain")
    assert found.step == 1
    lm = build(given)
    batch = training_rows(given, documents(given, lm.tokenizer)).batch(0)
    assert batch.segments_BT is not None
    with torch.no_grad():
        states = lm.model.hidden(batch.tokens_BT[:, :-1], segments_BT=batch.segments_BT[:, :-1]).states
        logp = lm.model.lm_head(states).log_softmax(-1).gather(2, batch.tokens_BT[:, 1:, None]).squeeze(2)
    for row, logp_T, trained_T in zip(found.rows, logp, batch.trained_BT[:, 1:], strict=True):
        assert row.mean == pytest.approx(-float(logp_T[trained_T].mean()), rel=1e-4)
    assert set(found.equation) == {"tokens", "L_main", "L_bal", "loss"}


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0, "dropout": 0.3}], ids=["whole", "adapters"])
def test_rows_of_fine_tuning(recipe: Make, lora: dict[str, Any] | None) -> None:
    """Also where adapters drop inputs at random."""
    base = pretrain(recipe("base", steps=1))
    settings = recipe("run").model_dump(include={"run", "task", "steps", "dtype", "accumulate", "optim"})
    settings |= {"model": {"path": str(base)}, "data": {"batch_size": 3, "sequence_length": 80}}
    path = sft(check(SftRecipe, settings | ({} if lora is None else {"lora": lora}), "test"))
    found = explained(path, "sft")
    assert found.step == 10
    assert all(row.text.startswith("<think>") for row in found.rows)
    assert sum(row.trained for row in found.rows) < sum(row.tokens for row in found.rows)


@pytest.mark.parametrize(
    ("checkpoints", "steps", "place"),
    [
        ((2, 4), 4, (2, 3.0)),  # the newest beyond which the log goes on
        ((4,), 4, (0, 1.0)),  # the weights at the start are known, too
        ((), 3, (0, 1.0)),
        ((50, 100), 130, (100, 101.0)),
        ((), 0, (0, None)),
    ],
)
def test_the_last_step_that_can_be_made_again(
    tmp_path: Path, checkpoints: tuple[int, ...], steps: int, place: tuple[int, float | None]
) -> None:
    for step in checkpoints:
        (tmp_path / "checkpoints" / f"step-{step:06}").mkdir(parents=True)
    lines = [f'{{"step": {step}, "loss": {float(step)}}}\n' for step in range(1, steps + 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert last_step(tmp_path) == place
