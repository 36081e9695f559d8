"""Every chat template, here in the manner of each family's, gets tools, calls and results as it takes them."""

import json
from typing import Any

import pytest

from luciola.serve.tool_formats import DEEPSEEK_V3, DEEPSEEK_V3_1, HERMES, LLAMA_3, MISTRAL
from luciola.serve.tool_prompts import ToolPrompts
from luciola.serve.tools import ToolUse
from luciola.text.tokenizer import Tokenizer

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"maxLength": 6}}}}},
    {"type": "function", "function": {"name": "now"}},
]
TOOL_LIST = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
RESULT = "{% elif m.role == 'tool' %}[{{ m.content }}]"
TEMPLATES = {
    "qwen": (
        TOOL_LIST + "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and m.tool_calls %}"
        "{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls %}{% set c = c.function %}"
        '\n<tool_call>\n{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}\n</tool_call>{% endfor %}'
        + RESULT + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}",
        HERMES, True, "object", True,
    ),
    "qwen, failing without content": (
        TOOL_LIST + "{% for m in messages %}{% if '</think>' in m.content %}{{ raise_exception('') }}{% endif %}"
        "{{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}{% set c = c.function %}"
        '\n<tool_call>\n{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}\n</tool_call>{% endfor %}'
        "{% endif %}{% endfor %}",
        HERMES, True, "object", True,
    ),
    # R1's shows no tools, and takes a message of calls for one of text if it has content.
    "deepseek": (
        "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}<｜tool▁calls▁begin｜>"
        "{% for c in m.tool_calls %}{{ '<｜tool▁call▁begin｜>' + c.type "
        "+ '<｜tool▁sep｜>' + c.function.name + '\\n```json\\n'"
        " + c.function.arguments + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>"
        + RESULT + "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        DEEPSEEK_V3, False, "text", False,
    ),
    "deepseek-v3.1": (
        TOOL_LIST + "{% for m in messages %}{% if m.tool_calls is defined %}{{ m.content or '' }}"
        "<｜tool▁calls▁begin｜>"
        "{% for c in m.tool_calls %}{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' "
        "+ c.function.arguments "
        "+ '<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>"
        + RESULT + "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        DEEPSEEK_V3_1, True, "text", True,
    ),
    "llama": (
        TOOL_LIST + "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
        "{{ raise_exception('one call at a time') }}{% endif %}{% set c = m.tool_calls[0].function %}"
        "{{- '{\"name\": \"' + c.name + '\", ' }}{{- '\"parameters\": ' }}{{- c.arguments | tojson }}{{- '}' }}"
        "{% elif m.role == 'tool' %}ipython {{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}",
        LLAMA_3, True, "object", True,
    ),
    "mistral": (
        TOOL_LIST + "{% for m in messages %}{% if m.tool_calls is defined %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
        "{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
        "{% endfor %}]{% elif m.role == 'tool' %}[{{ m.content }}, {{ m.tool_call_id }}]"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        MISTRAL, True, "object", True,
    ),
    "none": (
        "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception(m.role) }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        HERMES, False, None, True,
    ),
    "deepseek's default": (None, HERMES, False, None, True),
}  # fmt: skip


def history(content: str | None, calls: int = 1) -> list[dict[str, Any]]:
    made = [
        {"id": f"call_{i}", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ob"}'}}
        for i in range(calls)
    ]
    results = [{"role": "tool", "tool_call_id": f"call_{i}", "content": f"rain {i}"} for i in range(calls)]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": content, "tool_calls": made},
        *results,
    ]


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("content", [None, "", "I look."])
def test_every_template_gets_tools_calls_and_results_as_it_takes_them(family: str, content: str | None) -> None:
    template, form, shows_tools, arguments, beside = TEMPLATES[family]
    tokenizer = Tokenizer.characters("ab", chat_template=template)
    prompts, use = ToolPrompts.of(tokenizer), ToolUse.read(TOOLS)
    assert use and not prompts.special
    assert (prompts.form, prompts.shows_tools, prompts.arguments) == (form, shows_tools, arguments)
    assert prompts.content_beside_calls == beside
    given_messages = history(content, calls=1 if form == LLAMA_3 else 2)
    before = json.dumps(given_messages)
    for tools in (use.given, ()):
        messages, shown = prompts.prepare(given_messages, tools)
        text = tokenizer.render(messages, tools=shown)
        assert "Be brief." in text and "Well?" in text and "rain 0" in text
        assert (form == LLAMA_3 or "rain 1" in text) and text.index("Well?") < text.index("Ob") < text.index("rain")
        assert ("maxLength" in text) == bool(tools)
        assert ("I look." in text) == (content == "I look." and family not in ("deepseek", "llama", "mistral"))
        if form not in (MISTRAL, LLAMA_3):
            call = form.write([("weather", '{"city": "Ob"}')]).removeprefix(form.open).removesuffix(form.close)
            assert text.count(call) == 2
    assert json.dumps(given_messages) == before


def test_a_template_without_system_messages_has_the_tools_in_the_first_question() -> None:
    template = TEMPLATES["none"][0].replace("'system', ", "")
    tokenizer = Tokenizer.characters("ab", chat_template=template)
    prompts, use = ToolPrompts.of(tokenizer), ToolUse.read(TOOLS)
    assert use
    messages, shown = prompts.prepare([{"role": "user", "content": "Well?"}], use.given)
    text = tokenizer.render(messages, tools=shown)
    assert text.startswith("<user>") and "maxLength" in text and text.endswith("Well?")


def test_a_conversation_without_calls_is_left_as_it_is() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": None}]
    for template, *_ in TEMPLATES.values():
        prompts = ToolPrompts.of(Tokenizer.characters("ab", chat_template=template))
        assert prompts.prepare(messages, ()) == (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            None,
        )


@pytest.mark.parametrize(
    "calls",
    [3, [3], [{}], [{"function": {"name": "f", "arguments": "[1"}}], [{"function": {"name": "f", "arguments": "3"}}]],
)
def test_calls_of_the_history_that_are_none_are_refused(calls: object) -> None:
    prompts = ToolPrompts.of(Tokenizer.characters("ab"))
    with pytest.raises(ValueError, match=r"^messages\[0\].tool_calls"):
        prompts.prepare([{"role": "assistant", "content": None, "tool_calls": calls}], ())


def test_special_tokens_of_the_markup_are_told() -> None:
    tokenizer = Tokenizer.characters("ab", chat_template=TEMPLATES["mistral"][0])
    tokenizer.backend.add_special_tokens(["[TOOL_CALLS]"])
    special = ToolPrompts.of(tokenizer).special
    assert {"[TOOL_CALLS]", "<｜end▁of▁sentence｜>"} <= special
