"""`luciola explain`: the table of a real run, JSON, and one sentence for what has no loss to explain."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from luciola import hardware
from luciola.cli import app
from luciola.cli.explain import _signed

RECIPE = """
dtype = "float32"
[run]
name = "tiny"
checkpoint_every = 1
[task]
name = "arithmetic"
max_value = 4
phrasing = "symbols"
answer_form = "last_number"
held_out_fraction = 0.3
[base]
steps = 2
[base.model.config]
hidden_size = 16
intermediate_size = 16
num_hidden_layers = 1
num_attention_heads = 2
[base.tokenizer]
kind = "characters"
alphabet = "012345678+=? "
[base.data]
batch_size = 4
sequence_length = 40
[rollout]
prompts = 6
group_size = 16
max_tokens = 2
[grpo]
steps = 2
[optim]
lr = 1e-3
[evaluate]
problems = 2
samples = 0
"""


def luciola(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in runs/tiny."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(hardware, "gemm_peak", lambda dtype: 1e12)
        assert luciola("grpo", "tiny.toml").exit_code == 0
    return folder


@pytest.fixture
def inside(trained: Path, workplace: Path) -> Callable[..., Result]:
    """Commands in a copy of that folder."""
    shutil.copytree(trained / "runs", workplace / "runs")
    return luciola


def fails(result: Result, sentence: str) -> None:
    assert result.exit_code == 1, result.output
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_table_ends_with_three_equal_losses(inside: Callable[..., Result]) -> None:
    result = inside("explain", "loss", "runs/tiny", "--groups", "1")
    assert result.exit_code == 0, result.stderr
    assert "runs/tiny, step 2: grpo" in result.stdout
    for part in ("advantage", "ratio", "clip", "aggregation", "loss"):
        assert f"\n  {part} " in result.stdout
    lines = dict(line.rsplit("  ", 1) for line in result.stdout.splitlines() if line.count("  ") and "." in line[-12:])
    found = {name.strip(): value for name, value in lines.items()}
    sums = [float(found[name]) for name in ("sum", "the trainer's own loss", "metrics.jsonl, step 2")]
    assert sums[0] == pytest.approx(sums[1], abs=1e-7)
    assert sums[1] == pytest.approx(sums[2], abs=1e-7)
    assert "Every ratio is 1" in result.stdout


@pytest.mark.parametrize(
    ("loss", "text"),
    [(0.0, "+0.000000000"), (0.5, "+0.500000000"), (-1e-6, "-0.000001000"), (-6.5e-10, "-6.500e-10")],
)
def test_a_tiny_loss_keeps_its_digits(loss: float, text: str) -> None:
    assert _signed(loss) == text


def test_a_run_that_began_with_a_stored_model_is_explained_from_any_folder(
    inside: Callable[..., Result], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, end = RECIPE.index("[base]"), RECIPE.index("[rollout]")
    Path("second.toml").write_text(RECIPE[:start] + '[model]\npath = "runs/tiny"\n' + RECIPE[end:])
    monkeypatch.setattr(hardware, "gemm_peak", lambda dtype: 1e12)
    assert inside("grpo", "second.toml", "run.name=second").exit_code == 0
    (workplace / "elsewhere").mkdir()
    with monkeypatch.context() as moved:
        moved.chdir(workplace / "elsewhere")
        result = inside("explain", "loss", str(workplace / "runs" / "second"))
        assert result.exit_code == 0, result.stderr
    assert inside("grpo", "second.toml", "run.name=second", "--resume").exit_code == 0


def test_json_holds_every_completion(inside: Callable[..., Result]) -> None:
    result = inside("explain", "loss", "runs/tiny", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found["completions"]) == 6 * 16
    assert found["agrees"] is True
    assert sum(row["contribution"] for row in found["completions"]) == pytest.approx(found["logged_loss"], abs=1e-6)


def test_a_run_that_is_not_reinforcement_learning_is_taken_apart_row_by_row(inside: Callable[..., Result]) -> None:
    result = inside("explain", "loss", "runs/tiny/base", "--rows", "2")
    assert result.exit_code == 0, result.stderr
    assert "L_main  - 1/N sum over them of log p(token | all before it in its row)" in result.stdout
    assert sum(line.endswith(("e-01", "e+00")) for line in result.stdout.splitlines()) == 2
    assert "4 rows add up to" in result.stdout and "metrics.jsonl, step 2" in result.stdout
    found = json.loads(inside("explain", "loss", "runs/tiny/base", "--json").stdout)
    assert found["agrees"] and len(found["rows"]) == 4
    assert sum(row["contribution"] for row in found["rows"]) == pytest.approx(found["logged_loss"], abs=1e-5)


def test_a_sum_that_is_not_the_logged_loss_exits_1(inside: Callable[..., Result]) -> None:
    metrics = Path("runs/tiny/metrics.jsonl")
    lines = [json.loads(line) | {"loss": 0.5} for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fails(inside("explain", "loss", "runs/tiny"), "error: the sum is not the loss")


def test_what_has_no_loss_to_explain_is_refused(inside: Callable[..., Result]) -> None:
    fails(inside("explain", "losses", "runs/tiny"), "error: there is no explanation of 'losses'; there is one of: loss")
    fails(inside("explain", "loss", "runs/nothing"), "error: there is no folder runs/nothing")
    fails(inside("explain", "loss", "runs"), "error: runs is no run (it has no recipe.toml)")
    environment = Path("runs/tiny/base/environment.json")
    environment.write_text(json.dumps(json.loads(environment.read_text()) | {"kind": "rejection"}))
    fails(inside("explain", "loss", "runs/tiny/base"), "a stage of `luciola r1` that samples and trains nothing")
    (Path("runs/tiny/base") / "summary.json").unlink()
    fails(inside("explain", "loss", "runs/tiny"), "its base is still to be pre-trained")
    Path("runs/tiny/recipe.toml").write_text("steps =")
    assert inside("explain", "loss", "runs/tiny").exit_code == 2
