"""Numbers are read exactly, in every common spelling, and nothing else is read as a number."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luciola.verify import answer, plain

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


EQUAL = (
    *(("12 cm", "12"), ("12", "12 cm"), ("12\\text{ cm}", "12\\,\\mathrm{cm}"), ("12 centimeters", "12 cm")),
    *(("12 square meters", "12 m^2"), ("7 cubic feet", "7 ft^3"), ("5 m/s", "5")),
    *(("60 miles per hour", "60 mph"), ("9.8 m/s^2", "9.8"), ("90^\\circ", "90 degrees"), ("0.5 kg", "1/2")),
    *(("$5", "5"), ("5", "\\$5"), ("US$5", "5"), ("USD 5", "5"), ("5 dollars", "\\$5.00"), ("$1,234.50", "1234.5")),
    *(("50%", "50"), ("50\\%", "50 percent"), ("3 hours", "3 hr"), ("12 feet", "12 ft")),
    *(("[1, 2)", "[1,2)"), ("\\left[1,2\\right)", "[1,2)"), ("[0.5,2)", "[\\frac12,2)"), ("[1 1/2, 2]", "[3/2,2]")),
    *(("(-\\infty, 2]", "(-∞,2.0]"), ("(0, +\\infty)", "(0,\\infty)"), ("[1,000, 2,000]", "[1000, 2000]")),
    *(("1 1/2", "3/2"), ("\\frac{3}{2}", "1 1/2"), ("1\\frac{1}{2}", "1.5"), ("-1 1/2", "-\\frac{3}{2}")),
    *(("(1, 2, 3)", "(1.0,2,3)"), ("\\frac{6}{4}", "\\frac{3}{2}")),
)
DIFFERENT = (
    *(
        ("12 km", "12 cm"),
        ("12 cm^2", "12 cm"),
        ("12 square cm", "12 cm^3"),
        ("5 cents", "5 dollars"),
        ("5 cm", "6 cm"),
    ),
    *(("12 inches", "1 foot"), ("12 cm or 13 cm", "12"), ("12 cm 13 cm", "12"), ("12 cm, 13 cm", "12 cm")),
    *(("12 cm + 1 cm", "12"), ("3 hours and 20 minutes", "3"), ("$5 or $6", "5"), ("5%6", "5"), ("5 % 3", "5")),
    *(("50%", "0.5"), ("0.5", "50\\%"), ("50", "5%"), ("12x", "12"), ("7 m^4", "7")),
    *(("[1,2]", "[1,2)"), ("(1,2)", "[1,2)"), ("[2,1)", "[1,2)"), ("[1,3)", "[1,2)"), ("(2,1)", "(1,2)")),
    *(("(\\infty, 2]", "(-\\infty, 2]"), ("(1,2,3)", "(1,2)"), ("[1,2)", "[1,2,3)"), ("(1,234)", "(1, 234)")),
    *(("2 1/2", "21/2"), ("1 1/2", "11/2"), ("1 1/2", "1/2"), ("1 1/2", "1 \\cdot 1/2")),
)


@pytest.mark.parametrize(("given", "truth"), EQUAL)
def test_units_intervals_and_fractions_that_are_equal(given: str, truth: str) -> None:
    verdict = plain.compare(given, truth)
    assert verdict is not None and verdict.kind == "correct"


@pytest.mark.parametrize(("given", "truth"), DIFFERENT)
def test_units_intervals_and_fractions_that_are_not(given: str, truth: str) -> None:
    verdict = answer.grade(f"<answer>{given}</answer>", truth)
    assert (verdict.kind, verdict.reward) == ("wrong", 0.0)


@pytest.mark.parametrize(
    ("given", "truth", "kind"),
    [
        ("25\\pi cm^2", "25\\pi", "correct"),
        ("25\\pi", "25\\pi\\text{ cm}^2", "correct"),
        ("\\sqrt{8} cm", "2\\sqrt{2}", "correct"),
        ("\\sqrt{8} cm", "2\\sqrt{2} km", "wrong"),
        ("25\\pi cm^3", "25\\pi cm^2", "wrong"),
        ("1 \\le x < 2", "[1,2)", "correct"),
        ("1 < x < 2", "[1,2)", "wrong"),
        ("(3,4]\\cup[1,2)", "[1,2)\\cup(3,4]", "correct"),
        ("3m", "3", "correct"),
        ("2m + s", "2m", "wrong"),
    ],
)
def test_units_and_intervals_that_need_algebra(given: str, truth: str, kind: str) -> None:
    assert answer.grade(f"<answer>{given}</answer>", truth).kind == kind


@given(whole, st.sampled_from(["", " cm", " kg", " dollars"]), st.sampled_from(["", " cm", " kg", " dollars"]))
def test_a_unit_may_be_missing_but_not_another_one(value: int, unit: str, due: str) -> None:
    verdict = plain.compare(f"{value}{unit}", f"{value}{due}")
    assert verdict is not None
    assert (verdict.kind == "correct") == (unit == due or not unit or not due)


def test_numbers_need_no_algebra() -> None:
    for text in ("7", "8", "x = 7", "7.0", "6+1", "7 apples", "7!", "3,4"):
        assert plain.compare(text, "7") is not None
