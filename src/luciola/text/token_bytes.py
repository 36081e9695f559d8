"""What each token of a tokenizer stands for, in bytes.

A text can end in the middle of a character, so that whoever wants to know which tokens may continue it has to compare
bytes. Three ways of spelling are read: byte-level BPE (a printable character for every byte), SentencePiece's ("▁" for
a blank, "<0x0A>" for a byte without a character), and tokens that are their own text.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import pre_tokenizers

from luciola.text.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARKS = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))


def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: visible Latin-1 characters stand for their own code, from U+0100 on for the other bytes."""
    others = [byte for byte in range(256) if byte not in _MARKS]
    table = {chr(byte): byte for byte in _MARKS} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert table.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return table


def token_bytes(tokenizer: Tokenizer) -> tuple[list[bytes], frozenset[int]]:
    """The bytes of every token id as they are decoded inside a text (b"" for an id that has no token), and the ids of
    special tokens, which stand for no text: their bytes are their names.

    A space which the decoder takes from the front of a whole text is among the bytes of the token.

    Raises:
        ValueError: the tokenizer's decoder spells its tokens in some other way.
    """
    settings: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    added = tokenizer.backend.get_added_tokens_decoder()
    unknown = settings["model"].get("unk_token")
    special = {token_id for token_id, token in added.items() if token.special} | set(tokenizer.eos_token_ids)
    for name in (unknown,) if isinstance(unknown, str) else ():
        token_id = tokenizer.token_id(name)
        if token_id is not None:
            special.add(token_id)

    parts = list(_parts(settings["decoder"]))
    kinds = {part["type"] for part in parts}
    foreign = kinds - {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}
    if foreign or not kinds:
        raise ValueError(
            f"The tokenizer decodes with {', '.join(sorted(foreign)) or 'blanks between its tokens'}, whose bytes are "
            "not known token by token; constrained decoding needs byte-level BPE, SentencePiece's BPE or characters."
        )
    blanks = [part.get("replacement", "▁") for part in parts if part["type"] == "Metaspace"]
    replacements = [(blank, " ") for blank in blanks]
    for part in parts:
        if part["type"] == "Replace":
            if "String" not in part["pattern"]:
                raise ValueError("The tokenizer decodes by a regular expression, so tokens have no bytes of their own.")
            replacements.append((part["pattern"]["String"], part["content"]))
    byte_of = _byte_of() if "ByteLevel" in kinds else {}

    def spelled(token: str) -> bytes:
        if "ByteLevel" in kinds:
            spelled_out = all(character in byte_of for character in token)
            return bytes(byte_of[character] for character in token) if spelled_out else token.encode()
        if "ByteFallback" in kinds and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    tokens = [b""] * tokenizer.vocab_size
    for token, token_id in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        tokens[token_id] = token.encode() if token_id in special else spelled(token)
    return tokens, frozenset(special)


def _parts(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _parts(part)
    else:
        yield decoder
