"""A headless Chromium for test_tour.py: Debian's `chromium`, driven by playwright, and axe-core."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def browser() -> Iterator[Any]:
    """A browser, or a skip with the reason."""
    pytest.importorskip("playwright", reason="needs playwright: pip install 'minilm[test]'")
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            yield launched
        finally:
            launched.close()


def axe() -> str:
    """The source of axe-core, or a skip with the reason."""
    package = "axe_playwright_python"
    pytest.importorskip(package, reason="needs axe-core: pip install 'minilm[test]'")
    return resources.files(package).joinpath("axe.min.js").read_text(encoding="utf-8")


def context(browser: Any, width: int = 1440, **options: Any) -> Any:
    """A window without a network, in which pages are opened in tabs.

    Args:
        browser: See `browser`.
        width: Of the window, in pixels; below 500 it is that of a phone.
        options: As of playwright's `new_context`.
    """
    return browser.new_context(
        viewport={"width": width, "height": 900},
        is_mobile=width < 500,
        has_touch=True,
        offline=True,
        **options,
    )


class Page:
    """The page in a tab of its own, and what the tests do to it."""

    def __init__(self, context: Any, path: Path) -> None:
        self.url = path.as_uri()
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.tab = context.new_page()
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("console", lambda message: self.messages.append(message.text))
        self.tab.on("pageerror", lambda error: self.messages.append(str(error)))
        self.tab.on("dialog", lambda dialog: self.messages.append(dialog.message))

    def open(self, fragment: str = "") -> None:
        self.tab.goto("about:blank")  # else a new fragment alone would load nothing
        self.tab.goto(self.url + fragment)

    def run(self, function: str, argument: Any = None) -> Any:
        """Call a JavaScript function: `(x) => ...`."""
        return self.tab.evaluate(function, argument)

    def text(self, selector: str) -> str:
        found: str = self.tab.inner_text(selector)
        return found

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.tab.locator(selector).all_text_contents()
        return found

    def count(self, selector: str) -> int:
        found: int = self.tab.locator(selector).count()
        return found

    def hover(self, selector: str) -> None:
        self._show(selector)
        self.tab.hover(selector)

    def leave(self) -> None:
        """Move the pointer to where nothing reacts to it."""
        self.tab.mouse.move(1, 400)

    def click(self, selector: str) -> None:
        self._show(selector)
        self.tab.click(selector)

    def tap(self, selector: str) -> None:
        self._show(selector)
        self.tab.tap(selector)

    def press(self, *keys: str) -> None:
        """Keys by their names: "Tab", "ArrowDown", "Enter"."""
        for key in keys:
            self.tab.keyboard.press(key)

    def focus(self) -> dict[str, Any]:
        """What has the focus, and how thick the line around it is."""
        found: dict[str, Any] = self.run(
            """() => {
              const x = document.activeElement;
              const style = getComputedStyle(x.matches('.radios input') ? x.nextElementSibling : x);
              const around = (name) => (x.closest(name) ? x.closest(name).id : '');
              return {
                tag: x.tagName, id: x.id, name: x.name || '', text: x.textContent.slice(0, 40),
                table: around('table'), section: around('section'), ...x.dataset,
                href: x.getAttribute('href') || '',
                outline: style.outlineStyle === 'none' ? 0 : parseFloat(style.outlineWidth),
              };
            }"""
        )
        return found

    def _show(self, selector: str) -> None:
        """To the middle of the window, clear of the bar that stays."""
        place = "(x) => x.scrollIntoView({block: 'center', behavior: 'instant'})"
        self.tab.locator(selector).first.evaluate(place)
