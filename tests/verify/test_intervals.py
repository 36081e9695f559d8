"""Sets of real numbers are the same however they are written, and exactly so."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luciola.verify import answer, intervals
from luciola.verify.spelling import canonical

UNION = (
    *(
        "x < -1 \\text{ or } x > 3",
        "3 < x or -1 > x",
        "(-\\infty,-1) \\cup (3,\\infty)",
        "(3,\\infty)\\cup(-\\infty,-1)",
    ),
    *("\\{x | x < -1 \\text{ or } x > 3\\}", "\\left\\{ x \\,\\middle|\\, x<-1 \\lor x>3 \\right\\}"),
    *("x \\in (-\\infty,-1)\\cup(3,\\infty)", "x<-1 or 3<x<5 or x>4", "(-\\infty,-1) or (3,5]\\cup[5,\\infty)"),
)
OTHERS = (
    *("x \\le -1 or x > 3", "x < -1 or x > 4", "x < -1", "x > 3", "(-1,3)", "\\mathbb{R}", "\\emptyset"),
    *("x < -1 and x > 3", "(-\\infty,-1), (3,\\infty)", "y < -1 or x > 3", "\\{-1,3\\}", "x<-1 or 3<x<5 or x>5"),
)
SAME = (
    ("(-\\infty,\\infty)", "\\mathbb{R}", "\\mathbb R", "x\\in\\mathbb{R}", "\\text{all real numbers}"),
    ("(2,5)", "2 < x and x < 5", "2<x \\land 5>x", "\\{x : 2<x<5\\}", "\\{x\\in\\mathbb{R} \\mid 2<x<5\\}"),
    ("x \\ne 3", "(-\\infty,3)\\cup(3,\\infty)", "x<3 or x>3", "\\{x \\mid x \\neq 3\\}"),
    ("[1,3]", "[1,2]\\cup[2,3]", "[1,2)\\cup[2,3]", "1\\le x\\le3"),
    ("\\theta > 2", "(2,\\infty)", "2<\\theta"),
)


@pytest.mark.parametrize("truth", UNION)
def test_a_union_is_the_same_in_every_notation(truth: str) -> None:
    for text in UNION:
        assert answer.grade(f"<answer>{text}</answer>", truth).kind == "correct"
    for text in OTHERS:
        assert answer.grade(f"<answer>{text}</answer>", truth).kind != "correct"


@pytest.mark.parametrize("spellings", SAME, ids=lambda spellings: spellings[0])
def test_one_set_in_several_notations(spellings: tuple[str, ...]) -> None:
    for truth in spellings:
        for text in spellings:
            assert answer.grade(f"<answer>{text}</answer>", truth).kind == "correct"


@pytest.mark.parametrize(
    ("given", "truth", "kind"),
    [
        ("x < 1 \\text{ or } x > \\sqrt{3}", "(-\\infty,1)\\cup(\\sqrt3,\\infty)", "correct"),
        ("(-\\infty,1)\\cup(\\sqrt3,\\infty)", "x < 1 \\text{ or } x > \\sqrt{3}", "correct"),
        ("x < 1 \\text{ or } x \\ge \\sqrt{3}", "(-\\infty,1)\\cup(\\sqrt3,\\infty)", "wrong"),
        ("x < 1 \\text{ or } x > \\sqrt{5}", "(-\\infty,1)\\cup(\\sqrt3,\\infty)", "wrong"),
        ("\\{x \\mid 1<x<\\sqrt5\\}", "1<x<\\sqrt{5}", "correct"),
        ("\\varnothing", "\\emptyset", "correct"),
        ("\\{\\}", "\\emptyset", "correct"),
        ("\\{0\\}", "\\emptyset", "wrong"),
        ("\\mathbb{N}", "\\mathbb{R}", "wrong"),
        ("(0,\\infty)", "\\mathbb{R}", "wrong"),
    ],
)
def test_ends_that_are_no_numbers_and_sets_with_a_sign(given: str, truth: str, kind: str) -> None:
    assert answer.grade(f"<answer>{given}</answer>", truth).kind == kind


ends = st.integers(-5, 5)
pieces = st.lists(st.tuples(ends, st.sampled_from("[("), ends, st.sampled_from("])")).filter(lambda p: p[0] < p[2]))


@given(pieces.filter(bool), pieces.filter(bool))
def test_two_unions_are_equal_when_they_hold_the_same_numbers(
    first: list[tuple[int, str, int, str]], second: list[tuple[int, str, int, str]]
) -> None:
    def text(union: list[tuple[int, str, int, str]]) -> str:
        return canonical("\\cup".join(f"{o}{low},{high}{c}" for low, o, high, c in union))

    def holds(union: list[tuple[int, str, int, str]], x: Fraction) -> bool:
        return any(low < x < high or (x == low and o == "[") or (x == high and c == "]") for low, o, high, c in union)

    tried = [Fraction(n, 2) for n in range(-12, 13)]
    same = all(holds(first, x) == holds(second, x) for x in tried)
    assert (intervals.read(text(first)) == intervals.read(text(second))) == same
