"""The load that `make load` brings, on a small model: ten seconds of it, and that it sees what goes wrong."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import luciola
from luciola.model.native import build
from luciola.text.tokenizer import Tokenizer

SCRIPT = Path(__file__).with_name("load.py")
ALPHABET = "".join(chr(code) for code in range(32, 127)) + "\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any]) -> str:
    """Random weights: what it writes makes no sense, and depends on every token of the prompt."""
    tokens = Tokenizer.characters(ALPHABET)
    folder = tmp_path_factory.mktemp("models") / "random"
    shape = tiny | {"vocab_size": tokens.vocab_size, "max_position_embeddings": 1024}
    luciola.LanguageModel.create(shape, tokens, seed=1).save(folder)
    return str(folder)


def test_every_answer_is_that_of_the_request_alone_and_nothing_is_left_behind(model: str, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    size = ("--seconds", "6", "--clients", "16", "--leaving", "20", "--distinct", "30")
    # Other tests take the processor away now and then: the limits of time and memory are loose.
    limits = ("--health-limit", "0.5", "--memory-limit", "0.25")
    serve = [] if build.reason() else ["--", "--parity"]
    command = [sys.executable, SCRIPT, "--model", model, *size, *limits, "--output", output, *serve]
    source = str(Path(luciola.__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source})
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(output.read_text())
    assert not figures["faults"]
    assert figures["answers"] >= 50 and figures["left"] >= 16 and figures["health_asked"] >= 20


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("load", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "load", module)
    spec.loader.exec_module(module)
    return module


def test_the_load_sees_answers_that_are_mixed_up(load: ModuleType, hosting: Callable[..., Any], model: str) -> None:
    options = load.parsed(["--model", model, "--seconds", "0.3", "--clients", "4", "--leaving", "1"])
    asked = load.requests(6, longest=10)
    with hosting(luciola.load(model), max_queue=100) as server:
        alone = asyncio.run(load.each_alone(server.url, asked))
        assert len(set(alone)) == 6
        seen = asyncio.run(load.load(server.url, asked, [*alone[1:], alone[0]], options))
        assert seen.wrong and not seen.right and not seen.lost
    gone = asyncio.run(load.load(server.url, asked, alone, options))
    assert gone.lost and not gone.right


def test_all_kinds_of_requests_are_among_them(load: ModuleType) -> None:
    asked = load.requests()
    assert len({json.dumps(one.body) for one in asked}) == len(asked) == load.DISTINCT
    names = {name for one in asked for name in one.body}
    assert names >= {"messages", "prompt", "stop", "n", "thinking_token_budget", "ignore_eos"}
    assert names >= {"response_format", "structured_outputs"}
    lengths = [one.body["max_tokens"] for one in asked]
    assert min(lengths) == 1 and 150 < max(lengths) <= 200
