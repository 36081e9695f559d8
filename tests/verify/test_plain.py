"""Numbers are read exactly, in every common spelling, and nothing else is read as a number."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luciola.verify import plain

whole = st.integers(min_value=-(10**30), max_value=10**30)


@given(whole)
def test_integers_with_and_without_separators(value: int) -> None:
    assert plain.number(str(value)) == value
    assert plain.number(f"{value:,}") == value
    assert plain.number(f"{value:,}".replace(",", "{,}")) == value
    assert plain.number(f"${value}$ \\text{{ apples}}") == value


@given(whole, st.integers(min_value=1, max_value=10**9))
def test_fractions(above: int, below: int) -> None:
    value = Fraction(above, below)
    assert plain.number(f"{above}/{below}") == value
    assert plain.number(f"\\dfrac{{{above}}}{{{below}}}") == value
    assert plain.number(f"x = \\frac{{{above}}}{{{below}}}") == value


@given(st.integers(min_value=0, max_value=999), st.integers(min_value=0, max_value=98))
def test_mixed_numbers(whole_part: int, above: int) -> None:
    value = whole_part + Fraction(above, 99)
    assert plain.number(f"{whole_part} {above}/99") == value
    assert plain.number(f"-{whole_part}\\frac{{{above}}}{{99}}") == -value


@given(st.decimals(min_value=-(10**9), max_value=10**9, places=6))
def test_decimals(value: object) -> None:
    assert plain.number(str(value)) == Fraction(str(value))


NOT_NUMBERS = (
    *("", "-", ".", "--1", "1..2", "nan", "inf", "0x1", "1_0", "1e9999", "9" * 2000),
    *("1,00", "1,0000", "1, 200", "1 2", "1 or 2", "5 million", "5x", "5 pi"),
    *("1/0", "1/2/3", "3 4/0", "1/" + "0" * 40),
    *("٣", "４", "4²", "½"),
)


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_not_a_number(text: str) -> None:
    assert plain.number(text) is None


@given(st.text(max_size=30), st.text(min_size=1, max_size=30).filter(str.strip))
def test_comparison_decides_or_leaves_it_to_algebra(answer: str, truth: str) -> None:
    if plain.canonical(truth):
        verdict = plain.compare(answer, truth)
        assert verdict is None or verdict.kind in ("correct", "wrong")
        equal = plain.compare(truth, truth)
        assert equal is not None and equal.kind == "correct"


@given(st.text(max_size=60))
def test_canonical_spelling_is_settled_once(text: str) -> None:
    once = plain.canonical(text)
    assert len(once) <= len(text) + 8
    assert plain.number(text) == plain.number(text)


def test_numbers_need_no_algebra() -> None:
    for answer in ("7", "8", "x = 7", "7.0", "6+1", "7 apples", "7!", "3,4"):
        assert plain.compare(answer, "7") is not None
