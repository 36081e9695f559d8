"""The kernel of causal attention is the formula, with its gradients, whatever the shapes, strides and threads."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luciola.model import attention
from luciola.model.attention import Context, attend, visible
from luciola.model.layout import Layout
from luciola.model.native import causal
from luciola.model.native.repeat import usable
from luciola.model.rope import Rotation

NOWHERE = Rotation(torch.ones(0), torch.zeros(0))
pytestmark = pytest.mark.skipif(not usable(torch.zeros(1)), reason="there are no native kernels here")


def heads(seed: int, B: int, H: int, G: int, T: int, D: int, V: int) -> list[Tensor]:
    """Queries, keys and values, heads before time; those of values lie as a projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, n, T, D, generator=generator) for n in (H, G))
    v = torch.randn(B, T, G, V, generator=generator).transpose(1, 2)
    return [x.requires_grad_() for x in (q, k, v)]


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """In float64, with everything written out."""
    repeats = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask[:, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def agree(ours: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(ours, expected.float(), atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(ours, inputs, g)
    for a, b in zip(found, torch.autograd.grad(expected, inputs, g.double()), strict=True):
        torch.testing.assert_close(a, b.float(), atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(("D", "V"), [(1, 1), (16, 16), (24, 32), (33, 17), (64, 64), (192, 128)])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 25, 63, 100, 210])  # ends and middles of blocks, tiles and vectors
def test_every_shape_is_the_formula(D: int, V: int, T: int) -> None:
    inputs = heads(T, 2, 4, 2, T, D, V)
    agree(causal.causal_attend(*inputs, 0.2), formula(*inputs, 0.2, visible(T, T, inputs[0].device)), inputs)


@given(st.integers(1, 90), st.sampled_from([None, 1, 2, 16, 40, 500]), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_windows_and_packed_documents(T: int, window: int | None, packed: bool, seed: int) -> None:
    inputs = heads(seed, 3, 3, 1, T, 8, 12)
    begins = torch.randint(0, T, (3, T), generator=torch.Generator().manual_seed(seed))
    begins = begins.minimum(torch.arange(T)).cummax(1).values
    ours = causal.causal_attend(*inputs, 0.3, window, begins if packed else None)
    mask = visible(T, T, begins.device, window, begins if packed else None).expand(3, -1, -1)
    agree(ours, formula(*inputs, 0.3, mask), inputs)


@st.composite
def trees(draw: st.DrawFn) -> list[Tensor]:
    """Families of rows: a beginning, which may branch further on, and an own part that may be empty."""
    rows: list[Tensor] = []
    count = 0

    def new(length: int) -> Tensor:
        nonlocal count
        count += length
        return torch.arange(count - length, count)

    for prefix, branches in draw(
        st.lists(
            st.tuples(
                st.integers(1, 30),
                st.lists(st.tuples(st.integers(0, 20), st.lists(st.integers(0, 40), min_size=1, max_size=3)),
                         min_size=1, max_size=3),
            ),
            min_size=1,
            max_size=3,
        )
    ):  # fmt: skip
        prompt = new(prefix)
        for middle, own in branches:
            branch = torch.cat((prompt, new(middle)))
            rows += [torch.cat((branch, new(length))) for length in own]
    return rows


@given(trees(), st.sampled_from([None, 5]), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_rows_that_share_a_beginning_are_as_if_written_out(rows: list[Tensor], window: int | None, seed: int) -> None:
    layout = Layout(rows)
    inputs = heads(seed, 1, 4, 2, layout.N, 20, 8)
    ours = causal.causal_attend(*inputs, 0.3, window, layout=layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SHORT", 0)
        expected = attend(*inputs, 0.3, Context(NOWHERE, layout=layout), window)
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(
    "rows",
    [[[0, 1], [2, 3], [0, 4]], [[0, 1, 2], [0, 3, 2]], [[0, 1], [1, 0]]],
    ids=["apart", "same behind a difference", "another order"],
)
def test_rows_that_are_no_tree_are_refused(rows: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="must follow each other"):
        Layout([torch.tensor(row) for row in rows])


def test_no_bit_depends_on_threads_or_on_the_other_rows() -> None:
    inputs = heads(3, 5, 6, 3, 70, 32, 32)

    def run(rows: slice) -> list[Tensor]:
        some = [x.detach()[rows].clone().requires_grad_() for x in inputs]
        o = causal.causal_attend(*some, 0.2)
        return [o, *torch.autograd.grad(o, some, torch.ones_like(o))]

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(slice(None)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert all(torch.equal(a[2:3], b) for a, b in zip(found[0], run(slice(2, 3)), strict=True))


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_not_a_number_stays_visible_and_where_it_was(where: str) -> None:
    inputs = heads(1, 3, 2, 2, 40, 8, 8)
    with torch.no_grad():
        inputs["qkv".index(where)][1, 1, 20, 3] = torch.nan
    o_BTHV = causal.causal_attend(*inputs, 0.2)
    gradients = torch.autograd.grad(o_BTHV, inputs, torch.ones_like(o_BTHV))
    assert o_BTHV[1, 20, 1].isnan().any() and any(x[1, 1].isnan().any() for x in gradients)
    for b, h in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
        assert o_BTHV[b, :, h].isfinite().all() and all(x[b, h].isfinite().all() for x in gradients)


def test_large_scores_do_not_overflow() -> None:
    inputs = heads(2, 1, 2, 1, 50, 8, 8)
    o = causal.causal_attend(*inputs, 1e4)
    assert o.isfinite().all() and all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), inputs))


def test_attention_goes_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are short, in float32; and by PyTorch otherwise."""
    calls: list[Any] = []
    kernel = causal.causal_attend
    monkeypatch.setattr(causal, "causal_attend", lambda *a: calls.append(a) or kernel(*a))
    q, k, v = heads(1, 4, 4, 4, 9, 8, 8)
    attend(q, k, v, 0.3, Context(NOWHERE))
    assert len(calls) == 1
    attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.3, Context(NOWHERE))
    attend(q[:, :, 5:], k, v, 0.3, Context(NOWHERE))  # some queries of a longer past
    monkeypatch.setattr(attention, "SHORT", 8)
    attend(q, k, v, 0.3, Context(NOWHERE))
    assert len(calls) == 1
