"""Damaged model files: each ends in one sentence, or in the very model, never in a crash, a hang or another model.

The damages, thousands of them, are made and judged by a process of its own (`corruption/judge.py`, whose documentation
says how to see one again) with limits of time and memory; `corruption/verdicts.py` says what each may lead to.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

JUDGE = Path(__file__).parent / "corruption" / "judge.py"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "deepseek", "deepseek_v2", "deepseek_v3")


def judged(folder: Path, names: list[str]) -> tuple[list[str], list[str], dict[str, str], int]:
    """All cases that the names stand for, those begun, what is wrong with some of them, and the judge's exit code."""
    found = subprocess.run(
        [sys.executable, str(JUDGE), str(folder), *names], capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert lines, found.stderr
    begun = [line for line in lines[1:] if isinstance(line, str)]
    return lines[0], begun, dict(line for line in lines[1:] if isinstance(line, list)), found.returncode


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and measured in Linux's ways")
@pytest.mark.parametrize("family", FAMILIES)
def test_damage_ends_in_one_sentence_or_in_the_same_model(family: str, workplace: Path) -> None:
    cases, begun, wrong, code = judged(workplace, [family])
    assert len(cases) > 700
    while code:  # minus the number of the signal; 14 is the clock's
        wrong[begun[-1]] = f"ends the process with {code}"
        rest = cases[cases.index(begun[-1]) + 1 :]
        if len(wrong) > 20 or not rest:
            break
        _, begun, more, code = judged(workplace, rest)
        wrong |= more
    assert wrong == {}
