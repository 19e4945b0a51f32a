"""Shared code of the page tests: a real Chromium, and the checks of every page."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, sync_playwright

SECOND_HOST = "wheels.example"
"`chromium` resolves this host to this machine. So a test can use plain http with another host, like a colleague's browser."

_WIDEST = """width => [...document.querySelectorAll("body *")].filter(
    item => item.getBoundingClientRect().right > width && !item.closest(".scroll, pre, .skip, .hidden")
).slice(0, 5).map(item => item.outerHTML.slice(0, 120))"""
"JavaScript that lists elements wider than the page."


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start Chromium. It requires nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # playwright's event loop warns at its end
        with sync_playwright() as play:
            arguments = ["--no-sandbox", f"--host-resolver-rules=MAP {SECOND_HOST} 127.0.0.1"]
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
            yield browser
            browser.close()


def check_page(browser: Browser, address: str, *, scheme: str = "light", width: int = 1200, axe: bool = True) -> None:
    """Check that no element is too wide, everything loads, the console is silent, and axe reports nothing.

    Raises:
        AssertionError: a check failed.
    """
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, bypass_csp=axe)  # type: ignore[arg-type]
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("requestfailed", lambda request: errors.append(request.url))
    answer = page.goto(address)
    assert answer is not None
    assert answer.status == 200
    if axe:
        results = Axe().run(page)
        assert results.violations_count == 0, results.generate_report()
    page.evaluate("for (const folded of document.querySelectorAll('details')) folded.open = true")
    if page.evaluate("document.documentElement.scrollWidth") > width:
        widest = page.evaluate(_WIDEST, width)
        raise AssertionError(f"{address} scrolls sideways at {width}: {widest}")
    assert [text for text in errors if "favicon" not in text] == []
    context.close()
