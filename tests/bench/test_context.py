"""The ways of the context comparison compute what they say: the expanded one equals the absorbed one."""

import pytest
import torch

from luciola.bench import context
from luciola.bench.context import paged_step, stack
from luciola.engine.cache import Piece, PromptCache

SMALL = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "SHAPES", {kind: shape | SMALL for kind, shape in context.SHAPES.items()})


@torch.inference_mode()
def test_absorbed_and_expanded_give_the_same_states() -> None:
    model, cache, sequence = stack("MLA", 40, "float32")
    model.prepare()
    before = [pool.clone() for pool in cache.pools]
    absorbed = model.decode(paged_step(model, cache, 39), cache.pools).states
    for pool, kept in zip(cache.pools, before, strict=True):
        assert torch.equal(pool[:39], kept[:39])
        pool.copy_(kept)
    piece = PromptCache(cache, [Piece(sequence, 39, 1)], 1)
    expanded = model.hidden(torch.zeros(1, 1, dtype=torch.long), cache=piece).states[0]
    torch.testing.assert_close(absorbed, expanded, atol=1e-4, rtol=1e-4)


def test_a_step_says_the_bytes_of_its_cache() -> None:
    assert context.absorbed(20, "float32")() == context.expanded(20, "float32")() == 2 * 32 * (512 + 64) * 4
    assert context.mha(20, "bfloat16")() == 2 * 32 * 2 * 2 * 128 * 2
