"""A run that is killed, stopped, or runs out of disk goes on bit for bit; one that diverges stops and says where."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import luciola
from luciola.recipe import PretrainRecipe, SftRecipe, check, to_toml
from luciola.train import state
from luciola.train.pretrain import pretrain
from luciola.train.sft import sft
from luciola.train.stopping import Diverged

Make = Callable[..., PretrainRecipe]
Steps = Callable[[Path], list[dict[str, Any]]]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def same_run(a: Path, b: Path, steps_of: Steps) -> None:
    assert steps_of(a) == steps_of(b)
    assert weights(a) == weights(b)
    losses = [json.loads((run / "summary.json").read_text())["loss"] for run in (a, b)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_killed_run_ends_as_if_it_had_never_stopped(
    recipe: Make, kill_at: Callable[..., int], steps_of: Steps, seed: int
) -> None:
    """kill -9 at random instants, several times over; metrics and weights are those of the uninterrupted run."""
    rng = random.Random(seed)
    mode = {"packing": ["segments", "stream", "pad"][seed], "batch_size": 4, "sequence_length": 80}
    whole = pretrain(recipe("whole", data=mode))
    killed = recipe("killed", data=mode)
    for lines in sorted(rng.sample(range(12), 2)):
        kill_at(pretrain, killed, lines, rng)
    same_run(pretrain(killed, resume=True), whole, steps_of)
    assert len(steps_of(whole)) == 12


def test_a_run_killed_after_its_last_step_gets_its_model_and_summary(recipe: Make, steps_of: Steps) -> None:
    """And resuming a finished run leaves it as it is."""
    whole = pretrain(recipe("whole"))
    before = steps_of(whole), weights(whole), json.loads((whole / "summary.json").read_text())["loss"]
    shutil.rmtree(whole / "model")
    (whole / "summary.json").unlink()
    for _ in range(2):
        pretrain(recipe("whole"), resume=True)
        after = steps_of(whole), weights(whole), json.loads((whole / "summary.json").read_text())["loss"]
        assert after == before


def test_fine_tuning_resumes_as_well(
    recipe: Make, kill_at: Callable[..., int], steps_of: Steps, tmp_path: Path
) -> None:
    base = pretrain(recipe("base", steps=1))

    def tuning(name: str) -> SftRecipe:
        settings = recipe(name).model_dump(include={"run", "task", "steps", "dtype", "accumulate", "optim"})
        more = {"model": {"path": str(base)}, "data": {"batch_size": 3, "sequence_length": 80}}
        return check(SftRecipe, settings | more, "test")

    whole = sft(tuning("whole"))
    kill_at(sft, tuning("killed"), 5, random.Random(0))
    same_run(sft(tuning("killed"), resume=True), whole, steps_of)


def test_ctrl_c_saves_the_step_and_says_how_to_go_on(recipe: Make, steps_of: Steps, tmp_path: Path) -> None:
    """From outside: the command ends with code 130, its last step is a checkpoint, and --resume completes the run."""
    settings = recipe("stopped", checkpoint_every=0, steps=200)
    (tmp_path / "tiny.toml").write_text(to_toml(settings))
    command = [sys.executable, "-m", "luciola", "pretrain", "tiny.toml", "steps=200"]
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130, messages
    assert "stopped; continue with: luciola pretrain tiny.toml steps=200 --resume" in messages
    assert "Traceback" not in messages
    done = len(steps_of(tmp_path / "stopped"))
    assert 3 <= done < 200
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()] == [f"step-{done:06}"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_continues_exactly(
    recipe: Make, steps_of: Steps, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The signal arrives in the middle of a step; the step is finished and saved."""
    whole = pretrain(recipe("whole"))
    stopped = recipe("stopped", checkpoint_every=0)
    with monkeypatch.context() as patch:
        real = luciola.train.loop.train_step

        def train_step(*arguments: Any) -> dict[str, Any]:
            if arguments[-1] == 4:
                os.kill(os.getpid(), number)
            return real(*arguments)

        patch.setattr(luciola.train.loop, "train_step", train_step)
        with pytest.raises(KeyboardInterrupt):
            pretrain(stopped)
    path = Path(stopped.run.folder, "stopped")
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["step-000005"]
    assert len(steps_of(path)) == 5
    same_run(pretrain(stopped, resume=True), whole, steps_of)


def test_a_signal_after_the_steps_decision_to_save_is_not_lost_work(
    recipe: Make, steps_of: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = recipe("stopped", checkpoint_every=0)
    path = Path(stopped.run.folder, "stopped")
    real = luciola.run.Run.progress

    def progress(self: Any, *arguments: Any) -> Any:
        class Signalling:
            def __enter__(self) -> Callable[[str], None]:
                return lambda note: os.kill(os.getpid(), signal.SIGINT) if len(steps_of(path)) == 2 else None

            def __exit__(self, *error: Any) -> None: ...

        return Signalling()

    assert callable(real)
    monkeypatch.setattr(luciola.run.Run, "progress", progress)
    with pytest.raises(KeyboardInterrupt):
        pretrain(stopped)
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["step-000003"]
    assert len(steps_of(path)) == 3


def test_a_second_ctrl_c_does_not_wait(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_step(*arguments: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("not interrupted")

    monkeypatch.setattr(luciola.train.loop, "train_step", train_step)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe())
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_that_diverges_stops_with_the_step_and_the_last_checkpoint(recipe: Make, steps_of: Steps) -> None:
    optim = {"lr": 1e25, "clip_grad_norm": 0}
    with pytest.raises(Diverged, match=r"(loss|grad_norm) is (nan|inf) at step \d; the run has stopped") as found:
        pretrain(recipe("wild", checkpoint_every=1, optim=optim))
    run = Path(recipe("wild").run.folder, "wild")
    done = len(steps_of(run))
    assert f"at step {done + 1}" in str(found.value)
    checkpoint = run / "checkpoints" / f"step-{done:06}"
    assert f"the last good checkpoint is {checkpoint}. Lower the learning rate" in str(found.value)
    tensors = load_file(checkpoint / "optimizer.safetensors")
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    with pytest.raises(Diverged, match="there is no checkpoint yet"):
        pretrain(recipe("wilder", checkpoint_every=0, optim=optim))


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_when_there_is_room(
    recipe: Make, steps_of: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain(recipe("whole"))
    full = recipe("full")
    run = Path(full.run.folder, "full")

    def save(tensors: Mapping[str, Any], path: Path) -> None:
        if (run / "checkpoints" / "step-000003").exists() and path.name == "buffers.safetensors":
            path.write_bytes(b"half a fi")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", save)
        with pytest.raises(OSError, match="No space left"):
            pretrain(full)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000003"]
    same_run(pretrain(full, resume=True), whole, steps_of)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_saved_is_what_was_trained(recipe: Make, dtype: str) -> None:
    """The checkpoint's float32 weights, rounded, are the stored model; router biases travel exactly."""
    run = pretrain(recipe(dtype=dtype, bias_update_speed=0.001))
    kept = load_file(run / "checkpoints" / "step-000012" / "optimizer.safetensors")
    biases = load_file(run / "checkpoints" / "step-000012" / "buffers.safetensors")
    lm = luciola.load(run)
    for name, parameter in lm.model.named_parameters():
        expected = kept[f"master.{name}"]
        if dtype == "bfloat16":
            expected = expected.bfloat16().float()
        assert parameter.equal(expected), name
    buffers = dict(lm.model.named_buffers())
    assert biases.keys() == {name for name in buffers if "bias" in name}
    for name, bias in biases.items():
        assert bias.abs().max() > 0
        assert buffers[name].equal(bias)


def test_time_spent_before_an_interruption_counts(recipe: Make) -> None:
    run = pretrain(recipe())
    kept = run / "checkpoints" / "step-000012" / "state.json"
    facts = json.loads(kept.read_text())
    assert 0 < facts["facts"]["seconds"] <= json.loads((run / "summary.json").read_text())["seconds"] + 0.05
    kept.write_text(json.dumps(facts | {"facts": {"seconds": 1000.0}}))
    (run / "summary.json").unlink()
    pretrain(recipe(), resume=True)
    assert json.loads((run / "summary.json").read_text())["seconds"] >= 1000


def test_a_damaged_checkpoint_is_named_with_the_one_before(recipe: Make) -> None:
    run = pretrain(recipe())
    (run / "summary.json").unlink()
    newest = run / "checkpoints" / "step-000012"
    damaged = newest / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    mend = rf"{newest} is damaged \(.*\); delete it, and --resume goes on from {run / 'checkpoints' / 'step-000009'}"
    with pytest.raises(ValueError, match=mend):
        pretrain(recipe(), resume=True)
    shutil.rmtree(newest)
    pretrain(recipe(), resume=True)
    assert (run / "summary.json").exists()


def test_only_the_newest_checkpoints_are_kept(recipe: Make) -> None:
    run = pretrain(recipe())
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000009", "step-000012"]
