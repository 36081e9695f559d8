"""Train a byte-level BPE tokenizer the DeepSeek way.

DeepSeek LLM (section 2.1) and V3 (section 4.1): byte-level BPE over a pre-tokenizer that keeps character classes
apart, so that no token mixes letters, digits, Chinese or Japanese script, and punctuation. V3's rules allow one
leading character before letters (a space, or a punctuation mark as in `.append`) and line ends after punctuation.
Digits stay single, as in DeepSeek LLM and V2: arithmetic learns better from them than from V3's groups of up to three.
They are apart while merges are learnt, so no token has two digits; afterwards V3's groups change nothing for 0 to 9,
and the tokenizer has exactly the rules that other software knows as "deepseek-v3".
"""

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from luciola.text import chat
from luciola.text.tokenizer import REASONING_TOKENS, Tokenizer, finished

SPECIAL = (chat.BOS, chat.EOS, chat.PAD, chat.USER, chat.ASSISTANT)

DIGIT, DIGITS = r"\p{N}", r"\p{N}{1,3}"
HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
WORDS = (
    r"[!-/:-@\[-`{-~][A-Za-z]+"  # one ASCII mark and the letters it leads: .append, _name, "Yes
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"  # at most one space, then letters with their accents
    r"| ?[\p{P}\p{S}]+[\r\n]*"  # marks and symbols with the line ends after them
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # white space; the last blank before a word goes with the word
)


def byte_level(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Split by each pattern in turn, matches apart from what lies between them, then spell every piece in bytes."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    added_tokens: Sequence[str] = REASONING_TOKENS,
    chat_template: str | None = None,
    min_frequency: int = 2,
) -> Tokenizer:
    """Learn a tokenizer of `vocab_size` tokens from `texts`; fewer when the texts have too few pairs to merge.

    Ids: DeepSeek's bos 0, eos 1 and padding 2, its two chat tokens, the 256 bytes, the merges, then `added_tokens`.
    A pair is merged only when it occurs `min_frequency` times.

    Raises:
        ValueError: `vocab_size` has no room for the bytes and the named tokens.
    """
    smallest = len(SPECIAL) + 256 + len(added_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: the 256 bytes, {len(SPECIAL)} special and {len(added_tokens)} "
            f"added tokens need {smallest} before the first merge."
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = byte_level(DIGIT, HAN_AND_KANA, WORDS)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added_tokens),
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = byte_level(DIGITS, HAN_AND_KANA, WORDS)
    return finished(backend, special=SPECIAL, added_tokens=added_tokens, chat_template=chat_template)
