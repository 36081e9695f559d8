"""A flat list of tokens, spread over rows for attention only, gives what padded rows give, gradients included."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luciola.model.config import ModelConfig
from luciola.model.layout import Layout
from luciola.model.transformer import Transformer

SIZES: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
MLA: dict[str, Any] = {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
MOE: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}


@given(st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=4)), min_size=1))
@settings(max_examples=60, deadline=None)
def test_spread_and_collect_are_gathers_and_their_gradients_sums(groups: list[tuple[int, list[int]]]) -> None:
    """Groups of rows: a shared prefix, and an own part of each row that may be empty."""
    rows, count = [], 0
    for prefix, own in groups:
        start, count = count, count + prefix
        for length in own:
            rows.append(torch.cat((torch.arange(start, start + prefix), torch.arange(count, count + length))))
            count += length
    layout = Layout(rows)
    x = torch.randn(1, 2, count, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    spread = layout.spread(x)
    assert spread.shape == (len(rows), 2, max(map(len, rows)), 3)
    for b, row in enumerate(rows):
        assert torch.equal(spread[b, :, : len(row)], x[0, :, row])
        assert torch.equal(layout.positions_1N[0, row], torch.arange(len(row)))
    assert torch.equal(layout.collect(spread), x.transpose(1, 2))
    g = torch.randn(spread.shape, generator=torch.Generator().manual_seed(1))
    for b, row in enumerate(rows):
        g[b, :, len(row) :] = 0.0  # nothing real depends on padding
    expected = torch.zeros_like(x)
    for b, row in enumerate(rows):
        expected[0, :, row] += g[b, :, : len(row)]
    torch.testing.assert_close(torch.autograd.grad(spread, x, g)[0], expected)
    y = torch.randn(spread.shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    h = torch.randn(1, count, 2, 3, generator=torch.Generator().manual_seed(3))
    collected = layout.collect(y)
    torch.testing.assert_close((torch.autograd.grad(collected, y, h)[0] * y).sum(), (collected * h).sum())


@pytest.mark.parametrize("kind", [{}, {"num_key_value_heads": 2}, MLA, MLA | {"q_lora_rank": 6} | MOE])
def test_shared_prompts_change_nothing(kind: dict[str, Any]) -> None:
    """States and gradients of completions with a shared prompt equal those of whole rows, each run on its own."""
    model = Transformer(ModelConfig.model_validate(SIZES | kind))
    model.initialize(0)
    generator = torch.Generator().manual_seed(1)
    groups = [(3, (2, 4, 1)), (5, (3,)), (1, (1, 6))]
    tokens: list[int] = []
    rows = []
    for prompt, completions in groups:
        start = len(tokens)
        tokens += torch.randint(SIZES["vocab_size"], (prompt,), generator=generator).tolist()
        for length in completions:
            first = len(tokens)
            tokens += torch.randint(SIZES["vocab_size"], (length,), generator=generator).tolist()
            rows.append(torch.cat((torch.arange(start, start + prompt), torch.arange(first, first + length))))
    weights = [torch.randn(len(row), SIZES["hidden_size"], generator=generator) for row in rows]
    flat = torch.tensor([tokens])

    states = model.hidden(flat, layout=Layout(rows)).states[0]
    sum((states[row] * w).sum() for row, w in zip(rows, weights, strict=True)).backward()  # type: ignore[union-attr]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, w in zip(rows, weights, strict=True):
        alone = model.hidden(flat[:, row]).states[0]
        torch.testing.assert_close(states[row], alone, atol=2e-5, rtol=1e-5)
        (alone * w).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=2e-4, rtol=1e-4, msg=name)
