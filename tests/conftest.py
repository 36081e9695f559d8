"""A cache folder of our own and one thread a process: no test depends on the machine's past or slows its neighbour."""

import os
from pathlib import Path

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
