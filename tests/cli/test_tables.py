"""Figures as text: each interval stands beside its own figure, also where two results stand side by side."""

import json
from pathlib import Path

from luciola.cli.tables import evaluation
from luciola.cli.train import _report

RESULT = {"problems": 400, "samples": 8, "accuracy": 0.43, "accuracy_low": 0.382, "accuracy_high": 0.479}
RESULT |= {"pass@1": 0.551, "pass@1_low": 0.502, "pass@1_high": 0.599, "pass@k": 0.87, "maj@k": 0.47}


def test_intervals_belong_to_their_figures() -> None:
    rows = evaluation(RESULT)
    assert rows == [
        ("accuracy", "43.0% (38.2% to 47.9%)"),
        ("pass@1", "55.1% (50.2% to 59.9%)"),
        ("pass@8", "87.0%"),
        ("maj@8", "47.0%"),
    ]
    assert evaluation({"accuracy": 0.5}) == [("accuracy", "50.0%")]


def test_a_run_sets_them_side_by_side(tmp_path: Path) -> None:
    after = RESULT | {"accuracy": 0.99, "accuracy_low": 0.97, "accuracy_high": 0.995}
    (tmp_path / "summary.json").write_text(json.dumps({"before": RESULT, "after": after}))
    (tmp_path / "heldout.jsonl").write_text("")
    lines = [line.split() for line in _report(tmp_path).splitlines()]
    assert ["accuracy", *["43.0%", "(38.2%", "to", "47.9%)", "99.0%", "(97.0%", "to", "99.5%)"]] in lines
    assert ["pass@1", *["55.1%", "(50.2%", "to", "59.9%)", "55.1%", "(50.2%", "to", "59.9%)"]] in lines
