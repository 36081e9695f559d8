"""Whole pipelines: killed ones end as if they had not been, finished stages rest, parts can be left out."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from luciola import hardware
from luciola.model.language_model import LanguageModel
from luciola.recipe import PipelineRecipe, RecipeError
from luciola.recipe.pipeline import STAGES
from luciola.rl import r1_table as table
from luciola.rl.r1 import r1
from luciola.run import curves
from luciola.text.tokenizer import Tokenizer

Make = Callable[..., PipelineRecipe]


def start(recipe: PipelineRecipe) -> Path:
    return r1(recipe, "tiny.toml")


def start_alone(recipe: PipelineRecipe) -> Path:
    """The same in a process of its own, where what the fixtures replace has to be replaced again."""
    hardware.gemm_peak = lambda dtype: 1e12
    curves.draw = lambda *_, **__: None
    return start(recipe)


def weights(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.glob("*/model/*.safetensors"))
    return {file.parents[1].name: file.read_bytes() for file in files}


def times(folder: Path) -> dict[str, int]:
    """When each stage came to its end, which running it again would change."""
    return {file.parent.name: file.stat().st_mtime_ns for file in folder.glob("*/summary.json")}


def test_a_pipeline_killed_in_and_between_stages_ends_as_if_it_had_never_stopped(tiny: Make, forks: object) -> None:
    short: dict[str, None] = dict.fromkeys(("rl_all", "student_base", "distill", "student_rl"))
    whole = start(tiny("whole", **short))
    assert weights(whole).keys() == {"base", "cold_start", "reasoning_rl", "sft"}
    killed, rng = tiny("killed", **short), random.Random(0)
    folder = Path(killed.run.folder, "killed")
    moments = [
        "cold_start/recipe.toml",
        "reasoning_rl/checkpoints/step-000001",
        "rejection/metrics.jsonl",
        "sft/checkpoints/step-000002",
        "sft/evaluation/settings.json",
    ]
    stopped = 0
    for moment in moments:
        process = forks.Process(target=start_alone, args=(killed,))  # type: ignore[attr-defined]
        process.start()
        while process.is_alive() and not (folder / moment).exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        stopped += process.exitcode == -9
    assert stopped >= 4
    start(killed)
    assert weights(folder) == weights(whole)
    for name in ("rejection/sft.jsonl", "rejection/candidates.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    physical = ("seconds", "folder")
    rows = [[{k: v for k, v in row.items() if k not in physical} for row in table.read(f)] for f in (folder, whole)]
    assert rows[0] == rows[1]


def test_a_whole_pipeline_has_a_figure_for_every_model(tiny: Make) -> None:
    folder = start(tiny())
    rows = {row["stage"]: row for row in table.read(folder)}
    assert weights(folder).keys() == {name for name, row in rows.items() if "accuracy" in row}
    assert rows.keys() - weights(folder).keys() == {"rejection"}
    assert rows["distill"]["starts_from"] == rows["student_rl"]["starts_from"] == "student_base"
    sizes = {name: len(tensors) for name, tensors in weights(folder).items()}
    assert sizes["distill"] == sizes["student_rl"] == sizes["student_base"] < sizes["rl_all"]


def test_finished_stages_are_not_run_again_and_the_table_shows_all(tiny: Make) -> None:
    recipe = tiny()
    folder = r1(recipe, "tiny.toml", last="rejection")
    before = times(folder)
    assert before.keys() == {"base", "cold_start", "reasoning_rl", "rejection"}
    rows = {row["stage"]: row for row in table.read(folder)}
    assert list(rows) == list(STAGES)
    assert "accuracy" not in rows["sft"] and "seconds" not in rows["sft"]
    for name in ("base", "cold_start", "reasoning_rl"):
        row = rows[name]
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
        assert row["problems"] == 8 and row["parts"].keys() == {"sums", "differences"}
    assert rows["rejection"]["candidates"] == 3 * 4 * 4
    r1(recipe, "tiny.toml", first="sft", last="sft")
    assert {name: when for name, when in times(folder).items() if name != "sft"} == before
    assert (folder / "table.md").read_text().count("\n") == 2 + len(STAGES)
    # Every stage is also an ordinary run.
    from luciola.run import list_runs

    states = {run.name: run.state for run in list_runs(folder.parent)}
    assert states["tiny/sft"] == states["tiny/rejection"] == "finished"


def test_a_skipped_stage_hands_on_the_model_before_it(tiny: Make) -> None:
    folder = r1(tiny("zero"), "tiny.toml", skip=["cold_start"], last="reasoning_rl")
    assert not (folder / "cold_start").exists()
    rows = {row["stage"]: row for row in table.read(folder)}
    assert rows["reasoning_rl"]["starts_from"] == "base"
    assert str(folder / "base") in (folder / "reasoning_rl" / "recipe.toml").read_text()


def test_the_stages_before_a_later_beginning_must_have_finished(tiny: Make) -> None:
    with pytest.raises(ValueError, match="stage base has not finished, so --from sft has nothing to begin with"):
        r1(tiny(), "tiny.toml", first="sft")
    with pytest.raises(RecipeError, match="--from sft comes after --until base"):
        r1(tiny(), "tiny.toml", first="sft", last="base")
    with pytest.raises(RecipeError, match=r"stage sft is not in this pipeline"):
        r1(tiny(), "tiny.toml", first="sft", skip=["sft"])


def test_a_stage_begun_from_another_model_is_not_gone_on_with(tiny: Make) -> None:
    folder = r1(tiny(), "tiny.toml", last="cold_start")
    inputs = folder / "cold_start" / "inputs.json"
    kept = json.loads(inputs.read_text())
    assert [Path(path).parent for path in kept] == [folder / "base" / "model"]
    inputs.write_text(json.dumps(dict.fromkeys(kept, "of another base")))
    with pytest.raises(ValueError, match=r"cold_start was begun from another .*base/model.* delete"):
        r1(tiny(), "tiny.toml", last="cold_start")


def test_a_stored_model_that_was_replaced_is_not_gone_on_with(tiny: Make, tmp_path: Path) -> None:
    tokenizer = Tokenizer.characters("0123456789+-=? ")
    shape = tiny().base["model"]["config"] | {"vocab_size": tokenizer.vocab_size}  # type: ignore[index]
    for seed in (0, 1):
        model = LanguageModel.create(shape, tokenizer, seed=seed)
        model.save(tmp_path / f"stored-{seed}")
    stored = tmp_path / "stored-0" / "model.safetensors"
    recipe = tiny(base=None, model={"path": str(stored.parent)})
    folder = r1(recipe, "tiny.toml", last="cold_start")
    assert json.loads((folder / "cold_start" / "inputs.json").read_text()).keys() == {str(stored)}
    r1(recipe, "tiny.toml", last="cold_start")
    stored.write_bytes((tmp_path / "stored-1" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"cold_start was begun from another .*stored-0/model.safetensors"):
        r1(recipe, "tiny.toml", last="reasoning_rl")
    assert not (folder / "reasoning_rl").exists()


def test_other_settings_of_a_finished_stage_are_refused_and_of_a_later_one_taken(tiny: Make) -> None:
    folder = r1(tiny(), "tiny.toml", last="base")
    changed = tiny(cold_start={**tiny().cold_start, "steps": 2})
    r1(changed, "tiny.toml", last="cold_start")
    assert (folder / "cold_start" / "metrics.jsonl").read_text().count("\n") == 2
    with pytest.raises(ValueError, match=r"cold_start was started with other settings \(steps = 4 instead of 2\)"):
        r1(tiny(), "tiny.toml", last="cold_start")


def test_an_evaluation_with_other_settings_is_made_anew(tiny: Make) -> None:
    r1(tiny(), "tiny.toml", last="base")
    folder = r1(tiny(evaluate={"problems": 5, "max_tokens": 12}), "tiny.toml", last="base")
    assert table.read(folder)[0]["problems"] == 5


def test_a_refused_pipeline_leaves_its_records_as_they_were(tiny: Make) -> None:
    folder = r1(tiny(), "tiny.toml", last="reasoning_rl")
    files = [folder / name for name in ("pipeline.toml", "table.json", "table.md")]
    before = [file.read_bytes() for file in files]
    changed = tiny(rl_all={**tiny().rl_all, "seed": 5})
    with pytest.raises(ValueError, match=r"reasoning_rl was started with other settings \(model.path = "):
        r1(changed, "tiny.toml", skip=["cold_start"])
    assert [file.read_bytes() for file in files] == before
    kept = folder / "reasoning_rl" / "inputs.json"
    kept.write_text(json.dumps(dict.fromkeys(json.loads(kept.read_text()), "of another cold start")))
    with pytest.raises(ValueError, match="reasoning_rl was begun from another"):
        r1(changed, "tiny.toml")
    assert [file.read_bytes() for file in files] == before


def test_the_table_shows_stages_that_are_there_and_left_out(tiny: Make) -> None:
    folder = r1(tiny(), "tiny.toml", last="cold_start")
    row = table.read(folder)[1]
    assert row["stage"] == "cold_start" and "accuracy" in row
    r1(tiny(), "tiny.toml", skip=["cold_start"], last="base")
    assert table.read(folder)[1] == row
    assert [row["stage"] for row in table.read(folder)] == list(STAGES)
