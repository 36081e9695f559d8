"""The page of samples: hostile text stays text, and nothing is loaded from anywhere."""

from html.parser import HTMLParser
from typing import Any

import pytest

from luciola.evaluate.figures import Attempt, Judged, figures
from luciola.evaluate.page import page
from luciola.tasks.base import Problem
from luciola.verify.verdict import Verdict

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></article></section><img src=x onerror=alert(1)>",
    "</script><script src=//evil.example/x.js></script>",
    "<think>\"'><svg onload=alert(1)></think><iframe srcdoc='<script>1</script>'>",
    "<!-- <style>*{display:none}</style> --> &lt;b&gt; <![CDATA[ ]]>",
    '" autofocus onfocus="alert(1)',
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
]
OURS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "table",
    "tr",
    "td",
    "p",
    "nav",
    "label",
    "select",
    "option",
    "small",
    "section",
    "pre",
    "details",
    "summary",
    "article",
    "script",
}


class Reader(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def judged(text: str, kind: Any = "wrong") -> Judged:
    problem = Problem(text, text, text, (("level", text),))
    return Judged(problem, [Attempt(text, 3, "stop", Verdict(kind, 0.0, text))] * 2, 0.1)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_models_tasks_and_verdicts_is_never_markup(text: str) -> None:
    rows = [judged(text)]
    harmless = Reader(page("t", {"t": (figures([judged("plain")]), [judged("plain")])}))
    read = Reader(page(text, {text: (figures(rows), rows)}))
    assert {tag for tag, _ in read.tags} <= OURS
    assert sum(tag == "script" for tag, _ in read.tags) == sum(tag == "style" for tag, _ in read.tags) == 1
    known = {name for _, attributes in harmless.tags for name in attributes}
    assert {name for _, attributes in read.tags for name in attributes} <= known, "no attribute that text brought in"
    if "<think>" not in text:
        assert read.text.count(text) >= 7, "title, heading, prompt, truth, details and completions show it as it is"


def test_nothing_is_loaded_and_only_its_own_script_runs() -> None:
    rows = [judged("plain")]
    html = page("t", {"t": (figures(rows), rows)})
    tags = Reader(html).tags
    assert not any({"src", "href", "action"} & attributes.keys() for _, attributes in tags)
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_verdict_and_category_can_be_filtered_and_thinking_is_folded() -> None:
    rows = [judged("<think>deep</think>four", "correct"), judged("five", "timeout")]
    read = Reader(page("t", {"sums": (figures(rows), rows)}))
    verdicts = [a["data-verdict"] for tag, a in read.tags if tag == "article"]
    assert verdicts == ["correct", "correct", "timeout", "timeout"]
    options = {a["value"] for tag, a in read.tags if tag == "option"}
    for tag, attributes in read.tags:
        if tag == "section":
            assert set(str(attributes["data-categories"]).split()) <= options
    assert sum(tag == "details" for tag, _ in read.tags) == 2 + 2, "two truths, and the thoughts of two completions"


def test_a_page_too_large_for_a_browser_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luciola.evaluate.page.MAX_CHARACTERS", 30)
    rows = [judged("0123456789")] * 4
    html = page("t", {"t": (figures(rows), rows)})
    assert html.count("<section") == 1
    assert "3 more problems of t are left out" in html
