"""Perplexity against a computation that scores each token on its own, and the reading of files in pieces."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import luciola
from luciola.evaluate import perplexity as room
from luciola.evaluate.perplexity import Window, perplexity, pieces, windows
from luciola.text.tokenizer import Tokenizer

CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 24,
    "initializer_range": 0.3,
}
LETTERS = "abcdefgh é\n"


@pytest.fixture(scope="module")
def lm() -> luciola.LanguageModel:
    tokenizer = Tokenizer.characters(LETTERS)
    return luciola.LanguageModel.create(CONFIG | {"vocab_size": tokenizer.vocab_size}, tokenizer, seed=0)


def naive(lm: luciola.LanguageModel, tokens: list[int], window: int) -> float:
    """The sum of -log p, each token from a pass of its own over just the context its window gives it."""
    nats = 0.0
    for i in range(1, len(tokens)):
        # windows begin at multiples of the stride; token i counts in the first that reaches it
        begin = 0
        while begin + window <= i:
            begin += window // 2
        logits_V = lm.model(torch.tensor([tokens[begin:i]]))[0, -1]
        nats -= float(logits_V.double().log_softmax(-1)[tokens[i]])
    return nats


@pytest.mark.parametrize("window", [2, 7, 16, 24, None])
@pytest.mark.parametrize("length", [2, 16, 17, 90])
def test_it_is_what_scoring_every_token_alone_gives(
    lm: luciola.LanguageModel, tmp_path: Path, window: int | None, length: int
) -> None:
    text = ("abé cdh\nfa geb" * 10)[:length]
    path = tmp_path / "text"
    path.write_text(text, encoding="utf-8")
    assert lm.tokenizer is not None
    tokens = lm.tokenizer.encode(text)
    with torch.inference_mode():
        expected = naive(lm, tokens, window or 24)
    score = perplexity({"plain": lm.model}, lm.tokenizer, path, window)["plain"]
    assert score.tokens == len(tokens) - 1
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(expected / (len(tokens) - 1)), rel=1e-5)
    size = len(text.encode())
    assert score.bits_per_byte(size) == pytest.approx(expected / math.log(2) / size, rel=1e-5)


def test_models_are_scored_on_the_same_tokens(lm: luciola.LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("abc def " * 9)
    other = luciola.LanguageModel.create(lm.config, lm.tokenizer, seed=1)
    both = perplexity({"a": lm.model, "b": other.model}, lm.tokenizer, path)
    assert both["a"] == perplexity({"a": lm.model}, lm.tokenizer, path)["a"]
    assert both["b"] == perplexity({"b": other.model}, lm.tokenizer, path)["b"]
    assert both["a"].tokens == both["b"].tokens and both["a"].nats != both["b"].nats


def test_the_head_in_parts_changes_nothing(
    lm: luciola.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text"
    path.write_text("abc def " * 9)
    whole = perplexity({"a": lm.model}, lm.tokenizer, path)["a"].nats
    monkeypatch.setattr(room, "HEAD_NUMBERS", 3 * lm.config.vocab_size)
    assert perplexity({"a": lm.model}, lm.tokenizer, path)["a"].nats == pytest.approx(whole, rel=1e-6)


def test_progress_adds_up_to_the_file(
    lm: luciola.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text"
    path.write_text("abc éef " * 50, encoding="utf-8")
    monkeypatch.setattr(room.pieces, "__defaults__", (40,))
    read: list[int] = []
    perplexity({"a": lm.model}, lm.tokenizer, path, advance=lambda note, count: read.append(count))
    assert sum(read) == path.stat().st_size and len([count for count in read if count]) > 5


@given(sizes=st.lists(st.integers(0, 9), max_size=9), window=st.integers(2, 7))
def test_every_token_but_the_first_is_scored_once_with_half_a_window_before_it(sizes: list[int], window: int) -> None:
    numbers = iter(range(1000))
    parts = [[next(numbers) for _ in range(size)] for size in sizes]
    scored = []
    for tokens, count in windows(iter(parts), window):
        assert len(tokens) <= window and 0 < count < len(tokens)
        scored += tokens[-count:]
        assert tokens[0] == 0 or len(tokens) - count >= window // 2
    assert scored == list(range(1, sum(sizes)))


def test_a_window_says_what_counts() -> None:
    assert list(windows(iter([[0, 1, 2, 3, 4], [5, 6]]), 4)) == [
        Window([0, 1, 2, 3], 3),
        Window([2, 3, 4, 5], 2),
        Window([4, 5, 6], 1),
    ]


@given(text=st.text(alphabet="ab .\n\té好", max_size=300), characters=st.integers(3, 40))
def test_pieces_are_the_file(tmp_path_factory: pytest.TempPathFactory, text: str, characters: int) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces"
    path.write_bytes(text.encode() or b"a")
    found = list(pieces(path, characters))
    assert "".join(piece for piece, _ in found) == (text or "a")
    assert all(size == len(piece.encode()) for piece, size in found)


def test_pieces_have_the_tokens_of_the_whole(stateable: Tokenizer, tmp_path: Path) -> None:
    text = "ab cab (abc) bc\nab abc: cab\n\n  bca abc.\n" * 30
    text = text if stateable.token_id("▁") is not None or stateable.vocab_size > 256 else "ab c (abc)\na\n  bca " * 30
    path = tmp_path / "text"
    path.write_text(text)
    parts = [stateable.encode(piece) for piece, _ in pieces(path, 50)]
    tokens, whole = [token for part in parts for token in part], stateable.encode(text)
    assert len(parts) > 5
    if stateable.token_id("▁") is None:
        assert tokens == whole
    else:  # SentencePiece puts a blank before each text, and takes a line break for a letter
        assert abs(len(tokens) - len(whole)) <= 2 * len(parts)


def test_bad_files_are_named(lm: luciola.LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "text"

    def refused(content: bytes, **options: Any) -> str:
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            perplexity({"a": lm.model}, lm.tokenizer, path, **options)
        return str(error.value)

    assert "is empty" in refused(b"")
    assert "fewer than two tokens" in refused(b"a")
    assert "not UTF-8 text (byte 3)" in refused(b"abc\xff def")
    assert "not UTF-8 text (byte 3)" in refused(b"abc\xc3")
    assert "window=25 must be between 2 and the model's context of 24" in refused(b"abc", window=25)
    assert "window=1 must be" in refused(b"abc", window=1)
    with pytest.raises(ValueError, match="no tokenizer"):
        perplexity({"a": lm.model}, None, path)


@pytest.mark.parametrize("characters", [3, 5, 8])
def test_the_place_of_a_bad_byte_is_right_across_reads(tmp_path: Path, characters: int) -> None:
    path = tmp_path / "text"
    path.write_bytes("aé好b".encode() * 5 + b"\xff" + b"abc")
    with pytest.raises(ValueError, match=r"\(byte 35\)"):
        list(pieces(path, characters))
