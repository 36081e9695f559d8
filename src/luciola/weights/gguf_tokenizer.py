"""The tokenizer inside a GGUF file as a Tokenizer.

llama.cpp knows several kinds. Two are read: "gpt2", byte-level BPE with the merges in the file, and "llama",
SentencePiece's BPE as in Llama 2 and Mistral, where a merge is whatever makes a token and the token's score says when.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from gguf.constants import TokenType
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from luciola.text.tokenizer import Tokenizer, add_around
from luciola.weights.gguf_file import DamagedError
from luciola.weights.gguf_pre_tokenizers import PRE_TOKENIZERS, WHOLE_WORDS

SPACE = "▁"  # SentencePiece writes a space like this

# llama.cpp wants merges, and an array in a GGUF file at least one element: here is one that can never apply, because
# nothing makes its halves.
NO_MERGES = ["<no> <merges>"]

# Byte-level BPE spells bytes as printable characters: a blank as "Ġ", most of ASCII as itself.
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
ASCII_SPELLING = {chr(byte): _BYTES.pre_tokenize_str(chr(byte))[0][0] for byte in range(128)}

# Qwen composes accents before anything else. llama.cpp has no word for that and does without; this project's own key
# keeps it for those who read the file here.
NORMALIZER = "luciola.normalizer"

# Where transformers 5 puts the space in front: "first" of a text only, and never before one that is there. llama.cpp
# puts one after every special token as well.
METASPACE, SCHEMES = "luciola.metaspace", ("first", "always", "never")

# Every cut of a token is looked at, so the work grows with the square of its length. SentencePiece stops at 16.
_LONGEST_PIECE = 128
_MOST_TOKENS = 1_000_000


def tokenizer_of(metadata: Mapping[str, Any], where: object) -> Tokenizer:
    """The Tokenizer which a GGUF file's metadata describes, chat template included.

    Padding rows ("[PAD7]" of type unused) are left out. `where` names the file in the sentences of errors.

    Raises:
        ValueError: another kind of tokenizer, an unknown pre-tokenizer, or parts that do not fit together.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    known = kind == "llama" or (kind == "gpt2" and isinstance(pre, str) and pre in PRE_TOKENIZERS)
    if not known:
        raise ValueError(
            f"{where}: the tokenizer is {kind!r} with pre-tokenizer {pre!r}; readable are 'llama' (SentencePiece) and "
            f"'gpt2' (byte-level BPE) with {', '.join(PRE_TOKENIZERS)}. Use the model's folder in Hugging Face layout "
            "instead."
        )
    try:
        vocabulary = _vocabulary(metadata)
        if kind == "llama":
            backend = _sentence_piece(vocabulary, metadata)
        else:
            backend = _byte_pairs(vocabulary, metadata, str(pre))
    except DamagedError as error:
        raise ValueError(f"{where} is damaged: {error}; fetch it again.") from error
    if metadata.get(NORMALIZER) == "NFC":
        backend.normalizer = normalizers.NFC()
    named = vocabulary.named
    bos, eos = named.get("bos"), named.get("eos")
    by_default = kind == "llama" or pre in WHOLE_WORDS  # whether llama.cpp begins with bos if the file does not say
    add_around(
        backend,
        bos if metadata.get("tokenizer.ggml.add_bos_token", by_default) else None,
        eos if metadata.get("tokenizer.ggml.add_eos_token", False) else None,
    )
    templates = {key: text for key, text in metadata.items() if re.match(r"tokenizer\.chat_template(\.|$)", key)}
    for key, text in templates.items():
        if not isinstance(text, str):
            raise ValueError(f"{where} is damaged: {key} is no text; fetch it again.")
    template = templates.pop("tokenizer.chat_template", None)
    return Tokenizer(
        backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=named.get("padding"),
        further_eos_ids=[vocabulary.ids[named[role]] for role in ("eot", "eom") if role in named],
        chat_template=template,
        further_templates={key.removeprefix("tokenizer.chat_template."): text for key, text in templates.items()},
    )


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens in the order of their ids, the types of the same, and the tokens that have a role such as "bos"."""

    ids: dict[str, int]
    types: dict[str, int]
    named: dict[str, str]

    def added_to(self, backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
        """`backend` with the tokens that are found in a text before anything else happens to it."""
        special = (TokenType.CONTROL, TokenType.UNKNOWN)
        for types, add in ((special, backend.add_special_tokens), ((TokenType.USER_DEFINED,), backend.add_tokens)):
            tokens = [token for token, kind in self.types.items() if kind in types]
            add([AddedToken(token, normalized=False, special=types is special) for token in tokens])
        return backend


def _vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens: list[str] = _list(metadata, "tokens", str)
    types: list[int] = _list(metadata, "token_type", int)
    if len(tokens) > _MOST_TOKENS:
        raise DamagedError(f"it has {len(tokens):,} tokens, more than any tokenizer")
    if len(types) != len(tokens):
        raise DamagedError(f"{len(tokens)} tokens have {len(types)} types")
    rows = {
        token_id: token
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != TokenType.UNUSED or token != padding_row(token_id)
    }
    ids = {token: token_id for token_id, token in rows.items()}
    if len(ids) != len(rows):
        twice = next(token for token_id, token in rows.items() if ids[token] != token_id)
        raise DamagedError(f"the token {twice[:40]!r} appears twice")
    named = {}
    for role in ("bos", "eos", "eot", "eom", "padding", "unknown"):
        token_id = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if isinstance(token_id, int) and token_id in rows:
            named[role] = rows[token_id]
    return _Vocabulary(ids, {token: types[token_id] for token, token_id in ids.items()}, named)


def padding_row(token_id: int) -> str:
    """What stands in place of a token where a model has an embedding row and the tokenizer nothing."""
    return f"[PAD{token_id}]"


def _byte_pairs(vocabulary: _Vocabulary, metadata: Mapping[str, Any], pre: str) -> tokenizers.Tokenizer:
    lines: list[str] = _list(metadata, "merges", str)
    merges = []
    for line in dict.fromkeys(lines if lines != NO_MERGES else []):
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocabulary.ids.keys():
            raise DamagedError(f"merge {line[:80]!r} names tokens it lacks")
        merges.append((left, right))
    unknown = vocabulary.named.get("unknown")
    characters = _characters(vocabulary) if unknown is not None and not merges else None
    if characters is not None:
        backend = tokenizers.Tokenizer(models.BPE(vocab=characters, merges=[], unk_token=unknown))
        backend.decoder = decoders.Fuse()
        return vocabulary.added_to(backend)
    model = models.BPE(vocab=vocabulary.ids, merges=merges, unk_token=unknown, ignore_merges=pre in WHOLE_WORDS)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    return vocabulary.added_to(backend)


def _characters(vocabulary: _Vocabulary) -> dict[str, int] | None:
    """The vocabulary of `Tokenizer.characters` if this is one: each ordinary token is an ASCII character, spelt."""
    spelt = {spelling: character for character, spelling in ASCII_SPELLING.items()}
    ids = {}
    for token, token_id in vocabulary.ids.items():
        if vocabulary.types[token] == TokenType.NORMAL:
            if token not in spelt:
                return None
            token = spelt[token]
        ids[token] = token_id
    return ids if len(ids) == len(vocabulary.ids) else None


def _sentence_piece(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    scores: list[float] = _list(metadata, "scores", float)
    if len(scores) < max(vocabulary.ids.values(), default=-1) + 1 or not all(map(math.isfinite, scores)):
        raise DamagedError(f"{len(vocabulary.ids)} tokens have {len(scores)} scores, or not all of them are numbers")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    model = models.BPE(
        vocab=vocabulary.ids,
        merges=_merges_by_score(vocabulary.ids, scores),
        unk_token=vocabulary.named.get("unknown"),
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    scheme = metadata.get(METASPACE)
    if scheme in SCHEMES:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
    else:
        backend.normalizer = spaces_written_out(bool(prefix))
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return vocabulary.added_to(backend)


def spaces_written_out(prefix: bool) -> normalizers.Normalizer:
    """SentencePiece's view of a text: "▁" for each space, and one more in front if `prefix`."""
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _merges_by_score(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two tokens, the token with the best score first."""
    found = []
    for token, token_id in ids.items():
        if len(token) > _LONGEST_PIECE:
            raise DamagedError(f"a token has {len(token):,} characters, which SentencePiece does not make")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-scores[token_id], token_id, left, right))
    return [(left, right) for _, _, left, right in sorted(found)]


def _list(metadata: Mapping[str, Any], name: str, of: type) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(isinstance(value, of) for value in values):
        raise DamagedError(f"tokenizer.ggml.{name} is no list of {of.__name__}")
    return values
