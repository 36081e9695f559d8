"""The options of `luciola serve` on their way to the server; nothing listens here for long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from luciola.cli import app
from luciola.serve import server


@pytest.fixture(scope="module")
def model(writer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    writer(["fine"], context=256).save(folder)
    return folder


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `run` has been called with."""
    calls: list[tuple[Any, ...]] = []

    def run(*arguments: Any) -> None:
        calls.append(arguments)
        for listener in arguments[-1]:
            listener.close()

    monkeypatch.setattr(server, "run", run)
    return calls


def serve(model: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["serve", str(model), "--port", "0", "--dtype", "float32", *options])


@pytest.mark.parametrize(("tokens", "warned"), [("64", True), ("240", True), ("256", False)])
def test_a_cache_of_less_than_a_context_is_said_at_the_start(
    model: Path, ran: list[tuple[Any, ...]], tokens: str, warned: bool
) -> None:
    result = serve(model, "--max-cached-tokens", tokens)
    assert result.exit_code == 0, result.output
    expected = f"warning: the cache has room for {tokens} tokens, less than the model's context of 256"
    assert (expected in result.stderr) == warned == ("warning" in result.stderr)
    assert ran[0][0].state.service.context == min(256, int(tokens) + 1)


def test_names_that_are_allowed_reach_the_guard(model: Path, ran: list[tuple[Any, ...]]) -> None:
    assert serve(model, "--allowed-host", "a.example", "--allowed-host", "b").exit_code == 0
    assert ran[0][1].allowed_hosts == ("a.example", "b")
    wrong = serve(model, "--allowed-host", "http://a.example")
    assert wrong.exit_code != 0 and "expected a name such as" in wrong.output


@pytest.mark.parametrize(
    ("options", "requests", "page"),
    [
        ((), (1.0, 1.0), (0.6, 0.95)),
        (("--temperature", "0"), (0.0, 1.0), (0.0, 0.95)),
        (("--top-p", "0.5", "--temperature", "1"), (1.0, 0.5), (1.0, 0.5)),
    ],
)
def test_sampling_given_to_the_command_holds_for_the_page_too(
    model: Path,
    ran: list[tuple[Any, ...]],
    options: tuple[str, ...],
    requests: tuple[float, float],
    page: tuple[float, float],
) -> None:
    assert serve(model, *options).exit_code == 0
    settings = ran[0][0].state.service.settings
    assert (settings.temperature, settings.top_p) == requests
    assert (settings.page_temperature, settings.page_top_p) == page
