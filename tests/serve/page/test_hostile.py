"""Model text is only ever text: whatever a completion holds, nothing runs, loads or breaks the page."""

import time
from typing import Any
from urllib.parse import urlsplit

import pytest
from scripted import Reply, Scripted

OUTSIDE = "http://evil.example"
RUN = "document.title='run';window.__seen.push('ran')"
HOSTILE = {
    "script": f"<script>{RUN}</script><script src={OUTSIDE}/a.js></script>",
    "script end": f"</script></textarea></title></style></math><script>{RUN}</script>",
    "onerror": f'<img src=x onerror="{RUN}"><svg onload="{RUN}"><img src={OUTSIDE}/b.png><body onload={RUN}>',
    "frames": f"<iframe src='javascript:{RUN}'></iframe><object data={OUTSIDE}/c></object><embed src={OUTSIDE}/d>",
    "javascript link": f"[click](javascript:{RUN}) [c](JaVaScRiPt:{RUN}) <javascript:{RUN}> [x](<java\tscript:{RUN}>)",
    "encoded link": "[a](javascript&#58;alert(1)) [c](%6Aavascript:alert(1)) [d](\x01javascript:1)",
    "data link": "[d](data:text/html,<script>alert(1)</script>) [e](vbscript:x) [f](file:///etc/passwd) [h](//x)",
    "pictures": f"![p]({OUTSIDE}/e.png) ![q](data:image/svg+xml,<svg/onload=x>) [![r]({OUTSIDE}/f.png)]({OUTSIDE}/g)",
    "styles": f"<style>@import url({OUTSIDE}/h.css);</style><link rel=stylesheet href={OUTSIDE}/i.css><p style='x'>",
    "forms": f'<form action={OUTSIDE}/j><input autofocus onfocus="{RUN}"></form><meta http-equiv=refresh content=0>',
    "entities": "&lt;script&gt;alert(1)&lt;/script&gt; &#60;img src=x onerror=alert(1)&#62; &#0; &#x110000; &#xD800;",
    "maths": f"$\\text{{<img src=x onerror={RUN}>}}$ $\\href{{javascript:{RUN}}}{{x}}$ $$\\style{{x}}{{y}}$$",
    "code": f'```html"><img src=x onerror={RUN}>\n</code></pre><script>{RUN}</script>\n```\n`<script>{RUN}</script>`',
    "table": f"| <img src=x onerror={RUN}> | b |\n|---|---|\n| <script>{RUN}</script> | [x](javascript:{RUN}) |",
    "broken": "**bold *both __under `code\n```\n> - 1. | a\n|--|\n$$ \\frac{ \\[ \\( ![ [b](http:// <http:// &#; \\",
    "bidi": "safe \u202e)txt.exe\u202c and `\u2066if\u2069`",
    "surrogates": "half \ud83d and zero \x00\x08\x1b[31m \ufeff \uffff",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_stays_text(page: Any, server: Scripted, name: str) -> None:
    server.replies = [Reply(HOSTILE[name], HOSTILE[name], piece=7)]
    page.requested()
    page.ask(HOSTILE[name].encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    page.one(".thinking summary").click()
    page.until(lambda: page.text(".thinking .markdown"))
    assert page.driver.title.endswith("– Luciola")
    page.click("Edit message")
    page.driver.find_element("css selector", ".edit textarea").send_keys("\ue00c")
    page.open()  # what is kept is as harmless when it comes back
    page.js("document.querySelectorAll('details').forEach((d) => d.open = true)")
    page.until(lambda: page.text(".thinking .markdown"))
    foreign = ":is(script,img,iframe,object,embed,style,link,meta,base,[onload],[onerror])"
    assert page.all(f"#messages {foreign}") == []
    for href in page.js("return [...document.querySelectorAll('#messages a')].map((a) => a.href)"):
        assert urlsplit(href).scheme in ("http", "https", "mailto")
    for link in page.all("#messages a"):
        assert link.get_attribute("rel") == "noopener noreferrer" and link.get_attribute("target") == "_blank"
    assert {urlsplit(address).netloc for address in page.requested()} <= {urlsplit(server.url).netloc, ""}
    assert page.seen() == []


def test_characters_that_reorder_the_line_are_shown(page: Any, server: Scripted) -> None:
    server.replies = [Reply(HOSTILE["bidi"])]
    assert page.ask("?") == "safe ⟨U+202E⟩)txt.exe⟨U+202C⟩ and ⟨U+2066⟩if⟨U+2069⟩"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("x" * 100_000, id="one word"),
        pytest.param("word " * 20_000, id="one line"),
        pytest.param("> " * 20_000 + "deep", id="quotes"),
        pytest.param("- " * 20_000 + "deep", id="lists"),
        pytest.param("".join("  " * i + "- item\n" for i in range(300)), id="nested lists"),
        pytest.param("*a **b " * 10_000 + "c** d*" * 10_000, id="nested emphasis"),
        pytest.param("**" * 50_000, id="asterisks"),
        pytest.param("_a*" * 30_000, id="unmatched emphasis"),
        pytest.param("[" * 100_000, id="brackets"),
        pytest.param("[a](" * 25_000, id="half links"),
        pytest.param("[" * 5000 + "a" + "](http://x.example)" * 5000, id="nested links"),
        pytest.param("".join("`" * i + " " for i in range(1, 440)), id="backticks"),
        pytest.param("$" * 100_001, id="dollars"),
        pytest.param("$a " * 30_000, id="half maths"),
        pytest.param("\\(" * 50_000, id="half brackets of maths"),
        pytest.param("$" + "{" * 4000 + "}" * 4000 + "$", id="maths groups"),
        pytest.param("$$" + "\\frac{1}{" * 800 + "}" * 800 + "$$", id="maths fractions"),
        pytest.param("$$" + "\\sqrt" * 1500 + "$$", id="maths roots"),
        pytest.param("$$" + "\\left(" * 1300 + "$$", id="maths fences"),
        pytest.param("$$" + "\\displaystyle" * 600 + "$$", id="maths styles"),
        pytest.param("$$" + "\\begin{matrix}" * 500 + "$$", id="maths matrices"),
        pytest.param("```" + "`" * 50_000 + " x" * 20_000, id="fence"),
        pytest.param("``` " + "a" * 100_000 + "`", id="fence's name"),
        pytest.param("```js\n" + "/*" * 50_000, id="comments"),
        pytest.param("# " + " #" * 50_000 + "x", id="heading"),
        pytest.param("|" * 50_000 + "\n" + "|-" * 25_000 + "|", id="table"),
        pytest.param("https://a.example/" + ")" * 100_000, id="address"),
        pytest.param("&" * 100_000, id="ampersands"),
        pytest.param("<" * 100_000, id="angles"),
        pytest.param("-\n" * 20_000, id="items"),
        pytest.param("- " + " " * 100_000 + "x", id="spaces"),
        pytest.param("a\n" * 10_000, id="lines"),
    ],
)
def test_no_text_freezes_the_page(page: Any, server: Scripted, text: str) -> None:
    server.replies = [Reply(text, piece=len(text) // 3 + 1)]
    start = time.monotonic()
    page.send("Go")
    page.done(20)
    page.js("return document.body.offsetHeight")
    took = time.monotonic() - start
    assert took < 8, "seconds, on a slow machine; what grows with the square of the length takes minutes"
    deepest = """let deepest = 0; const walk = document.createTreeWalker(document.getElementById('messages'));
    for (let n = walk.currentNode, d; n; n = walk.nextNode()) { d = 0; for (let m = n; m; m = m.parentNode) d++;
    if (d > deepest) deepest = d; if (d > 1000) break; } return deepest"""
    assert page.js(deepest) < 400


def test_a_long_answer_stays_fluid(page: Any, server: Scripted) -> None:
    words = (
        "Some *words* of an answer with `code` and $x^2$ in a paragraph that is not short.\n\n- an item\n- another\n\n"
    )
    text = (words + "```python\nfor i in range(3):\n    print(i)\n```\n\n") * 400
    server.replies = [Reply(text, piece=len(text) // 2000 + 1, delay=0.001)]
    page.send("Go")
    longest = page.driver.execute_async_script(
        """const done = arguments[0]; let last = performance.now(), longest = 0;
        (function frame() { const now = performance.now(); longest = Math.max(longest, now - last); last = now;
        document.getElementById('stop').hidden ? done(longest) : requestAnimationFrame(frame); })()"""
    )
    assert page.text(".assistant").count("print") == 400
    assert longest < 1000, "ms between two frames, on a busy machine"
