"""What is no algebra is compared as text: no permutation of it is paid, and algebra stays algebra."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luciola.verify import answer, words
from luciola.verify.spelling import canonical

TEXTS = (
    *("1990-1995", "10-15", "2024-01-05", "5/6/2024", "10-5", "555-1234"),
    *("A B C", "R L R U", "AL", "ABC", "1 2 3", "a b c", "H2O", "H_2O", "cat2", "A1 B2", "COVID-19"),
    *("no", "on", "June 20", "cat, dog", "Mr. Smith", "true/false", "It is odd.", "\\text{two or three}", "(B)"),
)
ALGEBRA = (
    "ab",
    "xy",
    "2xy",
    "xy+1",
    "2abc",
    "2AB",
    "AB+C",
    "xyz(x+1)",
    "xyz/2",
    "xyz-1",
    "a-bcd",
    "x y",
    "2x",
    "\\pi r",
)
ALGEBRA += ("log x", "sin 2x", "sin2x", "sqrt 2", "f(x)", "x_1", "3:2", "-5-3", "3/4", "1.5", "10-x", "x=1 or x=2")


@pytest.mark.parametrize("truth", TEXTS)
def test_text_equals_itself_and_no_permutation(truth: str) -> None:
    text = canonical(truth)
    assert words.same(text, text, truth)
    for moved in (text[::-1], text[1:] + text[:1], text + text[-1]):
        if moved.strip("() .").casefold() != text.strip("() .").casefold():
            assert words.same(moved, text, truth) is False


@pytest.mark.parametrize("truth", ALGEBRA)
def test_algebra_is_no_text(truth: str) -> None:
    assert words.same("5", canonical(truth), truth) is None


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(-50, 50).filter(bool))
def test_ranges_of_the_same_length_differ(low: int, high: int, shift: int) -> None:
    truth = f"{low}-{high}"
    assert words.same(truth, truth, truth)
    assert words.same(f"{abs(low + shift)}-{abs(high + shift)}", truth, truth) is False


@given(st.permutations("ABCD"), st.permutations("ABCD"), st.sampled_from(["", " "]), st.sampled_from(["", " ", ","]))
@settings(max_examples=60)
def test_a_sequence_of_letters_is_right_in_its_order(first: list[str], second: list[str], due: str, gap: str) -> None:
    truth = due.join(second)
    assert words.same(gap.join(first), truth, truth) == (first == second)


@pytest.mark.parametrize(
    ("given", "truth", "kind"),
    [
        ("ba", "ab", "correct"),
        ("2yx", "2xy", "correct"),
        ("1+yx", "xy+1", "correct"),
        ("BA", "AB", "wrong"),
        ("1, 2, 3", "1 2 3", "correct"),
        ("1.0 2 3", "1 2 3", "correct"),
        ("3, 2, 1", "1 2 3", "wrong"),
        ("3, 2, 1", "1, 2, 3", "correct"),
        ("SUNDAY", "Sunday", "correct"),
        ("dog and cat", "cat, dog", "correct"),
        ("(cat, dog)", "(dog, cat)", "wrong"),
        ("cat or dog", "cat and dog", "wrong"),
        ("H_{2}O", "H2O", "correct"),
        ("05/06/2024", "5/6/2024", "correct"),
        ("2018", "2024-01-05", "wrong"),
        ("-5", "10-15", "wrong"),
        ("10-15 cm", "10-15", "correct"),
    ],
)
def test_text_and_algebra_are_graded(given: str, truth: str, kind: str) -> None:
    assert answer.grade(f"<answer>{given}</answer>", truth).kind == kind
