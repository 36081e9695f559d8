"""Conversations written to a file and read back: nothing is lost, and no file makes one that cannot be gone on with."""

import json
from pathlib import Path
from typing import Any

from scripted import Reply, Scripted


def test_export_and_import_keep_everything(page: Any, server: Scripted) -> None:
    server.replies = [Reply("Answer with $x$.", "Thinking."), Reply("Other.")]
    page.ask("Question?")
    page.click("Regenerate")
    page.until(lambda: page.answers() == ["Other."])
    page.done()

    def download(button: str, name: str) -> str:
        page.click("Export and import")
        page.click(button)
        path = Path(page.driver.downloads, name)
        page.until(path.exists)
        page.until(lambda: path.read_text())
        text = path.read_text()
        path.unlink()
        return text

    document = download("This conversation as Markdown", "Question.md")
    assert document == "# Question?\n\n## You\n\nQuestion?\n\n## glow-1b\n\nOther.\n"
    exported = json.loads(download("All conversations as JSON", "luciola-conversations.json"))
    [conversation] = exported["conversations"]
    assert {node["content"] for node in conversation["nodes"].values()} == {"Question?", "Answer with $x$.", "Other."}

    page.click("Delete “Question?”")
    page.until(lambda: page.questions() == [])
    conversation["nodes"]["strange"] = {"id": "other", "parent": "root", "role": "system", "content": "x"}
    for text, words in (("{", "cannot be imported"), (json.dumps(exported), "cannot be imported")):
        Path(page.driver.downloads, "in.json").write_text(text)
        page.one("#file").send_keys(str(Path(page.driver.downloads, "in.json")))
        page.until(lambda words=words: words in page.text("#toast span"))
        page.js("document.getElementById('toast').firstElementChild.textContent = ''")
    del conversation["nodes"]["strange"]
    Path(page.driver.downloads, "in.json").write_text(json.dumps(exported))
    page.one("#file").send_keys(str(Path(page.driver.downloads, "in.json")))
    page.until(lambda: page.answers() == ["Other."])
    page.open()
    page.click("Previous version (2 of 2)")
    page.until(lambda: page.answers()[0].startswith("Answer with"))


def test_an_imported_file_sets_nothing_out_of_bounds_and_no_later_time(page: Any, server: Scripted) -> None:
    nodes = {
        "a": {"id": "a", "parent": "root", "role": "user", "content": "Old?", "created": 1, "updated": 9e15},
        "b": {"id": "b", "parent": "a", "role": "assistant", "content": "Yes.", "created": 9e15, "updated": 9e15},
    }
    nodes["b"] |= {"finish": "toString", "stats": {"tokens": -7.5}, "thought": -1}
    sampling = {"n": 5, "temperature": -4, "top_k": 2.5, "seed": 2**40, "stream": False, "top_p": 0.5, "thinking": True}
    conversation = {"id": "x", "title": "Old", "created": 9e15, "updated": 9e15, "nodes": nodes, "sampling": sampling}
    path = Path(page.driver.downloads, "in.json")
    path.write_text(json.dumps({"conversations": [conversation]}))
    page.one("#file").send_keys(str(path))
    page.until(lambda: page.answers() == ["Yes."])
    assert page.text(".assistant .notice") == "" and page.text(".assistant .figures") == ""
    page.ask("New?")
    [asked] = server.asked
    assert not {"n", "top_k", "seed"} & asked.keys() and asked["stream"] is True
    assert (asked["temperature"], asked["top_p"], asked["thinking"]) == (0.6, 0.5, {"type": "enabled"})
    page.one("#new").click()
    page.ask("Later")
    page.open()
    titles = "return [...document.querySelectorAll('#conversations .open')].map((e) => e.textContent)"
    assert page.js(titles) == ["Later", "Old"]
    nodes["root"] = {"id": "root", "parent": "b", "role": "user", "content": "A circle."}
    path.write_text(json.dumps({"conversations": [conversation]}))
    page.one("#file").send_keys(str(path))
    page.until(lambda: "cannot be imported" in page.text("#toast span"))


def test_half_a_character_in_an_imported_file_does_not_spoil_the_requests(page: Any, server: Scripted) -> None:
    nodes = {
        "a": {"id": "a", "parent": "root", "role": "user", "content": "a\ud800"},
        "b": {"id": "b", "parent": "a", "role": "assistant", "content": "b\udc00", "reasoning": "\ud800c"},
    }
    nodes["b"]["finish"] = "length"
    page.load({"conversations": [{"id": "x", "title": "t\ud800", "system": "\ud800 system", "nodes": nodes}]})
    page.until(lambda: page.all(".user"))
    page.click("Continue")
    page.until(lambda: server.asked)
    page.done()
    assert server.asked[0]["messages"] == [
        {"role": "system", "content": "\ufffd system"},
        {"role": "user", "content": "a\ufffd"},
        {"role": "assistant", "content": "b\ufffd", "reasoning_content": "\ufffdc"},
    ]


def test_a_file_that_is_no_export_is_refused_in_plain_words(page: Any, server: Scripted) -> None:
    def conversation(**node: Any) -> dict[str, Any]:
        return {"conversations": [{"id": "x", "nodes": {"a": node}}]}

    wrong = {
        "": "it is not JSON",
        "{": "it is not JSON",
        "null": "it has no list named conversations",
        "7": "it has no list named conversations",
        "[null]": "it has no list named conversations",
        '{"conversations": {}}': "it has no list named conversations",
        '{"conversations": [null]}': "conversation 1 has no id or no nodes",
        '{"conversations": [{"id": "a", "nodes": {}}, {"id": 7, "nodes": {}}]}': "conversation 2 has no id or no nodes",
        '{"conversations": [{"id": "a", "nodes": []}]}': "conversation 1 has no id or no nodes",
        '{"conversations": [{"id": "a", "nodes": {"b": null}}]}': "conversation 1 has a message b without",
        json.dumps(conversation(id="a", parent="root", role="user", content=["x"])): "a message a without",
        json.dumps(conversation(id="a", parent=None, role="user", content="x")): "a message a without",
        json.dumps(conversation(id="a", parent="root", role="tool", content="x")): "a message a without",
    }
    for text, words in wrong.items():
        page.load(text)
        page.until(lambda: page.text("#toast span"))
        said = page.text("#toast span")
        assert said.startswith("This file cannot be imported: ") and words in said, text
        page.js("document.getElementById('toast').firstElementChild.textContent = ''")
    assert page.all("#conversations .open") == []
    odd = {"title": 7, "system": [], "sampling": [1], "chosen": "a", "created": "x"}
    page.load({"conversations": [{"id": "x", "nodes": {}, **odd}]})
    page.until(lambda: page.text("#toast span") == "Imported 1 conversation")
    assert page.ask("Well?") == "Hello."
