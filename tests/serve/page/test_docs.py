"""The page at /docs in real Chromium: what it tells, where it works, and how it gets by a key."""

from typing import Any

from scripted import Scripted

LIMITS = {
    "any": {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1},
    "few": {"type": "integer", "minimum": 0, "maximum": 20},
}
API = {
    "info": {"title": "Glow", "version": "1", "description": "An API."},
    "components": {"schemas": {"Asked": {"type": "object", "properties": LIMITS}}},
    "paths": {
        "/v1/things": {
            "post": {
                "tags": ["things"],
                "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Asked"}}}},
                "responses": {"200": {"content": {}}},
            }
        }
    },
}


def test_the_description_is_shown_below_a_path_too(page: Any, server: Scripted) -> None:
    server.description = API
    for path in ("docs", "below/docs"):
        page.requested()
        page.driver.get(server.url + path)
        page.until(lambda: "/v1/things" in page.text("#routes"))
        begin = server.url + path.removesuffix("docs")
        assert all(address.startswith(begin) for address in page.requested())
        assert page.js("return document.querySelector('link[rel=icon]').href") == begin + "static/logo.svg"
        rows = page.js("return [...document.querySelectorAll('td:last-child')].map((e) => e.textContent)")
        assert rows == ["", "at least 0, at most 20"]  # the greatest whole number of all is no limit worth telling


def test_the_description_behind_a_key(page: Any, server: Scripted) -> None:
    server.description, server.key = API, "firefly"
    page.driver.get(server.url + "docs")
    page.until(lambda: "asks for a key" in page.text("#routes"))
    page.one("#key").send_keys("wrong", "\ue007")
    page.until(lambda: "This key was not accepted." in page.text("#routes"))
    page.one("#key").send_keys("firefly", "\ue007")
    page.until(lambda: "/v1/things" in page.text("#routes"))
    page.driver.refresh()
    page.until(lambda: "/v1/things" in page.text("#routes"))  # the tab has the key, as the chat page then has
    page.open()
    assert page.text("#model") == "glow-1b" and not page.one("#login").is_displayed()
