"""Chat templates of strangers: whatever such a program does, it ends, and the caller gets one ValueError."""

import os
import signal
import threading

import pytest

from luciola.text import chat

MESSAGES = [{"role": "user", "content": "hello"}]

HOSTILE = {
    "endless nested loops": "{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}",
    "comparison of lists nested in themselves, which runs in C": (
        "{% set n = namespace(a=[1], b=[1]) %}"
        "{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}"
    ),
    "a power": "{{ 9 ** (9 ** 9) }}",
}
GREEDY = {
    "range": "{{ range(10 ** 12) | list }}",
    "multiplication": "{{ 'a' * 10 ** 11 }}",
    "padding by a method": "{{ 'a'.center(10 ** 11) }}",
    "padding by a filter": "{{ 'a' | center(10 ** 11) }}",
    "padding by a format": "{{ '%100000000000d' % 1 }}",
    "doubling": "{% set n = namespace(a='a') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "printing for ever": "{% set a = 'a' * 10 ** 6 %}{% for i in range(10 ** 5) %}{{ a }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}
FORBIDDEN = {
    "classes": "{{ messages.__class__.__mro__ }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "changing the messages": "{{ messages.append(1) }}",
    "an attribute through a filter": "{{ messages | attr('__class__') }}",
    "a file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_an_endless_template_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    with pytest.raises(ValueError, match=r"more than 0\.3 seconds"):
        chat.render(source, MESSAGES)
    assert chat.render("{{ messages[0].content }}", MESSAGES) == "hello"


@pytest.mark.parametrize("source", GREEDY.values(), ids=GREEDY.keys())
def test_a_greedy_template_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="chat template"):
        chat.render(source, MESSAGES)
    assert chat.render("{{ messages[0].content }}", MESSAGES) == "hello"


@pytest.mark.parametrize("source", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_a_template_reaches_nothing_but_its_variables(source: str) -> None:
    try:
        text = chat.render(source, MESSAGES)
    except ValueError:
        return
    assert text == ""  # jinja prints an attribute it hides as nothing


def test_the_worker_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "x")
    worker = chat._Worker()
    process = worker._start()
    with open(f"/proc/{process.pid}/environ", encoding="utf-8") as environment:
        assert "SOME_SECRET" not in environment.read()
    process.kill()
    process.communicate()


def test_a_worker_killed_from_outside_is_replaced() -> None:
    assert chat.render("{{ 1 + 1 }}", MESSAGES) == "2"
    process = chat._Worker.here()._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert chat.render("{{ 1 + 1 }}", MESSAGES) == "2"


def test_threads_share_the_worker_without_mixing_replies() -> None:
    wrong: list[str] = []

    def ask(name: str) -> None:
        for index in range(50):
            text = chat.render("{{ messages[0].content }}", [{"role": "user", "content": f"{name}{index}"}])
            if text != f"{name}{index}":
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_templates_of_released_models_use() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ tools | tojson }}{{ strftime_now('%Y') | length }}{{ enable_thinking }}{{ bos_token }}{{ eos_token }}"
    )
    text = chat.render(
        source,
        MESSAGES * 2,
        tools=[{"name": "f<&>ü"}],
        bos_token="<s>",
        eos_token="</s>",
        variables={"enable_thinking": False},
    )
    assert text == 'hello[{"name": "f<&>ü"}]4False<s></s>'


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="does not compile: line 2"):
        chat.render("a\n{% for", MESSAGES)
    with pytest.raises(ValueError, match="refuses these messages: no system role"):
        chat.render("{{ raise_exception('no system role') }}", MESSAGES)
    with pytest.raises(ValueError, match="plain JSON"):
        chat.render("{{ messages }}", [{"role": "user", "content": b"bytes"}])
