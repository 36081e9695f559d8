"""Curves: the panels follow what was measured."""

from pathlib import Path

from luciola.run import curves

PRETRAIN = [{"step": step, "loss": 3.0 / step} for step in range(1, 40)]
GRPO = [
    {
        "step": step,
        "loss": 0.0,
        "reward/mean": step / 50,
        "reward/std": 0.2,
        "completion/length": 40 + step,
        "verdict/correct": step,
        "verdict/wrong": 50 - step,
        "verdict/timeout": None,
    }
    for step in range(1, 51)
]
SUMMARY = {"before": {"accuracy": 0.36}, "after": {"accuracy": 0.98}}


def test_pretraining_shows_its_loss() -> None:
    assert [panel.title for panel in curves.panels(PRETRAIN, (), {})] == ["loss"]


def test_grpo_shows_rewards_rather_than_its_loss() -> None:
    shown = curves.panels(GRPO, PRETRAIN, SUMMARY)
    assert [panel.title for panel in shown] == [
        "pre-training loss",
        "reward",
        "accuracy (line: rollouts, dots: held out, greedy)",
        "completion length (tokens)",
    ]
    assert shown[2].values == [step / 50 for step in range(1, 51)]
    assert shown[2].points == [(0, 0.36), (50, 0.98)]


def test_the_picture_is_drawn_and_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    curves.draw((), tmp_path / "none.png", "none")
    assert not (tmp_path / "none.png").exists()
    curves.draw([*GRPO, {"step": 51, "reward/mean": None}], tmp_path / "curves.png", "try", PRETRAIN, SUMMARY)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_smoothing_keeps_a_line_straight_and_is_a_mean_away_from_the_ends() -> None:
    assert all(abs(value - 2.0) < 1e-9 for value in curves.smoothed([2.0] * 30, 15))
    assert curves.smoothed([1.0], 15) == [1.0]
    assert all(abs(value - i) < 1e-9 for i, value in enumerate(curves.smoothed([float(i) for i in range(100)], 15)))
    spike = [0.0] * 20 + [3.0] + [0.0] * 19
    assert all(abs(value - 3.0 / 9) < 1e-9 for value in curves.smoothed(spike, 15)[16:25])
    assert abs(curves.smoothed([0.0] * 39 + [1.0], 15)[-1]) < 0.75
