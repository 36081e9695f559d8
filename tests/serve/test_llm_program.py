"""The program `llm`, as it is, against a scripted model: replies, schemas, tools and conversations."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from luciola.serve.guard import ServerSettings

KEY = "sk-secret"
CALL = ['<tool_call>\n{"name": "clock", ', '"arguments": {"city": ', '"Oslo"', "}}\n</tool_call>"]
ANSWER = ["\n\n", '{"noon": ', "true, ", '"late": ', "false}"]
# Goes on with a call of the clock, and with the answer once anybody has told the time.
TEMPLATE = """\
{%- set said = namespace(text='') %}
{%- for message in messages %}
    {%- set said.text = said.text + '[' + message.role + ']' + (message.content or '') %}
    {%- for call in message.tool_calls or [] %}{% set said.text = said.text + call.function | tojson %}{% endfor %}
{%- endfor %}{{ said.text + '[assistant]</think>' }}
{%- if '12:00' in said.text %}{{ '\n\n' }}{% endif %}"""
CLOCK = """
def clock(city: str) -> str:
    "The time in a city."
    return "12:00 in " + city
"""


@pytest.fixture(scope="module")
def here(writer: Any, hosting: Any) -> Iterator[Any]:
    lm = writer([*CALL, *ANSWER], chat_template=TEMPLATE)
    with hosting(lm, ServerSettings(api_keys=(KEY,), access_log=False)) as server:
        yield server


@pytest.fixture
def llm(here: Any, tmp_path: Path) -> Callable[..., str]:
    """`llm("a question")`: what the program prints, told of this server by a file of its own."""
    model = {"model_id": "firefly", "model_name": "tiny", "api_base": here.url + "/v1", "api_key_name": "firefly"}
    model |= {"supports_schema": True, "supports_tools": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # JSON is YAML, too
    (tmp_path / "keys.json").write_text(json.dumps({"firefly": KEY}))
    # Plugins that happen to be installed are none of our business.
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    chosen = ["-m", "firefly", "-o", "temperature", "0"]

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", *chosen, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.mark.parametrize("how", [[], ["--async"]])
def test_a_question_with_a_system_message(llm: Callable[..., str], how: list[str]) -> None:
    assert llm("-s", "It is 12:00.", "What is the time?", *how) == "".join(ANSWER).strip()


def test_an_answer_by_a_schema(llm: Callable[..., str]) -> None:
    """Which the model would not give by itself to this question."""
    answer = llm("--schema", "noon bool, late bool", "-o", "max_tokens", "100", "What is the time?")
    assert json.loads(answer) == {"noon": True, "late": False}


@pytest.mark.parametrize("how", [[], ["--no-stream"]])
def test_a_tool_is_called_and_the_conversation_goes_on(llm: Callable[..., str], how: list[str]) -> None:
    assert llm("--functions", CLOCK, "What is the time?", *how).endswith("".join(ANSWER).strip())
    assert llm("-c", "Sure?", *how) == "".join(ANSWER).strip()
