"""The chat page for every hand and eye: keyboard, names of controls, contrast, narrow screens, other scripts."""

from typing import Any

import pytest
from scripted import Reply, Scripted

ANSWER = (
    """Some **text** with [a link](http://x.example), `code` and $x^2$.

# Heading

- [x] task
- item

> quote

| a | b | c | d | e | f | g | h |
|---|---|---|---|---|---|---|--:|
| long cell one | long cell two | long cell three | long cell four | five | six | seven | eight |

```python
def function(argument, another_argument, yet_another_argument):  # a comment that is rather long for a phone
    return "string" + 1
```

$$\\sum_{i=1}^{n} x_i^2 + \\sum_{i=1}^{n} y_i^2 + \\sum_{i=1}^{n} z_i^2 = \\frac{a}{b} + c + d + e + f + g$$

Averyveryverylongwordwithoutanyplacetobreak"""
    + "k" * 200
)

ENTER, ESCAPE, UP, SHIFT, CONTROL, TAB = "\ue007", "\ue00c", "\ue013", "\ue008", "\ue009", "\ue004"


def press(page: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    chain = ActionChains(page.driver)
    for key in keys[:-1]:
        chain.key_down(key)
    chain.send_keys(keys[-1])
    for key in reversed(keys[:-1]):
        chain.key_up(key)
    chain.perform()


def full(page: Any, server: Scripted) -> None:
    """Puts one of everything on the page."""
    server.replies = [Reply(ANSWER, ANSWER), Reply(ANSWER, ANSWER), Reply(status=400, message="Refused.")]
    page.ask("A question " + "q" * 200)
    page.click("Regenerate")
    page.until(lambda: page.text(".assistant .count") == "2/2")
    page.done()
    page.send("Another")
    page.until(lambda: page.text(".message:last-child .notice").startswith("Refused."))
    page.js("document.querySelectorAll('details').forEach((d) => d.open = true)")


def test_the_keyboard_does_it_all(page: Any, server: Scripted) -> None:
    page.js("document.activeElement.blur()")
    press(page, "?")
    assert page.one("#keys").is_displayed() and "New line" in page.text("#keys")
    press(page, ESCAPE)
    assert not page.one("#keys").is_displayed()
    press(page, "/")
    box = page.one("#box")
    assert page.driver.switch_to.active_element == box
    box.send_keys("two")
    press(page, SHIFT, ENTER)
    press(page, "l")
    assert server.asked == []
    server.replies = [Reply("word " * 1000, delay=0.02)]
    press(page, ENTER)
    page.until(lambda: page.answers() and page.answers()[0])
    press(page, ESCAPE)
    page.done(2)
    assert server.asked[0]["messages"][0]["content"] == "two\nl" and box.get_attribute("value") == ""
    press(page, UP)
    edit = page.driver.switch_to.active_element
    assert edit.accessible_name == "Edit message" and edit.get_attribute("value") == "two\nl"
    edit.send_keys("!")
    press(page, ENTER)
    page.until(lambda: page.questions() == ["two\nl!"])
    page.done()
    press(page, CONTROL, "k")
    assert page.questions() == [] and page.driver.switch_to.active_element == box
    press(page, CONTROL, "b")
    assert not page.one("#sidebar").is_displayed()
    box.send_keys("?")  # in a text it is only a question mark
    assert not page.one("#keys").is_displayed()


def test_the_focus_is_never_lost(page: Any, server: Scripted) -> None:
    box = page.one("#box")
    page.ask("one")
    page.js("document.querySelector('.user [aria-label=\"Edit message\"]').focus()")
    press(page, ENTER)
    page.driver.switch_to.active_element.send_keys("!")
    press(page, ENTER)
    page.until(lambda: page.questions() == ["one!"])
    assert page.driver.switch_to.active_element == box
    page.done()
    server.replies = [Reply("Half", end="length"), Reply(" done.")]
    for button, answer in (("Regenerate", "Half"), ("Continue", "Half done.")):
        page.js("arguments[0].focus()", page.button(button))
        press(page, ENTER)
        page.until(lambda answer=answer: page.answers() == [answer])
        assert page.driver.switch_to.active_element == box
        page.done()
    page.js("arguments[0].focus()", page.button("Previous version (2 of 2)", ".assistant"))
    press(page, ENTER)
    page.until(lambda: page.answers() == ["Hello."])
    assert page.driver.switch_to.active_element.accessible_name == "Next version (1 of 2)"


def test_the_focus_stays_in_the_list_of_conversations(page: Any, server: Scripted) -> None:
    for text in ("First", "Second", "Third", "Fourth"):
        page.one("#new").click()
        page.ask(text)

    def focused() -> str:
        return str(page.js("return document.activeElement.getAttribute('aria-label') ?? document.activeElement.title"))

    def focus(name: str) -> None:
        page.js("arguments[0].focus()", page.button(name, "#conversations"))

    focus("Delete “Third”")
    press(page, ENTER)
    page.until(lambda: "Deleted" in page.text("#toast span"))
    assert focused() == "Second", "what follows the deleted one"
    focus("Rename “First”")
    for end, title in ((ESCAPE, "First"), (ENTER, "Firsta")):
        press(page, ENTER)
        press(page, end if end == ESCAPE else "\ue014")  # to the end of the old name
        if end == ENTER:
            press(page, "a")
            press(page, ENTER)
        page.until(lambda title=title: focused() == f"Rename “{title}”")
    focus("Delete “Firsta”")
    press(page, ENTER)
    page.until(lambda: focused() == "Fourth")
    # The last of the list is answered, and moves to the front while the other one has the focus.
    page.click("Second", "#conversations")
    server.replies = [Reply("word " * 40, delay=0.02)]
    page.send("More")
    page.until(lambda: page.all("#conversations .running"))
    focus("Fourth")
    page.js("window.__had = document.activeElement")
    page.done()
    page.until(lambda: not page.all("#conversations .running"))
    assert page.js("return document.activeElement === window.__had && window.__had.textContent") == "Fourth"
    page.js(  # as another tab tells it
        """const opening = indexedDB.open('luciola', 1);
        opening.onsuccess = () => {
          const table = opening.result.transaction('conversations', 'readwrite').objectStore('conversations');
          table.getAll().onsuccess = ({ target }) => {
            const other = target.result.find((conversation) => conversation.title === 'Fourth');
            const changed = { ...other, title: 'Elsewhere', updated: Date.now() + 1 };
            table.put(changed).onsuccess = () => new BroadcastChannel('luciola').postMessage({ changed: other.id });
          };
        };"""
    )
    page.until(lambda: page.text("#conversations .open") == "Elsewhere")
    assert page.js("return document.activeElement === window.__had && window.__had.textContent") == "Elsewhere"
    page.js("document.querySelectorAll('#conversations li')[1].querySelector('[aria-label^=Delete]').focus()")
    press(page, ENTER)
    page.until(lambda: len(page.all("#conversations .open")) == 1)
    assert page.driver.switch_to.active_element == page.one("#box"), "the open one was deleted"


def test_the_focus_reaches_every_control_and_is_seen(page: Any, server: Scripted) -> None:
    full(page, server)
    page.js("document.activeElement.blur()")
    reached = set()
    for _ in range(60):
        press(page, TAB)
        name, style, inside = page.js(
            """const e = document.activeElement, s = getComputedStyle(e);
            const ring = s.outlineStyle !== 'none' && s.outlineWidth !== '0px';
            const around = e.closest('#form, .search, .edit') !== null; // which show the focus of what they hold
            return [e.getAttribute('aria-label') || e.textContent || e.tagName, ring, around]"""
        )
        assert style or inside or name == "BODY" or name.startswith("\n"), f"the focus on {name!r} cannot be seen"
        reached.add(name.strip())
    wanted = {
        "Search conversations",
        "Export and import",
        "Theme",
        "Settings of this conversation",
        "Message",
        "Copy message",
    }
    assert wanted | {"Regenerate", "Edit message", "Retry", "Copy code (python)"} <= reached


@pytest.mark.parametrize("dialog", ["", "options", "files", "help"])
def test_every_control_has_a_name(page: Any, server: Scripted, dialog: str) -> None:
    full(page, server)
    if dialog:
        page.js(f"document.getElementById('{dialog}').click()")
    page.driver.execute_cdp_cmd("Accessibility.enable", {})
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    page.driver.execute_cdp_cmd("Accessibility.disable", {})
    controls = "button textbox searchbox spinbutton combobox link checkbox radio menuitem DisclosureTriangle dialog"
    found = 0
    for node in nodes:
        if node.get("ignored") or node["role"]["value"] not in controls.split():
            continue
        found += 1
        assert node.get("name", {}).get("value", "").strip(), f"a {node['role']['value']} has no name: {node}"
    assert found >= (2 if dialog else 20)
    roles = {node["role"]["value"].lower() for node in nodes if not node.get("ignored")}
    if not dialog:
        assert {"main", "navigation", "complementary", "log", "article", "heading", "table", "figure"} <= roles


def test_answers_are_announced_without_every_token(page: Any, server: Scripted) -> None:
    page.js(
        """window.__told = []; const voice = document.getElementById('announcer');
        new MutationObserver(() => window.__told.push(voice.textContent)).observe(voice, {childList: true})"""
    )
    server.replies = [Reply("word " * 100)]
    page.ask("Talk")
    assert page.js("return window.__told") == ["Answering …", "The answer is complete."]
    assert page.one("#messages").get_attribute("aria-live") == "off"


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_hangs_over_a_narrow_screen(page: Any, server: Scripted, width: int) -> None:
    metrics = {"width": width, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.open()
    assert not page.one("#sidebar").is_displayed()
    full(page, server)
    over = """const wide = []; for (const e of document.querySelectorAll('#page *')) {
      const r = e.getBoundingClientRect();
      if (!r.width || e.closest('.table, pre, .display, .unseen, math')) continue;
      if (r.right > innerWidth + 1 || r.left < -1) wide.push(e.className || e.id || e.localName);
    } return [document.documentElement.scrollWidth, document.getElementById('scroll').scrollWidth, wide]"""
    assert page.js(over) == [width, width, []]
    page.click("Show the conversations")
    page.until(lambda: page.one("#sidebar").is_displayed())
    assert page.one("#sidebar").rect["width"] < width
    page.one("#new").click()
    page.until(lambda: not page.one("#sidebar").is_displayed())
    for dialog in ("options", "files"):
        page.js(f"document.getElementById('{dialog}').click()")
        assert page.js("return document.querySelector('dialog[open]').scrollWidth") <= width
        press(page, ESCAPE)


def test_long_maths_within_a_line_can_be_scrolled_to_its_end(page: Any, server: Scripted) -> None:
    metrics = {"width": 340, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    long = "+".join(f"a_{{{i}}}" for i in range(30))
    server.replies = [Reply(f"In a line ${long}$, and $x$.\n\nOf its own $${long}$$ too.\n\n- so \\({long}\\)!")]
    page.ask("?")
    assert page.js("return document.getElementById('scroll').scrollWidth") == 340
    ends = """return [...document.querySelectorAll('math')].map((math) => {
      const box = math.parentElement; box.scrollLeft = 1e6;
      const right = (element) => element.getBoundingClientRect().right;
      const last = right([...math.querySelectorAll('msub')].at(-1) ?? math);
      const whole = box.scrollHeight - box.clientHeight < 2; // nothing of it is cut off above or below
      return [box.scrollLeft > 300, last <= Math.min(right(box), innerWidth) + 1, whole];
    })"""
    assert page.js(ends) == [[True, True, True], [False, True, True], [True, True, True], [True, True, True]]


# Every visible text against the colours behind it, as the browser mixes them.
CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgba(colour) {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
}
function behind(element) {
  const layers = [];
  for (let e = element; e; e = e.parentElement) {
    const colour = rgba(getComputedStyle(e).backgroundColor);
    if (colour[3] > 0) layers.push(colour);
    if (colour[3] === 1) break;
  }
  const over = (under, [r, g, b, a]) => [r, g, b].map((x, i) => x * a + under[i] * (1 - a));
  return layers.reverse().reduce(over, [255, 255, 255]);
}
const light = (c) => c.map((x) => (x /= 255) <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
const poor = []; let seen = 0;
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
  if (!text || !e.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
  if (e.closest(".unseen, .skip, :disabled, noscript")) continue;
  seen += 1;
  const [a, b] = [light(rgba(getComputedStyle(e).color).slice(0, 3)), light(behind(e))].sort((x, y) => y - x);
  const ratio = (a + .05) / (b + .05);
  if (ratio < 4.5) poor.push(`${e.className || e.localName}: ${text.slice(0, 20)} ${ratio.toFixed(2)}`);
}
return [seen, poor];
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(page: Any, server: Scripted, theme: str) -> None:
    scheme = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    full(page, server)
    paper = page.js("return getComputedStyle(document.body).backgroundColor")
    assert (int(paper.split("(")[1].split(",")[0]) < 60) == (theme == "dark")
    for dialog in ("", "options", "files", "help"):
        if dialog:
            page.js(f"document.getElementById('{dialog}').click()")
        seen, poor = page.js(CONTRAST)
        assert seen > 60 and poor == []
        if dialog:
            press(page, ESCAPE)


def test_the_theme_can_be_chosen_and_is_kept(page: Any, server: Scripted) -> None:
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    page.click("Theme")
    page.click("Theme")
    page.open()
    assert page.js("return document.documentElement.dataset.theme") == "dark"
    assert page.js("return getComputedStyle(document.body).colorScheme") == "dark"
    assert page.js("return getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 16)"
    page.click("Theme")
    assert page.js("return document.documentElement.dataset.theme ?? null") is None


def test_motion_is_left_out_for_those_who_ask(page: Any, server: Scripted) -> None:
    reduced = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", reduced)
    server.replies = [Reply("word " * 1000, delay=0.02)]
    page.send("Go")
    page.until(lambda: page.answers() and page.answers()[0])
    assert page.js("return document.getAnimations().length") == 0
    page.click("Stop")
    page.done()


def test_text_runs_in_its_own_direction(page: Any, server: Scripted) -> None:
    server.replies = [Reply("مرحبا بالعالم\n\n- واحد\n\nand English\n\n```\ncode\n```")]
    page.ask("שלום")
    direction = "return [...document.querySelectorAll(arguments[0])].map((e) => getComputedStyle(e).direction)"
    assert page.js(direction, ".said") == ["rtl"]
    assert page.js(direction, ".markdown p") == ["rtl", "ltr"]
    assert page.js(direction, ".markdown li") == ["rtl"]
    assert page.js(direction, ".code") == ["ltr"]
