"""Tokenizers in GGUF metadata: what is written is read back the same; the rest is refused, and damage noticed."""

import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from luciola.text.bpe import DIGIT, byte_level, train_bpe
from luciola.text.tokenizer import Tokenizer
from luciola.weights.gguf_tokenizer import NO_MERGES, tokenizer_of
from luciola.weights.gguf_vocabulary import vocabulary_of

CODE = Path(json.__file__).read_text()
TEXTS = [CODE, "你好，世界。  123 ３４５ 🤖👨‍👩‍👧\r\n\r\n isn't IT'LL <think>a</think>", "e\u0301 é ▁ \u3000", "", " "]


def read(metadata: dict[str, Any]) -> Tokenizer:
    return tokenizer_of(metadata, "model.gguf")


def small_llama(**changes: Any) -> dict[str, Any]:
    """Metadata of the "llama" kind: all bytes, a few letters and merges."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁a", "▁ab"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 6],
        "tokenizer.ggml.scores": [0.0] * 259 + [-100.0] * 3 + [-2.0, -1.0, -3.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def names(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.backend.id_to_token(token_id) for token_id in tokenizer.encode(text)]


def test_what_is_written_is_read_back(stateable: Tokenizer) -> None:
    metadata = vocabulary_of(stateable, stateable.vocab_size + 11)
    again = read(metadata)
    for text in TEXTS:
        ids = stateable.encode(text)
        assert again.encode(text) == ids
        for skip in (False, True):
            assert again.decode(ids, skip) == stateable.decode(ids, skip)
    for attribute in ("bos_token_id", "eos_token_ids", "pad_token_id", "vocab_size", "chat_template"):
        assert getattr(again, attribute) == getattr(stateable, attribute), attribute
    twice = vocabulary_of(again, stateable.vocab_size + 11)
    # An added token may be two tokens in a row, a merge which "llama" then has and the original had not.
    assert {key: twice[key] for key in twice if key != "tokenizer.ggml.scores"} == {
        key: metadata[key] for key in metadata if key != "tokenizer.ggml.scores"
    }


def test_names_and_values(stateable: Tokenizer) -> None:
    """Only what every writer of GGUF can write: no None, no empty list, no list of mixed types."""
    for key, value in vocabulary_of(stateable, stateable.vocab_size).items():
        assert key.startswith("tokenizer.")
        assert type(value) in (str, int, bool, list)
        if isinstance(value, list):
            assert len({type(item) for item in value}) == 1


def test_kinds() -> None:
    assert vocabulary_of(train_bpe([CODE], 2000), 2000)["tokenizer.ggml.pre"] == "deepseek-v3"
    written = vocabulary_of(Tokenizer.characters("a \n"), 13)
    assert written["tokenizer.ggml.tokens"][10:] == ["a", "Ġ", "Ċ"]
    assert written["tokenizer.ggml.merges"] == NO_MERGES
    assert vocabulary_of(read(small_llama()), 265)["tokenizer.ggml.scores"][-3:] == [-1.0, -0.0, -2.0]


def test_padding_rows_have_no_token() -> None:
    tokenizer = train_bpe([CODE], 400)
    metadata = vocabulary_of(tokenizer, 403)
    assert metadata["tokenizer.ggml.tokens"][400:] == ["[PAD400]", "[PAD401]", "[PAD402]"]
    assert metadata["tokenizer.ggml.token_type"][400:] == [5, 5, 5]
    again = read(metadata)
    assert again.vocab_size == 400
    assert again.token_id("[PAD400]") is None
    assert again.decode([400]) == ""
    metadata["tokenizer.ggml.token_type"][401] = 1  # a token of that name is a token
    assert read(metadata).token_id("[PAD401]") == 401


def test_chat_template_byte_for_byte() -> None:
    template = "{{ x }}\r\n\t é 你 \x00 ▁{# \n\n"
    tokenizer = Tokenizer.characters("ab", chat_template=template)
    assert vocabulary_of(tokenizer, 20)["tokenizer.chat_template"] == template
    without = Tokenizer(tokenizer.backend)
    assert "tokenizer.chat_template" not in vocabulary_of(without, 20)
    assert read(vocabulary_of(without, 20)).chat_template is None


def test_several_ends() -> None:
    backend = train_bpe([], 300).backend
    tokenizer = Tokenizer(backend, eos_token="<｜User｜>", further_eos_ids=[1, 0])
    metadata = vocabulary_of(tokenizer, 300)
    assert [metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "eot", "eom")] == [3, 1, 0]
    assert read(metadata).eos_token_ids == (3, 1, 0)
    nameless = Tokenizer(backend, further_eos_ids=[1])
    assert read(vocabulary_of(nameless, 300)).eos_token_ids == (1,)


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_what_encoding_adds_is_stated_and_saved_but_never_encoded(bos: bool, eos: bool, tmp_path: Path) -> None:
    metadata = small_llama(add_bos_token=bos, add_eos_token=eos)
    tokenizer = read(metadata)
    ids = tokenizer.encode("ab")
    assert len(ids) == 1
    assert tokenizer.backend.encode("ab").ids == [1] * bos + ids + [2] * eos
    written = vocabulary_of(tokenizer, 265)
    assert (written["tokenizer.ggml.add_bos_token"], written["tokenizer.ggml.add_eos_token"]) == (bos, eos)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).backend.encode("ab").ids == tokenizer.backend.encode("ab").ids


def test_sentence_piece() -> None:
    tokenizer = read(small_llama())
    assert names(tokenizer, "ab a") == ["▁ab", "▁a"]
    assert names(tokenizer, "a</s>ab\n") == ["▁a", "</s>", "▁ab", "<0x0A>"]
    assert tokenizer.decode(tokenizer.encode("ab é\n  a")) == "ab é\n  a"
    bare = read(small_llama(add_space_prefix=False))
    assert names(bare, "ab a") == ["ab", "▁a"]
    assert bare.decode(bare.encode(" ab")) == " ab"
    assert read(small_llama()).backend.encode("a").ids[0] == 1  # bos is llama.cpp's default for this kind


def test_score_decides_the_order() -> None:
    assert names(read(small_llama()), "ab") == ["▁ab"]  # first ▁a, then with b
    scores = small_llama()["tokenizer.ggml.scores"]
    scores[-3:] = [-1.0, -2.0, -3.0]
    assert names(read(small_llama(scores=scores)), "ab") == ["▁ab"]  # first ab, then with ▁
    tokens = small_llama()["tokenizer.ggml.tokens"]
    tokens[-1] = "bb"
    assert names(read(small_llama(tokens=tokens, scores=scores)), "abb") == ["▁", "ab", "b"]
    scores[-3:] = [-2.0, -1.0, -3.0]
    assert names(read(small_llama(tokens=tokens, scores=scores)), "abb") == ["▁a", "bb"]


def word_piece() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")))


def unigram() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer(models.Unigram([("a", -1.0)])))


def bytes_with(change: Callable[[tokenizers.Tokenizer], object]) -> Tokenizer:
    """A tokenizer of train_bpe with one thing changed."""
    backend = train_bpe([CODE], 1200).backend
    change(backend)
    return Tokenizer(backend, bos_token="<｜begin▁of▁sentence｜>")


def set_to(name: str, value: object) -> Callable[[tokenizers.Tokenizer], object]:
    return lambda backend: setattr(backend, name, value)


def adds_user(backend: tokenizers.Tokenizer) -> None:
    name = "<｜User｜>"
    special = [(name, backend.token_to_id(name))]
    backend.post_processor = processors.TemplateProcessing(single=[name, "$A"], special_tokens=special)


def sentence_piece_with(**model: Any) -> Tokenizer:
    state = json.loads(read(small_llama()).backend.to_str())
    state["model"] |= model
    state["post_processor"] = None
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)))


def words_without_merges() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "ab": 1}, merges=[])))


REFUSALS: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "WordPiece": (word_piece, "kind WordPiece cannot be written to GGUF; byte-level BPE"),
    "Unigram": (unigram, "kind Unigram cannot"),
    "words without bytes": (
        lambda: bytes_with(set_to("pre_tokenizer", pre_tokenizers.Whitespace())),
        "kind BPE over neither bytes nor single characters",
    ),
    "another split": (
        lambda: bytes_with(set_to("pre_tokenizer", byte_level(r"[a-m]+", DIGIT))),
        "splits text into words as no pre-tokenizer known here does, .*like one of deepseek-v3, ",
    ),
    "normalizer": (
        lambda: bytes_with(set_to("normalizer", normalizers.Lowercase())),
        "would treat .* differently, so it is not written; normalizers",
    ),
    "decoder": (lambda: bytes_with(set_to("decoder", decoders.Fuse())), "would treat .* differently"),
    "stripping": (
        lambda: bytes_with(lambda backend: backend.add_tokens([AddedToken("<m>", lstrip=True, normalized=False)])),
        "would treat .*<m>.* differently",
    ),
    "single words": (
        lambda: bytes_with(lambda backend: backend.add_tokens([AddedToken("<m>", single_word=True)])),
        "would treat .*<m>.* differently",
    ),
    "post-processor": (lambda: bytes_with(adds_user), "with special tokens; GGUF can only state bos and eos"),
    "zero byte": (lambda: bytes_with(lambda backend: backend.add_tokens(["<\0>"])), "has a zero byte in its text"),
    "four ends": (
        lambda: Tokenizer(train_bpe([], 300).backend, further_eos_ids=[0, 1, 2, 3]),
        r"room for 3 tokens that end a text; this tokenizer names \(0, 1, 2, 3\)",
    ),
    "end beyond": (
        lambda: Tokenizer(train_bpe([], 300).backend, further_eos_ids=[9000]),
        r"eos .* \(9000,\), .* would be .* \(\), ",
    ),
    "end without a token": (
        lambda: Tokenizer(read(vocabulary_of(Tokenizer.characters("ab"), 12)).backend, further_eos_ids=[12]),
        "as GGUF states it they would be",
    ),
    "spelt alike": (lambda: Tokenizer.characters("a Ġ"), "Two tokens would both be spelt 'Ġ'"),
    "whole words": (words_without_merges, "'ab' is neither a single character nor an added token"),
    "bytes missing": (
        lambda: Tokenizer(tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[], byte_fallback=True))),
        "lacks some of the 256 tokens <0x00> to <0xFF>",
    ),
    "merges apart": (
        lambda: sentence_piece_with(merges=[["▁a", "b"], ["a", "b"], ["▁", "ab"], ["▁", "a"]]),
        "The merges of '▁ab' have others between them",
    ),
    "merges in part": (lambda: sentence_piece_with(merges=[["a", "b"]]), "would treat .* differently"),
    "other spaces": (
        lambda: Tokenizer(tokenizers.Tokenizer.from_str(sentence_piece_with().backend.to_str().replace("▁", "_"))),
        "would treat .* differently",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    make, message = REFUSALS[name]
    tokenizer = make()
    with pytest.raises(ValueError, match=message) as error:
        vocabulary_of(tokenizer, tokenizer.vocab_size + 2)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_too_few_rows() -> None:
    with pytest.raises(ValueError, match="The tokenizer has 12 tokens and the model only 11 embedding rows"):
        vocabulary_of(Tokenizer.characters("ab"), 11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "model.gguf: the tokenizer is 'bert' .* readable are 'llama' .SentencePiece. and 'gpt2'"),
        ({"model": "gpt2", "pre": ["x"]}, "with pre-tokenizer .'x'."),
        ({"scores": None}, "model.gguf is damaged: tokenizer.ggml.scores is no list of float; fetch it again"),
        ({"scores": [float("nan")] * 265}, "265 tokens have 265 scores, or not all of them are numbers"),
        ({"scores": [0.0] * 7}, "265 tokens have 7 scores"),
        ({"token_type": [1]}, "265 tokens have 1 types"),
        ({"tokens": ["a"] * 265}, "the token 'a' appears twice"),
        ({"tokens": [*map(str, range(264)), "a" * 5_000_000]}, "a token has 5,000,000 characters"),
        ({"model": "gpt2", "pre": "qwen2", "merges": ["ab"]}, "merge 'ab' names tokens it lacks"),
        ({"model": "gpt2", "pre": "qwen2", "merges": ["a b b"]}, "merge 'a b b' names tokens it lacks"),
        ({"model": "gpt2", "pre": "qwen2"}, "tokenizer.ggml.merges is no list of str"),
    ],
)
def test_what_cannot_be_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(small_llama(**changes))
    assert "\n" not in str(error.value)


def test_thirty_two_thousand_tokens_are_read_in_no_time() -> None:
    rng = random.Random(0)
    tokens = small_llama()["tokenizer.ggml.tokens"]
    tokens = list(
        dict.fromkeys([*tokens, *("".join(rng.choices("▁abcdefgh", k=rng.randrange(1, 17))) for _ in range(40_000))])
    )
    types = [*[1] * 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    start = time.perf_counter()
    read(small_llama(tokens=tokens, token_type=types, scores=[-float(i) for i in range(len(tokens))]))
    assert time.perf_counter() - start < 5


def mutated(metadata: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One to three things wrong: of another type, cut, doubled, huge, not a number, or missing."""
    damaged = copy.deepcopy(metadata)
    strange = [
        None,
        "",
        "x" * 100_000,
        "\ud800",
        -1,
        2**63,
        True,
        float("nan"),
        [],
        {},
        [[]],
        b"a",
        ["a b"],
        [1],
        [2.5],
    ]
    for _ in range(rng.randrange(1, 4)):
        key = rng.choice(list(damaged))
        value = damaged[key]
        match rng.randrange(4):
            case 0:
                damaged[key] = rng.choice(strange)
            case 1 if isinstance(value, list) and value:
                value[rng.randrange(len(value))] = rng.choice([*strange, value[0], value[-1], "a" * 3000, float("inf")])
            case 2 if isinstance(value, list) and value:
                damaged[key] = value[: rng.randrange(len(value))] + value[: rng.randrange(3)]
            case 3 if isinstance(value, int):
                damaged[key] = rng.choice([-1, 10**9, 2**32 - 1, 2**70, 5])
            case _:
                del damaged[key]
        if not damaged:
            break
    return damaged


def test_damage_anywhere_ends_in_a_tokenizer_or_a_value_error() -> None:
    rng = random.Random(0)
    sound = [
        small_llama(add_bos_token=True, add_space_prefix=True, padding_token_id=5),
        vocabulary_of(Tokenizer.characters("ab \n"), 20),
        vocabulary_of(train_bpe([CODE], 600), 610),
    ]
    readable = 0
    for number in range(300):
        damaged = mutated(sound[number % 3], rng)
        start = time.perf_counter()
        try:
            tokenizer = read(damaged)
        except ValueError as error:
            assert "model.gguf" in str(error)
        else:
            readable += 1
            tokenizer.decode(tokenizer.encode("ab <think> 你好\n"))
        assert time.perf_counter() - start < 5
    assert 30 < readable < 270


def test_a_merge_written_twice_counts_once() -> None:
    metadata = vocabulary_of(train_bpe([CODE], 600), 600)
    again = metadata | {"tokenizer.ggml.merges": metadata["tokenizer.ggml.merges"] * 2}
    assert read(again).encode(CODE) == read(metadata).encode(CODE)


def test_splits_of_a_pattern_are_not_guessed() -> None:
    """A split which differs from a known one by a single rule is not taken for it."""
    pattern = Regex(r"\p{N}{1,3}|[^\p{N}\s]+|\s+")
    backend = train_bpe([CODE * 2], 1500).backend
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    with pytest.raises(ValueError, match="splits text into words"):
        vocabulary_of(Tokenizer(backend), 1500)


def test_qwen_s_composition_of_accents_comes_back_though_llama_cpp_has_no_word_for_it() -> None:
    tokenizer = train_bpe([CODE], 600)
    tokenizer.backend.normalizer = normalizers.NFC()
    again = read(vocabulary_of(tokenizer, 600))
    assert again.encode("e\u0301") == tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_further_templates_travel_and_tool_use_is_taken_where_there_are_tools(tmp_path: Path) -> None:
    tokenizer = Tokenizer.characters("abc", chat_template="plain")
    tokenizer.further_templates["tool_use"] = "with {{ tools | length }} tools\r\n{{ bos_token }}"
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "files" / "additional_chat_templates").mkdir(parents=True)
    Tokenizer.characters("abc", chat_template="plain").save(tmp_path / "files")
    (tmp_path / "files" / "chat_template.jinja").write_text("plain")
    further = tmp_path / "files" / "additional_chat_templates" / "tool_use.jinja"
    further.write_bytes(tokenizer.further_templates["tool_use"].encode())
    for again in (
        read(vocabulary_of(tokenizer, 20)),
        Tokenizer.load(tmp_path / "saved"),
        Tokenizer.load(tmp_path / "files"),
    ):
        assert again.further_templates == tokenizer.further_templates
        assert again.render([]) == "plain"
        assert again.render([], tools=[{}, {}]).startswith("with 2 tools")


@pytest.mark.parametrize("stateable", ["sentencepiece, prefix, added", "sentencepiece, bare, plain"], indirect=True)
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace_comes_back_though_llama_cpp_puts_more_spaces(scheme: str, stateable: Tokenizer) -> None:
    """As transformers 5 saves Llama's and Mistral's tokenizers."""
    state = json.loads(stateable.backend.to_str())
    splitter = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    steps += [] if scheme == "never" else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    state |= {"normalizer": None, "pre_tokenizer": splitter, "decoder": {"type": "Sequence", "decoders": steps}}
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    tokenizer = Tokenizer(backend, bos_token="<s>", eos_token="</s>")
    metadata = vocabulary_of(tokenizer, tokenizer.vocab_size)
    assert metadata["tokenizer.ggml.add_space_prefix"] == (scheme != "never")
    for text in (*TEXTS, " a</s> b</s>c", "a b"):
        assert read(metadata).encode(text) == tokenizer.encode(text)
