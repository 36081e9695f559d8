"""The chat page in real Chromium: conversations, and what becomes of them."""

from typing import Any

from scripted import Reply, Scripted


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
