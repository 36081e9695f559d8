"""Contenders on tiny models, and the arithmetic of their standings."""

from typing import Any

import pytest
import torch

import luciola
from luciola.bench import contenders
from luciola.bench.contenders import standings, weight_bytes
from luciola.bench.speculation import gain
from luciola.bench.subjects import V3_SHAPE, prefill_flops, random_prompts
from luciola.bench.turns import Turn, compare, take_turns
from luciola.model.config import ModelConfig
from luciola.model.transformer import Transformer

TINY = V3_SHAPE | {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bench") / "v3"
    luciola.LanguageModel.create(TINY, seed=0).save(folder)
    return str(folder)


def test_ours_and_transformers_generate_the_same_tokens_round_by_round(model: str) -> None:
    prompts = random_prompts(TINY["vocab_size"], rows=3, length=5, rounds=2)
    ours = contenders.luciola(model, prompts, 6, {"dtype": "float32"})
    theirs = contenders.transformers(model, prompts, 6)
    first, second = ours(), ours()
    assert [len(row) for row in first["tokens"]] == [6, 6, 6]
    assert first["tokens"] != second["tokens"]
    assert [first["tokens"], second["tokens"]] == [theirs()["tokens"], theirs()["tokens"]]


def test_a_precision_that_is_hopeless_here_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for bfloat16, expected in ((99.0, ["float32", "int8", "int4"]), (101.0, list(contenders.PRECISIONS))):
        speeds = {"core_gflops": {"float32": 100.0, "bfloat16": bfloat16}}
        monkeypatch.setattr(contenders.hardware, "measured", lambda speeds=speeds: speeds)
        assert contenders.precisions() == expected


def test_prompts_differ_from_round_to_round_and_not_from_run_to_run() -> None:
    prompts = random_prompts(1000, rows=2, length=8, rounds=3)
    assert prompts == random_prompts(1000, rows=2, length=8, rounds=3)
    assert len({tuple(row) for rows in prompts for row in rows}) == 6
    assert all(5 <= token < 1000 for rows in prompts for row in rows for token in row)


def said(*tokens: list[int], **more: Any) -> dict[str, Any]:
    return {"tokens": list(tokens), "weight_bytes": 10, **more}


def test_standings_take_the_best_of_each_and_count_agreement_up_to_the_first_difference() -> None:
    prompts = [[[1, 2, 3]], [[4, 5, 6]]]
    clock = {"decoded_per_second": 7.0}
    turns = {
        "float32": [Turn(2.0, said([1, 2, 3, 4])), Turn(2.0, said([1, 2, 3, 4]))],
        "int8": [Turn(1.0, said([9, 9, 9, 9])), Turn(0.5, said([9, 9, 9, 9]))],
        "peer f32": [Turn(4.0, said([1, 2, 3, 4])), Turn(4.0, said([1, 9, 3, 4]))],
        "peer q4": [Turn(3.0, said([8, 8, 8, 8], clock=clock)), Turn(3.0, said([8, 8, 8, 8], clock=clock))],
    }
    peers = ["peer f32", "peer q4"]
    result = standings(turns, ["float32", "int8"], peers, prompts, 4)
    assert (result["best"], result["peer"]) == ("int8", "peer q4")
    assert result["tokens_per_second"] == {"float32": 2.0, "int8": 4 / 0.75, "peer f32": 1.0, "peer q4": 4 / 3}
    assert result["ratio"] == 4.5 and result["ratio_lowest"] == 3.0 and result["ratio_highest"] == 6.0
    assert result["ratios"] == {"peer f32": 6.0, "peer q4": 4.5}
    assert result["same_tokens"] == 5 / 8
    assert result["peer_own_clock"] == clock
    prefill = standings(turns, ["float32"], peers, prompts, 1)
    assert prefill["tokens_per_second"]["peer q4"] == 1.0  # three tokens of prompt


def test_weights_that_a_token_reads() -> None:
    untied = Transformer(ModelConfig.model_validate(LLAMA))
    all_bytes = sum(parameter.nbytes for parameter in untied.parameters())
    buffers = sum(
        buffer.nbytes for name, buffer in untied.state_dict().items() if name not in dict(untied.named_parameters())
    )
    assert weight_bytes(untied) == all_bytes + buffers - 64 * 16 * 4
    tied = Transformer(ModelConfig.model_validate(LLAMA | {"tie_word_embeddings": True}))
    assert weight_bytes(tied) == weight_bytes(untied)
    # a quantised head no longer shares the embedding, which then is but looked up
    head = torch.nn.Module()
    head.register_buffer("packed", torch.zeros(64 * 16, dtype=torch.int8))
    tied.lm_head = head
    assert weight_bytes(tied) == weight_bytes(untied) - 64 * 16 * 3


def test_the_prompt_meets_the_head_once() -> None:
    model = Transformer(ModelConfig.model_validate(LLAMA))
    head, layer = 2 * 64 * 16, 2 * (4 * 16 * 16 + 3 * 16 * 24)
    pairs = 10 * 10 / 2 * 2 * 2 * 16  # half of all pairs, q.k and p v, over both heads
    norms = 2 * 3 * 16 * 10
    assert prefill_flops(model, 10) == pytest.approx(10 * layer + head + pairs + norms)


def test_turns_bring_back_what_a_step_returned(model: str) -> None:
    prompts = random_prompts(TINY["vocab_size"], rows=1, length=5, rounds=2)
    arguments = {"model": model, "prompts": prompts, "new_tokens": 3, "engine": {"dtype": "float32"}}
    turns = take_turns({"ours": ("luciola.bench.contenders:luciola", arguments)}, rounds=1, warmup=1)
    step = contenders.luciola(**arguments)
    step()
    ((seconds, said),) = turns["ours"]
    assert seconds > 0 and said["tokens"] == step()["tokens"]


def test_a_ratio_is_of_turns_and_not_of_medians() -> None:
    turns = {
        "ours": [Turn(1.0, None), Turn(2.0, None), Turn(9.0, None)],
        "peer": [Turn(3.0, None), Turn(4.0, None), Turn(9.0, None)],
    }
    assert compare(turns, "ours", "peer") == {
        "ours_seconds": 2.0,
        "peer_seconds": 4.0,
        "ratio": 2.0,
        "ratio_lowest": 1.0,
        "ratio_highest": 3.0,
        "rounds": 3,
    }


def test_speculation_is_judged_by_all_tokens_and_all_seconds() -> None:
    plain = [Turn(1.0, said([1, 2])), Turn(1.0, said([3, 4]))]
    stats = {"accepted": 3, "drafted": 4}
    mtp = [Turn(0.5, said([1, 2])), Turn(0.5, said([3, 5], stats=stats, weight=1))]
    assert gain(plain, mtp) == {
        "plain_tokens_per_second": 2.0,
        "mtp_tokens_per_second": 4.0,
        "ratio": 2.0,
        "acceptance": 0.75,
        "same_completions": 0.5,
    }
