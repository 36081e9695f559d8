"""The reward court: every cheat in cheats.jsonl earns nothing, every answer in honest.jsonl earns its reward."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from luciola.verify import answer, court, extract, plain
from luciola.verify.pool import Pool
from luciola.verify.verdict import Verdict

TAGS = ("<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}")


def rows(name: str) -> list[dict[str, str]]:
    lines = (court.CASES / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_cheats_earn_nothing_and_are_told_apart() -> None:
    cases = rows("cheats.jsonl")
    verdicts = answer.grade_many([(row["completion"], row["truth"]) for row in cases])
    got = {row["name"]: (verdict.kind, verdict.reward) for row, verdict in zip(cases, verdicts, strict=True)}
    assert got == {row["name"]: (row["kind"], 0.0) for row in cases}
    assert len(got) == len(cases)


def test_honest_answers_are_rewarded() -> None:
    cases = rows("honest.jsonl")
    verdicts = answer.grade_many([(row["completion"], row["truth"]) for row in cases])
    refused = {row["name"]: v for row, v in zip(cases, verdicts, strict=True) if (v.kind, v.reward) != ("correct", 1.0)}
    assert not refused


def test_grade_and_extract_agree_with_the_table() -> None:
    completion = "<think>3 + 4 = 7</think>\n<answer> 7 </answer>"
    assert answer.extract(completion) == "7"
    assert answer.grade(completion, "7").kind == "correct"
    assert answer.grade(completion, "8").kind == "wrong"
    assert answer.extract("<think>7</think>") is None
    assert answer.grade("<think>7</think>", "7").kind == "no_answer"


def test_a_prompt_that_opened_the_thinking() -> None:
    cut_off = "so it may be \\boxed{7}, but let me"
    assert answer.grade(cut_off, "7").kind == "correct"  # looks like an ordinary reply
    assert answer.grade("<think>" + cut_off, "7").kind == "no_answer"


def test_an_empty_reference_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="reference answer is empty"):
        answer.grade("<answer>7</answer>", " ")


@pytest.mark.parametrize("truth", ["x + + ) 1", "A -> B", "\\mathbb", "\\frac{1", "f: X \\rightrightarrows Y?"])
def test_a_reference_that_algebra_cannot_read_is_compared_as_text(truth: str) -> None:
    for other in ("x+1", "5", "B -> A", truth + " 1"):
        verdict = answer.grade(f"<answer>{other}</answer>", truth)
        assert (verdict.kind, verdict.reward) == ("wrong", 0.0)
    assert answer.grade(f"<answer> {truth.upper()}</answer>", truth.upper()).kind == "correct"


@pytest.mark.parametrize(
    "completion",
    [
        "<answer>" + "7" * 10**6 + "</answer>",
        "<answer>" + "7 " * 500_000 + "</answer>",
        "\\boxed{" * 150_000,
        "\\boxed{" * 100_000 + "}" * 100_000,
        "\\boxed{7}" * 110_000,
        "<answer>" * 125_000,
        "<think>" * 100_000 + "</think>" * 50_000,
        "answer is " * 100_000,
        "the answer is 7. " * 60_000 + "The answer is 8.",
        "1 " * 500_000,
        "1\n" * 500_000,
        "= 1 " * 250_000,
        "-" * 10**6,
        " " * 10**6 + "x",
        "\n" * 10**6,
        "1," * 500_000,
        "(" * 10**6,
        "\\" * 10**6,
        "\\boxed{" + "\\" * 10**6,
        "{" * 500_000 + "}" * 500_000,
    ],
    ids=lambda completion: completion[:24],
)
def test_a_megabyte_is_refused_at_once(completion: str) -> None:
    start = time.process_time()
    verdict = answer.grade(completion, "7")
    assert verdict.reward == (completion == "\\boxed{7}" * 110_000)  # repeating the right answer is allowed
    assert time.process_time() - start < 2.0


HOSTILE = (
    *("9^{9^{9^{9}}}", "10^{10^{10}}", "2**9**9**9", "(9+1)^{9^9}", "2^{10!}", "7^{9999999999}", "123456789!"),
    *("(" * 100, "(" * 400 + "x" + ")" * 400, "\\frac{1" * 100, "{" * 300 + "5"),
)


@pytest.mark.parametrize("truth", ["5", "0.5", "x", "(1,2)", "\\sqrt{2}"])
@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile[:24])
def test_towers_and_nests_are_wrong_before_anything_computes_them(hostile: str, truth: str) -> None:
    verdict = plain.compare(hostile, truth)
    assert verdict is not None and verdict.kind == "wrong" and verdict.detail


def test_a_tower_that_is_asked_for_is_compared() -> None:
    assert answer.grade("\\boxed{2^{2^3}}", "2^{2^{3}}").kind == "correct"
    assert answer.grade("\\boxed{256}", "2^{2^{3}}").kind == "correct"
    assert answer.grade("\\boxed{x^{2^{n}}}", "(x^{2^n})").kind == "correct"


def test_what_hangs_sympy_is_a_timeout() -> None:
    with Pool(size=1, seconds=0.7) as pool:
        pool.check("x", "y")  # started: the time that counts begins with the comparison
        start = time.monotonic()
        hostile = "3^{9 \\cdot 99999999}"
        assert answer.grade(f"<answer>{hostile}</answer>", "\\sqrt{2}", pool=pool).kind == "timeout"
        assert time.monotonic() - start < 5
    assert answer.grade("<answer>1024</answer>", "2^{10}").kind == "correct"


def test_a_long_sum_is_refused_by_its_value() -> None:
    assert answer.grade("<answer>\\sum_{k=1}^{1000000000} \\frac{1}{k^2}</answer>", "5").kind == "wrong"


def test_equal_pairs_are_asked_once() -> None:
    asked: list[tuple[object, ...]] = []

    class Counting(Pool):
        def check_many(self, requests: Sequence[tuple[object, ...]]) -> list[Verdict]:
            asked.extend(requests)
            return super().check_many(requests)

    with Counting(size=1) as pool:
        pairs = [("\\boxed{x+x}", "2x"), ("\\boxed{3x}", "2x"), ("\\boxed{7}", "7"), ("\\boxed{x+x}", "2x")]
        assert [v.kind for v in answer.grade_many(pairs, pool=pool)] == ["correct", "wrong", "correct", "correct"]
    assert asked == [("x+x", "2x"), ("3x", "2x")]


pieces = st.lists(st.sampled_from([*TAGS, "7", " or ", "\n", "=", "x", "answer is ", ". ", "-", ",", "٣"]), max_size=12)


@given(pieces.map("".join))
@example("</think>")
@settings(max_examples=400, deadline=None)
def test_an_answer_never_holds_a_tag_and_never_comes_from_the_thinking(completion: str) -> None:
    found = extract.find(completion)
    if found.answer is None:
        assert found.why
        return
    assert found.answer.strip()
    assert not any(tag in found.answer for tag in TAGS[:5])
    assert found.answer in completion.partition("</think>")[2] or "</think>" not in completion


@given(st.text(max_size=40), st.text(min_size=1, max_size=20))
@settings(deadline=None)
def test_the_r1_form_gives_back_its_answer(thought: str, content: str) -> None:
    if content.strip() and not any(tag in thought + content for tag in TAGS):
        assert answer.extract(f"<think>{thought}</think>\n<answer>{content}</answer>") == content.strip()


@given(st.text(max_size=60))
@settings(deadline=None)
def test_any_text_gets_a_verdict(completion: str) -> None:
    verdict = answer.grade(completion, "1234567")
    assert verdict.reward == float(verdict.kind == "correct")


def real(name: str) -> list[dict[str, Any]]:
    folder = os.environ.get("LUCIOLA_DATA")
    if not folder:
        pytest.skip("set LUCIOLA_DATA to a folder with gsm8k_train.jsonl and math_sample.jsonl")
    return [json.loads(line) for line in (Path(folder) / name).read_text(encoding="utf-8").splitlines()]


def test_every_reference_of_math_equals_itself_and_not_its_neighbour() -> None:
    truths = [extract.boxes(row["solution"])[-1] for row in real("math_sample.jsonl")]
    same = answer.grade_many([(f"<think>a</think>\\boxed{{{truth}}}", truth) for truth in truths])
    assert {verdict.kind for verdict in same} == {"correct"}
    others = [truths[(7 * index + 13) % len(truths)] for index in range(len(truths))]
    verdicts = answer.grade_many([(f"\\boxed{{{truth}}}", other) for truth, other in zip(truths, others, strict=True)])
    for truth, other, verdict in zip(truths, others, verdicts, strict=True):
        assert verdict.kind == ("correct" if truth == other else "wrong"), (truth, other, verdict)


def test_every_reference_of_gsm8k_is_a_number() -> None:
    for row in real("gsm8k_train.jsonl"):
        truth = row["answer"].rpartition("####")[2].strip()
        for completion in (f"The answer is {truth}.", f"It is \\boxed{{{truth}}}.", f"<answer>{truth} pieces</answer>"):
            assert answer.grade(completion, truth).kind == "correct"
        assert answer.grade(f"<answer>{truth}1</answer>", truth).kind == "wrong"
