"""What requests may ask for, through the whole engine: penalties, biases, stop tokens, likeliest tokens, grammars, and
weights in 8 or 4 bits."""

import ast
import json
import re
import string
from collections.abc import Callable
from typing import Any

import pytest
import torch

from luciola.engine.engine import Engine
from luciola.engine.grammar import Grammar
from luciola.engine.params import SamplingParams
from luciola.model.language_model import LanguageModel
from luciola.model.quant_layers import QuantLinear, quantize_model
from luciola.text.tokenizer import Tokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "initializer_range": 0.15,
    "max_position_embeddings": 600,
}  # fmt: skip
TEXT = Tokenizer.characters(string.printable)


@pytest.fixture(scope="module")
def writer() -> LanguageModel:
    """Random weights, every printable character."""
    return LanguageModel.create(SHAPE | {"vocab_size": TEXT.vocab_size}, TEXT, seed=4)


@pytest.fixture(scope="module")
def engine(writer: LanguageModel) -> Engine:
    return Engine(writer, dtype="model", block_size=8)


def test_a_bias_of_a_hundred_decides_and_of_minus_a_hundred_forbids(engine: Engine) -> None:
    params = SamplingParams(max_tokens=20, seed=0, logit_bias={17: 100.0}, ignore_eos=True)
    assert set(engine.generate([[5]], params)[0][0].token_ids) == {17}
    free = engine.generate([[5]], SamplingParams(max_tokens=40, seed=0, ignore_eos=True))[0][0].token_ids
    params = SamplingParams(max_tokens=40, seed=0, logit_bias=dict.fromkeys(free, -100.0), ignore_eos=True)
    assert not set(engine.generate([[5]], params)[0][0].token_ids) & set(free)


def test_penalties_keep_a_greedy_text_from_repeating(engine: Engine) -> None:
    def words(**penalty: float) -> list[int]:
        params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, **penalty)
        return engine.generate([[5, 6, 7]], params)[0][0].token_ids

    repeats = len(words()) - len(set(words()))
    assert repeats > 5
    assert len(set(words(presence_penalty=2.0))) > len(set(words()))
    assert len(set(words(frequency_penalty=2.0))) > len(set(words()))
    strict = words(repetition_penalty=1e4)
    assert len(set(strict)) == len(strict)
    assert not set(strict) & {5, 6, 7}


def test_stop_tokens_end_and_min_tokens_keep_them_away(engine: Engine) -> None:
    free = engine.generate([[5]], SamplingParams(max_tokens=30, seed=3, ignore_eos=True))[0][0].token_ids
    stop = free[10]
    cut = free.index(stop) + 1
    (out,) = engine.generate([[5]], SamplingParams(max_tokens=30, seed=3, ignore_eos=True, stop_token_ids=[stop]))[0]
    assert (out.token_ids, out.finish_reason) == (free[:cut], "stop")
    params = SamplingParams(max_tokens=30, seed=3, ignore_eos=True, stop_token_ids=[stop], min_tokens=25)
    (out,) = engine.generate([[5]], params)[0]
    assert len(out.token_ids) >= 25
    assert stop not in out.token_ids[:24]


@torch.no_grad()
def test_likeliest_tokens_are_the_full_passs(writer: LanguageModel, engine: Engine) -> None:
    prompt, params = [5, 6], SamplingParams(max_tokens=8, seed=1, top_logprobs=5, temperature=1.7, ignore_eos=True)
    (out,) = engine.generate([prompt], params)[0]
    logp = writer.model(torch.tensor([prompt + out.token_ids]))[0].log_softmax(-1)
    assert out.top_logprobs is not None
    assert out.logprobs is not None
    for i, (token, top) in enumerate(zip(out.token_ids, out.top_logprobs, strict=True)):
        row = logp[len(prompt) - 1 + i]
        best = row.topk(5)
        assert list(top) == best.indices.tolist()
        assert list(top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)
        assert out.logprobs[i] == pytest.approx(float(row[token]), abs=1e-4)


def test_what_names_tokens_beyond_the_vocabulary_is_refused(engine: Engine) -> None:
    for params in (SamplingParams(logit_bias={999: 1.0}), SamplingParams(stop_token_ids=[999])):
        with pytest.raises(ValueError, match="token 999, outside the vocabulary"):
            engine.generate([[5]], params)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def valid(text: str) -> bool:
    found = json.loads(text)
    return set(found) == {"name", "age"} and found["name"] in ("ada", "bob") and 0 <= found["age"] <= 150


def test_json_by_schema_for_many_in_a_cache_too_small_for_all(writer: LanguageModel) -> None:
    """Some give way in the middle of their text, and go on in their grammar."""
    engine = Engine(writer, dtype="model", max_cached_tokens=200, block_size=4)
    params = SamplingParams(max_tokens=120, seed=0, n=3, grammar=Grammar.json(SCHEMA))
    free = SamplingParams(max_tokens=60, seed=0, ignore_eos=True)
    out = engine.generate([[5 + i] for i in range(6)] * 2, [params] * 6 + [free] * 6)
    assert engine.stats["preemptions"] > 0
    assert engine.stats["grammar_tokens"] == sum(len(c.token_ids) for group in out[:6] for c in group)
    assert engine.stats["grammar_seconds"] > 0
    for group in out[:6]:
        for c in group:
            assert c.finish_reason == "stop"
            assert valid(c.text), c.text
    alone = Engine(writer, dtype="model").generate([[5]], params)[0]
    assert [c.token_ids for c in alone] == [c.token_ids for c in out[0]]


def test_a_grammar_that_begins_after_the_thinking(writer: LanguageModel, engine: Engine) -> None:
    prompt = TEXT.encode("q<think>")
    bias = {TEXT.encode("</think>")[0]: 2.0}
    grammar = Grammar.regex("(yes|no), because [a-z]{3,9}[.]").after("</think>")
    params = SamplingParams(max_tokens=400, seed=0, n=8, grammar=grammar, logit_bias=bias)
    (out,) = engine.generate([prompt], params)
    thought = [c for c in out if c.finish_reason == "stop"]
    assert len(thought) >= 6
    thinkings = []
    for c in thought:
        thinking, _, answer = TEXT.decode(c.token_ids, skip_special_tokens=False).partition("</think>")
        assert re.fullmatch(r"(yes|no), because [a-z]{3,9}[.]", answer), answer
        thinkings.append(thinking)
    assert len(set(thinkings)) > 3


def test_every_complete_program_parses(engine: Engine) -> None:
    bias = {TEXT.encode(c)[0]: 4.0 for c in "\n"}
    params = SamplingParams(max_tokens=120, seed=0, n=12, grammar=Grammar.python(), logit_bias=bias)
    (out,) = engine.generate([TEXT.encode("# ")], params)
    done = [c.text for c in out if c.finish_reason == "stop"]
    assert len(done) >= 3
    for program in done:
        ast.parse(program)


def test_grammars_that_nothing_fits_are_refused_before_anything_runs(engine: Engine) -> None:
    contradiction = {"type": "integer", "minimum": 5, "maximum": 3}
    with pytest.raises(ValueError):
        engine.generate([[5]], SamplingParams(grammar=Grammar.json(contradiction)))
    with pytest.raises(ValueError, match="no token of the model can begin it"):
        engine.generate([[5]], SamplingParams(grammar=Grammar.regex("[α-ω]+")))
    assert engine.blocks_used == 0


def test_a_text_that_its_grammar_ends_is_shorter_than_min_tokens(engine: Engine) -> None:
    """One that could go on does so until then."""
    params = SamplingParams(max_tokens=30, min_tokens=20, seed=0, grammar=Grammar.regex("[a-c]{5}"))
    (out,) = engine.generate([[5]], params)[0]
    assert (len(out.text), len(out.token_ids), out.finish_reason) == (5, 5, "stop")
    params = SamplingParams(max_tokens=30, min_tokens=20, seed=0, n=4, grammar=Grammar.regex("[a-c]{5,25}"))
    for out in engine.generate([[5]], params)[0]:
        assert 20 <= len(out.text) <= 25 and out.finish_reason == "stop"


def test_a_grammar_needs_a_tokenizer() -> None:
    lm = LanguageModel.create(SHAPE | {"vocab_size": 30})
    with pytest.raises(ValueError, match="a grammar needs a tokenizer, and this model has none"):
        Engine(lm, dtype="model").generate([[5]], SamplingParams(grammar=Grammar.regex("a")))


EXPERTS = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "tie_word_embeddings": True,
    "max_position_embeddings": 600,
}  # fmt: skip


@pytest.mark.parametrize(
    "shape", [SHAPE | EXPERTS | {"hidden_size": 128}, LLAMA | {"hidden_size": 128}], ids=["mla", "gqa"]
)
@pytest.mark.parametrize(("quantize", "near"), [("int8", 0.05), ("int4", 0.6)])
def test_quantised_engines_are_near_the_floats_and_alike_in_company(
    shape: dict[str, Any], quantize: str, near: float
) -> None:
    """Log-probabilities of the same tokens differ little; and the tokens do not depend on company."""
    lm = LanguageModel.create(shape | {"vocab_size": 200}, seed=2)
    engine = Engine(lm, dtype="float32", quantize=quantize, block_size=4)
    assert engine.quantization is not None
    assert {c.bits for c in engine.quantization.choices} & {8, 4}
    prompts = [[3 + i, *range(20, 26 + i)] for i in range(5)]
    params = [SamplingParams(max_tokens=10, seed=i, n=2, logprobs=True, ignore_eos=True) for i in range(5)]
    together = engine.generate(prompts, params)
    for prompt, p, group in zip(prompts, params, together, strict=True):
        assert [c.token_ids for c in engine.generate([prompt], [p])[0]] == [c.token_ids for c in group]
        for c in group:
            with torch.no_grad():
                logp = lm.model(torch.tensor([prompt + c.token_ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
            floats = logp.gather(1, torch.tensor(c.token_ids)[:, None]).squeeze(1)
            assert float((floats - torch.tensor(c.logprobs)).abs().mean()) < near
    assert next(lm.model.parameters()).dtype == torch.float32
    assert engine.blocks_used == 0


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_of_any_size_are_what_the_model_alone_makes_of_them(quantize: str, group_size: int) -> None:
    lm = LanguageModel.create(LLAMA | {"vocab_size": 200, "hidden_size": 128}, seed=2)
    engine = Engine(lm, dtype="float32", quantize=quantize, group_size=group_size)
    layers = [module for module in engine.model.modules() if isinstance(module, QuantLinear)]
    assert {layer.weight.group for layer in layers} == {group_size}
    alone, report = quantize_model(lm.model, int(quantize[3:]), group_size)
    assert engine.quantization == report
    params = SamplingParams(max_tokens=8, seed=1, logprobs=True, ignore_eos=True)
    (out,) = engine.generate([[3, 4, 5]], params)[0]
    with torch.no_grad():
        logp = alone(torch.tensor([[3, 4, 5, *out.token_ids]]))[0, 2:-1].log_softmax(-1)
    expected = logp.gather(1, torch.tensor(out.token_ids)[:, None]).squeeze(1)
    assert out.logprobs == pytest.approx(expected.tolist(), abs=1e-3)


def test_speculation_on_quantised_weights(script: Callable[..., LanguageModel]) -> None:
    lm = LanguageModel.create(SHAPE | EXPERTS | {"vocab_size": 200, "hidden_size": 128}, seed=2)
    params = SamplingParams(max_tokens=25, temperature=0.0, ignore_eos=True)
    plain = Engine(lm, dtype="float32", quantize="int8").generate([[3, 4, 5]], params)
    fast = Engine(lm, dtype="float32", quantize="int8", speculate="mtp").generate([[3, 4, 5]], params)
    assert plain[0][0].token_ids == fast[0][0].token_ids
