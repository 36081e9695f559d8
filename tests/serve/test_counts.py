"""What /metrics, the usage in replies and the access log say of the same requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from luciola.serve.guard import ServerSettings

PIECES = ["<think>", "two ", "and ", "two", "</think>", "It ", "is ", "four"]
QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "2+2?"}], "temperature": 0}
OFF = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def here(writer: Any, hosting: Any) -> Iterator[Any]:
    with hosting(writer(PIECES, context=512), ServerSettings(access_log=True)) as server:
        yield server


def chat(here: Any, **body: Any) -> Any:
    return here.client.post("/v1/chat/completions", json=QUESTION | body)


def counted(here: Any) -> dict[str, float]:
    """The sum of each metric over its labels, and one with its last label where it has two."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(here.client.get("/metrics").text):
        for sample in family.samples:
            name = sample.name.removeprefix("luciola:")
            labels = [value for key, value in sample.labels.items() if key != "model_name"]
            for key in {name, *(f"{name} {label}" for label in labels)}:
                found[key] = found.get(key, 0.0) + sample.value
    return found


class Growth:
    """`with Growth(here) as grown: ...`; then grown["name"] says by how much a metric has grown."""

    def __init__(self, here: Any) -> None:
        self._here = here

    def __enter__(self) -> Growth:
        self._before = counted(self._here)
        return self

    def __exit__(self, *_: object) -> None:
        self._here.until_free()
        self._after = counted(self._here)

    def __getitem__(self, name: str) -> float:
        return self._after.get(name, 0.0) - self._before.get(name, 0.0)


def test_tokens_of_thinking_are_the_same_in_usage_and_metrics(here: Any) -> None:
    with Growth(here) as grown:
        usage = chat(here).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 5
    assert grown["reasoning_tokens_total"] == 5
