"""The page in a real browser: Playwright and a Chromium, skipped where either is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

import bitskip_cpu
from bitskip_cpu.colours import palette
from tests.serve.test_process import end, start

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VIEWS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api")
    with driver.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    process, found = start("stories-24", "--threads", 1)
    try:
        yield found
        end(process)
    finally:
        process.kill()


class Seen:
    """A page, what its console said, and the hosts that it asked."""

    def __init__(self, browser: Any, address: str, view: str) -> None:
        self.page = browser.new_context(**VIEWS[view]).new_page()
        self.said: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.goto(address)
        self.page.wait_for_selector("#scale .chip")

    def write(self, tokens: int = 30, **fields: str) -> None:
        """Ask for a text and wait for its end."""
        for name, value in {"max-tokens": str(tokens), "temperature": "0", **fields}.items():
            self.page.fill(f"#{name}", value)
        self.page.click("#go")
        self.page.wait_for_selector(".t")
        self.page.wait_for_selector("#go:not([disabled])", timeout=60_000)

    def text(self, article: int = 0) -> str:
        """All that a text shows."""
        shown: str = self.page.locator(".words").nth(article).text_content()
        return shown


@pytest.mark.parametrize("view", VIEWS)
def test_a_race_of_two_depths(browser: Any, address: str, view: str) -> None:
    seen = Seen(browser, address, view)
    page = seen.page
    page.check("#race")
    seen.write(prompt="Once upon a time", temperature="0.8")
    model = bitskip_cpu.load("stories-24", threads=1, usual_cache="int8")  # as `serve` does
    how = {"max_tokens": 30, "temperature": 0.8}
    for article, depth in enumerate((18, 24)):
        alone = model.generate("Once upon a time", exit_layer=depth, **how)
        assert seen.text(article) == "Once upon a time" + alone.text
        first = page.locator(".words").nth(article).locator(".t").first
        background = first.evaluate("e => getComputedStyle(e).backgroundColor")
        wanted = palette(24)[depth - 1][0]
        assert background == "rgb({}, {}, {})".format(*bytes.fromhex(wanted[1:]))
        assert first.get_attribute("data-depth") == str(depth)
    assert page.locator(".words").nth(1).locator(".t.other").count() > 0
    assert "30 tokens" in page.locator(".figures").first.inner_text()
    token = page.locator(".t").nth(3)
    token.tap() if view == "phone" else token.hover()
    assert "of 24 blocks" in page.locator("#about").inner_text()
    assert page.locator("#about tr").count() == 5
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert seen.said == [] and seen.hosts == {urlsplit(address).netloc}


def test_by_keyboard_alone(browser: Any, address: str) -> None:
    seen = Seen(browser, address, "light")
    page = seen.page
    page.focus("#prompt")
    page.keyboard.type("Tom had a")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".t")
    page.keyboard.press("Escape")
    page.wait_for_selector("#go:not([disabled])")
    first = page.locator(".t").first
    first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.previousElementSibling.classList.contains('t')")
    assert page.locator("#about").is_visible()


def test_a_dynamic_exit_has_several_colours(browser: Any, address: str) -> None:
    seen = Seen(browser, address, "light")
    seen.page.select_option("#rule", "max")
    seen.write(tokens=60, prompt="Tom had a red")
    depths = seen.page.locator(".t").evaluate_all("all => all.map(t => t.dataset.depth)")
    assert len(set(depths)) > 1


def test_markup_in_a_prompt_is_text(browser: Any, address: str) -> None:
    seen = Seen(browser, address, "light")
    prompt = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    seen.write(tokens=5, prompt=prompt)
    assert seen.text().startswith(prompt)
    assert seen.page.locator(".words img, .words script").count() == 0
    assert seen.said == []


def test_what_is_wrong_is_said(browser: Any, address: str) -> None:
    seen = Seen(browser, address, "light")
    seen.page.fill("#prompt", "a " * 3000)
    seen.page.click("#go")
    seen.page.wait_for_selector("#problem:not([hidden])")
    assert "512" in seen.page.locator("#problem").inner_text()
