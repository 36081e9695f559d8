"""Rewards for the form of a completion, apart from whether its answer is right."""

import re

_FORM = re.compile(r"\s*<think>(?P<thinking>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


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
