"""Perplexity of a text under a model, in strided windows, for one or several versions of its weights at once.

    perplexity = exp(mean over tokens of -log p(token | window so far)),   bits a byte = sum of -log2 p / bytes of text

A window holds `window` tokens; the next begins half a window later and counts only the tokens that are new in it, so
that all but the first half window are predicted from at least half a window of context. The first token of the text has
none and is not scored, though its bytes count. Perplexity depends on tokenizer and window; bits a byte can be compared
across tokenizers.

Shapes: B = 1, T tokens of a window, D hidden, V vocabulary, N scored tokens.
"""

from __future__ import annotations

import codecs
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from luciola.model.transformer import Transformer
from luciola.text.tokenizer import Tokenizer

WINDOW = 2048  # tokens of a window where the model's context is not shorter
PIECE = 1 << 18  # characters of text that are made tokens at a time
HEAD_NUMBERS = 1 << 22  # logits in flight

Advance = Callable[[str, int], None]


@dataclass(slots=True)
class Score:
    """What one model has made of a text so far."""

    nats: float = 0.0
    tokens: int = 0

    @property
    def loss(self) -> float:
        """Mean of -log p a token, in nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where the text is impossible."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        """The length of the text coded by the model, in bits a byte of it."""
        return self.nats / math.log(2) / text_bytes


class Window(NamedTuple):
    """Tokens that go through the model together, of which the last `scored` count."""

    tokens: list[int]
    scored: int


def perplexity(
    models: Mapping[str, Transformer],
    tokenizer: Tokenizer | None,
    path: Path,
    window: int | None = None,
    advance: Advance = lambda note, count: None,
) -> dict[str, Score]:
    """Score the text file with each of the models, which share the tokenizer, window by window.

    Args:
        window: tokens that a prediction sees at most; None: the model's context, or 2,048 where that is longer.
        advance: told after each window how the first model stands, and the bytes of the file read since the last.

    Raises:
        ValueError: there is no tokenizer, the window does not fit the model, or the file is not UTF-8 or too short.
        OSError: the file cannot be read.
    """
    if tokenizer is None:
        raise ValueError("this model has no tokenizer, so no text can be scored with it")
    context = min(model.config.max_position_embeddings for model in models.values())
    window = min(context, WINDOW) if window is None else window
    if not 2 <= window <= context:
        raise ValueError(f"window={window} must be between 2 and the model's context of {context} tokens")
    scores = {name: Score() for name in models}
    read = 0

    def encoded() -> Iterator[list[int]]:
        nonlocal read
        for piece, size in pieces(path):
            read += size
            yield tokenizer.encode(piece)

    for tokens, scored in windows(encoded(), window):
        for name, model in models.items():
            scores[name].nats -= float(token_logprobs(model, tokens)[-scored:].double().sum())
            scores[name].tokens += scored
        advance(f"perplexity {next(iter(scores.values())).perplexity:.4g}", read)
        read = 0
    if not next(iter(scores.values())).tokens:
        raise ValueError(f"{path} has fewer than two tokens, and a prediction needs one to start from; give more text")
    return scores


def unknown_characters(tokenizer: Tokenizer, path: Path) -> tuple[int, int]:
    """How many characters of the text file the tokenizer does not have, and how many the file has."""
    counts: Counter[str] = Counter()
    for piece, _ in pieces(path):
        counts.update(piece)
    return sum(count for character, count in counts.items() if tokenizer.lacks(character)), counts.total()


def pieces(path: Path, characters: int = PIECE) -> Iterator[tuple[str, int]]:
    """The text of a UTF-8 file in pieces of about so many characters, each with its number of bytes.

    A piece ends before white space that follows a word, where tokenizers part their words anyway (SentencePiece's may
    make a token more at such a place); text that has none for long, four times the size, is cut where it happens to be.

    Raises:
        ValueError: the file is not UTF-8, said with the place, or it is empty.
    """
    decoder, text, place = codecs.getincrementaldecoder("utf-8")(), "", 0
    with path.open("rb") as file:
        while block := file.read(characters):
            try:
                text += decoder.decode(block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, place - len(error.object) + len(block) + error.start) from error
            place += len(block)
            cut = _last_cut(text, characters) if len(text) >= characters else 0
            if not cut and len(text) >= 4 * characters:
                cut = len(text)
            if cut:
                yield text[:cut], len(text[:cut].encode())
                text = text[cut:]
    if decoder.getstate()[0]:
        raise _not_utf8(path, place - len(decoder.getstate()[0]))
    if not place:
        raise ValueError(f"{path} is empty; give a text to score")
    if text:
        yield text, len(text.encode())


def _not_utf8(path: Path, place: int) -> ValueError:
    return ValueError(f"{path} is not UTF-8 text (byte {place}); convert it first, for example with iconv")


def _last_cut(text: str, characters: int) -> int:
    """Where the last white space after a word begins, in the last so many characters; 0 where there is none.

    White space after punctuation is no such place: tokenizers keep ".\\n" together.
    """
    for place in range(len(text) - 1, max(0, len(text) - characters), -1):
        if text[place] in " \n" and text[place - 1].isalnum():
            return place
    return 0


def windows(pieces_of_tokens: Iterator[list[int]], window: int) -> Iterator[Window]:
    """Windows that begin half a window apart and together score every token but the first, once."""
    stride = window // 2
    held: list[int] = []
    scored_to = 1  # tokens of `held` that have been scored, or cannot be
    for tokens in pieces_of_tokens:
        held += tokens
        while len(held) > window:  # a full window that is not the last
            yield Window(held[:window], window - scored_to)
            held, scored_to = held[stride:], window - stride
    if len(held) > scored_to:
        yield Window(held, len(held) - scored_to)


@torch.inference_mode()
def token_logprobs(model: Transformer, tokens: list[int]) -> Tensor:
    """log p of tokens[1:], each given those before it, (T - 1,) float32.

    The head is called as a module, whatever its weights are stored as, on as many states as keep the logits small.
    """
    tokens_T = torch.tensor(tokens, device=model.embed_tokens.weight.device)
    states_TD = model.hidden(tokens_T[None, :-1]).states[0]
    rows = max(1, HEAD_NUMBERS // model.config.vocab_size)
    parts = []
    for states_ND, targets_N in zip(states_TD.split(rows), tokens_T[1:].split(rows), strict=True):
        logp_NV = model.lm_head(states_ND).float().log_softmax(-1)
        parts.append(logp_NV.gather(1, targets_N[:, None]).squeeze(1))
    return torch.cat(parts)
