"""Progress where there is no terminal: few lines, with rate and time left."""

import pytest

from luciola.run import duration
from luciola.run import progress as report
from luciola.run.progress import progress

assert report is progress


def test_lines_are_few_and_the_last_one_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(50, "pretrain", start=10) as advance:
        for _ in range(40):
            advance("loss 1.23")
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith("pretrain 50/50  ")
    assert line.endswith("loss 1.23")
    assert "steps/s" in line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
