"""A request's tokens do not depend on the company it keeps, nor on how the engine goes about it.

The witness knows neither cache nor batch: it runs the whole text through the model again for every token.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.engine.sampler import Settings, UniformStream, sample
from luciola.model.language_model import LanguageModel

GQA: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 27, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "initializer_range": 0.3,
    "max_position_embeddings": 96,
}  # fmt: skip
WINDOWED = GQA | {"model_type": "mistral", "head_dim": 4, "sliding_window": 5}
COMPRESSED: dict[str, Any] = {
    "vocab_size": 27, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "q_lora_rank": 8, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
    "attention_bias": True, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "initializer_range": 0.3, "max_position_embeddings": 96,
    "num_nextn_predict_layers": 1, "tie_word_embeddings": True,
}  # fmt: skip


@torch.no_grad()
def witness(lm: LanguageModel, prompt: list[int], params: SamplingParams, index: int) -> list[int]:
    """The completion as the definition has it, without any engine."""
    tokens, stream = list(prompt), UniformStream(params.seed, index, prompt)
    for i in range(params.max_tokens):
        logits = lm.model(torch.tensor([tokens]))[0, -1:]
        tokens.append(int(sample(logits, Settings.of([params]), torch.tensor([stream.number(i)])).tokens[0]))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module", params=["mla+moe", "mla compressed", "gqa", "window"])
def model(request: pytest.FixtureRequest, lm: LanguageModel) -> LanguageModel:
    configs = {"mla compressed": COMPRESSED, "gqa": GQA, "window": WINDOWED}
    return lm if request.param == "mla+moe" else LanguageModel.create(configs[request.param], seed=1)


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that share beginnings, of lengths around the borders of blocks, greedy and sampled, one or more each."""
    stems = [draw(st.lists(st.integers(3, 26), min_size=12, max_size=12)) for _ in range(2)]
    found = []
    for _ in range(draw(st.integers(1, 6))):
        prompt = draw(st.sampled_from(stems))[: draw(st.integers(1, 12))] + draw(
            st.lists(st.integers(3, 26), max_size=2)
        )
        params = SamplingParams(
            max_tokens=draw(st.integers(1, 10)),
            temperature=draw(st.sampled_from([0.0, 0.7, 1.0])),
            top_p=draw(st.sampled_from([1.0, 0.8])),
            n=draw(st.integers(1, 3)),
            seed=draw(st.integers(0, 9)),
            ignore_eos=True,
        )
        found.append((prompt, params))
    return found


OPTIONS = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 5),
        "chunk": st.sampled_from([1, 3, 7, 100]),
        "max_cached_tokens": st.sampled_from([24, 30, 48, 2000]),  # 24: the longest request alone just fits
        "max_running": st.sampled_from([1, 2, 5, 100]),
        "prefix_cache": st.booleans(),
    }
)


@given(requests(), OPTIONS, st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_tokens_are_the_witness_whatever_the_engine_does(
    model: LanguageModel, asked: list[tuple[list[int], SamplingParams]], options: dict[str, Any], native: bool
) -> None:
    """Alone and together, in blocks of any size, prompts in pieces, with others giving way, and once more when every
    prompt is in the cache from end to end."""
    engine = Engine(model, dtype="model", **options)
    prompts, params = [list(p) for p, _ in asked], [p for _, p in asked]
    expected = [[witness(model, prompt, p, j) for j in range(p.n)] for prompt, p in asked]
    for _ in range(2):
        found = engine.generate(prompts, params)
        assert [[c.token_ids for c in group] for group in found] == expected
        engine._pool.check([])
        assert engine.blocks_used == 0
    assert [c.token_ids for c in engine.generate(prompts[:1], params[:1])[0]] == expected[0]


@pytest.mark.parametrize("length", range(1, 14))
def test_a_prompt_that_is_in_the_cache_from_end_to_end(model: LanguageModel, length: int) -> None:
    """Of every length around the borders of blocks: what is found there is used, and the answer is the same."""
    engine = Engine(model, dtype="model", block_size=4)
    prompt, params = list(range(5, 5 + length)), SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    first, again = (engine.generate([prompt], params)[0][0] for _ in range(2))
    assert first.token_ids == again.token_ids == witness(model, prompt, params, 0)
    assert (first.cached_tokens, again.cached_tokens) == (0, (length - 1) // 4 * 4)
    longer = prompt + first.token_ids
    further = engine.generate([longer], params)[0][0]
    assert further.token_ids == witness(model, longer, params, 0)
    assert further.cached_tokens == (len(longer) - 1) // 4 * 4  # a conversation's next turn finds the answer, too


def test_those_who_gave_way_go_on_where_they_were(model: LanguageModel) -> None:
    """A cache for two of six: many are preempted, some find part of what they had."""
    engine = Engine(model, dtype="model", block_size=3, max_cached_tokens=48)
    prompts = [[3 + i, *range(4, 13)] for i in range(6)]
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=2, ignore_eos=True)
    found = engine.generate(prompts, params)
    assert engine.stats["preemptions"] > 0
    assert [c.token_ids for (c,) in found] == [witness(model, prompt, params, 0) for prompt in prompts]
    assert engine.blocks_used == 0


def test_training_in_between_forgets_what_the_cache_holds(script: Callable[..., LanguageModel]) -> None:
    lm = LanguageModel.create(GQA)
    engine = Engine(lm, dtype="model", block_size=2)
    prompt, params = list(range(3, 13)), SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    engine.generate([prompt], params)
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=0.5, fused=True)
    lm.model(torch.tensor([prompt])).square().sum().backward()
    optimizer.step()
    (completion,) = engine.generate([prompt], params)[0]
    assert completion.cached_tokens == 0
    assert completion.token_ids == witness(lm, prompt, params, 0)
