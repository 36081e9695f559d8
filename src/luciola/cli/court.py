"""The command that tries a reward function with cheats."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from luciola.cli.tables import aligned, figure


def court(
    reward: Annotated[str, typer.Argument(help="The function (prompt, completion, truth) -> number, module:function.")],
    code: Annotated[bool, typer.Option("--code", help="Try it with programs; left out: with answers.")] = False,
    seconds: Annotated[float, typer.Option(help="Time for one call of the reward.", min=0.1)] = 20.0,
) -> None:
    """Try a reward function with every known cheat, and list the cheats it pays.

    Also listed: honest answers it does not pay, and calls in which it hung or failed.

    \b
    Exit code 0: no cheat was paid, no call hung or failed, and at least half of the honest answers were paid.
    Exit code 1: one of these is not so, or there is no such reward.
    Exit code 2: the command was not called rightly.

    \b
    Examples: luciola court my_rewards:accuracy
              luciola court --code luciola.verify.court:code_reward
    """
    from luciola.verify.court import answer_cases, code_cases, try_reward

    rows: list[tuple[str, ...]] = []
    tried = Counter[str]()  # cases by role
    counts = Counter[str]()  # those paid by role, and "failed"
    for finding in try_reward(reward, code_cases() if code else answer_cases(), seconds):
        case, paid, failed = finding.case, finding.outcome == "paid", finding.outcome in ("timeout", "crash")
        tried[case.role] += 1
        counts[case.role] += paid
        counts["failed"] += failed
        what = {("cheat", "paid"): "paid", ("honest", "unpaid"): "honest, not paid"}.get((case.role, finding.outcome))
        if what or failed:
            detail = finding.detail or repr(case.completion[-60:])
            rows.append((what or finding.outcome, figure(finding.reward), case.name, detail))
    if rows:
        print(aligned([("outcome", "reward", "case", ""), *rows]))
    print(
        f"paid {counts['cheat']} of {tried['cheat']} cheats and {counts['honest']} of {tried['honest']} honest "
        f"answers, measured against {tried['wrong']} wrong ones; "
        f"{counts['failed']} of {tried.total()} calls hung or failed"
    )
    useless = 2 * counts["honest"] < tried["honest"]
    if useless:
        print(
            "fewer than half of the honest answers earn more than 0 and more than a wrong one: "
            "this reward refuses too much that is right to be learnt from"
        )
    if counts["cheat"] or counts["failed"] or useless:
        raise typer.Exit(1)
