"""The chat page in real Chromium when the server fails, and when it asks for something."""

import time
from typing import Any

import pytest
from scripted import Reply, Scripted


def test_a_restart_mid_stream_is_told_and_survived(page: Any, server: Scripted) -> None:
    server.replies = [Reply("kept " * 2000, delay=0.02)]
    page.send("Go on")
    page.until(lambda: page.answers() and page.answers()[0].count("kept") > 5)
    server.stop()
    gone = "The server has gone away; what came so far is kept. Trying again …"
    page.until(lambda: page.text(".assistant .notice").startswith(gone))
    assert page.answers()[0].count("kept") > 5
    page.until(lambda: gone in page.text("#announcer"))  # screen readers hear it, too
    page.until(lambda: page.text("#state") == "Reconnecting")
    kept = page.answers()[0].strip()
    server.replies = [Reply(" and back again.")]
    server.start()
    page.until(lambda: page.answers() == [f"{kept} and back again."], 20)
    page.done()
    assert page.text(".assistant .notice") == ""
    again = server.asked[1]
    assert again["continue_final_message"] is True
    assert [m["role"] for m in again["messages"]] == ["user", "assistant"]
    assert again["messages"][1]["content"].strip() == kept


@pytest.mark.parametrize(("kind", "code"), [("overloaded_error", None), ("server_error", "shutting_down")])
def test_an_orderly_shutdown_mid_stream_is_survived_too(page: Any, server: Scripted, kind: str, code: str) -> None:
    cut = Reply("Kept word ", end="error", message="the server is shutting down", type=kind, code=code)
    server.replies = [cut, Reply("and more.")]
    assert page.ask("Go on") == "Kept word and more."
    assert page.text(".assistant .notice") == ""
    assert server.asked[1]["continue_final_message"] is True


def test_an_answer_that_the_server_gave_up_can_be_continued(page: Any, server: Scripted) -> None:
    server.replies = [Reply("Half", end="error", message="The engine failed."), Reply(" and whole.")]
    page.ask("Go on")
    page.click("Continue")
    page.until(lambda: page.answers() == ["Half and whole."])


def test_a_request_that_took_too_long_is_not_sent_again(page: Any, server: Scripted) -> None:
    late = "the request took longer than the 600 seconds that this server gives"
    server.replies = [Reply(status=504, message=late)]
    page.send("Go on")
    page.until(lambda: page.text(".assistant .notice") == f"{late} Retry")
    time.sleep(1)
    assert len(server.asked) == 1


def test_a_continuation_gets_what_is_left_of_the_longest_answer(page: Any, server: Scripted) -> None:
    page.click("Settings of this conversation")
    page.one("#set-max_tokens").send_keys("5")
    page.click("Close", "#settings")
    server.replies = [Reply("one two", end="break"), Reply(" three four five", end="length"), Reply(" six")]
    page.ask("Count")
    assert page.answers() == ["one two three four five"]
    page.click("Continue")  # the limit was reached: asked for more, it is as much again
    page.until(lambda: page.answers() == ["one two three four five six"])
    assert [asked["max_tokens"] for asked in server.asked] == [5, 3, 5]


def test_a_stream_that_breaks_each_time_is_not_asked_for_for_ever(page: Any, server: Scripted) -> None:
    server.default = Reply("Half", end="break")
    page.send("Go on")
    page.done(20)
    assert len(server.asked) == 4  # once, and three times more by itself
    time.sleep(1)
    assert len(server.asked) == 4
    assert page.answers() == ["HalfHalfHalfHalf"]
    server.default = Reply("Whole.")
    page.click("Retry")
    page.until(lambda: page.answers() == ["Whole."])


def test_an_answer_cut_short_goes_on_where_it_stopped(page: Any, server: Scripted) -> None:
    server.replies = [
        Reply("", "Half a thou", end="length", piece=20),
        Reply("The rest", "ght.", end="length", piece=20),
    ]
    server.default = Reply(" of it.", piece=20)
    page.ask("Go on")
    page.click("Continue")
    page.until(lambda: page.answers() == ["The rest"])
    page.done()
    page.click("Continue")
    page.until(lambda: page.answers() == ["The rest of it."])
    page.done()
    page.one(".thinking summary").click()
    page.until(lambda: page.text(".thinking .markdown") == "Half a thought.")
    assert [asked["messages"][1:] for asked in server.asked] == [
        [],
        [{"role": "assistant", "content": "", "reasoning_content": "Half a thou"}],
        [{"role": "assistant", "content": "The rest", "reasoning_content": "Half a thought."}],
    ]
    assert page.text(".assistant .figures").startswith("4 tokens")


def test_waiting_for_the_server_can_be_given_up(page: Any, server: Scripted) -> None:
    server.stop()
    page.send("Hello?")
    page.until(lambda: page.text(".assistant .notice").startswith("The server cannot be reached. Trying again …"))
    page.click("Stop")
    page.done()
    server.start()
    time.sleep(1)
    assert server.asked == [] and page.questions() == ["Hello?"]
    page.click("Regenerate")
    page.until(lambda: page.answers() == ["Hello."])


def test_a_page_opened_before_the_server_is_ready_connects_by_itself(page: Any, server: Scripted) -> None:
    page.ask("Earlier")
    server.stop()
    page.js("window.__seen.length = 0")
    page.driver.get("about:blank")
    server.start()
    server.key = "later"  # all but the page itself is refused for now
    page.open(ready=False)
    page.until(lambda: page.one("#login").is_displayed())
    assert page.questions() == ["Earlier"]
    server.key = None
    page.one("#key").send_keys("x", "\ue007")
    page.until(lambda: page.text("#model") == "glow-1b")


def test_the_key_is_asked_for_and_kept_for_the_tab_only(page: Any, server: Scripted) -> None:
    server.key = "firefly"
    page.open(ready=False)
    for key in ("wrong", "firefly"):
        page.until(lambda: page.one("#login").is_displayed())
        page.one("#key").send_keys(key, "\ue007")
    page.until(lambda: page.text("#model") == "glow-1b")
    assert page.ask("Hello?") == "Hello."
    assert "firefly" not in page.js("return JSON.stringify([{...localStorage}, document.cookie])")
    page.open()
    server.key = "changed"
    page.send("And now?")
    page.until(lambda: page.one("#login").is_displayed())
    page.one("#key").send_keys("changed", "\ue007")
    page.until(lambda: len(page.answers()) == 2 and page.answers()[1] == "Hello.")


def test_the_question_for_a_key_can_be_put_off(page: Any, server: Scripted) -> None:
    server.key = "firefly"
    page.open(ready=False)
    for _ in range(2):
        page.until(lambda: page.one("#login").is_displayed())
        assert not page.one("#login-fault").is_displayed()  # none was given yet
        page.one("#key").send_keys("\ue00c")  # Escape
        page.until(lambda: not page.one("#login").is_displayed())
        time.sleep(0.5)
        assert not page.one("#login").is_displayed()
        page.click("Connect")
    page.until(lambda: page.one("#login").is_displayed())
    page.one("#key").send_keys("wrong", "\ue007")
    page.until(lambda: page.one("#login-fault").is_displayed())
    assert page.text("#login-fault") == "This key was not accepted."
    page.click("Cancel")
    page.one("#box").send_keys("Hello?", "\ue007")  # who writes anyway is asked again, and loses nothing
    page.until(lambda: page.one("#login").is_displayed())
    page.one("#key").send_keys("firefly", "\ue007")
    page.until(lambda: page.text("#model") == "glow-1b")
    page.one("#box").send_keys("\ue007")
    page.until(lambda: page.answers() == ["Hello."])
    assert page.questions() == ["Hello?"]


def test_a_key_that_changed_while_the_server_was_away_can_be_put_off(page: Any, server: Scripted) -> None:
    server.replies = [Reply("kept " * 2000, delay=0.02)]
    page.send("Go on")
    page.until(lambda: page.answers() and page.answers()[0].count("kept") > 5)
    server.stop()
    server.key = "firefly"
    page.until(lambda: page.text("#state") == "Reconnecting")
    server.start()
    page.until(lambda: page.one("#login").is_displayed())
    page.click("Cancel")
    page.click("Stop")
    page.done(2)
    assert page.answers()[0].count("kept") > 5


def test_a_busy_server_is_asked_again_when_it_says(page: Any, server: Scripted) -> None:
    server.replies = [Reply(status=429, message="The queue is full.", headers={"Retry-After": "2"}), Reply("Now.")]
    start = time.monotonic()
    page.send("Me?")
    page.until(lambda: page.text(".assistant .notice").startswith("The server is busy. Trying again in 2 s"))
    page.until(lambda: page.answers() == ["Now."])
    assert time.monotonic() - start >= 2
    assert len(server.asked) == 2


def test_a_refusal_says_why(page: Any, server: Scripted) -> None:
    long = "The prompt has 5000 tokens; this model takes 4096."
    server.replies = [
        Reply(status=400, message=long, code="context_length_exceeded"),
        Reply(status=422, message="temperature: expected a number."),
        Reply("Half an", end="error", message="The engine failed."),
        Reply("Cut", end="length"),
    ]
    for told in (
        f"This conversation is too long for the model. {long}",
        "temperature: expected a number.",
        "The engine failed.",
    ):
        page.one("#new").click()
        page.send("Well?")
        offered = "Continue Retry" if told == "The engine failed." else "Retry"
        page.until(lambda told=told, offered=offered: page.text(".assistant .notice") == f"{told} {offered}")
        page.done()
    assert page.answers() == ["Half an"]
    page.one("#new").click()
    page.ask("Well?")
    assert page.text(".assistant .notice") == "The answer was cut at the limit of tokens. Continue"
