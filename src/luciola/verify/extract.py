"""Find the one answer that a completion commits to. The rules stand as a table in `answer.py`.

Two principles: only what follows the thinking counts, and a completion which offers several different answers offers
none. So neither an answer tried out inside the thinking nor a spray of guesses earns anything. Everything here takes
time linear in the length of the completion.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from luciola.verify.spelling import canonical

MAX_WORDS = 20_000  # characters from the end of a reply in ordinary words; who writes more has not made up their mind

_TAG = re.compile(r"</?(?:think|answer)>")
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,2}\{")
_ANSWER_IS = re.compile(r"\banswer\s{0,3}(?:is|:)[\s:]{0,3}", re.IGNORECASE)
_IS = re.compile(r"\b(?:is|are|equals)\b")
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s|\n")
_NUMBER = re.compile(r"(?<![\w.])-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?(?!\w)")
_DASH_AS_MINUS = re.compile(r"−|(?<![\w.])–(?=[0-9])")  # an en dash between numbers is a range, before one a sign
_RESULT_WORDS = re.compile(r"\b(?:answer|sum|total|result|difference)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Found:
    """The answer of a completion; or None, and why there is none."""

    answer: str | None
    why: str = ""


def find(completion: str) -> Found:
    """Apply the rules in the order of the table."""
    reply = after_thinking(completion)
    if reply.answer is None:
        return reply
    if _TAG.search(reply.answer):
        return answer_block(completion)
    if _BOX.search(reply.answer):
        return _agreed(boxes(reply.answer), "boxes")
    if _TAG.search(completion):
        return Found(None, "no <answer> block and no \\boxed{} after the thinking")
    stated = _stated(completion)
    return _agreed(stated, "stated answers") if stated else final_number(completion)


def answer_block(completion: str) -> Found:
    """The content of the only <answer> block after the thinking, taken out of its \\boxed{} if it has one."""
    reply = after_thinking(completion)
    if reply.answer is None:
        return reply
    tags = _TAG.findall(reply.answer)
    if tags != ["<answer>", "</answer>"]:
        return Found(None, f"expected one <answer> block after the thinking, found the tags {_brief(tags)}")
    content = reply.answer.partition("<answer>")[2].partition("</answer>")[0].strip()
    return _agreed(boxes(content) if _BOX.search(content) else [content], "boxes")


def final_number(completion: str, given: Sequence[int] = ()) -> Found:
    """The one number that the last sentence with a number states, for replies in ordinary words.

    `given` are the numbers of the question. A sentence that repeats all of them ("15 is the sum of 7 and 8") has each
    taken away once. What is left must be a single value; failing that, what follows the last "=" (or, without `given`,
    the first "is") must be. An earlier sentence that claims another result makes the reply a spray of guesses, and so
    no answer: a number standing alone, the whole question repeated, or, with `given`, a word like "sum" or "answer".
    """
    text = _DASH_AS_MINUS.sub("-", completion[-MAX_WORDS:])
    sentences = [part for part in _END_OF_SENTENCE.split(text) if _NUMBER.search(part)]
    if not sentences:
        return Found(None, "no number in the reply")
    *earlier, last = sentences
    value = _single(last, given)
    if value is None:
        return Found(None, "the last sentence with a number does not state exactly one result")
    claims = [_single(part, given) for part in earlier if _claims_result(part, given)]
    return _agreed([*(claim for claim in claims if claim is not None), value], "results")


def boxes(text: str) -> list[str]:
    """The contents of every \\boxed{...}, with braces counted; "" for a box that does not end or holds another one."""
    contents: list[str] = []
    position = 0
    while box := _BOX.search(text, position):
        depth, end = 1, box.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 2 if text[end] == "\\" else 1  # \{ is a brace that is printed, not one that groups
        content = text[box.end() : end - 1].strip()
        contents.append("" if depth or _BOX.search(content) else content)
        position = end
    return contents


def after_thinking(completion: str) -> Found:
    """What follows </think>; the whole completion where nothing was thought."""
    tags = [tag for tag in _TAG.findall(completion) if "think" in tag]
    if tags in (["<think>", "</think>"], ["</think>"]):
        return Found(completion.partition("</think>")[2])
    if tags == ["<think>"]:
        return Found(None, "the thinking does not end")
    return Found(None, f"expected one think block, found the tags {_brief(tags)}") if tags else Found(completion)


def _stated(text: str) -> list[str]:
    """What follows every "answer is", up to the end of its sentence."""
    ends = (re.split(r"\.(?:\s|$)|\n", rest[:2000], maxsplit=1)[0] for rest in _ANSWER_IS.split(text)[1:])
    return [end.strip(" *") for end in ends]


def _agreed(answers: Sequence[str], name: str) -> Found:
    """The last answer, provided that all are the same and none is empty."""
    if not all(answers):
        return Found(None, "an answer that is empty, does not end, or holds a box inside a box")
    last = canonical(answers[-1])
    if any(canonical(answer) != last for answer in set(answers)):
        return Found(None, f"{len(answers)} {name} that do not agree")
    return Found(answers[-1])


def _single(sentence: str, given: Sequence[int]) -> str | None:
    """The only number a sentence gives, apart from the question's own."""
    values = set(_without(_numbers(sentence), given))
    if len(values) > 1 and "=" in sentence:
        sides = sentence.split("=")
        values = set(_numbers(sides[-1])).union(*(_numbers(side) for side in sides[:-1] if _stands_alone(side)))
    elif len(values) > 1 and not given and _IS.search(sentence):
        values = set(_numbers(_IS.split(sentence, maxsplit=1)[1]))
    return values.pop() if len(values) == 1 else None


def _numbers(text: str) -> list[str]:
    return [number.replace(",", "") for number in _NUMBER.findall(text)]


def _without(numbers: list[str], given: Iterable[int]) -> list[str]:
    """`numbers` with each given one taken away once; unchanged where one of them is missing."""
    rest = list(numbers)
    for number in map(str, given):
        if number not in rest:
            return numbers
        rest.remove(number)
    return rest


def _stands_alone(text: str) -> bool:
    """Whether there is one number here and no word or operator beside it."""
    return len(_numbers(text)) == 1 and not re.search(r"[\w+*/×·÷-]", _NUMBER.sub("", text))


def _claims_result(sentence: str, given: Sequence[int]) -> bool:
    numbers = _numbers(sentence)
    repeats = bool(given) and len(_without(numbers, given)) < len(numbers)
    return repeats or _stands_alone(sentence) or (bool(given) and _RESULT_WORDS.search(sentence) is not None)


def _brief(tags: Sequence[str]) -> str:
    return (" ".join(tags[:6]) + (" ..." if len(tags) > 6 else "")) or "(none)"
