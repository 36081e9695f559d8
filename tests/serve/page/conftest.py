"""Debian's Chromium, driven by selenium, and the scripted server that the page talks to."""

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
QUIET = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-default-apps",
]

if "scripted" not in sys.modules:  # tests are imported by their paths: a neighbour is found only by its own
    _spec = importlib.util.spec_from_file_location("scripted", Path(__file__).parent / "scripted.py")
    assert _spec and _spec.loader
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["scripted"] = _module
    _spec.loader.exec_module(_module)

from scripted import Scripted  # noqa: E402


@pytest.fixture
def server() -> Iterator[Scripted]:
    scripted = Scripted()
    scripted.start()
    yield scripted
    if scripted._server:
        scripted.stop()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One browser for all tests; each gets a fresh origin (its server's own port), and with it empty storage."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    downloads = tmp_path_factory.mktemp("downloads")
    preferences = {
        "download.default_directory": str(downloads),
        "profile.default_content_setting_values.automatic_downloads": 1,
    }
    options.add_experimental_option("prefs", preferences)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for flag in [*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.downloads = downloads
    yield driver
    driver.quit()


# What must never happen on the page is noted in window.__seen: alerts, and all that the policy had to forbid.
WATCH = """
window.__seen = [];
const forbidden = (e) => window.__seen.push(`policy: ${e.violatedDirective} ${e.blockedURI}`);
addEventListener("securitypolicyviolation", forbidden);
for (const name of ["alert", "confirm", "prompt", "eval"]) window[name] = () => window.__seen.push(name);
addEventListener("error", (e) => window.__seen.push(`error: ${e.message}`));
addEventListener("unhandledrejection", (e) => window.__seen.push(`rejection: ${e.reason}`));
"""


class Page:
    """The page in the browser, with the few gestures that the tests share."""

    def __init__(self, driver: Any, server: Scripted) -> None:
        self.driver, self.server = driver, server

    def open(self, ready: bool = True) -> None:
        self.driver.get(self.server.url)
        if ready:
            self.until(lambda: self.js("return document.documentElement.dataset.ready") == "yes")

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, condition: Callable[[], Any], seconds: float = 10) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, (
                f"not so within {seconds} s; the page says:\n{self.one('#page').text[-2000:]}"
            )
            time.sleep(0.03)
        return found

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        found = self.all(selector)
        assert len(found) == 1, f"{len(found)} elements match {selector}"
        return found[0]

    def text(self, selector: str) -> str:
        return str(self.js("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def button(self, label: str, within: str = "body") -> Any:
        """The last visible button of this name."""
        found = self.js(
            """const named = (b) => (b.getAttribute("aria-label") ?? b.textContent.trim()) === arguments[0];
            const shown = [...document.querySelectorAll(arguments[1] + " button")].filter((b) => b.checkVisibility());
            return shown.filter(named).at(-1)""",
            label,
            within,
        )
        assert found, f"no visible button {label!r}"
        return found

    def click(self, label: str, within: str = "body") -> None:
        self.js("arguments[0].click()", self.button(label, within))

    def send(self, text: str) -> None:
        self.one("#box").send_keys(text, "\ue007")

    def ask(self, text: str, seconds: float = 10) -> str:
        """Sends a message, waits for the end of the answer and returns its text."""
        self.send(text)
        self.until(lambda: self.js("return !document.getElementById('stop').hidden") or self.answers())
        self.done(seconds)
        return self.answers()[-1]

    def load(self, content: Any) -> None:
        """Imports a file of this content."""
        path = Path(self.driver.downloads, "in.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        self.one("#file").send_keys(str(path))

    def done(self, seconds: float = 10) -> None:
        self.until(lambda: self.js("return document.getElementById('stop').hidden"), seconds)

    def answers(self) -> list[str]:
        return list(self.js("return [...document.querySelectorAll('.assistant > .markdown')].map((e) => e.innerText)"))

    def questions(self) -> list[str]:
        return list(self.js("return [...document.querySelectorAll('.said')].map((e) => e.textContent)"))

    def seen(self) -> list[str]:
        return list(self.js("return window.__seen"))

    def requested(self) -> list[str]:
        """The addresses that the browser asked for since the last call."""
        addresses = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                addresses.append(message["params"]["request"]["url"])
        return addresses


@pytest.fixture
def page(chromium: Any, server: Scripted) -> Iterator[Page]:
    chromium.set_window_size(1280, 900)
    script = chromium.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    shown = Page(chromium, server)
    shown.requested()
    shown.open()
    yield shown
    chromium.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    seen = shown.seen()
    chromium.get("about:blank")
    assert seen == [], "something ran, was forbidden or failed on the page"
