"""The page's own Markdown and maths, read in real Chromium."""

import json
import random
import re
from typing import Any

from scripted import Reply


def html(page: Any, text: str, cuts: list[int] | None = None) -> str:
    """The HTML that `text` becomes, at once or piece by piece; addresses' fixed attributes are left out."""
    script = """const [text, cuts, done] = arguments; import("/static/markdown.js").then(({ Markdown }) => {
      const element = document.createElement("div"), view = new Markdown(element);
      for (const cut of cuts) view.update(text.slice(0, cut), true);
      view.update(text);
      done(element.innerHTML);
    });"""
    made = str(page.driver.execute_async_script(script, text, cuts or []))
    return re.sub(r' (dir="(auto|ltr)"|target="_blank"|rel="[^"]*"|title="[^"]*")', "", made)


MARKDOWN = {
    "a\nb": "<p>a<br>b</p>",
    "a\n\nb": "<p>a</p><p>b</p>",
    "*a* **b** ***c*** ~~d~~": "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <del>d</del></p>",
    "snake_case_name 2*3*4 a ** b": "<p>snake_case_name 2<em>3</em>4 a ** b</p>",
    "**“注意”**这里": "<p><strong>“注意”</strong>这里</p>",
    "**bold *both* on**": "<p><strong>bold <em>both</em> on</strong></p>",
    "a \\* b \\` c": "<p>a * b ` c</p>",
    "`a*b*` ``c ` d``": "<p><code>a*b*</code> <code>c ` d</code></p>",
    "# One\n## Two ##\ntext": '<h3 class="level1">One</h3><h4 class="level2">Two</h4><p>text</p>',
    "#no heading": "<p>#no heading</p>",
    "- a\n- b\n  - c\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
    "3. a\n   - b\n4. c": '<ol start="3"><li>a<ul><li>b</li></ul></li><li>c</li></ol>',
    "1. a\n\n2. b": "<ol><li><p>a</p></li><li><p>b</p></li></ol>",
    "1. a\n    * b\n    * c": "<ol><li>a<ul><li>b</li><li>c</li></ul></li></ol>",
    "text\n- a\n- b\n\nafter": "<p>text</p><ul><li>a</li><li>b</li></ul><p>after</p>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "[a](http://x.example/b_(c)) <http://y.example>": '<p><a href="http://x.example/b_(c)">a</a> '
    '<a href="http://y.example/">http://y.example</a></p>',
    "see (http://x.example/a).": '<p>see (<a href="http://x.example/a">http://x.example/a</a>).</p>',
    "**[a](https://x.example)**": '<p><strong><a href="https://x.example/">a</a></strong></p>',
    '[a][1], [B][], [b] and ![c][1]\n\n- [a][ 1]\n\n[1]: http://x.example\n[b]: <http://y.example> "Y"': "<p>"
    '<a href="http://x.example/">a</a>, <a href="http://y.example/">B</a>, <a href="http://y.example/">b</a> and '
    '<a href="http://x.example/">🖼 c</a></p><ul><li><a href="http://x.example/">a</a></li></ul>'
    '<p hidden="">[1]: http://x.example</p><p hidden="">[b]: &lt;http://y.example&gt; "Y"</p>',
    "[a][1] [1]\n\n[1]: javascript:x": "<p>[a][1] [1]</p><p>[1]: javascript:x</p>",
    "x[1] and [a][2]\n\n> [2]: http://x.example": "<p>x[1] and [a][2]</p><blockquote><p>[2]: http://x.example</p>"
    "</blockquote>",
    "[a](javascript:x)": "<p>[a](javascript:x)</p>",
    "a <b>c</b> &lt;d&gt; &amp;": "<p>a &lt;b&gt;c&lt;/b&gt; &lt;d&gt; &amp;</p>",
    "<answer>42</answer>": "<p>42</p>",
    "So <answer>4</answer>, or `<answer>`": "<p>So 4, or <code>&lt;answer&gt;</code></p>",
    "It costs $5 and $10, or 3$ more": "<p>It costs $5 and $10, or 3$ more</p>",
    "from $20 per month to US$30": "<p>from $20 per month to US$30</p>",
    "$$ open": "<p>$$ open</p>",
}


# However the sub-list is moved in: models use two spaces, four and tabs.
NESTED = (
    "- a\n    - b\n    - c\n- d",
    "* a\n    * b\n    * c\n* d",
    "*   a\n    *   b\n    *   c\n*   d",
    "*   a\n  * b\n  * c\n*   d",
    "- a\n      - b\n      - c\n- d",
    "- a\n\t- b\n\t- c\n- d",
    "- a\n\n    - b\n    - c\n- d",
    "  - a\n    - b\n    - c\n  - d",
    "    - a\n      - b\n      - c\n    - d",
    "- a\n    - b\n  - c\n- d",
    "- a\n   - b\n   - c\n - d",
)
LISTS = {
    **dict.fromkeys(NESTED, "<ul><li>a<ul><li>b</li><li>c</li></ul></li><li>d</li></ul>"),
    "- **Fruits**\n    - Apple": "<ul><li><strong>Fruits</strong><ul><li>Apple</li></ul></li></ul>",
    "- a\n    - b\n        - c\n    - d": "<ul><li>a<ul><li>b<ul><li>c</li></ul></li><li>d</li></ul></li></ul>",
    "1. a\n  - b\n    - c\n  - d": "<ol><li>a<ul><li>b<ul><li>c</li></ul></li><li>d</li></ul></li></ol>",
    "1. a\n      - b\n      - c\n2. d": "<ol><li>a<ul><li>b</li><li>c</li></ul></li><li>d</li></ol>",
    "1. a\n        1. b": "<ol><li>a<ol><li>b</li></ol></li></ol>",
    "text:\n* a\n    1. b": "<p>text:</p><ul><li>a<ol><li>b</li></ol></li></ul>",
    "Steps:\n  - one\n  - two": "<p>Steps:</p><ul><li>one</li><li>two</li></ul>",
    "Steps:\n    - one\n    - two": "<p>Steps:</p><ul><li>one</li><li>two</li></ul>",
    "   * one\n   * two": "<ul><li>one</li><li>two</li></ul>",
    "  1. one\n  2. two": "<ol><li>one</li><li>two</li></ol>",
    " 9. a\n10. b": '<ol start="9"><li>a</li><li>b</li></ol>',
    "10. a\n\n   b\n\n11. c": '<ol start="10"><li><p>a</p><p>b</p></li><li><p>c</p></li></ol>',
    "-\n  a\n- b": "<ul><li>a</li><li>b</li></ul>",
    "- a\n- b\n\ntext": "<ul><li>a</li><li>b</li></ul><p>text</p>",
    "text\n-": "<p>text<br>-</p>",
}


def test_lists_nest_as_they_are_moved_in(page: Any) -> None:
    assert {text: html(page, text) for text in LISTS} == LISTS


def test_markdown(page: Any) -> None:
    assert {text: html(page, text) for text in MARKDOWN} == MARKDOWN


def test_code_tables_and_tasks(page: Any) -> None:
    page.js("document.getElementById('messages').replaceChildren()")
    text = "```py\nx = '*1*'  # no\n```\n\n| a | b |\n|:-:|--:|\n| `x|y` | $p \\| q$ |\n\n- [x] done\n- [ ] not"
    made = html(page, text)
    assert '<span>py</span><button type="button" class="copycode" aria-label="Copy code (py)">' in made
    assert "<em>" not in made and "t-comment" in made
    assert '<th class="centre">a</th><th class="end">b</th>' in made and "<code>x|y</code>" in made
    assert re.findall(r'aria-label="(done|to do)"', made) == ["done", "to do"]


GROWING = [
    *MARKDOWN,
    *LISTS,
    "intro\n\n- a\n\n  b\n\n- c\n\n```py\nfor x in y:\n\n    pass\n```\nend",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\nx\n===\n\n> q\n\n$$\nx^2\n$$\n\n1. x\n\n   ```\n   y\n   ```\n2. z",
    "```\ncode\n``` \n~~~js\nlet a = 1 // b\n~~~\ntext <answer>*4*</answer>",
    "\\begin{align}\na &= b \\\\\nc &= d\n\\end{align}\n\n$a$ and \\(b\\)\r\n\r\n    indented\n\nlast",
]


def test_an_answer_that_grows_ends_as_if_it_had_come_at_once(page: Any) -> None:
    rng = random.Random(3)
    for text in GROWING:
        whole = html(page, text)
        assert html(page, text, list(range(len(text) + 1))) == whole
        for _ in range(3):
            parts = rng.sample(GROWING, 3)
            long = "\n\n".join(parts)
            cuts = sorted(rng.sample(range(len(long)), len(long) // 5))
            assert html(page, long, cuts) == html(page, long)


def mathml(page: Any, tex: str) -> str:
    """The MathML of `tex` without attributes and rows, which have no meaning by themselves."""
    script = """const [tex, done] = arguments;
    import("/static/maths.js").then(({ maths }) => done(maths(tex, true).outerHTML));"""
    made = str(page.driver.execute_async_script(script, tex))
    return re.sub(r"</?mrow>|</?math>|<mspace></mspace>", "", re.sub(r"<(\w+) [^>]*>", r"<\1>", made))


MATHS = {
    r"\frac{1}{2}": "<mfrac><mn>1</mn><mn>2</mn></mfrac>",
    r"\frac12": "<mfrac><mn>1</mn><mn>2</mn></mfrac>",
    r"x^{2}_i": "<msubsup><mi>x</mi><mi>i</mi><mn>2</mn></msubsup>",
    r"x^23": "<msup><mi>x</mi><mn>2</mn></msup><mn>3</mn>",
    r"f'(x)": "<msup><mi>f</mi><mo>′</mo></msup><mo>(</mo><mi>x</mi><mo>)</mo>",
    r"\sqrt[3]{x}": "<mroot><mi>x</mi><mn>3</mn></mroot>",
    r"\alpha\Omega\le\infty": "<mi>α</mi><mi>Ω</mi><mo>≤</mo><mo>∞</mo>",
    r"\sum_{i=1}^n": "<munderover><mo>∑</mo><mi>i</mi><mo>=</mo><mn>1</mn><mi>n</mi></munderover>",
    r"\int_0^1 x\,dx": "<msubsup><mo>∫</mo><mn>0</mn><mn>1</mn></msubsup><mi>x</mi><mi>d</mi><mi>x</mi>",
    r"\lim_{x\to0}": "<munder><mo>lim</mo><mi>x</mi><mo>→</mo><mn>0</mn></munder>",
    r"\begin{pmatrix}a&b\\c&d\end{pmatrix}": "<mo>(</mo><mtable><mtr><mtd><mi>a</mi></mtd><mtd><mi>b</mi></mtd></mtr>"
    "<mtr><mtd><mi>c</mi></mtd><mtd><mi>d</mi></mtd></mtr></mtable><mo>)</mo>",
    r"\left(\frac{a}{b}\right.": "<mo>(</mo><mfrac><mi>a</mi><mi>b</mi></mfrac>",
    r"\boxed{42}": "<mpadded><mn>42</mn></mpadded>",
    r"\text{a \$5 \& $b$}": "<mtext>a $5 &amp; b</mtext>",
    r"\text{if } x": "<mtext>if&nbsp;</mtext><mi>x</mi>",
    r"\mathbb{R}\mathbf{x}": "<mi>ℝ</mi><mi>𝐱</mi>",
    r"\hat{x}": "<mover><mi>x</mi><mo>^</mo></mover>",
    r"\underbrace{a}_{b}": "<munder><munder><mi>a</mi><mo>⏟</mo></munder><mi>b</mi></munder>",
    r"\operatorname{softmax}(x)": "<mi>softmax</mi><mo>(</mo><mi>x</mi><mo>)</mo>",
    r"\binom{n}{k}": "<mo>(</mo><mfrac><mi>n</mi><mi>k</mi></mfrac><mo>)</mo>",
    r"1{,}000 + 1,000": "<mn>1</mn><mo>,</mo><mn>000</mn><mo>+</mo><mn>1,000</mn>",
    r"\unknown{x}": r"<mtext>\unknown</mtext><mi>x</mi>",
    r"a\ne b\\c": "<mtable><mtr><mtd><mi>a</mi><mo>≠</mo><mi>b</mi></mtd></mtr>"
    "<mtr><mtd><mi>c</mi></mtd></mtr></mtable>",
    r"\{x \mid x > 0\}": "<mo>{</mo><mi>x</mi><mo>∣</mo><mi>x</mi><mo>&gt;</mo><mn>0</mn><mo>}</mo>",
    r"50\% \cdot \$3": "<mn>50</mn><mo>%</mo><mo>⋅</mo><mo>$</mo><mn>3</mn>",
    r"\alpha*\not= b": "<mi>α</mi><mo>∗</mo><mo>=\u0338</mo><mi>b</mi>",
    r"{a \over b}": "<mfrac><mi>a</mi><mi>b</mi></mfrac>",
    r"\frac{": "<mfrac></mfrac>",
    "": "",
}


def test_maths(page: Any) -> None:
    assert {tex: mathml(page, tex) for tex in MATHS} == MATHS


def test_maths_is_found_in_every_usual_dress(page: Any) -> None:
    dresses = ["$x+1$", "$$x+1$$", r"\(x+1\)", r"\[x+1\]", "$$\nx+1\n$$", "\\[\nx+1\n\\]", "so $x+1$, or", "- $x+1$"]
    dresses += ["$`x+1`$", "```math\nx+1\n```", "- a\n  ```math\n  x+1\n  ```"]
    for text in dresses:
        assert html(page, text).count("<math") == 1 and "x+1" not in html(page, text), text


def test_maths_draws_whatever_is_written(page: Any) -> None:
    """Any sequence of TeX's pieces ends in one element, never in an error or a page that hangs."""
    pieces = json.loads(
        r"""["\\frac","{","}","^","_","x","12"," ","&","\\\\","\\left","\\right","(","]",
        "\\begin{matrix}","\\end{matrix}","\\sqrt","[","\\text","\\sum","'","\\over","\\mathbf","\\operatorname*","\\limits","\\substack","\\displaystyle","\\",
        "\\middle","|","\\hat","\\not","\\begin{array}","\\hline","%","~","\\tag","é","漢","😀","\\begin","\\big","\\color"]"""
    )
    rng = random.Random(5)
    texts = ["".join(rng.choices(pieces, k=rng.randrange(1, 30))) for _ in range(3000)]
    script = """const [texts, done] = arguments; import("/static/maths.js").then(({ maths }) => {
      const bad = [];
      for (const tex of texts) {
        try { if (maths(tex, true).localName !== "math") bad.push(tex); } catch (e) { bad.push(tex + e); }
      }
      done(bad);
    });"""
    assert page.driver.execute_async_script(script, texts) == []


def test_columns_of_maths_are_aligned(page: Any, server: Any) -> None:
    text = r"$$\begin{aligned} a &= bbbbbb \\ cccccc &= d \end{aligned}$$" + "\n\n"
    text += r"$$\begin{pmatrix} a & bbbbbb \\ cccccc & d \end{pmatrix}$$"
    server.replies = [Reply(text)]
    page.ask("?")
    gaps = page.js(
        """return [...document.querySelectorAll("mtd")].map((cell) => {
        const [from, to] = [cell.firstElementChild, cell.lastElementChild].map((e) => e.getBoundingClientRect());
        const all = cell.getBoundingClientRect();
        return [from.left - all.left, all.right - to.right]; })"""
    )
    assert len(gaps) == 8
    (short_left, short_right), (_, row_right) = gaps[:2]
    assert short_left > 20 > 5 > short_right, "to the right before the sign"
    assert row_right < 5 and gaps[3][0] < 8 and gaps[3][1] > 20, "to the left after it"
    for left, right in gaps[4:]:
        assert abs(left - right) < 3, "in the middle of a matrix"
