"""A cache folder of our own and one thread a process: no test depends on the machine's past or slows its neighbour."""

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any test imports torch

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder: what a command writes to runs/ goes there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def forks() -> ForkServerContext:
    """Processes that start at once: torch is imported a single time, in the server from which they are forked."""
    from luciola import hardware

    # What this machine can do is measured here and kept, however busy the machine is, so that no fork measures again.
    kept = hardware.cache_folder() / f"hardware-{hardware._fingerprint()}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(hardware.measured()))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["luciola.rl.grpo", "torch._dynamo"])  # the latter is what AdamW imports
    return context


@pytest.fixture
def kill_at(forks: ForkServerContext) -> Callable[..., int]:
    """`kill_at(start, recipe, lines, rng)`: begins or resumes a run and kills it, as a power cut would, some time after
    its metrics (or those of a part of it, "base") have `lines` lines. Returns its exit code, 0 if it was faster."""

    def kill(start: Callable[..., Path], recipe: Any, lines: int, rng: random.Random, part: str = ".") -> int:
        metrics = Path(recipe.run.folder, recipe.run.name, part, "metrics.jsonl")
        process = forks.Process(target=start, args=(recipe, True))
        process.start()
        while process.is_alive() and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        return process.exitcode

    return kill


@pytest.fixture
def steps_of() -> Callable[[Path], list[dict[str, Any]]]:
    """The metrics of a run, without those that depend on the speed and memory of the machine."""
    physical = ("tokens_per_second", "mfu", "seconds/", "memory/")

    def read(run: Path) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in record.items() if not k.startswith(physical)} for record in records]

    return read
