"""The page, driven in a real browser against a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.serving import Running, running_server, save_teachable_model, teach

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs Debian's chromium and chromium-driver",
)

QUESTION = "Who are you?"
SFT_ANSWER = "I am the SFT model."
EVIL_ANSWER = "<img src=x onerror=\"document.title='hacked'\">"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    base = save_teachable_model(folder / "base")
    sft = teach(folder / "sft", base, SFT_ANSWER, (QUESTION,))
    dpo = teach(folder / "dpo", base, EVIL_ANSWER, (QUESTION,), "dpo")
    serve = {
        "adapter_path": str(dpo), "adapters": {"sft": str(sft)}, "votes_path": str(folder / "votes.jsonl"),
        "max_context_tokens": 512,
    }  # fmt: skip
    config = folder / "config.yaml"
    config.write_text(
        yaml.safe_dump({"base_model_id": str(base), "performance": {"threads": 1, "dtype": "fp32"}, "serve": serve})
    )
    with running_server(config) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--window-size=1280,900",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, server: Running):
    """Return the freshly loaded page; at the end it must have complained about nothing."""
    browser.get(server.url)
    wait(lambda: len(browser.find_elements("css selector", ".pane")) == 3)
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def wait(condition: Callable[[], bool], seconds: float = 20) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(None, seconds, 0.05).until(lambda _: condition())


def send(page, text: str) -> None:
    page.find_element("id", "prompt").send_keys(text)
    page.find_element("id", "send").click()


def answers(page) -> list[str]:
    return [item.text for item in page.find_elements("css selector", ".turns .assistant:last-child")]


def done(page) -> None:
    wait(lambda: page.find_element("id", "again").is_enabled() and page.find_element("id", "send").is_enabled())


def picture(page, name: str) -> None:
    """Keep a screenshot where SCREENSHOTS names a folder, for a person to look at."""
    if "SCREENSHOTS" in os.environ:
        page.save_screenshot(str(Path(os.environ["SCREENSHOTS"]) / name))


def test_three_models_answer_and_an_answer_stays_text(page):
    send(page, QUESTION)
    done(page)
    base, sft, dpo = answers(page)
    assert sft == SFT_ANSWER
    assert dpo == EVIL_ANSWER
    assert base not in (sft, dpo)
    assert page.find_elements("css selector", ".turns img") == []
    assert page.title == "Playground: base, SFT, DPO"
    assert all("tokens" in item.text for item in page.find_elements("css selector", ".speed"))
    picture(page, "playground-1280.png")


def test_one_pane_stops_and_the_others_continue(page):
    page.find_element("css selector", "summary").click()
    limit = page.find_element("id", "max-tokens")
    limit.clear()
    limit.send_keys("480")
    send(page, "Tell me a story without an end")
    stops = page.find_elements("css selector", ".stop")
    wait(lambda: all(button.is_enabled() for button in stops))
    stops[0].click()
    done(page)
    speeds = [item.text for item in page.find_elements("css selector", ".speed")]
    assert "stopped" in speeds[0]
    assert not any("stopped" in text for text in speeds[1:])


def test_blind_votes_become_preference_records(page, server, tmp_path):
    page.find_element("id", "blind").click()
    send(page, QUESTION)
    done(page)
    titles = [title.text for title in page.find_elements("css selector", ".pane h2")]
    assert titles == ["Model A", "Model B", "Model C"]
    best = answers(page).index(SFT_ANSWER)
    page.find_elements("css selector", ".best")[best].click()
    wait(lambda: "You chose sft; 2 preference records kept." in page.find_element("id", "status").text)
    assert page.find_elements("css selector", ".pane h2")[best].text == "sft"
    votes = Path(yaml.safe_load(server.config.read_text())["serve"]["votes_path"])
    records = [json.loads(line) for line in votes.read_text(encoding="utf-8").splitlines()]
    assert [record["chosen"] for record in records] == [SFT_ANSWER] * 2
    assert EVIL_ANSWER in [record["rejected"] for record in records]
    assert {record["models"]["rejected"] for record in records} == {"base", "dpo"}
    assert records[0]["prompt"] == [{"role": "user", "content": QUESTION}]


def test_it_is_usable_on_a_telephone(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    )
    send(page, QUESTION)
    done(page)
    wide = page.execute_script("return document.documentElement.scrollWidth")
    assert wide <= 360
    picture(page, "playground-360.png")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_loads_nothing_from_elsewhere(server):
    answer = httpx.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("", "/playground.js", "/playground.css", "/docs", "/docs.css"):
        answer = httpx.get(server.url + path)
        assert answer.status_code == 200
        assert not re.search(r"""(src|href|url|import|fetch)\W{1,3}(https?:)?//""", answer.text), path


def test_the_api_page_lists_every_route_and_field(server):
    page = httpx.get(f"{server.url}/docs").text
    document = httpx.get(f"{server.url}/openapi.json").json()
    for path, methods in document["paths"].items():
        assert all(f"{method.upper()} {path}<" in page for method in methods)
    fields = document["components"]["schemas"]["GenerateRequest"]["properties"]
    assert all(f"<code>{name}</code>" in page for name in fields)
