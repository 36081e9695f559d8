"""A Tokenizer as the metadata of a GGUF file, proven: what llama.cpp's rules make of it gives the same ids and texts.

GGUF cannot state every tokenizer: it has names for some pre-tokenizers, and nothing for normalizers or for what an
added token does to the blanks around it. So what is to be written is read back and compared with the original, on texts
made to tell tokenizers apart; a difference is an error, and nothing wrong gets written.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import tokenizers
from gguf.constants import TokenType

from luciola.text.tokenizer import Tokenizer
from luciola.text.untrusted import shortened
from luciola.weights.gguf_pre_tokenizers import PRE_TOKENIZERS, WHOLE_WORDS
from luciola.weights.gguf_tokenizer import (
    ASCII_SPELLING,
    METASPACE,
    NO_MERGES,
    NORMALIZER,
    padding_row,
    spaces_written_out,
    tokenizer_of,
)
from luciola.weights.tricky_texts import tricky_texts

_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}
_EOS_ROLES = ("eos", "eot", "eom")  # all that a GGUF file has room for


def vocabulary_of(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """All `tokenizer.*` metadata of a GGUF file for a model with `rows` embedding rows.

    The values are str, bool, int and lists of str, int or float. Byte-level BPE and tokenizers of single characters
    become llama.cpp's "gpt2", BPE with byte fallback its "llama".

    Raises:
        ValueError: GGUF has no way to state this tokenizer; or fewer rows than tokens.
    """
    if rows < tokenizer.vocab_size:
        raise ValueError(f"The tokenizer has {tokenizer.vocab_size} tokens and the model only {rows} embedding rows.")
    state = json.loads(tokenizer.backend.to_str())
    texts = tricky_texts(tokenizer)
    form = _form(state)
    metadata = {
        **form(tokenizer, state, rows, texts),
        **_named_ids(tokenizer, state),
        **_added_around(tokenizer),
    }
    if state["normalizer"] == {"type": "NFC"}:
        metadata[NORMALIZER] = "NFC"
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    if tokenizer.further_templates:
        metadata["tokenizer.chat_templates"] = list(tokenizer.further_templates)
        metadata |= {f"tokenizer.chat_template.{name}": text for name, text in tokenizer.further_templates.items()}
    _prove(tokenizer, metadata, texts)
    return metadata


_Form = Callable[[Tokenizer, dict[str, Any], int, Sequence[str]], dict[str, Any]]


def _form(state: dict[str, Any]) -> _Form:
    """The one of the three below that can state this tokenizer."""
    model = state["model"]
    kind = model["type"]
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if kind == "BPE" and not affixes and model.get("dropout") is None:
        if model["byte_fallback"]:
            return _sentence_piece
        if '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["normalizer"]]):
            return _byte_level
        if not model["merges"] and state["pre_tokenizer"] is None:
            return _characters
        kind = "BPE over neither bytes nor single characters"
    raise ValueError(
        f"A tokenizer of the kind {kind} cannot be written to GGUF; byte-level BPE, BPE with byte fallback and "
        "tokenizers of single characters can."
    )


def _byte_level(tokenizer: Tokenizer, state: dict[str, Any], rows: int, texts: Sequence[str]) -> dict[str, Any]:
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(tokenizer, texts),
        **_tokens(state, rows, lambda token: (token, TokenType.NORMAL)),
        "tokenizer.ggml.merges": merges or NO_MERGES,
    }


def _pre_tokenizer(tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """The first known name under which the ids of all texts stay the same."""
    other = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    expected = [tokenizer.encode(text) for text in texts]
    farthest = 0
    for name, pre_tokenizer in PRE_TOKENIZERS.items():
        other.pre_tokenizer = pre_tokenizer
        other.model.ignore_merges = name in WHOLE_WORDS
        for index, text in enumerate(texts):
            if other.encode(text, add_special_tokens=False).ids != expected[index]:
                farthest = max(farthest, index)
                break
        else:
            return name
    raise ValueError(
        "The tokenizer splits text into words as no pre-tokenizer known here does, at the latest in "
        f"{shortened(texts[farthest])}; to be written to GGUF it must split like one of {', '.join(PRE_TOKENIZERS)}."
    )


def _characters(tokenizer: Tokenizer, state: dict[str, Any], rows: int, texts: Sequence[str]) -> dict[str, Any]:
    def spelt(character: str) -> tuple[str, TokenType]:
        if len(character) > 1:
            raise ValueError(
                f"The token {shortened(character)} is neither a single character nor an added token, and without "
                "merges nothing makes it; GGUF cannot state such a tokenizer."
            )
        # Beyond ASCII a character is several bytes, which nothing would merge: it is found before that, as it is.
        ascii_spelling = ASCII_SPELLING.get(character)
        return (character, TokenType.USER_DEFINED) if ascii_spelling is None else (ascii_spelling, TokenType.NORMAL)

    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": next(iter(PRE_TOKENIZERS)),  # whatever the words, each character is a token
        **_tokens(state, rows, spelt),
        "tokenizer.ggml.merges": NO_MERGES,
    }


def _sentence_piece(tokenizer: Tokenizer, state: dict[str, Any], rows: int, texts: Sequence[str]) -> dict[str, Any]:
    model = state["model"]
    if not model["vocab"].keys() >= _BYTE_TOKENS:
        raise ValueError("The tokenizer falls back on bytes but lacks some of the 256 tokens <0x00> to <0xFF>.")
    made: dict[str, int] = {}  # tokens in the order of their first merge
    for left, right in model["merges"]:
        token = left + right
        if token in made and token != next(reversed(made)):
            raise ValueError(
                f"The merges of {shortened(token)} have others between them, but in GGUF all merges of a token have "
                "its one score; this tokenizer cannot be written."
            )
        made.setdefault(token, len(made))
    vocabulary = _tokens(
        state, rows, lambda token: (token, TokenType.BYTE if token in _BYTE_TOKENS else TokenType.NORMAL)
    )
    tokens, types = vocabulary["tokenizer.ggml.tokens"], vocabulary["tokenizer.ggml.token_type"]
    unknown = model["vocab"].get(model["unk_token"])
    if unknown is not None and types[unknown] == TokenType.CONTROL:
        types[unknown] = int(TokenType.UNKNOWN)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        **vocabulary,
        "tokenizer.ggml.scores": [-float(made.get(token, len(made))) for token in tokens],
    }
    splitter = state["pre_tokenizer"] or {}
    if splitter.get("type") == "Metaspace" and not splitter["split"] and state["normalizer"] is None:
        scheme = splitter["prepend_scheme"]
        return metadata | {METASPACE: scheme, "tokenizer.ggml.add_space_prefix": scheme != "never"}
    return metadata | {"tokenizer.ggml.add_space_prefix": _prefixes(tokenizer, state, texts)}


def _prefixes(tokenizer: Tokenizer, state: dict[str, Any], texts: Sequence[str]) -> bool:
    """Whether a text gets a space in front; if neither fits, the proof will show where."""
    other = tokenizers.Tokenizer.from_str(json.dumps(state | {"pre_tokenizer": None}))
    other.normalizer = spaces_written_out(prefix=True)
    return all(other.encode(text, add_special_tokens=False).ids == tokenizer.encode(text) for text in texts)


def _tokens(state: dict[str, Any], rows: int, ordinary: Callable[[str], tuple[str, TokenType]]) -> dict[str, Any]:
    """Tokens and types up to `rows`: added tokens as they are, the others as `ordinary` spells them, padding."""
    entries = [(padding_row(token_id), TokenType.UNUSED) for token_id in range(rows)]
    added = {token["id"]: token for token in state["added_tokens"]}
    for token, token_id in state["model"]["vocab"].items():
        if token_id not in added:
            entries[token_id] = ordinary(token)
    for token_id, token in added.items():
        entries[token_id] = (token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    tokens = [token for token, _ in entries]
    if len(set(tokens)) < rows:
        twice = Counter(tokens).most_common(1)[0][0]
        raise ValueError(
            f"Two tokens would both be spelt {shortened(twice)} in GGUF; this tokenizer cannot be written."
        )
    if any("\0" in token for token in tokens):
        raise ValueError("A token has a zero byte in its text, where llama.cpp takes it to end; it cannot be written.")
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [int(kind) for _, kind in entries]}


def _named_ids(tokenizer: Tokenizer, state: dict[str, Any]) -> dict[str, int]:
    """The ids of the tokens that have a role. A role nobody has is left out; llama.cpp then assumes some id for eos."""
    ends = tokenizer.eos_token_ids
    if len(ends) > len(_EOS_ROLES):
        raise ValueError(f"GGUF has room for {len(_EOS_ROLES)} tokens that end a text; this tokenizer names {ends}.")
    unknown = state["model"].get("unk_token")
    roles = {
        "bos": tokenizer.bos_token_id,
        **dict(zip(_EOS_ROLES, ends, strict=False)),
        "padding": tokenizer.pad_token_id,
        "unknown": None if unknown is None else tokenizer.token_id(unknown),
    }
    return {f"tokenizer.ggml.{role}_token_id": token_id for role, token_id in roles.items() if token_id is not None}


def _added_around(tokenizer: Tokenizer) -> dict[str, bool]:
    """Which of bos and eos the tokenizer adds to a text when asked for special tokens."""
    plain, full = (tokenizer.backend.encode("a", add_special_tokens=asked).ids for asked in (False, True))
    bos, eos = [tokenizer.bos_token_id], list(tokenizer.eos_token_ids[:1])
    for front, behind in ((False, False), (True, False), (False, True), (True, True)):
        if full == bos * front + plain + eos * behind:
            return {"tokenizer.ggml.add_bos_token": front, "tokenizer.ggml.add_eos_token": behind}
    raise ValueError(f"The tokenizer makes {full} of {plain} with special tokens; GGUF can only state bos and eos.")


def _prove(tokenizer: Tokenizer, metadata: dict[str, Any], texts: Sequence[str]) -> None:
    read = tokenizer_of(metadata, "The metadata just made")
    ours, theirs = ((t.bos_token_id, t.eos_token_ids, t.pad_token_id) for t in (tokenizer, read))
    if ours != theirs:
        raise ValueError(
            f"The tokenizer's bos, eos and padding ids are {ours}; as GGUF states it they would be {theirs}."
        )
    for text in texts:
        ids = tokenizer.encode(text)
        same = read.encode(text) == ids and all(
            read.decode(ids, skip) == tokenizer.decode(ids, skip) for skip in (False, True)
        )
        if not same:
            raise ValueError(
                f"As GGUF states it the tokenizer would treat {shortened(text)} differently, so it is not written; "
                "normalizers other than NFC, and added tokens that strip blanks or stand only as words have "
                "no place in GGUF."
            )
