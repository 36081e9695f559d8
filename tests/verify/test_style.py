"""The format reward is for one form alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luciola.verify.style import format_reward

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
