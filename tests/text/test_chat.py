"""The default chat template and the split of a completion into thinking and answer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luciola.text.chat import ASSISTANT, BOS, DEFAULT_TEMPLATE, EOS, USER, render, split_reasoning


def rendered(*turns: tuple[str, str], add_generation_prompt: bool = True) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return render(DEFAULT_TEMPLATE, messages, add_generation_prompt=add_generation_prompt, bos_token=BOS, eos_token=EOS)


def test_a_question() -> None:
    assert rendered(("user", "1+1=")) == f"{BOS}{USER}1+1={ASSISTANT}"


def test_system_texts_stand_after_bos_wherever_they_were() -> None:
    text = rendered(("system", "A"), ("user", "q"), ("system", "B"))
    assert text == f"{BOS}A\n\nB{USER}q{ASSISTANT}"


def test_only_the_last_answer_keeps_its_thinking() -> None:
    turns = (("user", "q"), ("assistant", "<think>t</think>a"), ("user", "r"), ("assistant", "<think>u</think>b"))
    text = rendered(*turns, add_generation_prompt=False)
    assert text == f"{BOS}{USER}q{ASSISTANT}a{EOS}{USER}r{ASSISTANT}<think>u</think>b{EOS}"


@given(st.text(max_size=30), st.text(max_size=30).filter(lambda text: text))
def test_prompt_and_answer_concatenate_to_the_finished_turn(question: str, answer: str) -> None:
    finished = rendered(("user", question), ("assistant", answer), add_generation_prompt=False)
    assert rendered(("user", question)) + answer + EOS == finished


def test_an_unknown_role_and_tools_are_refused() -> None:
    with pytest.raises(ValueError, match="role 'critic' is not one of"):
        rendered(("critic", "x"))
    with pytest.raises(ValueError, match="no place for tools"):
        render(DEFAULT_TEMPLATE, [{"role": "user", "content": "x"}], tools=[{"name": "f"}])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\na b\n</think>\n\nc\n", ("a b", "c\n")),
        ("a</think>b", ("a", "b")),
        ("\n<think>a", ("a", "")),
        ("<think></think>b", ("", "b")),
        ("no tags <think>", (None, "no tags <think>")),
        ("<think>a</think>b</think>c", ("a", "b</think>c")),
        ("", (None, "")),
    ],
)
def test_split_reasoning(text: str, expected: tuple[str | None, str]) -> None:
    assert split_reasoning(text) == expected


# In the manner of R1's own template: tools after the system text, calls and replies between their tokens, earlier
# thoughts dropped, and a prompt that opens the thinking.
WITH_TOOLS = """\
{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}
{%- set ns.system = ns.system + m.content %}{% endfor %}{{ bos_token }}{{ ns.system }}{% if tools %}

## Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}
{%- elif m.role == 'assistant' and m.tool_calls is defined %}<｜Assistant｜><｜tool▁calls▁begin｜>
{%- for call in m.tool_calls %}<｜tool▁call▁begin｜>{{ call.type }}<｜tool▁sep｜>{{ call.function.name }}
```json
{{ call.function.arguments }}
```<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>{{ eos_token }}
{%- elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>') | last }}{{ eos_token }}
{%- elif m.role == 'tool' %}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>
{%- if not loop.last and messages[loop.index0 + 1].role == 'tool' %}{% endif %}<｜tool▁outputs▁end｜>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>
{% endif %}"""


def test_a_template_that_takes_tools_and_opens_the_thinking() -> None:
    tool = {"type": "function", "function": {"name": "add", "description": "a < b & c", "parameters": {}}}
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "<think>It is 2.</think>Two."},
        {"role": "user", "content": "你好 🤖"},
    ]
    text = render(WITH_TOOLS, messages, tools=[tool], bos_token=BOS, eos_token=EOS)
    assert text.startswith(f"{BOS}Be brief.\n## Tools\n" + json.dumps(tool))
    assert '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>' in text
    assert f"<｜tool▁output▁begin｜>2<｜tool▁output▁end｜><｜tool▁outputs▁end｜>{ASSISTANT}Two.{EOS}" in text
    assert text.endswith(f"{USER}你好 🤖{ASSISTANT}<think>\n")
    assert "It is 2." not in text
    assert split_reasoning("It is easy.\n</think>\n\nHello") == ("It is easy.", "Hello")
    assert "## Tools" not in render(WITH_TOOLS, messages, bos_token=BOS, eos_token=EOS)
