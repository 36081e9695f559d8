"""kill -9 in the midst of each part of a step: `--resume` goes on bit for bit, as if nothing had happened."""

import json
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from luciola.recipe import GrpoRecipe
from luciola.rl.grpo import grpo

Make = Callable[..., GrpoRecipe]
Steps = Callable[[Path], list[dict[str, Any]]]

# All that a checkpoint has to remember; the fourth step, in which the run is killed, lies after the one of two steps.
FULL: dict[str, dict[str, Any]] = {
    "grpo": {"steps": 6, "reference_refresh": 2, "updates_per_rollout": 2, "epochs": 2, "replay": 0.5},
    "objective": {"beta": 0.1},
    "optim": {"lr": 3e-3, "schedule": "cosine", "warmup_steps": 2},
}
ADAPTERS = FULL | {"lora": {"rank": 2, "alpha": 4.0}}

# In which part, what is called there many times a step, and at which call of the fourth step the process dies.
PARTS = {
    "rollout": ("luciola.engine.engine", "Engine", "_step", 2),  # some tokens are sampled, others are not
    "verification": ("luciola.tasks.arithmetic", "Arithmetic", "grade", 5),
    "update": ("luciola.train.optim", "Optimizer", "step", 3),  # the weights have changed twice
}
PROGRAM = """
import importlib, itertools, os, signal
from luciola.rl import grpo as module

counts = None

def killing(real):
    def call(*arguments, **more):
        if counts is not None and next(counts) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)
    return call

def rollout(engine, tokenizer, recipe, step, real=module.rollout):
    global counts
    counts = itertools.count(1) if step == 3 else None
    return real(engine, tokenizer, recipe, step)

holder = getattr(importlib.import_module(place), owner)
setattr(holder, name, killing(getattr(holder, name)))
module.rollout = rollout
module.grpo(recipe, True)
"""


@pytest.mark.parametrize("settings", [FULL, ADAPTERS], ids=["full", "adapters"])
@pytest.mark.parametrize("part", PARTS)
def test_a_run_killed_in_the_midst_of_a_step_ends_as_if_it_had_never_stopped(
    recipe: Make, forks: ForkServerContext, steps_of: Steps, part: str, settings: dict[str, Any]
) -> None:
    whole = grpo(recipe("whole", **settings))
    killed = recipe("killed", **settings)
    names = dict(zip(("place", "owner", "name", "number"), PARTS[part], strict=True))
    process = forks.Process(target=exec, args=(PROGRAM, {"recipe": killed, **names}))
    process.start()
    process.join(120)
    assert process.exitcode == -9
    path = Path(killed.run.folder, "killed")
    assert len(steps_of(path)) == 3, "it died in the fourth step"
    assert [folder.name for folder in (path / "checkpoints").iterdir()] == ["step-000002"]
    assert not (path / "summary.json").exists()
    assert grpo(killed, resume=True) == path
    assert steps_of(path) == steps_of(whole)
    assert len(steps_of(whole)) == 6
    last = {file.name for file in (whole / "checkpoints" / "step-000006").glob("*.safetensors")}
    assert {"optimizer.safetensors", "reference.safetensors", "replay.safetensors"} <= last
    same = [f"checkpoints/step-000006/{name}" for name in last] + ["samples.jsonl", "heldout.jsonl"]
    same.append("model/model.safetensors" if settings is FULL else "model/adapter_model.safetensors")
    for name in same:
        assert (path / name).read_bytes() == (whole / name).read_bytes(), name
    after = [json.loads((run / "summary.json").read_text())["after"] for run in (path, whole)]
    assert after[0]["accuracy"] == after[1]["accuracy"]
