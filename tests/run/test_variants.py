"""Variants: which runs belong together, and what is said of each over its seeds."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from luciola.cli import app
from luciola.recipe import GrpoRecipe, to_toml
from luciola.run.variants import draw, table, variants


def made(folder: Path, name: str, seed: int, accuracies: list[float] | None, **settings: dict[str, Any]) -> Path:
    """The folder of a run that was evaluated before, every 10 steps, and after."""
    path = folder / name
    path.mkdir()
    recipe = {
        "run": {"name": name},
        "seed": seed,
        "task": {"name": "arithmetic"},
        "model": {"path": "start"},
    } | settings
    (path / "recipe.toml").write_text(to_toml(GrpoRecipe.model_validate(recipe)))
    (path / "environment.json").write_text('{"kind": "grpo"}')
    if accuracies is not None:
        first, *between, last = accuracies
        records = [{"step": 10 * i, "evaluate/accuracy": a} for i, a in enumerate(between, 1)]
        records.append({"step": 10 * (len(between) + 1)})
        (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        summary = {"before": {"accuracy": first}, "after": {"accuracy": last}, "seconds": 10.0 * (seed + 1)}
        (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        made(tmp_path, "a0", 0, [0.2, 0.4, 0.8]),
        made(tmp_path, "b0", 0, [0.2, 0.5, 0.9], objective={"name": "dr_grpo"}),
        made(tmp_path, "a1", 1, [0.4, 0.6, 0.6]),
    ]


def test_runs_that_differ_in_their_seed_are_one_variant_named_by_its_objective(runs: list[Path]) -> None:
    grpo, dr = variants(runs)
    assert (grpo.label, dr.label) == ("grpo", "dr_grpo")
    assert grpo.curves == {0: [(0, 0.2), (10, 0.4), (20, 0.8)], 1: [(0, 0.4), (10, 0.6), (20, 0.6)]}
    assert list(dr.curves) == [0]
    assert grpo.middle() == [(s, pytest.approx(m), a, b) for s, m, a, b in
                             [(0, 0.3, 0.2, 0.4), (10, 0.5, 0.4, 0.6), (20, 0.7, 0.6, 0.8)]]  # fmt: skip


def test_the_table_has_mean_deviation_and_range(runs: list[Path]) -> None:
    _, grpo, dr = table(variants(runs))
    assert grpo == ("grpo", "0, 1", "30.0%", "70.0%", "14.1%", "60.0%", "80.0%", "15")
    assert dr == ("dr_grpo", "0", "20.0%", "90.0%", "", "90.0%", "90.0%", "10")


def test_other_settings_are_named_and_one_variant_needs_no_name(tmp_path: Path, runs: list[Path]) -> None:
    fast = made(tmp_path, "fast", 0, [0.2, 0.3], optim={"lr": 1e-3})
    assert [v.label for v in variants([runs[0], fast])] == ["optim.lr=1e-05", "optim.lr=0.001"]
    assert [v.label for v in variants([runs[0], runs[2]])] == ["all runs"]
    # two of the same objective are not told apart by its name
    assert all("optim.lr" in v.label for v in variants([*runs, fast]))


def test_only_steps_that_all_seeds_share_have_a_mean(tmp_path: Path) -> None:
    pair = [made(tmp_path, "x", 0, [0.1, 0.2, 0.3, 0.4]), made(tmp_path, "y", 1, [0.3, 0.4])]
    (both,) = variants(pair)
    assert [step for step, *_ in both.middle()] == [0, 10]
    assert both.ends() == [0.4, 0.4]


def test_what_cannot_be_compared_is_refused(tmp_path: Path, runs: list[Path]) -> None:
    empty = made(tmp_path, "empty", 2, None)
    for paths, sentence in (
        ([*runs, empty], "empty has no held-out accuracy yet"),
        ([*runs, made(tmp_path, "again", 1, [0.1, 0.2])], "two runs of grpo have the seed 1"),
        ([tmp_path / "none"], "there is no folder"),
        ([tmp_path], "is no run"),
    ):
        with pytest.raises(ValueError, match=sentence):
            variants(paths)


def test_the_command_prints_the_table_and_draws(runs: list[Path], tmp_path: Path) -> None:
    picture = tmp_path / "variants.png"
    result = CliRunner().invoke(app, ["compare", *map(str, runs), "--output", str(picture)])
    assert result.exit_code == 0, result.stderr
    assert "dr_grpo" in result.stdout and "70.0%" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    draw(variants(runs[:1]), picture)  # one run is a variant as well


def test_a_picture_that_cannot_be_written_is_named_as_it_was_given(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    for name, sentence in (
        ("variants.jpg", "variants.jpg: the curves are drawn as PNG; give a name that ends in .png"),
        ("folder.png", "folder.png is a folder"),
        ("file/variants.png", "file: "),
    ):
        result = CliRunner().invoke(app, ["compare", *map(str, runs), "--output", str(tmp_path / name)])
        assert result.exit_code == 1 and sentence in result.stderr, result.stderr
        assert "/." not in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "variants.jpg").exists()
    fresh = tmp_path / "new" / "variants.PNG"
    assert CliRunner().invoke(app, ["compare", *map(str, runs), "--output", str(fresh)]).exit_code == 0
    assert fresh.read_bytes().startswith(b"\x89PNG")
