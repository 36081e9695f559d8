"""Takes the pictures of the page in docs/: `python tests/serve/page/screenshots.py [FOLDER]`, with chromium and
chromedriver installed, and better with Debian's fonts-inter and fonts-lmodern, as on most people's desktops. A scripted
server answers, so that the pictures only change when the page does."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from scripted import Reply, Scripted
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

THINKING = """The user wants the gradient of the softmax cross-entropy. Let me write $p_i = e^{z_i} / \\sum_j e^{z_j}$.

The loss is $-\\log p_y = -z_y + \\log \\sum_j e^{z_j}$; the second term's derivative is $p_i$, the first's $-[i = y]$.
"""
ANSWER = r"""Write the loss of one example with logits $z \in \mathbb{R}^V$ and target $y$ as

$$
\mathcal{L}(z) = -\log \frac{e^{z_y}}{\sum_{j=1}^{V} e^{z_j}} = -z_y + \log \sum_{j=1}^{V} e^{z_j}.
$$

The second term's derivative is the softmax itself, so

$$
\frac{\partial \mathcal{L}}{\partial z_i} = p_i - [i = y], \qquad \boxed{\nabla_z \mathcal{L} = p - \mathrm{onehot}(y)}
$$

In PyTorch this takes three lines, without ever storing the whole Jacobian:

```python
def grad(logits, target):
    p = torch.softmax(logits, dim=-1)  # stable: subtracts the maximum
    p[torch.arange(len(target)), target] -= 1
    return p / len(target)
```

| Quantity | Shape | Cost |
|:--|:--|--:|
| logits | `(N, V)` | — |
| gradient | `(N, V)` | $O(NV)$ |
"""
PHONE = r"""A firefly's glow is **cold light**: nearly all of the reaction's energy leaves as photons.

1. *Luciferin* binds ATP.
2. The enzyme *luciferase* oxidises it.
3. The product falls back and emits at about $\lambda = 560\,\text{nm}$.

$$E = \frac{hc}{\lambda} \approx 2.2\,\text{eV}$$

> The genus *Luciola* flashes to find its mate.
"""
TITLES = [
    "Why do we warm up the learning rate?",
    "KL penalty against clipping",
    "A haiku about gradient descent",
    "¿Qué es una luciérnaga?",
]


def main(folder: Path) -> None:
    server = Scripted()
    server.start()
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        flags = (
            "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --force-device-scale-factor=2"
        )
        for flag in [*flags.split(), f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            _desktop(driver, server, folder)
            _phone(driver, server, folder)
        finally:
            driver.quit()
    server.stop()


def _ask(driver: webdriver.Chrome, text: str) -> None:
    driver.find_element("id", "box").send_keys(text, "\ue007")
    _wait(driver, "return document.querySelectorAll('.assistant').length > 0 && document.getElementById('stop').hidden")


def _wait(driver: webdriver.Chrome, script: str) -> None:
    WebDriverWait(driver, 60).until(lambda d: d.execute_script(script))


def _shoot(driver: webdriver.Chrome, path: Path, width: int, height: int, theme: str) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1.5, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    driver.execute_script("document.activeElement.blur()")
    driver.execute_async_script("const done = arguments[0]; setTimeout(() => requestAnimationFrame(done), 400)")
    driver.save_screenshot(str(path))


def _desktop(driver: webdriver.Chrome, server: Scripted, folder: Path) -> None:
    driver.set_window_size(1280, 1000)
    driver.get(server.url)
    _wait(driver, "return document.documentElement.dataset.ready")
    for title in TITLES:
        _ask(driver, title)
        driver.find_element("id", "new").click()
    server.replies = [Reply(ANSWER, THINKING, delay=0.02)]
    _ask(driver, "What is the gradient of the softmax cross-entropy, and how do I write it in PyTorch?")
    _shoot(driver, folder / "chat.png", 1280, 1000, "light")
    _shoot(driver, folder / "chat-dark.png", 1280, 1000, "dark")


def _phone(driver: webdriver.Chrome, server: Scripted, folder: Path) -> None:
    driver.find_element("id", "new").click()
    server.replies = [Reply(PHONE, THINKING, delay=0.02)]
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    _ask(driver, "How does a firefly glow?")
    _shoot(driver, folder / "chat-phone.png", 390, 844, "light")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[3] / "docs"))
