"""Completions with their verdicts as one HTML file, to be opened from the disk in any browser.

What a model wrote is text and never markup: everything from outside is escaped, in attributes too, and should that ever
fail, the page's content security policy lets no script run but its own and no address be loaded.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from luciola.evaluate.figures import Attempt, Judged
from luciola.text.chat import split_reasoning
from luciola.verify.verdict import KINDS

MAX_CHARACTERS = 20_000_000  # of completions; a browser grows slow beyond, and the JSON lines have them all

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; font: 13px/1.45 ui-monospace, monospace; }
section { border-top: 1px solid #ccc; padding: .6rem 0; } article { margin: .5rem 0 .5rem .5rem; padding-left: .8rem; }
article { border-left: 4px solid #bbb; } article[data-verdict=correct] { border-color: #2a8a4a; }
article[data-verdict=wrong] { border-color: #c03a2b; } small, summary { color: #666; } summary { cursor: pointer; }
nav { position: sticky; top: 0; background: #fff; padding: .6rem 0; } [hidden] { display: none; }
@media (prefers-color-scheme: dark) {
  body, nav { background: #1b1b1d; color: #ddd; } small, summary { color: #999; } section { border-color: #444; }
}
"""

# The filters. A category is an index into the page's list of categories, so that no text of a task enters a selector.
_SCRIPT = """
const verdict = document.getElementById("verdict"), category = document.getElementById("category");
function show() {
  let shown = 0;
  for (const problem of document.querySelectorAll("section")) {
    const of = problem.dataset.categories.split(" ");
    let any = false;
    for (const attempt of problem.querySelectorAll("article")) {
      const fits = (!verdict.value || attempt.dataset.verdict === verdict.value);
      attempt.hidden = !fits;
      any = any || fits;
    }
    problem.hidden = !any || (category.value !== "" && !of.includes(category.value));
    if (!problem.hidden) shown += problem.querySelectorAll("article:not([hidden])").length;
  }
  document.getElementById("shown").textContent = shown + " completions shown";
}
verdict.addEventListener("change", show);
category.addEventListener("change", show);
show();
"""


def page(title: str, tasks: Mapping[str, tuple[Mapping[str, Any], Sequence[Judged]]]) -> str:
    """The page: of each task its figures, then every problem with prompt, truth and completions, the thinking folded.

    Args:
        title: what was measured.
        tasks: figures and judged problems by the task's name.
    """
    categories: dict[tuple[str, str], int] = {}
    for name, (_, judged) in tasks.items():
        for row in judged:
            for category in _categories(name, row):
                categories.setdefault(category, len(categories))
    sha = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{sha}'; base-uri 'none'"
    options = "".join(
        f'<option value="{number}">{escape(kind)}: {escape(value)}</option>'
        for (kind, value), number in sorted(categories.items())
    )
    verdicts = "".join(f'<option value="{kind}">{kind.replace("_", " ")}</option>' for kind in KINDS)
    body = "\n".join(_problems(tasks, categories))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
{"".join(_table(name, figures) for name, (figures, _) in tasks.items())}
<nav><label>verdict <select id="verdict"><option value="">all</option>{verdicts}</select></label>
<label>category <select id="category"><option value="">all</option>{options}</select></label>
<small id="shown"></small></nav>
{body}
<script>{_SCRIPT}</script></body></html>
"""


def _table(name: str, figures: Mapping[str, Any]) -> str:
    shares = [key for key in figures if f"{key}_low" in figures]
    rows = "".join(
        f"<tr><td>{escape(key.replace('@k', '@' + str(figures['samples'])))}</td><td>{figures[key]:.1%}</td>"
        f"<td><small>{figures[f'{key}_low']:.1%} to {figures[f'{key}_high']:.1%}</small></td></tr>"
        for key in shares
    )
    return f"<h2>{escape(name)}</h2><table>{rows}</table><p><small>{figures['problems']} problems</small></p>"


def _problems(
    tasks: Mapping[str, tuple[Mapping[str, Any], Sequence[Judged]]], categories: Mapping[tuple[str, str], int]
) -> Iterator[str]:
    room = MAX_CHARACTERS
    for name, (_, judged) in tasks.items():
        for position, row in enumerate(judged):
            room -= sum(len(attempt.text) for attempt in row.attempts)
            if room < 0:
                yield (
                    f"<p>{len(judged) - position} more problems of {escape(name)} are left out here; "
                    "the JSON lines beside this page have them.</p>"
                )
                break
            numbers = " ".join(str(categories[category]) for category in _categories(name, row))
            labels = ", ".join(escape(value) for _, value in row.problem.categories)
            yield (
                f'<section data-categories="{numbers}"><small>{labels}</small><pre>{escape(row.problem.prompt)}</pre>'
                f"<details><summary>truth</summary><pre>{escape(row.problem.truth)}</pre></details>"
                f"{''.join(_attempts(row.attempts))}</section>"
            )


def _attempts(attempts: Iterable[Attempt]) -> Iterator[str]:
    for number, attempt in enumerate(attempts):
        verdict = attempt.verdict
        told = "greedy" if number == 0 else f"sample {number}"
        cut = ", cut off" if attempt.finish_reason == "length" else ""
        detail = f": {escape(verdict.detail)}" if verdict.detail else ""
        thinking, reply = split_reasoning(attempt.text)
        thoughts = (
            "" if thinking is None else f"<details><summary>thinking</summary><pre>{escape(thinking)}</pre></details>"
        )
        yield (
            f'<article data-verdict="{verdict.kind}"><small>{told} &middot; {verdict.kind.replace("_", " ")}{detail} '
            f"&middot; {attempt.tokens} tokens{cut}</small>{thoughts}<pre>{escape(reply)}</pre></article>"
        )


def _categories(task: str, row: Judged) -> list[tuple[str, str]]:
    return [("task", task), *row.problem.categories]
