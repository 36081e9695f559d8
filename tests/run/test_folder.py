"""The run folder: what is refused, what survives a kill, and what a resumed run finds."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from luciola.recipe import PretrainRecipe, check
from luciola.run import Run, list_runs, read_records
from luciola.run.compare import table


def recipe(folder: Path, name: str = "try", **changes: object) -> PretrainRecipe:
    settings = {
        "steps": 10,
        "dtype": "float32",
        "run": {"name": name, "folder": str(folder), "keep_checkpoints": 2},
        "model": {"config": {"hidden_size": 8}},
        "tokenizer": {"kind": "characters"},
        "data": {"source": "files", "paths": ["text.txt"]},
    }
    return check(PretrainRecipe, settings | changes, "test")


def test_a_new_run_says_what_it_is(tmp_path: Path) -> None:
    with Run.create(recipe(tmp_path), "pretrain") as run:
        assert run.dtype == "float32"
    facts = json.loads((run.path / "environment.json").read_text())
    assert facts["kind"] == "pretrain"
    assert facts["dtype"] == "float32"
    assert facts["torch"].startswith("2.")
    assert facts["cores"] >= 1
    assert "steps = 10" in (run.path / "recipe.toml").read_text()


def begun(recipe: PretrainRecipe) -> None:
    """A run that has made a step."""
    with Run.create(recipe, "pretrain") as run:
        run.log(1, {"loss": 1.0})


def test_a_run_that_failed_before_its_first_step_begins_anew(tmp_path: Path) -> None:
    """Whatever its settings were: there is nothing of it to keep. A base that has begun is something."""
    Run.create(recipe(tmp_path), "pretrain").close()
    Run.create(recipe(tmp_path, steps=20), "pretrain").close()
    Run.create(recipe(tmp_path, steps=30), "pretrain", resume=True).close()
    assert "steps = 30" in (tmp_path / "try" / "recipe.toml").read_text()
    begun(recipe(tmp_path / "try", "base"))
    with pytest.raises(ValueError, match="exists; continue it with --resume"):
        Run.create(recipe(tmp_path, steps=40), "pretrain")


def test_a_finished_run_is_only_looked_at(tmp_path: Path) -> None:
    begun(recipe(tmp_path))
    with Run.create(recipe(tmp_path), "pretrain", resume=True) as run:
        assert not run.finished
        run.summary({"loss": 1.0})
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.name != ".lock"}
    with Run.create(recipe(tmp_path), "pretrain", resume=True) as run:
        assert run.finished
    assert before == {path.name: path.read_bytes() for path in run.path.iterdir() if path.name != ".lock"}


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    begun(recipe(tmp_path))
    with pytest.raises(ValueError, match=r"exists; continue it with --resume, or choose another run.name=NAME"):
        Run.create(recipe(tmp_path), "pretrain")
    Run.create(recipe(tmp_path), "pretrain", resume=True).close()
    facts = json.loads((tmp_path / "try" / "environment.json").read_text())
    assert len(facts["resumed"]) == 1


def test_resuming_what_was_never_started_starts_it(tmp_path: Path) -> None:
    with Run.create(recipe(tmp_path), "pretrain", resume=True) as run:
        assert (run.path / "recipe.toml").exists()
        assert run.checkpoints() == []


def test_the_model_a_run_starts_from_is_kept_by_its_whole_path_and_may_move_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_stored(path: str, folder: str = "runs") -> PretrainRecipe:
        return check(
            PretrainRecipe, recipe(Path(folder)).model_dump() | {"model": {"path": path}, "tokenizer": None}, ""
        )

    def stored() -> str:
        kept: str = tomllib.loads(Path("runs/try/recipe.toml").read_text())["model"]["path"]
        return kept

    (tmp_path / "here" / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    begun(from_stored("models/base"))
    assert stored() == str(tmp_path / "here" / "models" / "base")
    for same in ("models/base", "./models//base", stored(), "../here/models/base"):
        Run.create(from_stored(same), "pretrain", resume=True).close()
    for other in ("models/other", "base2", str(tmp_path / "models" / "base")):
        with pytest.raises(ValueError, match=f"other settings .model.path = {other} instead of "):
            Run.create(from_stored(other), "pretrain", resume=True)
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(tmp_path)
        Run.create(
            from_stored(str(tmp_path / "here" / "models" / "base"), "here/runs"), "pretrain", resume=True
        ).close()
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    Run.create(from_stored("models/base"), "pretrain", resume=True).close()
    assert stored() == str(tmp_path / "there" / "models" / "base")
    begun(from_stored("pypi:some-model", "others"))
    assert 'path = "pypi:some-model"' in Path("others/try/recipe.toml").read_text()


def test_a_run_resumes_with_its_own_settings_only(tmp_path: Path) -> None:
    begun(recipe(tmp_path))
    with pytest.raises(
        ValueError, match=r"other settings \(steps = 20 instead of 10, optim.lr = 0.5 instead of 0.001\)"
    ):
        Run.create(recipe(tmp_path, steps=20, optim={"lr": 0.5}), "pretrain", resume=True)
    harmless = {"name": "try", "folder": str(tmp_path), "checkpoint_every": 3, "keep_checkpoints": 1}
    Run.create(recipe(tmp_path, run=harmless), "pretrain", resume=True).close()
    assert "checkpoint_every = 3" in (tmp_path / "try" / "recipe.toml").read_text()


def test_a_resumed_run_keeps_its_dtype_and_hears_of_other_software(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(recipe(tmp_path, dtype="auto"))
    path = tmp_path / "try" / "environment.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"dtype": "bfloat16", "torch": "1.0"}))
    with Run.create(recipe(tmp_path, dtype="auto"), "pretrain", resume=True) as run:
        assert run.dtype == "bfloat16"
    assert "was started with torch 1.0 and goes on with 2." in capsys.readouterr().err


def test_metrics_are_one_json_object_a_line(tmp_path: Path) -> None:
    with Run.create(recipe(tmp_path), "pretrain") as run:
        run.log(1, {"loss": 0.1 + 0.2, "lr": 1e-3})
        first = (run.path / "metrics.jsonl").read_text()
        assert first == '{"step": 1, "loss": 0.30000000000000004, "lr": 0.001}\n', "there before the file is closed"
        run.log(2, {"loss": float("nan"), "grad_norm": float("inf")})
        run.samples(2, [{"prompt": "1+1", "completion": "\u2028 \ud800 \u00fc", "reward": 1.0}])
    assert (run.path / "metrics.jsonl").read_text().splitlines()[1] == '{"step": 2, "loss": null, "grad_norm": null}'
    (sample,) = read_records(run.path / "samples.jsonl")
    assert sample == {"step": 2, "prompt": "1+1", "completion": "\u2028 \ud800 \u00fc", "reward": 1.0}


def test_numbers_of_arrays_and_tensors_are_logged(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    with Run.create(recipe(tmp_path), "pretrain") as run:
        run.log(1, {"a": numpy.float64(0.5), "b": torch.tensor(2), "c": {"d": [numpy.int32(3)]}})
    assert run.metrics() == [{"step": 1, "a": 0.5, "b": 2, "c": {"d": [3]}}]


def test_truncating_forgets_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    with Run.create(recipe(tmp_path), "pretrain") as run:
        for step in range(1, 6):
            run.log(step, {"loss": 1.0 / step})
            run.samples(step, [{"reward": step}, {"reward": -step}])
        with open(run.path / "metrics.jsonl", "a") as file:
            file.write('{"step": 6, "lo')
        run.truncate(3)
        run.log(4, {"loss": 9.0})
    assert [(record["step"], record["loss"]) for record in run.metrics()] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]
    assert [record["step"] for record in read_records(run.path / "samples.jsonl")] == [1, 1, 2, 2, 3, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not JSON"):
        read_records(tmp_path / "metrics.jsonl")


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    with Run.create(recipe(tmp_path), "pretrain") as run:
        for step in (5, 10, 1_000_000):
            with run.checkpoint(step) as folder:
                (folder / "state").write_text(str(step))
        with pytest.raises(RuntimeError), run.checkpoint(20):
            raise RuntimeError
        assert [step for step, _ in run.checkpoints()] == [10, 1_000_000]
        assert (run.checkpoints()[-1][1] / "state").read_text() == "1000000"


HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_folder import recipe
from luciola.run import Run
run = Run.create(recipe(Path(sys.argv[1])), "pretrain")
run.log(1, {"loss": 1.0})
if sys.argv[3] == "fork":
    import os
    if os.fork() == 0:
        time.sleep(2)
        os._exit(0)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("way", ["alone", "fork"])
def test_a_living_process_keeps_others_out_and_a_killed_one_does_not(tmp_path: Path, way: str) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path), str(Path(__file__).parent), way]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(ValueError, match=f"process {process.pid} is writing the run"):
            Run.create(recipe(tmp_path), "pretrain", resume=True)
        assert [run.state for run in list_runs(tmp_path)] == ["running"]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        started = time.monotonic()
        with Run.create(recipe(tmp_path), "pretrain", resume=True) as run:
            assert [record["step"] for record in run.metrics()] == [1]
        assert time.monotonic() - started < 1.5, "a forked child that lives on must not hold the lock"


def test_runs_are_listed_with_their_state_and_compared(tmp_path: Path) -> None:
    for name, lr in (("one", 0.1), ("two", 0.2)):
        with Run.create(recipe(tmp_path, name, optim={"lr": lr}), "pretrain") as run:
            run.log(10, {"loss": lr})
            if name == "two":
                run.summary({"loss": 0.2, "after": {"accuracy": 0.75}})
    (tmp_path / "stray").mkdir()
    runs = list_runs(tmp_path)
    assert [(run.name, run.state, run.step, run.steps) for run in runs] == [
        ("one", "stopped", 10, 10),
        ("two", "finished", 10, 10),
    ]
    assert table(runs) == [
        ("", "one", "two"),
        ("optim.lr", "0.1", "0.2"),
        ("step", "10/10", "10/10"),
        ("loss", "", "0.2"),
        ("after.accuracy", "", "0.75"),
    ]
    assert list_runs(tmp_path / "nowhere") == []


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    settings = {"name": "try", "folder": str(tmp_path), "tensorboard": True}
    with Run.create(recipe(tmp_path, run=settings), "pretrain") as run:
        run.log(1, {"loss": 0.5})
    assert list((run.path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_child_of_a_killed_process_is_given_time_to_let_go(tmp_path: Path) -> None:
    """It closes the lock first thing, but on a busy machine that may be later than the next start."""
    Run.create(recipe(tmp_path), "pretrain").close()
    lock = tmp_path / "try" / ".lock"
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    lock.write_text(f"{gone.pid}\n")
    holder = (
        "import fcntl, sys, time; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX); print(); time.sleep(0.3)"
    )
    with subprocess.Popen([sys.executable, "-uc", holder, str(lock)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with Run.create(recipe(tmp_path), "pretrain", resume=True):
            assert child.wait() == 0
