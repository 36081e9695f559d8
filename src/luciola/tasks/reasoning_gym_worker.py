"""The process that scores answers with reasoning-gym. `luciola.verify.pool` starts it by file name and may kill it.

In: [answer, task, seed, seconds]. Out: {"kind", "detail"}.
"""

from luciola.tasks.reasoning_gym import dataset, names
from luciola.verify.serving import serve

FULL_SCORE = 0.999  # scorers that weigh parts may lose the last bits


def check(answer: str, name: str, seed: int) -> dict[str, str]:
    """The verdict of the task's own scorer."""
    made = dataset(name, seed)
    score = float(made.score_answer(answer, entry=made[0]))
    kind = "correct" if score >= FULL_SCORE else "wrong"
    return {"kind": kind, "detail": f"score {score:g}" if 0 < score < FULL_SCORE else ""}


if __name__ == "__main__":
    names()  # imports the package before the clock runs
    serve(check)
