"""The tokenizer inside a GGUF file (llama.cpp's "gpt2" kind: byte-level BPE), as a Tokenizer.

GGUF stores tokens, merges and the *name* of a pre-tokenizer, whose rules live in llama.cpp's source. PRE_TOKENIZERS has
the rules as the models' own tokenizer.json files state them.
"""

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from luciola.text.bpe import HAN_AND_KANA, WORDS, byte_level
from luciola.text.tokenizer import Tokenizer
from luciola.weights.gguf_file import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4  # token types: special ones, and added ones which are ordinary text

_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS_THEN_GPT2 = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])


def _tiktoken(digits: str) -> pre_tokenizers.PreTokenizer:
    """The split of GPT-4's tokenizer, which Llama 3 and Qwen took over with different runs of digits."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS = {
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "command-r": _DIGITS_THEN_GPT2,
    "gpt-2": _GPT2,
    "llama-bpe": _tiktoken(r"\p{N}{1,3}"),
    "qwen2": _tiktoken(r"\p{N}"),
    "deepseek-v3": byte_level(r"\p{N}{1,3}", HAN_AND_KANA, WORDS),
}


def tokenizer_of(file: GGUFFile) -> Tokenizer:
    """The Tokenizer which a GGUF file's metadata describes, chat template included.

    Raises:
        ValueError: another kind of tokenizer than byte-level BPE, an unknown pre-tokenizer, or parts that do not fit.
    """
    metadata = file.metadata
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{file.path}: the tokenizer is {kind!r} with pre-tokenizer {pre!r}; readable are 'gpt2' (byte-level BPE) "
            f"with {', '.join(PRE_TOKENIZERS)}. Use the model's folder in Hugging Face layout instead."
        )
    tokens: list[str] = _list(file, "tokens", str)
    types: list[int] = _list(file, "token_type", int)
    merges = [tuple(merge.split(" ")) for merge in _list(file, "merges", str)]
    vocab = {token: index for index, token in enumerate(tokens)}
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(f"{file.path} is damaged: merge {' '.join(pair)!r} names tokens it lacks; fetch it again.")
    if len(types) != len(tokens):
        raise ValueError(f"{file.path} is damaged: {len(tokens)} tokens have {len(types)} types; fetch it again.")

    # Llama 3's rule: a word which is itself a token stays whole, whatever the merges would make of it.
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, types, strict=True):
        if token_type == _CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif token_type == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])

    def named(role: str) -> str | None:
        token_id = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return tokens[token_id] if isinstance(token_id, int) and 0 <= token_id < len(tokens) else None

    bos, eos, end_of_turn = named("bos"), named("eos"), metadata.get("tokenizer.ggml.eot_token_id")
    template = metadata.get("tokenizer.chat_template")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token"):
        # Only for those who ask the saved tokenizer.json to add special tokens; `Tokenizer.encode` never does.
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, vocab[bos])]
        )
    return Tokenizer(
        backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=named("padding"),
        further_eos_ids=[end_of_turn] if isinstance(end_of_turn, int) else [],
        chat_template=template if isinstance(template, str) else None,
    )


def _list(file: GGUFFile, name: str, of: type) -> list[Any]:
    values = file.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(isinstance(value, of) for value in values):
        raise ValueError(f"{file.path} is damaged: tokenizer.ggml.{name} is no list of {of.__name__}; fetch it again.")
    return values
