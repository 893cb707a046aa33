"""Make the pictures of the READMEs, report and playground, from the demo's real output.

Reads the report in `eval.output_dir` and the adapters that `serve` names; writes eval/report.png and serve/playground.png,
or with --all both pages in two widths, light and dark, to another folder. Needs requirements.txt, chromium and chromedriver.

    python -m scripts.make_pictures --config configs/demo.yaml
"""

from __future__ import annotations

import argparse
import io
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.benchmarks.running_server import started
from eval.report import shortest_sample
from scripts.common.config import LoadedConfig, add_config_arguments, load_config
from scripts.common.errors import UserError, entry_point, listing
from scripts.common.paths import ROOT
from scripts.common.run import set_up_logging

log = logging.getLogger(__name__)

REPORT, PLAYGROUND = Path("eval/report.png"), Path("serve/playground.png")
WIDTHS = {"1280": (1280, 900), "390": (390, 844)}  # a window, and a phone
COLOURS = 128  # of a palette: pages of text look the same, and take a third of the bytes
LONGEST_WAIT = 120  # seconds for the server, and for an answer
NOTHING_KEPT = "Its picture is not kept. Correct `serve` in the configuration, and start again."


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="write every width and scheme there, to look at")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Open the report, ask the playground one question, and keep what the browser shows."""
    arguments = build_parser().parse_args(argv)
    set_up_logging()
    config = load_config(arguments.config, arguments.overrides)
    comparison = Path(config.values.eval.output_dir)
    if not (comparison / "report.html").is_file():
        raise UserError(f"eval.output_dir: {comparison} holds no report.html. Run `make demo` first.")
    with browser() as driver:
        driver.get((comparison / "report.html").resolve().as_uri())
        keep(driver, ROOT / REPORT, arguments.all)
        with server(config) as url:
            driver.get(url)
            ask(driver, shortest_sample(comparison)["prompt"])
            driver.get(url)  # a reload keeps the conversation
            check_answers(driver)
            keep(driver, ROOT / PLAYGROUND, arguments.all)
    return 0


@contextmanager
def browser() -> Iterator[Any]:
    """Start a browser without a window."""
    from selenium import webdriver

    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        raise UserError("found no chromium or no chromedriver. Debian has them as chromium and chromium-driver.")
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(programs[0])
        for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
        try:
            yield driver
        finally:
            driver.quit()


@contextmanager
def server(config: LoadedConfig) -> Iterator[str]:
    """Serve the models of the configuration, and yield the address of the playground."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(config.to_yaml(), encoding="utf-8", newline="\n")
        with started("serve.fastapi_server:app", path) as (url, *_):
            yield url


def ask(driver: Any, prompt: str) -> None:
    """Type a question into the playground and wait for all answers.

    Raises: UserError where a model gives none.
    """
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(driver, LONGEST_WAIT)
    try:
        wait.until(lambda page: page.find_element("id", "status").text != "Loading…")
        panes_of(driver)
        driver.execute_script("document.getElementById('prompt').value = arguments[0]", prompt)
        driver.find_element("id", "send").click()
        time.sleep(1)
        wait.until(lambda page: page.find_element("id", "again").is_enabled())
    except TimeoutException:
        raise UserError(f"the playground is not done after {LONGEST_WAIT} s. {NOTHING_KEPT}") from None
    check_answers(driver)


def panes_of(driver: Any) -> list[Any]:
    """Return the panes of the models.

    Raises: UserError with what the page says where there are none.
    """
    panes = driver.find_elements("css selector", ".pane")
    if not panes:
        said = driver.find_element("tag name", "body").text.replace("\n", " ")[:200]
        raise UserError(f"the playground shows no model; it says: {said} {NOTHING_KEPT}")
    return list(panes)


def check_answers(driver: Any) -> None:
    """Make sure that every model has answered, so that no picture shows an error.

    Raises: UserError with what each of the others says.
    """
    silent = []
    for pane in panes_of(driver):
        failed = pane.find_elements("css selector", ".turns .error")
        answers = pane.find_elements("css selector", ".turns .assistant")
        if failed or not answers or not answers[-1].text.strip():
            silent.append(
                f"{pane.find_element('tag name', 'h2').text}: {failed[0].text if failed else 'an empty answer'}"
            )
    if silent:
        raise UserError(listing("the playground has no answer from", silent, NOTHING_KEPT))


def keep(driver: Any, picture: Path, folder: Path | None) -> None:
    """Keep the first screen of a page for a README; with a folder, the whole page in every width and scheme."""
    if folder is None:
        shoot(driver, WIDTHS["1280"], "light", picture)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for width, size in WIDTHS.items():
        for scheme in ("light", "dark"):
            shoot(driver, size, scheme, folder / f"{picture.stem}-{width}-{scheme}.png")


def shoot(driver: Any, size: tuple[int, int], scheme: str, path: Path) -> None:
    """Save what a window of this size shows in a light or dark scheme."""
    from PIL import Image

    width, height = size
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < height},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    time.sleep(1)
    Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    log.info("%s: %.0f kB", path, path.stat().st_size / 1e3)


if __name__ == "__main__":
    sys.exit(main())
