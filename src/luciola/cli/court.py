"""The command that tries a reward function with cheats."""

from __future__ import annotations

from typing import Annotated

import typer

from luciola.cli.tables import aligned, figure


def court(
    reward: Annotated[str, typer.Argument(help="The function (prompt, completion, truth) -> number, module:function.")],
    code: Annotated[bool, typer.Option("--code", help="Try it with programs; left out: with answers.")] = False,
    seconds: Annotated[float, typer.Option(help="Time for one call of the reward.", min=0.1)] = 20.0,
) -> None:
    """Try a reward function with every known cheat, and list the cheats it pays.

    Also listed: honest answers it does not pay, and calls in which it hung or failed. Exit code 1 if a cheat was paid,
    or if a call hung or failed.

    \b
    Examples: luciola court my_rewards:accuracy
              luciola court --code luciola.verify.court:code_reward
    """
    from luciola.verify.court import answer_cases, code_cases, try_reward

    rows: list[tuple[str, ...]] = []
    counts = dict.fromkeys(("cheat", "paid", "honest", "refused", "failed"), 0)
    for finding in try_reward(reward, code_cases() if code else answer_cases(), seconds):
        case, failed = finding.case, finding.outcome in ("timeout", "crash")
        paid = case.role == "cheat" and finding.outcome == "paid"
        refused = case.role == "honest" and finding.outcome == "unpaid"
        for name, holds in (("paid", paid), ("refused", refused), ("failed", failed)):
            counts[name] += holds
        if case.role in counts:
            counts[case.role] += 1
        if paid or refused or failed:
            what = "paid" if paid else "honest, not paid" if refused else finding.outcome
            rows.append((what, figure(finding.reward), case.name, finding.detail or repr(case.completion[-60:])))
    if rows:
        print(aligned([("outcome", "reward", "case", ""), *rows]))
    print(f"paid {counts['paid']} of {counts['cheat']} cheats and {counts['honest'] - counts['refused']} of ", end="")
    print(f"{counts['honest']} honest answers; {counts['failed']} calls hung or failed")
    if counts["paid"] or counts["failed"]:
        raise typer.Exit(1)
