"""The pre-tokenizers which a GGUF file names in tokenizer.ggml.pre: how text falls into words before pairs are merged.

A file has only the name; the rules are in llama.cpp's source (src/llama-vocab.cpp) and in the tokenizer.json of the
models a name was made for. Here they are as the models state them; where that matters, tests/peers says what llama.cpp
does differently.
"""

from tokenizers import Regex, pre_tokenizers

from luciola.text.bpe import DIGIT, DIGITS, HAN_AND_KANA, WORDS, byte_level

_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS_THEN_GPT2 = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(DIGIT), "isolated"), _GPT2])

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _tiktoken(digits: str) -> pre_tokenizers.PreTokenizer:
    """The split of GPT-4's tokenizer, which Llama 3 and Qwen took over with different runs of digits."""
    letters = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
    return byte_level(rf"{letters}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}")


def _cased(digits: str, contraction: str) -> pre_tokenizers.PreTokenizer:
    """The split of GPT-4o's tokenizer, which Mistral took over: a word also ends where small letters meet capitals."""
    large, small = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    letters = (
        rf"[^\r\n\p{{L}}\p{{N}}]?{large}*{small}+{contraction}|[^\r\n\p{{L}}\p{{N}}]?{large}+{small}*{contraction}"
    )
    return byte_level(rf"{letters}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}")


# DeepSeek LLM lists the cased letters (Latin, Greek, Cyrillic and others) as Unicode had them in 2018.
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ"
    "\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ"
    "ﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_MARKS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

PRE_TOKENIZERS = {
    # DeepSeek's first: Luciola's own tokenizers are made after it, and small ones fit other names too.
    "deepseek-v3": byte_level(DIGITS, HAN_AND_KANA, WORDS),
    # Digits in runs, as in llama.cpp; the models split them singly, which is the same where no token has two digits.
    "deepseek-llm": byte_level(
        r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", rf"\s?[{_MARKS}]+", r"\s+$", _EAST_ASIAN, r"\p{N}+"
    ),
    "deepseek-coder": byte_level(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, DIGIT),
    "deepseek-r1-qwen": _tiktoken(DIGIT),
    "qwen2": _tiktoken(DIGIT),
    "llama-bpe": _tiktoken(DIGITS),
    "tekken": _cased(DIGIT, ""),
    "gpt-4o": _cased(DIGITS, _CONTRACTION + "?"),
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "command-r": _DIGITS_THEN_GPT2,
    "gpt-2": _GPT2,
}

# Llama 3's rule and Mistral's: a word which is itself a token stays whole, whatever the merges would make of it. Under
# the same names llama.cpp begins a text with bos unless the file says otherwise.
WHOLE_WORDS = frozenset({"llama-bpe", "tekken"})
