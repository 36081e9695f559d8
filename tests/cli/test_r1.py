"""`luciola r1`: the plan, the table, and one sentence for every mistake."""

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from luciola import hardware
from luciola.cli import app
from luciola.recipe import PipelineRecipe, check, load

ROWS = [
    {
        "stage": "base", "what": "pre-training of the base", "steps": 700, "seconds": 90.0, "accuracy": 0.5,
        "accuracy_low": 0.4, "accuracy_high": 0.6, "thinking_tokens": 20.25, "parts": {"sums": 0.75},
    },
    {
        "stage": "rejection", "what": "rejection sampling", "steps": 40, "seconds": 30.0, "kept": 1234,
        "candidates": 5000,
    },
    {"stage": "sft", "what": "SFT of the base on the samples", "steps": 300},
]  # fmt: skip


@pytest.fixture
def luciola(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setattr(hardware, "gemm_peak", lambda dtype: 1e12)
    return lambda *arguments: CliRunner().invoke(app, ["r1", *arguments])


@pytest.mark.parametrize("name", ["r1", "deepseek-r1"])
def test_a_dry_run_is_the_recipe_and_a_plan(luciola: Callable[..., Result], workplace: Path, name: str) -> None:
    result = luciola(name, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert check(PipelineRecipe, tomllib.loads(result.stdout), "printed") == load(PipelineRecipe, name)
    assert list(workplace.iterdir()) == []
    plan = [line for line in result.stdout.splitlines() if line.startswith("# ")]
    assert [line.split()[1] for line in plan if "student_base" in line][-2:] == ["distill", "student_rl"]
    assert any("not estimated: models/DeepSeek-V3-Base does not exist" in line for line in plan) == (name != "r1")
    assert any(line.startswith("# all stages: ") for line in plan) == (name == "r1")


def test_a_dry_run_knows_the_sizes_of_models_that_are_not_there(luciola: Callable[..., Result]) -> None:
    result = luciola("r1", "--dry-run", "--from", "sft", "--until", "distill")
    sizes = dict(re.findall(r"^# (\w+) +\w+ +([0-9,]+) ", result.stdout, flags=re.MULTILINE))
    teacher, student = (int(sizes[name].replace(",", "")) for name in ("sft", "distill"))
    assert list(sizes) == ["sft", "rl_all", "student_base", "distill"]
    assert 0.2 < student / teacher < 0.3, "a student of a quarter of the size"


def test_the_table_of_a_pipeline_is_printed(luciola: Callable[..., Result], workplace: Path) -> None:
    (workplace / "table.json").write_text(json.dumps(ROWS))
    lines = luciola("--table", ".").stdout.splitlines()
    assert [re.split(r"  +", line) for line in lines] == [
        ["stage", "what", "steps", "minutes", "held out", "95 % interval", "thinking tokens", "sums"],
        ["base", "pre-training of the base", "700", "1.5", "50.0%", "40.0% to 60.0%", "20.2", "75.0%"],
        ["rejection", "rejection sampling", "40", "0.5", "1,234 of 5,000 kept"],
        ["sft", "SFT of the base on the samples", "300", "not finished"],
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["r1", "sft.stpes=3"], 2, "error: r1, stage sft: unknown key stpes; did you mean steps?"),
        (["r1", "--skip", "cold_strat"], 2, "no stage cold_strat; did you mean cold_start?"),
        (["r1", "--from", "sfd", "--dry-run"], 2, "no stage sfd; did you mean sft?"),
        (["r1", "--from", "sft"], 1, "stage base has not finished, so --from sft has nothing to begin with"),
        (["quickstart"], 2, "is a recipe for `luciola grpo`"),
        ([], 2, "give a recipe, for example recipes/r1.toml, or --table FOLDER"),
        (["--table", "nowhere"], 1, "nowhere has no table yet"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(
    luciola: Callable[..., Result], arguments: list[str], code: int, sentence: str
) -> None:
    result = luciola(*arguments)
    assert result.exit_code == code, result.output
    assert sentence in result.stderr and result.stderr.count("\n") == 1
