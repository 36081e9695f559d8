"""`luciola evaluate TASK... --output`: the folder it writes, going on after kill -9, and what is refused before."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from luciola.cli import app
from luciola.evaluate import run as evaluation
from luciola.model.language_model import LanguageModel
from luciola.tasks.arithmetic import Arithmetic
from luciola.tasks.base import Problem
from luciola.text.tokenizer import Tokenizer
from luciola.verify import sandbox
from luciola.verify.verdict import Verdict

SHAPE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 4096,
}  # fmt: skip
PROBLEMS, AT_ONCE = 40, 6
OPTIONS = ["--problems", str(PROBLEMS), "--samples", "2", "--max-tokens", "8", "--dtype", "float32"]
# The command as it is, with small batches and a moment after each, so that a kill has something to hit.
SLOWED = f"""
import time
from luciola.evaluate import run
from luciola.cli import main
run.AT_ONCE = {AT_ONCE}
judge = run.judge
def slowed(*arguments):
    time.sleep(0.3)
    return judge(*arguments)
run.judge = slowed
main()
"""


@pytest.fixture
def model(workplace: Path) -> str:
    tokenizer = Tokenizer.characters("0123456789+=? Whatisplumdnec.'CH\n")
    LanguageModel.create(SHAPE | {"vocab_size": tokenizer.vocab_size}, tokenizer, seed=1).save(workplace / "model")
    return "model"


def evaluate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", *arguments])


def results(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "results.json").read_text())
    return {name: {k: v for k, v in figures.items() if k != "seconds"} for name, figures in found.items()}


def attempts(folder: str) -> list[Any]:
    lines = Path(folder, "arithmetic.jsonl").read_text().splitlines()
    return [json.loads(line)["attempts"] for line in lines]


def test_killed_and_gone_on_with_the_numbers_are_the_same(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "AT_ONCE", AT_ONCE)
    assert evaluate(model, "arithmetic", *OPTIONS, "--output", "whole").exit_code == 0
    command = [sys.executable, "-c", SLOWED, "evaluate", model, "arithmetic", *OPTIONS, "--output", "killed"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    kept, limit = Path("killed", "arithmetic.jsonl"), time.monotonic() + 90
    while not (kept.exists() and kept.read_bytes().count(b"\n") >= 6):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    before = attempts("killed")
    assert 6 <= len(before) < PROBLEMS
    assert not Path("killed", "results.json").exists()
    result = evaluate(model, "arithmetic", *OPTIONS, "--output", "killed")
    assert result.exit_code == 0, result.output
    assert attempts("killed") == attempts("whole")
    assert results("killed") == results("whole")
    assert results("whole")["arithmetic"]["problems"] == PROBLEMS
    page = Path("killed", "samples.html")
    assert page.exists() and str(page) in result.stdout
    result = evaluate(model, "arithmetic", *OPTIONS, "--seed", "5", "--output", "killed")
    assert result.exit_code == 1
    assert "holds an evaluation with other settings (seed = 0 there, 5 here)" in result.stderr


def test_failures_of_the_verifier_are_warned_of(workplace: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "warning" not in evaluate(model, "arithmetic", *OPTIONS).stderr
    asked = iter(range(3 * PROBLEMS))

    def grade(self: Arithmetic, problem: Problem, completion: str) -> Verdict:
        kinds: dict[int, Verdict] = {7: Verdict("timeout", 0.0, "too\nslow"), 9: Verdict("crash", 0.0, "broken")}
        return kinds.get(next(asked), Verdict("wrong", 0.0))

    monkeypatch.setattr(Arithmetic, "grade", grade)
    monkeypatch.setattr(evaluation, "judge", lambda task, problems, completions: [
        [task.grade(problem, text) for text in group] for problem, group in zip(problems, completions, strict=True)
    ])  # fmt: skip
    result = evaluate(model, "arithmetic", *OPTIONS, "--json")
    assert result.exit_code == 0, result.output
    (warning,) = (line for line in result.stderr.splitlines() if "warning" in line)
    assert "arithmetic: the verifier failed on 2 of 120 completions, which count as not right" in warning
    assert "first of all timeout: too" in warning
    assert json.loads(result.stdout)["verdicts"]["crash"] == 1


def test_a_damaged_folder_is_told_by_the_name_of_its_file(workplace: Path, model: str) -> None:
    arguments = (model, "arithmetic", *OPTIONS, "--output", "found")
    assert evaluate(*arguments).exit_code == 0
    settings, kept = Path("found", "settings.json"), Path("found", "arithmetic.jsonl")
    whole, lines = settings.read_text(), kept.read_text().splitlines(keepends=True)
    for content in ("", "{", "[]"):
        settings.write_text(content)
        result = evaluate(*arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "found/settings.json is damaged" in result.stderr
        assert "delete the folder or give another --output" in result.stderr
    settings.write_text(whole)
    record = json.loads(lines[3])
    for change, said in (
        ({"step": None}, "line 4 has no whole number as its step; delete the line to go on"),
        ({"attempts": None}, "the record of step 3 is damaged; delete it and all later lines to go on"),
        ({"seconds": "long"}, "the record of step 3 is damaged"),
        ({"attempts": [{"text": "4"}] * 3}, "the record of step 3 is damaged"),
    ):
        kept.write_text("".join([*lines[:3], json.dumps(record | change) + "\n", *lines[4:]]))
        result = evaluate(*arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "found/arithmetic.jsonl" in result.stderr and said in result.stderr
    kept.write_text("".join([*lines[:3], "[]\n", *lines[4:]]))
    assert "line 4 has no whole number as its step" in evaluate(*arguments).stderr


def test_problems_that_do_not_fit_are_refused_before_any_is_asked(workplace: Path, model: str) -> None:
    rows = [{"question": "1+1=?", "answer": "2"}, {"question": "1+" * 3000 + "1=?", "answer": "3001"}]
    (workplace / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(model, "arithmetic", "jsonl=sums.jsonl", *OPTIONS, "--output", "found")
    assert result.exit_code == 1
    assert "error: jsonl: 1 of 2 problems do not fit into the model's context of 4096 tokens" in result.stderr
    assert "take a model with a longer context, or another task" in result.stderr
    assert result.stderr.count("\n") == 1 and not Path("found").exists()
    (workplace / "sums.jsonl").write_text(json.dumps(rows[0]) + "\n")
    result = evaluate(model, "jsonl=sums.jsonl", "--samples", "0", "--max-tokens", "4")
    assert result.exit_code == 0, result.output


def test_a_task_that_is_named_twice_is_refused(workplace: Path, model: str) -> None:
    result = evaluate(model, "countdown", "arithmetic", "countdown", *OPTIONS)
    assert result.exit_code == 2
    assert "error: countdown is named twice; name it once" in result.stderr


def test_programs_without_bubblewrap_are_refused_with_the_way_to_install_it(
    model: str, monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    (workplace / "empty").mkdir()
    monkeypatch.setenv("PATH", str(workplace / "empty"))
    sandbox.unavailable.cache_clear()
    try:
        result = evaluate(model, "humaneval", "--problems", "1")
    finally:
        sandbox.unavailable.cache_clear()
    assert result.exit_code == 1
    assert "apt-get install bubblewrap" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(bool(sandbox.unavailable()), reason=sandbox.unavailable() or "")
def test_programs_have_pass_at_k_and_neither_votes_nor_form(workplace: Path, model: str) -> None:
    row = {"task_id": 11, "text": "Add 1.", "code": "def f(x):\n    return x + 1", "test_list": ["assert f(1) == 2"]}
    (workplace / "mbpp.jsonl").write_text(json.dumps(row) + "\n")
    result = evaluate(model, "mbpp=mbpp.jsonl", "task.form=completion", *OPTIONS, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["problems"], found["pass@1"], found["pass@k"], found["accuracy"]) == (1, 0.0, 0.0, 0.0)
    assert "maj@k" not in found and "format_rate" not in found
    assert sum(found["verdicts"].values()) == 3
    assert evaluate(model, "mbpp", *OPTIONS).exit_code == 2


@pytest.mark.skipif(bool(sandbox.unavailable()), reason=sandbox.unavailable() or "")
def test_programming_problems_of_ones_own_are_measured(workplace: Path, model: str) -> None:
    row = {"prompt": "Print 1.", "pairs": [["", "1"]]}
    (workplace / "problems.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "prompt": "One."}) + "\n")
    result = evaluate(model, "programs=problems.jsonl", *OPTIONS, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["problems"], found["pass@1"]) == (2, 0.0)
    assert "maj@k" not in found
