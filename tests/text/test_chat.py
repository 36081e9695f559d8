"""The default chat template and the split of a completion into thinking and answer."""

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
