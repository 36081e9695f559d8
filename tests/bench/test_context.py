"""The three ways of the context comparison compute what they say: the expanded one equals the absorbed one."""

import pytest
import torch

from luciola.bench import context
from luciola.bench.context import SHAPES, attend_expanded, decode_token, filled_caches
from luciola.model.config import ModelConfig
from luciola.model.transformer import Transformer

SMALL = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def small(kind: str, **changes: int) -> Transformer:
    model = Transformer(ModelConfig.model_validate(SHAPES[kind] | SMALL | changes))
    model.initialize(0)
    return model


@pytest.mark.parametrize("interleave", [True, False])
def test_expanding_the_latents_is_the_same_attention(interleave: bool) -> None:
    widths = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    model = small("MLA", **widths, rope_interleave=interleave, q_lora_rank=12 if interleave else None)  # type: ignore[arg-type]
    caches = filled_caches(model, 40)
    ours = [cache.clone() for cache in caches]
    absorbed = decode_token(model, 39, ours, lambda attention, x, step, cache: attention.decode(x, step, cache))
    expanded = decode_token(model, 39, caches, attend_expanded)
    torch.testing.assert_close(expanded, absorbed, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a[:, :-1], b[:, :-1]) for a, b in zip(ours, caches, strict=True))


def test_the_stack_decodes_as_the_model_does() -> None:
    model = small("MHA", head_dim=8)
    caches = filled_caches(model, 12)
    copies = [cache.clone() for cache in caches]
    with torch.inference_mode():
        expected = model.decode(torch.tensor([0]), torch.tensor([11]), copies, None).states
    states = decode_token(model, 11, caches, lambda attention, x, step, cache: attention.decode(x, step, cache))
    torch.testing.assert_close(states, expected)


def test_a_step_says_the_bytes_of_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "SHAPES", {kind: shape | SMALL for kind, shape in SHAPES.items()})
    assert context.absorbed(20, "float32")() == context.expanded(20, "float32")() == 2 * 20 * (512 + 64) * 4
    assert context.mha(20, "bfloat16")() == 2 * 20 * 2 * 4 * 128 * 2
