"""Rewards for the form of a completion, apart from whether its answer is right."""

import re
from collections.abc import Sequence
from typing import Literal

Language = Literal["en", "zh"]

_FORM = re.compile(r"\s*<think>(?P<thinking>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_HAN}]|[^\W\d_{_HAN}]+(?:['’][^\W\d_{_HAN}]+)*")
_WORD_OR_NUMBER = re.compile(rf"[{_HAN}]|[^\W{_HAN}]+")
_WRITTEN: dict[Language, re.Pattern[str]] = {
    "en": re.compile(r"[A-Za-z\u00c0-\u024f'’]+"),
    "zh": re.compile(f"[{_HAN}]"),
}
_COMMAND = re.compile(r"\\[A-Za-z]+")  # \frac is a word in no language


def format_reward(completion: str) -> float:
    """1.0 when the completion is one think block and then one answer block, neither blank, and nothing else; or 0.0.

    The accuracy reward looks only for an answer; this one teaches the form (R1 report, section 2.2.2). Blank space may
    stand around and between the blocks. A tag that occurs twice, inside another block or in a different order earns
    nothing. Where the prompt has already opened the thinking, pass "<think>" + completion.
    """
    if any(completion.count(tag) != 1 for tag in _TAGS):
        return 0.0
    blocks = _FORM.fullmatch(completion)
    return float(blocks is not None and all(text.strip() for text in blocks.groups()))


def language_reward(completion: str, language: Language) -> float:
    """`language_share`, and 0.0 without any words."""
    return language_share(completion, language) or 0.0


def language_share(completion: str, language: Language) -> float | None:
    """The share of words of the target language in the thinking (R1 report, section 2.3.2); None without any words.

    A word belongs to the language whose script it is written in: Latin letters are English ("en"), each Han character
    is a word of Chinese ("zh"). So English is told from Chinese or Russian, but not from French. Names of variables
    (one letter) and LaTeX commands are no words. The thinking is what stands before </think>, or else everything.
    """
    thinking = completion.partition("</think>")[0].replace("<think>", " ")
    found = _WORD.findall(_COMMAND.sub(" ", thinking))
    words = [word for word in found if len(word) > 1 or _WRITTEN["zh"].match(word)]
    return sum(_WRITTEN[language].fullmatch(word) is not None for word in words) / len(words) if words else None


def repetition_reward(completion: str) -> float:
    """0.0 where no three words in a row occur again, down towards -1.0: minus the share of 3-grams that are repeats.

    Words are numbers, Han characters and runs of letters, whatever their case.
    """
    words = _WORD_OR_NUMBER.findall(completion.lower())
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0


def length_rewards(lengths: Sequence[int], correct: Sequence[bool]) -> list[float]:
    """The length reward within one group of completions (Kimi k1.5 report, section 2.3.3), each from -0.5 to 0.5.

    0.5 - (length - shortest) / (longest - shortest) for right answers: short ones earn, long ones lose. Wrong ones get
    the same where it is negative and 0 elsewhere, so that brevity alone earns nothing. All 0 where lengths are equal.
    """
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    rewards = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [reward if right else min(0.0, reward) for reward, right in zip(rewards, correct, strict=True)]
