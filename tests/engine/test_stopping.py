"""Stop texts against their naive definition: the whole text is searched again after each piece."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from luciola.engine.stopping import StopTexts

SETTINGS = settings(max_examples=500, deadline=None, derandomize=True)
TEXTS = st.lists(st.text("ab", min_size=1, max_size=6), max_size=6)
PIECES = st.lists(st.text("abc", max_size=5), max_size=15)


def naive(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, int | None]:
    """The text before the stop text, and the piece that completed it."""
    text = ""
    for i, piece in enumerate(pieces):
        text += piece
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return text[: min(places)], i
    return text, None


@given(TEXTS, PIECES)
@SETTINGS
def test_the_text_is_cut_where_searching_all_of_it_would_cut(stops: list[str], pieces: list[str]) -> None:
    expected, last = naive(stops, pieces)
    watch, shown = StopTexts(stops).watch(), ""
    for i, piece in enumerate(pieces):
        shown += watch.push(piece)
        assert expected.startswith(shown)
        assert watch.found == (last is not None and i >= last)
    assert shown + watch.flush() == expected
    assert watch.flush() == ""


@given(TEXTS, PIECES)
@SETTINGS
def test_nothing_is_held_back_but_what_may_become_a_stop_text(stops: list[str], pieces: list[str]) -> None:
    """What is held is the longest end of the text with which some stop text begins."""
    watch, text, shown = StopTexts(stops).watch(), "", ""
    for piece in pieces:
        text, shown = text + piece, shown + watch.push(piece)
        if watch.found:
            break
        held = next(i for i in range(len(text) + 1) if i == len(text) or any(s.startswith(text[i:]) for s in stops))
        assert shown == text[:held]


def test_texts_are_watched_apart() -> None:
    stops = StopTexts(["end"])
    one, other = stops.watch(), stops.watch()
    assert (one.push("the en"), other.push("d")) == ("the ", "d")
    assert (one.push("d."), other.push("end"), one.found, other.found) == ("", "", True, True)


def test_any_character_is_a_character() -> None:
    watch = StopTexts(["\0", "\ufffd你", "é"]).watch()
    assert watch.push("a\ufffd") == "a"
    assert watch.push("b") == "\ufffdb"
    assert watch.push("\ufffd") == ""
    assert watch.push("你") == ""
    assert watch.found


def test_ten_thousand_stop_texts_and_one_of_as_many_characters() -> None:
    stops = [f"<stop number {i}>" for i in range(10_000)] + ["x" * 10_000]
    watch = StopTexts(stops).watch()
    assert watch.push("text " * 1000 + "x" * 500) == "text " * 1000
    assert watch.push(" <stop num") == "x" * 500 + " "
    assert watch.push("ber 9876> more") == ""
    assert watch.found
