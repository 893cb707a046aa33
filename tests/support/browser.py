"""A real browser for the tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs Debian's chromium and chromium-driver",
)


@contextmanager
def running_browser(profile: Path, *flags: str) -> Iterator[Any]:
    """Start a browser without a window, with these flags besides."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--window-size=1280,900",
        f"--user-data-dir={profile}", *flags,
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def wait(condition: Callable[[], Any], seconds: float = 20) -> None:
    """Wait until the condition is true of elements that are there, and that the page has not redrawn meanwhile."""
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    redrawn = (NoSuchElementException, StaleElementReferenceException)
    WebDriverWait(None, seconds, 0.05, redrawn).until(lambda _: condition())


def texts(page: Any, selector: str) -> list[str]:
    """Return what a person reads in the elements of one moment: between two calls the page may be redrawn."""
    script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText)"
    return page.execute_script(script, selector)


def picture(page: Any, name: str) -> None:
    """Keep a screenshot where SCREENSHOTS names a folder, for a person to look at."""
    if "SCREENSHOTS" in os.environ:
        page.save_screenshot(str(Path(os.environ["SCREENSHOTS"]) / name))


# All pairs of fields, buttons and labels that cover each other, among those that are seen.
GEOMETRY = """
const seen = [...document.querySelectorAll("button, textarea, input, summary, h2, .speed")]
  .filter((one) => one.checkVisibility() && one.getBoundingClientRect().width > 1)
  .map((one) => [one.id || one.className || one.textContent, one.getBoundingClientRect()]);
const overlaps = [];
for (const [i, [name, a]] of seen.entries()) for (const [other, b] of seen.slice(i + 1)) {
  const x = Math.min(a.right, b.right) - Math.max(a.left, b.left), y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  if (x > 1 && y > 1) overlaps.push([name, other]);
}
return {
  overlaps, wide: document.documentElement.scrollWidth,
  promptBottom: document.getElementById("prompt").getBoundingClientRect().bottom,
};
"""
