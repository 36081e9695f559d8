"""Byte-level BPE: every text survives, classes of characters stay apart, training is a function of its texts."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luciola.text.bpe import train_bpe

TEXTS = [
    "the cat sat on the mat, and the dog sat on the log.\n" * 20,
    "你好，世界。你好，世界。こんにちは\n" * 20,
    "for i in range(1234): x.append(i * 12.5)  # 100 times\n" * 20,
]
TOKENIZER = train_bpe(TEXTS, 500)


@given(st.text())
def test_every_text_survives(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_training_text_is_compressed() -> None:
    assert len(TOKENIZER.encode(TEXTS[0])) < len(TEXTS[0]) / 3


def test_digits_are_single_tokens() -> None:
    assert [TOKENIZER.decode([token_id]) for token_id in TOKENIZER.encode("x1234")] == ["x", "1", "2", "3", "4"]


def test_no_token_mixes_classes() -> None:
    def kind(character: str) -> str:
        return "Han" if "\u4e00" <= character <= "\u9fa5" else unicodedata.category(character)[0]

    for token_id in range(TOKENIZER.vocab_size):
        text = TOKENIZER.decode([token_id])
        if "\ufffd" in text or text in ("<think>", "</think>", "<answer>", "</answer>"):
            continue
        found = {kind(character) for character in text.strip()}
        if text[:1] in ".(#*,":  # one ASCII mark may lead letters
            found -= {"P"} if found & {"L"} else set()
        assert len(found - {"C"}) <= 1, text


def test_ids_and_size() -> None:
    assert TOKENIZER.vocab_size <= 500
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_ids, TOKENIZER.pad_token_id) == (0, (1,), 2)
    assert len(TOKENIZER.encode("<think>")) == 1
    assert TOKENIZER.decode(TOKENIZER.encode("<think>a</think>")) == "<think>a</think>"
    assert train_bpe(TEXTS, 300).vocab_size == 300


def test_the_same_texts_give_the_same_tokenizer() -> None:
    again = train_bpe(iter(TEXTS), 500)
    assert [again.encode(text) for text in TEXTS] == [TOKENIZER.encode(text) for text in TEXTS]


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=200 is too small.*need 265"):
        train_bpe(TEXTS, 200)
