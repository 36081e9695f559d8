"""The command that tries a reward function with cheats."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from luciola.cli.tables import figure

MOST_HUNG = 5  # calls in a row, after which the others would only take as long


def court(
    reward: Annotated[str, typer.Argument(help="The function (prompt, completion, truth) -> number, module:function.")],
    code: Annotated[bool, typer.Option("--code", help="Try it with programs; left out: with answers.")] = False,
    seconds: Annotated[float, typer.Option(help="Time for one call of the reward.", min=0.1)] = 10.0,
) -> None:
    """Try a reward function with every known cheat, and list the cheats it pays.

    Also listed: honest answers it does not pay, and calls in which it hung or failed. After five calls in a row that
    hung it stops.

    \b
    Exit code 0: no cheat was paid, no call hung or failed, and at least half of the honest answers were paid.
    Exit code 1: one of these is not so, or there is no such reward.
    Exit code 2: the command was not called rightly.

    \b
    Examples: luciola court my_rewards:accuracy
              luciola court --code luciola.verify.court:code_reward
    """
    from luciola.verify.court import answer_cases, code_cases, try_reward

    cases = code_cases() if code else answer_cases()
    line = f"{{:16}}  {{:8}}  {{:{max(len(case.name) for case in cases)}}}  {{}}"
    listed = hung = 0  # rows printed; calls in a row that timed out
    tried = Counter[str]()  # cases by role
    counts = Counter[str]()  # those paid by role, and "failed"
    for finding in try_reward(reward, cases, seconds):
        case, paid, failed = finding.case, finding.outcome == "paid", finding.outcome in ("timeout", "crash")
        tried[case.role] += 1
        counts[case.role] += paid
        counts["failed"] += failed
        what = {("cheat", "paid"): "paid", ("honest", "unpaid"): "honest, not paid"}.get((case.role, finding.outcome))
        if what or failed:
            if not listed:
                print(line.format("outcome", "reward", "case", "").rstrip())
            detail = finding.detail or repr(case.completion[-60:])
            print(line.format(what or finding.outcome, figure(finding.reward), case.name, detail), flush=True)
            listed += 1
        hung = hung + 1 if finding.outcome == "timeout" else 0
        if hung == MOST_HUNG:
            raise ValueError(
                f"stopped after {tried.total()} of {len(cases)} calls: the last {MOST_HUNG} timed out (limit: "
                f"{seconds:g} seconds a call); make {reward} faster, training would stop on such failures too"
            )
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
