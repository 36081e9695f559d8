"""The chat page before the real server: what both say to each other is no invention of the scripted one."""

from collections.abc import Callable
from typing import Any

from scripted import Scripted


def test_a_conversation_with_the_real_server(
    page: Any, server: Scripted, writer: Callable[..., Any], hosting: Callable[..., Any]
) -> None:
    thought = ["<think>", "let ", "me ", "see", "</think>"]
    words = [f"word{i} " for i in range(600)]
    with hosting(writer([*thought, *words])) as real:
        page.driver.get(real.url + "/")
        page.until(lambda: page.js("return document.documentElement.dataset.ready") == "yes")
        assert page.text("#model") == "tiny"
        page.click("Settings of this conversation")
        page.one("#set-temperature").send_keys("0")
        page.one("#set-max_tokens").send_keys("60")
        page.click("Close", "#settings")
        page.send("Hello")
        page.until(lambda: "word9 " in page.text(".assistant > .markdown"))
        page.done(60)
        assert page.text(".assistant .notice") == "The answer was cut at the limit of tokens. Continue"
        assert page.text(".assistant .figures").startswith("60 tokens · ")
        page.until(lambda: page.text("#cache").startswith("Cache "))
        page.click("Continue")
        page.until(lambda: page.js("return !document.getElementById('stop').hidden"))
        page.done(60)
        said = page.text(".assistant > .markdown").split()
        assert said[:5] == [f"word{i}" for i in range(5)]
        page.click("Settings of this conversation")
        page.click("Back to the defaults")
        page.click("Close", "#settings")
        page.send("Again")
        page.until(lambda: len(page.answers()) == 2 and page.answers()[1])
        page.click("Stop")
        page.done()
        real.until_free()
        assert page.requested() and page.seen() == []
        page.driver.refresh()
        page.until(lambda: page.questions() == ["Hello", "Again"])
    page.send("Are you there?")
    page.until(lambda: "The server cannot be reached" in page.text(".message:last-child .notice"))
