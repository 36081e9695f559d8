"""However a completion is cut into pieces, its parts are those of the whole text, and nothing waits without need."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luciola.serve.reasoning import ReasoningSplitter
from luciola.text.chat import END_THINK, THINK, split_reasoning

TEXTS = st.lists(
    st.sampled_from([THINK, END_THINK, "<", "</", "</thi", "think>", "<think", " ", "\n", "a", "é", "日本", "\u00a0"])
).map("".join)


def parts(pieces: list[str], thinking: bool = False, separate: bool = True) -> tuple[str, str]:
    splitter = ReasoningSplitter(thinking, separate)
    given_out = [*(splitter.push(piece) for piece in pieces), splitter.end()]
    return "".join(part for part, _ in given_out), "".join(part for _, part in given_out)


@st.composite
def pieces_of_texts(draw: st.DrawFn) -> list[str]:
    text = draw(TEXTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(pieces_of_texts())
def test_a_model_that_opens_its_thinking(pieces: list[str]) -> None:
    text = "".join(pieces)
    opened = text.lstrip().startswith(THINK)
    thinking, answer = split_reasoning(text) if opened else (None, text)
    assert parts(pieces) == (thinking or "", answer)


@given(pieces_of_texts())
def test_a_prompt_that_has_opened_the_thinking(pieces: list[str]) -> None:
    text = "".join(pieces)
    thinking, answer = split_reasoning(text if text.lstrip().startswith(THINK) else THINK + text)
    assert parts(pieces, thinking=True) == (thinking or "", answer)


@given(pieces_of_texts(), st.booleans())
def test_where_nothing_is_separated_everything_is_content_at_once(pieces: list[str], thinking: bool) -> None:
    splitter = ReasoningSplitter(thinking, separate=False)
    assert [splitter.push(piece) for piece in pieces] == [("", piece) for piece in pieces]
    assert splitter.end() == ("", "") and not splitter.thinking


@given(pieces_of_texts(), st.booleans())
def test_only_what_could_be_markup_is_held_back(pieces: list[str], thinking: bool) -> None:
    """What has not been given out is blank space and the beginning of a tag."""
    splitter = ReasoningSplitter(thinking)
    for piece in pieces:
        splitter.push(piece)
        waiting = splitter._held.strip()
        assert waiting not in (THINK, END_THINK)
        assert THINK.startswith(waiting) or END_THINK.startswith(waiting)


@pytest.mark.parametrize(
    ("pieces", "thinking", "expected"),
    [
        (["<th", "ink>\n a", " b \n", "</", "think>\n", "\nc\n"], False, [("", ""), ("a", ""), (" b", ""), ("", ""),
                                                                        ("", ""), ("", "c\n"), ("", "")]),
        (["hm", " </thi", "s>", "</think>", "x"], True, [("hm", ""), ("", ""), (" </this>", ""), ("", ""), ("", "x"),
                                                        ("", "")]),
        (["a </thi"], True, [("a", ""), (" </thi", "")]),
        (["yes", " <think>no</think>"], False, [("", "yes"), ("", " <think>no</think>"), ("", "")]),
        ([" <thi"], False, [("", ""), ("", " <thi")]),
        (["a</think>b</think>c"], True, [("a", "b</think>c"), ("", "")]),
    ],
)  # fmt: skip
def test_pieces(pieces: list[str], thinking: bool, expected: list[tuple[str, str]]) -> None:
    splitter = ReasoningSplitter(thinking)
    assert [*(splitter.push(piece) for piece in pieces), splitter.end()] == expected


def test_it_says_whether_it_is_within_the_thinking() -> None:
    splitter = ReasoningSplitter(thinking=True)
    assert splitter.thinking
    splitter.push("a</think>")
    assert not splitter.thinking
    splitter = ReasoningSplitter()
    assert not splitter.thinking
    splitter.push("<think>")
    assert splitter.thinking
