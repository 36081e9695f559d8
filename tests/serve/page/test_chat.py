"""The chat page in real Chromium: conversations, and what becomes of them."""

from typing import Any

import pytest
from scripted import Reply, Scripted

from luciola.serve.protocol import ChatRequest


def test_a_conversation_goes_to_the_server_as_it_stands_without_earlier_thinking(page: Any, server: Scripted) -> None:
    server.replies = [Reply("First **answer**.", "Secret thoughts."), Reply("Second answer.")]
    assert page.ask("One?") == "First answer."
    assert page.ask("Two?") == "Second answer."
    assert page.questions() == ["One?", "Two?"]
    assert server.asked[1]["messages"] == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "First **answer**."},
        {"role": "user", "content": "Two?"},
    ]
    assert "Secret" not in str(server.asked)


def test_a_model_that_learnt_single_questions_gets_each_alone(page: Any, server: Scripted) -> None:
    server.model |= {"history": False, "system": "Think first."}
    page.open()
    assert "sent alone" in page.text("#about")
    page.ask("One?")
    page.ask("Two?")
    assert server.asked[1]["messages"] == [
        {"role": "system", "content": "Think first."},
        {"role": "user", "content": "Two?"},
    ]


def test_thinking_is_folded_and_timed_and_ends_on_request(page: Any, server: Scripted) -> None:
    server.replies = [Reply("The answer.", "hmm " * 2000, delay=0.02)]
    page.send("Why?")
    page.until(lambda: page.text(".thinking summary").startswith("Thinking"))
    assert page.js("return document.querySelector('.thinking details').open") is False
    page.one(".thinking summary").click()
    page.until(lambda: "hmm hmm" in page.text(".thinking .markdown"))
    page.click("Answer now")
    page.done()
    assert page.answers() == ["The answer."]
    assert server.controls == [{"id": "chatcmpl-0", "action": "reasoning_end"}]
    words = page.text(".thinking summary")
    assert words.startswith("Thought for ") and 0 < float(words.split()[2]) < 30
    # Who opened it while it ran sees the next one open while it runs, and folded after it.
    server.replies = [Reply("Again.", "hmm " * 40, delay=0.02)]
    page.send("And?")
    page.until(lambda: page.js("return document.querySelectorAll('.thinking details')[1]?.open"))
    page.done()
    assert page.js("return document.querySelectorAll('.thinking details')[1].open") is False


def test_stop_keeps_what_came_and_the_server_hears_of_it(page: Any, server: Scripted) -> None:
    server.replies = [Reply("word " * 1000, delay=0.02)]
    page.send("Go on")
    page.until(lambda: page.answers() and page.answers()[0].count("word") > 3)
    page.one("#box").send_keys("\ue00c")  # Escape
    page.done(2)
    kept = page.answers()[0]
    assert kept.startswith("word word word") and kept.count("word") < 1000
    assert page.text(".assistant .notice") == "Stopped. Continue"
    page.until(lambda: server.gone == ["chatcmpl-0"])
    server.replies = [Reply("Well.")]
    page.ask("Then?")
    assert server.asked[1]["messages"][1]["content"].strip() == kept.strip()


def test_a_reload_keeps_the_conversation_even_mid_answer(page: Any, server: Scripted) -> None:
    server.replies = [Reply("Kept **for ever**.", "Thought."), Reply("slow " * 500, delay=0.03)]
    page.ask("First?")
    page.send("Second?")
    page.until(lambda: len(page.answers()) == 2 and page.answers()[1].count("slow") > 30)
    page.open()
    assert page.questions() == ["First?", "Second?"]
    assert page.answers()[0] == "Kept for ever."
    assert page.answers()[1].count("slow") > 2
    page.until(lambda: "not complete" in page.text(".message:last-child .notice"))
    page.one(".thinking summary").click()
    page.until(lambda: page.text(".thinking .markdown") == "Thought.")
    server.replies = [Reply(" done.")]
    page.click("Continue")
    page.until(lambda: page.answers() and page.answers()[-1].endswith("slow done."))


def test_regenerating_and_editing_keep_every_version(page: Any, server: Scripted) -> None:
    server.replies = [Reply(text) for text in ("a1", "a2", "b1", "c1")]
    page.ask("A")
    page.click("Regenerate")
    page.until(lambda: page.answers() == ["a2"])
    assert page.text(".assistant .count") == "2/2"
    page.ask("B")
    assert [m["content"] for m in server.asked[2]["messages"]] == ["A", "a2", "B"]
    # The first answer again: what followed the second is a branch of its own.
    page.click("Previous version (2 of 2)")
    page.until(lambda: page.answers() == ["a1"])
    assert page.questions() == ["A"]
    page.click("Next version (1 of 2)")
    page.until(lambda: page.answers() == ["a2", "b1"])
    page.click("Edit message", ".user:last-of-type, .user:nth-of-type(3)")
    box = page.one(".edit textarea")
    box.clear()
    box.send_keys("C", "\ue007")
    page.until(lambda: page.answers() == ["a2", "c1"])
    assert [m["content"] for m in server.asked[3]["messages"]] == ["A", "a2", "C"]
    page.open()
    assert (page.questions(), page.answers()) == (["A", "C"], ["a2", "c1"])
    page.click("Previous version (2 of 2)", ".user:nth-of-type(3)")
    page.until(lambda: page.questions() == ["A", "B"])


def test_settings_belong_to_their_conversation(page: Any, server: Scripted) -> None:
    page.ask("Before")
    page.click("Settings of this conversation")
    assert page.one("#set-temperature").get_attribute("placeholder") == "0.6"
    for name, value in {"temperature": "0.25", "top_k": "40", "seed": "7", "thinking_token_budget": "99"}.items():
        page.one(f"#set-{name}").send_keys(value)
    page.one("#set-top_p").send_keys("3")  # no probability: it is marked, and not sent
    assert page.one("#set-top_p").get_attribute("aria-invalid") == "true"
    page.js("const s = document.getElementById('set-thinking'); s.value = 'false'; s.onchange()")
    page.one("#system").send_keys("Be brief.")
    page.click("Close", "#settings")
    page.ask("After")
    plain, asked = server.asked
    assert plain.items() >= {"temperature": 0.6, "top_p": 0.95}.items() and not {"seed", "thinking"} & plain.keys()
    wanted = {
        "temperature": 0.25,
        "top_p": 0.95,
        "top_k": 40,
        "seed": 7,
        "thinking_token_budget": 99,
        "thinking": {"type": "disabled"},
    }
    assert asked.items() >= wanted.items()
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    page.open()
    page.ask("Still")
    assert server.asked[2].items() >= wanted.items()
    page.one("#new").click()
    page.ask("Fresh")
    assert server.asked[3]["temperature"] == 0.6 and server.asked[3]["messages"][0]["role"] == "user"


def test_a_new_conversation_keeps_its_settings_over_a_reload(page: Any, server: Scripted) -> None:
    page.click("Settings of this conversation")
    page.one("#system").send_keys("Be brief.")
    page.one("#set-temperature").send_keys("0.25")
    page.click("Close", "#settings")
    page.until(lambda: page.text("#conversations .open") == "New conversation")
    page.js("return new Promise((done) => setTimeout(done, 500))")  # it is written after a while
    page.open()
    page.ask("Well?")
    assert server.asked[0]["temperature"] == 0.25
    assert server.asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert page.text("#conversations .open") == "Well?"


def test_what_the_settings_allow_is_what_the_server_takes(page: Any, server: Scripted) -> None:
    page.click("Settings of this conversation")
    names = page.js("return [...document.querySelectorAll('#sampling input')].map((e) => e.id.slice(4))")
    assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"} < set(names)
    for end in ("min", "max"):
        page.js(
            """for (const input of document.querySelectorAll('#sampling input')) {
            input.value = input[arguments[0]]; input.oninput(); }""",
            end,
        )
        assert page.all("#sampling [aria-invalid=true]") == []
        page.js("document.getElementById('settings').close()")
        page.ask(end)
        assert set(names) < server.asked[-1].keys()
        ChatRequest.model_validate(server.asked[-1])
    field = page.one("#set-top_p")
    page.js("arguments[0].value = '0'; arguments[0].oninput()", field)
    assert field.get_attribute("aria-invalid") == "true"


def test_a_server_that_names_no_sampling_is_left_to_its_own(page: Any, server: Scripted) -> None:
    server.model = {}
    page.open()
    page.ask("Well?")
    assert not {"temperature", "top_p"} & server.asked[0].keys()


def test_conversations_are_found_renamed_deleted_and_brought_back(page: Any, server: Scripted) -> None:
    server.replies = [Reply("alpha"), Reply("needle in it"), Reply("gamma")]
    for text in ("First talk", "Second talk", "Third talk"):
        page.one("#new").click()
        page.ask(text)

    def titles() -> list[str]:
        return list(page.js("return [...document.querySelectorAll('#conversations .open')].map((e) => e.textContent)"))

    assert titles() == ["Third talk", "Second talk", "First talk"]
    page.one("#search").send_keys("NEEDLE")
    page.until(lambda: titles() == ["Second talk"])
    page.one("#search").clear()
    page.js("const s = document.getElementById('search'); s.value = ''; s.oninput()")
    page.click("Rename “First talk”")
    page.one("#conversations input").send_keys("Renamed", "\ue007")  # the old name is selected
    page.until(lambda: "Renamed" in titles())
    page.click("Delete “Third talk”")
    page.until(lambda: "Third talk" not in titles())
    assert page.questions() == []  # it was open
    page.click("Undo")
    page.until(lambda: "Third talk" in titles())
    assert page.questions() == ["Third talk"]
    page.click("Delete “Second talk”")
    page.until(lambda: "Second talk" not in titles())
    page.open()
    assert sorted(titles()) == ["Renamed", "Third talk"]


def test_figures_stand_under_the_answer_and_the_cache_below(page: Any, server: Scripted) -> None:
    server.replies = [Reply("one two three four five six seven eight nine ten", delay=0.03)]
    page.send("Count")
    page.until(lambda: "Cache 42 %" in page.text("#status"))
    page.done()
    words = page.text(".assistant .figures")
    assert words.startswith("10 tokens · ") and "prompt 120 (96 cached)" in words and "first after 0." in words
    rate = float(words.split(" · ")[1].split()[0])
    assert 2 < rate < 40, "ten tokens 0.03 s apart"


def test_an_answer_that_comes_at_once_has_figures_too(page: Any, server: Scripted) -> None:
    server.replies = [Reply("All of it at once.", "Thought of at once.", piece=1000)]
    page.ask("Quick")
    assert page.text(".thinking summary") == "Thought for < 0.1 s"
    words = page.text(".assistant .figures").split(" · ")
    assert words[0] == "2 tokens" and words[1].endswith(" tokens/s") and float(words[1].split()[0]) > 0


@pytest.mark.parametrize("end", ["constructor", "toString", "__proto__"])
def test_an_unknown_finish_reason_says_nothing(page: Any, server: Scripted, end: str) -> None:
    server.replies = [Reply("Well.", end=end)]
    page.ask("Well?")
    assert page.text(".assistant .notice") == ""
    assert page.text("#announcer") == "The answer is complete."


def test_a_tab_comes_back_to_its_own_conversation(page: Any, server: Scripted) -> None:
    page.ask("in the first tab")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.open()
    page.one("#new").click()
    page.ask("in the second tab")
    page.driver.switch_to.new_window("tab")
    page.open()
    begun = page.questions()
    for handle in set(page.driver.window_handles) - {first}:
        page.driver.switch_to.window(handle)
        page.driver.close()
    page.driver.switch_to.window(first)
    page.open()
    assert page.questions() == ["in the first tab"]
    assert begun == ["in the second tab"]  # a new tab begins with what was last used


def test_two_tabs_do_not_undo_each_other(page: Any, server: Scripted) -> None:
    server.default = lambda body: Reply("re: " + body["messages"][-1]["content"])
    page.ask("first")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.open()
    assert page.questions() == ["first"]
    server.replies = [Reply("re: from the second tab", delay=0.2)]
    page.ask("from the second tab")
    second = page.driver.current_window_handle
    page.driver.switch_to.window(first)
    assert "not complete" not in page.text("#messages")
    page.driver.switch_to.window(second)
    page.driver.close()
    page.driver.switch_to.window(first)
    page.until(lambda: page.questions() == ["first", "from the second tab"])
    page.ask("from the first tab")
    page.open()
    assert page.answers() == ["re: first", "re: from the second tab", "re: from the first tab"]


def test_the_scroll_follows_the_answer_until_the_reader_looks_back(page: Any, server: Scripted) -> None:
    server.replies = [Reply("\n\n".join(f"paragraph {i}" for i in range(300)), delay=0.004)]
    page.send("Long")
    left = "const m = document.getElementById('scroll'); return m.scrollHeight - m.scrollTop - m.clientHeight"
    page.until(lambda: page.text(".assistant").count("paragraph") > 60)
    assert page.js(left) < 100
    page.js("document.getElementById('scroll').scrollTop = 100")
    before = page.text(".assistant").count("paragraph")
    page.until(lambda: page.text(".assistant").count("paragraph") > before + 20)
    assert page.js("return document.getElementById('scroll').scrollTop") == 100
    page.click("Jump to the latest message")
    page.done(20)
    assert page.js(left) < 100


def test_a_long_conversation_is_drawn_from_its_end_and_never_anew(page: Any, server: Scripted) -> None:
    nodes: dict[str, Any] = {}
    for i in range(300):
        node = {"role": "assistant" if i % 2 else "user", "content": f"message {i}.\n\n" + "- item\n" * (i % 7)}
        nodes[f"m{i}"] = node | {"id": f"m{i}", "parent": f"m{i - 1}" if i else "root", "created": i, "finish": "stop"}
    page.load({"conversations": [{"id": "x", "title": "Long", "nodes": nodes}]})
    page.until(lambda: page.text(".message:last-child").startswith("message 299"))
    page.one("#new").click()
    at_once, shift = page.driver.execute_async_script(
        """const [done] = arguments, scroller = document.getElementById('scroll');
        const messages = document.getElementById('messages').children;
        document.querySelector('#conversations .open').click();
        const [drawn, last] = [messages.length, messages[messages.length - 1]];
        const below = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
        if (below > 1) return done([`${below} from the end`, 0]);
        scroller.scrollTop -= 200; // as someone who reads back
        const before = last.getBoundingClientRect().top;
        (function look() {
          if (messages.length < 300) return setTimeout(look, 20);
          requestAnimationFrame(() => setTimeout(() => done([drawn, last.getBoundingClientRect().top - before])));
        })();"""
    )
    assert at_once == 30 and abs(shift) < 2, "what is read stays where it is"
    number = "Number(/message (\\d+)[.]/.exec(e.textContent)[1])"
    numbers = f"return [...document.querySelectorAll('.message')].map((e) => {number})"
    assert page.js(numbers) == list(range(300))
    page.js(
        """window.__touched = 0;
        const watch = new MutationObserver((all) => (window.__touched += all.length));
        const deep = { subtree: true, childList: true, attributes: true, characterData: true };
        for (const message of document.querySelectorAll('.message')) watch.observe(message, deep);"""
    )
    page.send("One more")
    page.until(lambda: len(page.all(".message")) == 302)
    page.done()
    assert page.js("return window.__touched") == 0


def test_messages_and_code_can_be_copied(page: Any, server: Scripted) -> None:
    server.replies = [Reply("<answer>Take *this*:</answer>\n\n```py\nx = 1\nprint(x)\n```")]
    page.ask("Code?")
    page.js("window.__copied = []; navigator.clipboard.writeText = async (text) => window.__copied.push(text)")
    page.click("Copy code (py)")
    page.until(lambda: page.text("#toast span") == "Copied")
    page.click("Copy message", ".assistant")
    page.until(lambda: len(page.js("return window.__copied")) == 2)
    assert page.js("return window.__copied") == ["x = 1\nprint(x)", "Take *this*:\n\n```py\nx = 1\nprint(x)\n```"]


def test_what_is_being_written_survives_a_reload(page: Any, server: Scripted) -> None:
    page.one("#box").send_keys("half a thought")
    page.open()
    assert page.one("#box").get_attribute("value") == "half a thought"
    page.ask(" more")
    page.open()
    assert page.one("#box").get_attribute("value") == ""


def test_a_server_that_comes_back_with_another_model_is_asked_for_that(page: Any, server: Scripted) -> None:
    page.ask("Who are you?")
    server.stop()
    server.name = "other-2b"
    page.send("And now?")
    page.until(lambda: "cannot be reached" in page.text(".message:last-child .notice"))
    server.start()
    page.until(lambda: len(page.answers()) == 2 and page.answers()[1] == "Hello.")
    assert server.asked[-1]["model"] == "other-2b" and page.text("#model") == "other-2b"
