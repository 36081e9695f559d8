"""The two entries of an attention module agree: `decode` against a cache, a token at a time, and `forward` over rows.

The slow twin of both is softmax attention written out.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luciola.model import attention
from luciola.model.attention import Context, Extend, attend, visible
from luciola.model.config import ModelConfig
from luciola.model.gqa import GQA
from luciola.model.mla import MLA
from luciola.model.native.attention import Step
from luciola.model.norm import RMSNorm
from luciola.model.rope import Rope, Rotation, rotate

SETTINGS = settings(max_examples=30, deadline=None, derandomize=True)
TOLERANCE = 5e-5  # float32 outputs of size about 5; absorbed and expanded form add up in another order
SIZES = {"vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}


@st.composite
def mla(draw: st.DrawFn) -> dict[str, Any]:
    yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16}
    yarn |= {"mscale": 1.0, "mscale_all_dim": 0.7}
    return SIZES | {
        "hidden_size": draw(st.sampled_from([7, 24])),
        "num_attention_heads": draw(st.integers(1, 5)),
        "q_lora_rank": draw(st.sampled_from([None, 5])),
        "kv_lora_rank": draw(st.sampled_from([3, 16])),
        "qk_nope_head_dim": draw(st.integers(1, 9)),
        "qk_rope_head_dim": draw(st.sampled_from([2, 6, 8])),
        "v_head_dim": draw(st.integers(1, 20)),  # narrower and wider than keys
        "rope_interleave": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "rope_scaling": draw(st.sampled_from([None, yarn])),
    }


@st.composite
def gqa(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 3))
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    return SIZES | {
        "model_type": family,
        "hidden_size": draw(st.sampled_from([7, 24])),
        "sliding_window": None if family == "llama" else draw(st.sampled_from([None, 1, 4, 50])),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([2, 6, 10])),
        "attention_bias": draw(st.booleans()),
    }


def module(settings: dict[str, Any], seed: int) -> tuple[MLA | GQA, ModelConfig]:
    config = ModelConfig.model_validate(settings)
    attention = MLA(config) if config.is_mla else GQA(config, config.window(0))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in attention.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4 + (p.ndim == 1))
    return attention, config


class Paged:
    """One layer's paged cache for rows of up to `longest` tokens, in blocks of 3 dealt out at random."""

    def __init__(self, shape: ModelConfig, rows: int, longest: int, seed: int) -> None:
        self.rope, blocks = Rope(shape), -(-longest // 3)
        order = torch.randperm(rows * blocks, generator=torch.Generator().manual_seed(seed))
        self.table = order.to(torch.int32).view(rows, blocks)
        self.pool = torch.full((rows * blocks * 3, shape.cached_per_token_and_layer), 1e3)

    def step(self, rows: list[int], positions: list[int]) -> Step:
        rotation = self.rope(max(positions) + 1, self.pool.device)
        rows_N, positions_N = (torch.tensor(x, dtype=torch.int32) for x in (rows, positions))
        return Step(rows_N, positions_N, self.table, 3, rotation.cos, rotation.sin)

    def extend(self, row: int, start: int) -> Extend:
        """For `forward` on the tokens of a row from `start` on."""

        def extend(entries: Tensor) -> Tensor:
            at = torch.arange(start + entries.shape[1])
            slots = self.table[row, at // 3].long() * 3 + at % 3
            self.pool[slots[start:]] = entries[0]
            return self.pool[slots].unsqueeze(0)

        return extend


@given(
    st.one_of(mla(), gqa()), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 99)
)
@SETTINGS
@torch.no_grad()
def test_pieces_and_single_tokens_equal_whole_rows(
    config: dict[str, Any], prompts: list[int], steps: int, seed: int
) -> None:
    """A prompt read in two pieces, then tokens one step at a time and two at once, of rows of different lengths."""
    attention, shape = module(config, seed)
    norm = RMSNorm(shape.hidden_size)
    attention.prepare(norm)
    generator = torch.Generator().manual_seed(seed + 1)
    rows = [torch.randn(1, n + steps + 2, shape.hidden_size, generator=generator) for n in prompts]
    paged = Paged(shape, len(rows), max(prompts) + steps + 2, seed)
    rope = paged.rope
    whole = []
    for b, (row, n) in enumerate(zip(rows, prompts, strict=True)):
        full = attention(norm(row), Context(rope(row.shape[1], row.device)))
        whole.append((row + full)[0])
        cut = n // 2
        for start, end in ((0, cut), (cut, n)):
            if end > start:
                angles = rope(end, row.device)
                context = Context(Rotation(angles.cos[start:], angles.sin[start:]))
                y = attention(norm(row[:, start:end]), context, paged.extend(b, start))
                close(y, full[:, start:end])
    for i in range(steps):
        step = paged.step(list(range(len(rows))), [n + i for n in prompts])
        x = torch.cat([row[:, n + i] for row, n in zip(rows, prompts, strict=True)])
        expected = torch.stack([all_[n + i] for all_, n in zip(whole, prompts, strict=True)])
        close(attention.decode(x, step, paged.pool), expected)
    two = [(b, n + steps + i) for b, n in enumerate(prompts) for i in range(2)]
    x = torch.stack([rows[b][0, t] for b, t in two])
    y = attention.decode(x, paged.step([b for b, _ in two], [t for _, t in two]), paged.pool)
    close(y, torch.stack([whole[b][t] for b, t in two]))


def close(found: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, atol=TOLERANCE * scale, rtol=0)


@given(st.one_of(mla(), gqa()), st.integers(1, 12), st.integers(0, 99))
@SETTINGS
@torch.no_grad()
def test_prefill_and_decode_write_the_same_cache(config: dict[str, Any], length: int, seed: int) -> None:
    """What a token leaves in the cache (normed latent, rotated shared key) does not depend on how it was processed."""
    attention, shape = module(config, seed)
    norm = RMSNorm(shape.hidden_size)
    attention.prepare(norm)
    x = torch.randn(1, length, shape.hidden_size, generator=torch.Generator().manual_seed(seed))
    at_once, one_by_one = (Paged(shape, 1, length, seed) for _ in range(2))
    attention(norm(x), Context(at_once.rope(length, x.device)), at_once.extend(0, 0))
    for t in range(length):
        attention.decode(x[:, t], one_by_one.step([0], [t]), one_by_one.pool)
    torch.testing.assert_close(at_once.pool, one_by_one.pool, atol=1e-5, rtol=1e-5)


@given(mla(), st.integers(1, 9), st.integers(0, 99))
@SETTINGS
@torch.no_grad()
def test_mla_is_the_formula_of_the_paper(config: dict[str, Any], time: int, seed: int) -> None:
    """V2 paper, equations 9 to 19, head by head, from the published row order of the weights."""
    ours, shape = module(config, seed)
    assert isinstance(ours, MLA)
    n, r, v, rank = ours.n, ours.r, ours.v, ours.rank
    h = torch.randn(time, shape.hidden_size, generator=torch.Generator().manual_seed(seed))
    rotation = Rope(shape)(time, h.device)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turned(x: Tensor) -> Tensor:
        return rotate(x[None], rotation, shape.rope_interleave)[0]

    if shape.q_lora_rank is None:
        q = ours.q_proj(h)
    else:
        q = ours.q_b_proj(normed(ours.q_a_proj(h), ours.q_a_layernorm.weight))
    compressed = ours.kv_a_proj_with_mqa(h)
    c, k_R = normed(compressed[:, :rank], ours.kv_a_layernorm.weight), turned(compressed[:, rank:])
    outputs = []
    for i in range(shape.num_attention_heads):
        q_i = q[:, i * (n + r) : (i + 1) * (n + r)]
        W_UK, W_UV = ours.kv_b_proj.weight[i * (n + v) : (i + 1) * (n + v)].split((n, v))
        scores = q_i[:, :n] @ (c @ W_UK.T).T + turned(q_i[:, n:]) @ k_R.T
        causal = torch.ones(time, time).triu(1).bool()
        outputs.append((shape.attention_scale * scores).masked_fill(causal, -torch.inf).softmax(-1) @ (c @ W_UV.T))
    expected = ours.o_proj(torch.cat(outputs, dim=-1))
    found = ours(h[None], Context(rotation))[0]
    torch.testing.assert_close(found, expected, atol=TOLERANCE * max(1.0, float(expected.abs().max())), rtol=0)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", weights, v)


@given(
    st.integers(1, 8), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.booleans(),
    st.sampled_from([None, 1, 3, 50]), st.sampled_from(["native", "at once", "fused"]), st.integers(0, 99),
)  # fmt: skip
@SETTINGS
def test_attention_is_the_formula(
    time: int,
    groups: int,
    repeats: int,
    width: int,
    v_width: int,
    packed: bool,
    window: int | None,
    way: str,
    seed: int,
) -> None:
    """Also its gradients, where values are narrower or wider than keys, among packed documents, in a window, by the
    kernel, over one or several blocks of queries, and by PyTorch's kernel."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, time, groups * repeats, width, generator=generator, requires_grad=True)
    k = torch.randn(2, time, groups, width, generator=generator, requires_grad=True)
    v = torch.randn(2, time, groups, v_width, generator=generator, requires_grad=True)
    begins = torch.randint(0, time, (2, time), generator=generator).minimum(torch.arange(time)).cummax(1).values
    mask = visible(time, time, q.device, window, begins if packed else None).expand(2, -1, -1)
    nowhere = Rotation(torch.ones(time, 0), torch.zeros(time, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", 3)
        patch.setattr(attention, "SHORT", 1024 if way == "native" else 0)
        patch.setattr(attention, "KEPT_NUMBERS", 1 << 23 if way == "at once" else 0)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        ours = attend(*heads_first, 0.7, Context(nowhere, begins if packed else None), window)
        g = torch.randn(ours.shape, generator=generator)
        gradients = torch.autograd.grad(ours, (q, k, v), g)
    expected = plain_attention(q, k, v, 0.7, mask)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients, torch.autograd.grad(expected, (q, k, v), g), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_what_a_token_may_see_by_hand() -> None:
    begins = torch.tensor([[0, 0, 2, 2, 4]])
    seen = visible(5, 5, begins.device, None, begins)[0].int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert visible(2, 4, begins.device, 3)[0].int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
