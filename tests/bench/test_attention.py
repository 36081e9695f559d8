"""The comparison counts the arithmetic that is done, and measures both ways of the same attention."""

import pytest
import torch

from luciola.bench import attention as bench
from luciola.bench.attention import Case
from luciola.model import attention
from luciola.model.native.repeat import usable


@pytest.mark.parametrize("case", [Case(3, 7, 4, 2, 5, 6), Case(6, 7, 4, 2, 5, 6, prompt=3, group=3)])
def test_arithmetic_is_that_of_what_each_query_sees_once(case: Case) -> None:
    looks = 0
    for row in range(case.rows):
        first = 0 if row % case.group == 0 else case.prompt
        looks += sum(t + 1 for t in range(first, case.tokens))
    products = 2 * case.heads * looks  # of one number of a head: s, do v^T; p v, p^T do; and s again, ds k, ds^T q
    assert bench._flops(case) == products * (2 * (case.width + case.v_width) + 2 * case.width + case.v_width)


@pytest.mark.skipif(not usable(torch.zeros(1)), reason="there are no native kernels here")
def test_both_ways_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CASES", {"rows": Case(2, 9, 4, 2, 5, 6), "group": Case(4, 9, 4, 2, 5, 6, 3, 2)})
    monkeypatch.setattr(bench.hardware, "gemm_peak", lambda dtype: 1e12)
    before, found = attention.SHORT, bench.run("torch")
    assert before == attention.SHORT
    for name in bench.CASES:
        assert found[name]["ratio"] > 0 and found[name]["luciola_ms"] > 0 and found[name]["torch_ms"] > 0
        assert 0 < found[name]["share_of_peak"] < 1
