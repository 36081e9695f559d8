"""What the command's options make of the settings."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from luciola.cli import app


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The settings with which `luciola serve` and some options would serve a model."""

    def settings_of(*options: str) -> Any:
        made: list[Any] = []
        # Stands for the model and for the engine.
        both = SimpleNamespace(max_cached_tokens=8, config=SimpleNamespace(max_position_embeddings=8))
        command = importlib.import_module("luciola.cli.serve")  # the name itself is the function's
        monkeypatch.setattr(command, "opened", lambda *args, **kwargs: (both, both))
        monkeypatch.setattr(command, "_warm_up", lambda lm, engine: None)
        monkeypatch.setattr("luciola.serve.server.listen", lambda server: [])
        monkeypatch.setattr("luciola.serve.app.create", lambda lm, engine, settings: made.append(settings))
        monkeypatch.setattr("luciola.serve.server.run", lambda app, server, name, sockets: None)
        result = CliRunner().invoke(app, ["serve", str(tmp_path), *options])
        assert result.exit_code == 0, result.output
        return made[0]

    return settings_of


@pytest.mark.parametrize(
    ("options", "requests", "page"),
    [
        ((), (1.0, 1.0), (0.6, 0.95)),
        (("--temperature", "0"), (0.0, 1.0), (0.0, 0.95)),
        (("--top-p", "0.5", "--temperature", "1"), (1.0, 0.5), (1.0, 0.5)),
    ],
)
def test_sampling_given_to_the_command_holds_for_the_page_too(
    settings_of: Any, options: tuple[str, ...], requests: tuple[float, float], page: tuple[float, float]
) -> None:
    settings = settings_of(*options)
    assert (settings.temperature, settings.top_p) == requests
    assert (settings.page_temperature, settings.page_top_p) == page
