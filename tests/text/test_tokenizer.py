"""Tokenizers: one token a character, files that survive, and streams that never show half a character."""

import json
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from luciola.text.chat import BOS, EOS
from luciola.text.tokenizer import LONG, Tokenizer

ALPHABET = "0123456789+-*/=() \nabcxyz你"
CHARACTERS = Tokenizer.characters(ALPHABET)


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token: any string of ids is possible, and most are no text."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


BYTES = byte_tokenizer()


@given(st.text(alphabet=ALPHABET))
def test_each_character_is_a_token_and_comes_back(text: str) -> None:
    ids = CHARACTERS.encode(text)
    assert len(ids) == len(text)
    assert CHARACTERS.decode(ids) == text


def test_characters_outside_the_alphabet_are_unknown() -> None:
    assert CHARACTERS.encode("1☃👍2") == [*CHARACTERS.encode("1"), 3, 3, *CHARACTERS.encode("2")]


def test_added_tokens_are_single_and_survive_decoding_while_special_ones_do_not() -> None:
    ids = CHARACTERS.encode("<think>1</think><answer>2</answer>" + EOS)
    assert len(ids) == 7
    assert CHARACTERS.decode(ids) == "<think>1</think><answer>2</answer>"
    assert CHARACTERS.decode(ids, skip_special_tokens=False).endswith(EOS)


def test_ids_are_deepseek_s() -> None:
    assert (CHARACTERS.bos_token_id, CHARACTERS.eos_token_ids, CHARACTERS.pad_token_id) == (0, (1,), 2)
    assert CHARACTERS.encode(BOS) == [0]
    assert CHARACTERS.vocab_size == max(CHARACTERS.encode(ALPHABET)) + 1
    assert CHARACTERS.token_id("</think>") == CHARACTERS.encode("</think>")[0]
    assert CHARACTERS.token_id("nothing") is None


def test_chat_is_the_encoded_template() -> None:
    ids = CHARACTERS.chat([{"role": "user", "content": "1+1="}])
    assert CHARACTERS.decode(ids, skip_special_tokens=False) == f"{BOS}<｜User｜>1+1=<｜Assistant｜>"


def test_without_a_template_chat_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no chat template.*chat_template\.jinja"):
        BYTES.chat([{"role": "user", "content": "1"}])


@given(st.text(max_size=40))
def test_stream_of_true_text_never_shows_half_a_character(text: str) -> None:
    stream = BYTES.stream()
    pieces = [stream.push(token_id) for token_id in BYTES.encode(text)]
    assert "".join(pieces) == text.rstrip("\ufffd")  # a true U+FFFD at the end waits for the flush
    assert "".join(pieces) + stream.flush() == text
    assert all(piece.count("\ufffd") <= text.count("\ufffd") for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=80))
@settings(max_examples=300)
def test_stream_of_any_ids_adds_up_to_their_decoding(ids: list[int]) -> None:
    stream = BYTES.stream()
    pieces = "".join(stream.push(token_id) for token_id in ids)
    assert pieces + stream.flush() == BYTES.decode(ids)


def test_a_stream_of_broken_bytes_does_not_wait_for_ever() -> None:
    stream = BYTES.stream()
    token_id = BYTES.encode("é")[1]  # a continuation byte: it never begins a character
    assert "".join(stream.push(token_id) for _ in range(100)).count("\ufffd") >= 80


def test_stream_keeps_the_spaces_of_sentencepiece_style_tokenizers() -> None:
    vocab = {"<s>": 0, "▁a": 1, "▁b": 2}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(backend)
    stream = tokenizer.stream()
    ids = [1, 0, 0, 2, 1]
    assert "".join(stream.push(token_id) for token_id in ids) == tokenizer.decode(ids) == "a b a"


def test_save_and_load(tmp_path: Path) -> None:
    CHARACTERS.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    text = "<think>1+1</think>你" + EOS
    assert loaded.encode(text) == CHARACTERS.encode(text)
    assert loaded.decode(loaded.encode(text)) == CHARACTERS.decode(CHARACTERS.encode(text))
    for name in ("vocab_size", "bos_token_id", "eos_token_ids", "pad_token_id", "chat_template"):
        assert getattr(loaded, name) == getattr(CHARACTERS, name)


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def test_names_given_as_dicts_and_eos_of_the_generation_config(tmp_path: Path) -> None:
    CHARACTERS.save(tmp_path)
    entry = {"__type": "AddedToken", "content": EOS, "lstrip": False, "special": True}
    edit(tmp_path / "tokenizer_config.json", eos_token=entry, pad_token=None)
    edit(tmp_path / "generation_config.json", eos_token_id=[4, 1])
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_token_ids == (1, 4)
    assert loaded.pad_token_id is None


def test_eos_from_special_tokens_map_or_from_config_when_nothing_else_names_it(tmp_path: Path) -> None:
    CHARACTERS.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).eos_token_ids == (1,)
    (tmp_path / "special_tokens_map.json").unlink()
    assert Tokenizer.load(tmp_path).eos_token_ids == ()
    edit(tmp_path / "config.json", eos_token_id=5)
    assert Tokenizer.load(tmp_path).eos_token_ids == (5,)


def test_chat_template_file_wins_and_a_list_gives_its_default(tmp_path: Path) -> None:
    CHARACTERS.save(tmp_path)
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    edit(tmp_path / "tokenizer_config.json", chat_template=named)
    assert Tokenizer.load(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert Tokenizer.load(tmp_path).chat_template == "F"


def test_saved_truncation_is_not_applied(tmp_path: Path) -> None:
    CHARACTERS.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("12345")) == 5


def test_errors_name_the_file_or_the_token(tmp_path: Path) -> None:
    assert not Tokenizer.present(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert Tokenizer.present(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer\.json; write one with transformers"):
        Tokenizer.load(tmp_path)
    CHARACTERS.save(tmp_path)
    edit(tmp_path / "tokenizer_config.json", bos_token="<s>")
    with pytest.raises(ValueError, match="bos_token is '<s>', which its vocabulary of 36 tokens lacks"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_what_tokenizer_config_adds_goes_into_the_saved_tokenizer(bos: bool, eos: bool, tmp_path: Path) -> None:
    """R1's files say add_bos_token beside a tokenizer.json that adds nothing."""
    tokenizer = Tokenizer.characters("abc")
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": bos, "add_eos_token": eos}))
    Tokenizer.load(tmp_path).save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.encode("ab") == tokenizer.encode("ab")
    whole = again.backend.encode("ab", add_special_tokens=True).ids
    assert whole == [tokenizer.bos_token_id] * bos + tokenizer.encode("ab") + [tokenizer.eos_token_ids[0]] * eos


def test_a_character_is_lacking_where_it_would_be_lost() -> None:
    tokenizer = Tokenizer.characters("ab ")
    assert [tokenizer.lacks(character) for character in "ab c\n"] == [False, False, False, True, True]
    assert not any(byte_tokenizer().lacks(character) for character in "ac\n\u03a9\u6f22")


@given(st.text(min_size=1, max_size=30), st.booleans())
@settings(max_examples=30, deadline=None)
def test_long_texts_have_the_tokens_of_short_ones(text: str, skip: bool) -> None:
    for tokenizer in (BYTES, CHARACTERS):
        text = text.encode("utf-8", "ignore").decode()
        long = text * (LONG // max(1, len(text)) + 1)
        ids = tokenizer.backend.encode(long, add_special_tokens=False).ids
        assert tokenizer.encode(long) == ids
        assert tokenizer.decode(ids, skip) == tokenizer.backend.decode(ids, skip_special_tokens=skip)


def test_a_long_text_is_encoded_while_other_threads_go_on() -> None:
    tokenizer, text = BYTES, "a b " * 500_000
    done = threading.Event()
    thread = threading.Thread(target=lambda: (tokenizer.encode(text), done.set()))
    began = time.perf_counter()
    gaps, last = [], began
    thread.start()
    while not done.is_set():
        time.sleep(0.001)
        gaps.append(time.perf_counter() - last)
        last = time.perf_counter()
    thread.join()
    assert len(gaps) > 20 and max(gaps) < 0.7 * (last - began)
