"""The format reward is for one form alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luciola.verify.style import format_reward, language_reward, language_share, length_rewards, repetition_reward

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@pytest.mark.parametrize(
    "completion",
    [
        "<think>a</think><answer>b</answer>",
        "<think>\na\n</think>\n<answer>\nb\n</answer>\n",
        "\n<think>a < b > c</think>\n\n<answer>b</answer>",
    ],
)
def test_the_form(completion: str) -> None:
    assert format_reward(completion) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "b",
        "<answer>b</answer>",
        "<think>a</think>",
        "<think></think><answer>b</answer>",
        "<think> \n</think><answer>b</answer>",
        "<think>a</think><answer></answer>",
        "<think>a</think><answer> </answer>",
        "<think>a</think>text<answer>b</answer>",
        "text<think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer>text",
        "a</think><answer>b</answer>",
        "<think>a<answer>b</answer></think>",
        "<answer>b</answer><think>a</think>",
        "<think>a</think><answer>b",
        "<think>a</think><think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer><answer>b</answer>",
        "<think><think>a</think></think><answer>b</answer>",
        "<think>a <answer> a</think><answer>b</answer>",
        "<THINK>a</THINK><ANSWER>b</ANSWER>",
    ],
)
def test_nothing_else(completion: str) -> None:
    assert format_reward(completion) == 0.0


@given(st.lists(st.sampled_from([*TAGS, "a", " ", "\n"]), max_size=10).map("".join))
def test_the_four_tags_once_each_in_order(completion: str) -> None:
    inside = completion
    for tag in TAGS:
        inside = inside.replace(tag, "|")
    parts = inside.split("|")
    tags_in_order = [tag for tag in completion.replace("<", "\0<").replace(">", ">\0").split("\0") if tag in TAGS]
    blank = [not part.strip() for part in parts]
    right = tags_in_order == list(TAGS) and blank == [True, False, True, False, True]
    assert format_reward(completion) == float(right)


def test_language_is_the_share_of_words_in_its_script() -> None:
    assert language_reward("<think>two words</think>你好", "en") == 1.0
    assert language_reward("<think>two words 你好</think>", "en") == pytest.approx(2 / 4)
    assert language_reward("<think>two words 你好</think>", "zh") == pytest.approx(2 / 4)
    assert language_reward("<think>设 x = \\frac{1}{2} 则</think>", "zh") == 1.0, "names and commands are no words"
    for empty in ("", "<think></think>all of this is an answer", "<think>12 + 34 = 46</think>"):
        assert language_reward(empty, "en") == 0.0, "no words earn nothing"


def test_repetition_is_the_share_of_repeated_three_word_sequences() -> None:
    assert repetition_reward("all words here are different") == 0.0
    assert repetition_reward("") == repetition_reward("no no") == 0.0
    assert repetition_reward("a b c a b c") == pytest.approx(3 / 4 - 1)
    assert -1.0 < repetition_reward("wait " * 1000) < -0.99


def test_length_favours_short_right_answers_and_never_a_wrong_one() -> None:
    found = length_rewards([10, 20, 30, 10, 30], [True, True, True, False, False])
    assert found == [0.5, 0.0, -0.5, 0.0, -0.5]
    assert length_rewards([7, 7], [True, False]) == [0.0, 0.0]


def test_thinking_without_words_has_no_language() -> None:
    assert language_share("<think>1+2=3</think><answer>three</answer>", "en") is None
    assert language_share("<think>你好</think>", "en") == 0.0
    assert language_reward("<think>1+2=3</think>", "en") == 0.0
