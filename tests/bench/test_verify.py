"""The cases of the verifiers' comparison are different ones, judged as they should be, and in part for SymPy."""

import pytest

from luciola.bench import verify
from luciola.bench.verify import answers, programs
from luciola.verify import answer, code, extract, plain, sandbox


def test_answers_are_different_ones_and_half_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "REFERENCES", 32)
    pairs = answers(0)
    kinds = [verdict.kind for verdict in answer.grade_many(pairs)]
    assert kinds == ["correct", "wrong"] * (len(pairs) // 2)
    assert not set(answers(0)) & set(answers(1))
    given = [(extract.find(text).answer or "", truth) for text, truth in pairs]
    for_sympy = [pair for pair in given if plain.compare(*pair) is None]
    assert len(for_sympy) / len(pairs) == 1 / 8
    assert len(set(for_sympy)) > 0.95 * len(for_sympy)


@pytest.mark.skipif(bool(sandbox.unavailable()), reason=sandbox.unavailable() or "")
def test_programs_are_judged_as_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "PROGRAMS", 4)
    for cases in programs(0).values():
        assert [verdict.kind for verdict in code.grade_many(cases)] == ["correct", "wrong"] * 2
    assert not {text for text, _ in programs(0)["functions"]} & {text for text, _ in programs(1)["functions"]}
