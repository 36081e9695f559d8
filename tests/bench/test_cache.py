"""The measured bytes are those of the papers' formulas, and a batch fills its memory."""

import pytest

from luciola.bench.cache import SHAPES, fill
from luciola.bench.turns import take_turns
from luciola.model.config import ModelConfig

# numbers a token and layer (V2 report, table 1), layers
FORMULAS = {
    "MHA": (2 * 128 * 128, 60),
    "GQA": (2 * 8 * 128, 60),
    "MQA": (2 * 128, 60),
    "MLA": (512 + 64, 60),
    "DeepSeek 67B": (2 * 8 * 128, 95),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_the_real_caches_have_the_bytes_of_the_formulas(kind: str) -> None:
    numbers, layers = FORMULAS[kind]
    measured = fill(ModelConfig.model_validate(SHAPES[kind]), memory=1 << 23, context=16)
    assert measured["storage_bytes_per_token"] == 2 * numbers * layers


def test_a_batch_fills_the_memory_it_is_given() -> None:
    contenders, most = {}, {"MLA": 4, "MQA": 9}
    for kind, rows in most.items():
        numbers, layers = FORMULAS[kind]
        memory = int((rows + 0.5) * 128 * 2 * numbers * layers)
        arguments = {"shape": SHAPES[kind], "memory": memory, "context": 128}
        contenders[kind] = ("luciola.bench.cache:measurement", arguments)
    for kind, (turn,) in take_turns(contenders, rounds=1, warmup=0).items():
        assert turn.said["largest_batch"] == most[kind]
        assert turn.said["resident_bytes_per_token"] == pytest.approx(turn.said["storage_bytes_per_token"], rel=0.1)


def test_the_published_saving_is_6_bits_against_16() -> None:
    mla, gqa = (numbers * layers for numbers, layers in (FORMULAS["MLA"], FORMULAS["DeepSeek 67B"]))
    assert 1 - mla / gqa == pytest.approx(0.822, abs=0.001)
    assert 1 - mla * 6 / (gqa * 16) == pytest.approx(0.933, abs=0.001)
