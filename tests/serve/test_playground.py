"""The page, driven in a real browser against a real server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.browser import GEOMETRY, needs_browser, picture, running_browser, texts, wait
from tests.support.serving import Running, running_server, save_teachable_model, teach

pytestmark = needs_browser

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
        "thumbs_path": str(folder / "thumbs.jsonl"), "max_context_tokens": 512,
    }  # fmt: skip
    config = folder / "config.yaml"
    config.write_text(
        yaml.safe_dump({"base_model_id": str(base), "performance": {"threads": 1, "dtype": "fp32"}, "serve": serve})
    )
    with running_server(config) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    with running_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def open_page(browser, server: Running, panes: int = 3) -> None:
    """Load the page as on a first visit."""
    browser.get(f"{server.url}/docs")  # the page itself would keep what it shows as it is left
    browser.execute_script("localStorage.clear()")
    browser.get(server.url)
    wait(lambda: len(browser.find_elements("css selector", ".pane")) == panes)


@pytest.fixture
def page(browser, server: Running):
    """Return the freshly loaded page; at the end it must have complained about nothing."""
    open_page(browser, server)
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def send(page, text: str) -> None:
    page.find_element("id", "prompt").send_keys(text)
    page.find_element("id", "send").click()


def answers(page) -> list[str]:
    return texts(page, ".turns .assistant:last-child")


def done(page) -> None:
    wait(lambda: page.find_element("id", "again").is_enabled() and page.find_element("id", "send").is_displayed())


def test_three_models_answer_and_an_answer_stays_text(page):
    send(page, QUESTION)
    done(page)
    base, sft, dpo = answers(page)
    assert sft == SFT_ANSWER
    assert dpo == EVIL_ANSWER
    assert base not in (sft, dpo)
    assert page.find_elements("css selector", ".turns img") == []
    assert page.title == "Playground: base, SFT, DPO"
    assert all("tokens" in speed for speed in texts(page, ".speed"))
    picture(page, "playground-1280.png")


def test_one_pane_stops_and_the_others_continue(page):
    page.find_element("css selector", "summary").click()
    limit = page.find_element("id", "max-tokens")
    limit.clear()
    limit.send_keys("480")
    send(page, "Tell me a story without an end")
    stops = page.find_elements("css selector", ".stop")
    wait(stops[0].is_displayed)
    stops[0].click()
    done(page)
    speeds = texts(page, ".speed")
    assert "stopped" in speeds[0]
    assert not any("stopped" in text for text in speeds[1:])


def test_blind_votes_become_preference_records(page, server, tmp_path):
    page.find_element("id", "blind").click()
    send(page, QUESTION)
    done(page)
    assert titles(page) == ["Model A", "Model B", "Model C"]
    best = answers(page).index(SFT_ANSWER)
    page.find_elements("css selector", ".best")[best].click()
    wait(lambda: "You chose sft; 2 preference records kept." in page.find_element("id", "status").text)
    assert texts(page, ".pane h2")[best] == "sft"
    votes = Path(yaml.safe_load(server.config.read_text())["serve"]["votes_path"])
    records = [json.loads(line) for line in votes.read_text(encoding="utf-8").splitlines()]
    assert [record["chosen"] for record in records] == [SFT_ANSWER] * 2
    assert EVIL_ANSWER in [record["rejected"] for record in records]
    assert {record["models"]["rejected"] for record in records} == {"base", "dpo"}
    assert records[0]["prompt"] == [{"role": "user", "content": QUESTION}]


def titles(page) -> list[str]:
    return texts(page, ".pane h2")


def names_behind(page) -> list[str]:
    """Return which model each pane really asks, as the next reload would read it."""
    page.execute_script("dispatchEvent(new Event('pagehide'))")
    return [pane["model"] for pane in json.loads(page.execute_script("return localStorage.playground"))["panes"]]


def test_a_blind_conversation_keeps_its_models_in_their_places_and_hides_speed(page):
    page.execute_script("document.getElementById('max-tokens').value = 16")
    page.find_element("id", "blind").click()
    for turn in range(4):
        send(page, f"{QUESTION} {turn}")
        done(page)
        if turn == 0:
            order = names_behind(page)
        assert names_behind(page) == order
        page.find_element("id", "again").click()
        done(page)
        assert names_behind(page) == order
        assert titles(page) == ["Model A", "Model B", "Model C"]
        assert not any(re.search(r"\d", speed) for speed in texts(page, ".speed"))
    page.find_element("id", "reveal").click()
    assert titles(page) == order
    assert all("tokens" in speed for speed in texts(page, ".speed"))
    send(page, QUESTION)
    done(page)
    assert titles(page) == order, "what is known stays known"
    assert not page.find_element("id", "verdicts").is_displayed()


def test_a_tie_keeps_no_record_and_all_bad_gives_thumbs_down(page, server):
    serve = yaml.safe_load(server.config.read_text())["serve"]
    before = Path(serve["votes_path"]).read_text() if Path(serve["votes_path"]).exists() else ""
    page.find_element("id", "blind").click()
    send(page, QUESTION)
    done(page)
    picture(page, "playground-blind.png")
    page.find_element("id", "tie").click()
    wait(lambda: "A tie" in page.find_element("id", "status").text)
    assert set(titles(page)) == {"base", "sft", "dpo"}
    page.find_element("id", "clear").click()
    send(page, QUESTION)
    done(page)
    assert titles(page) == ["Model A", "Model B", "Model C"]
    page.find_element("id", "all-bad").click()
    wait(lambda: "3 thumbs down" in page.find_element("id", "status").text)
    assert before == (Path(serve["votes_path"]).read_text() if Path(serve["votes_path"]).exists() else "")
    records = [json.loads(line) for line in Path(serve["thumbs_path"]).read_text(encoding="utf-8").splitlines()][-3:]
    assert [record["label"] for record in records] == [False] * 3
    assert {record["model"] for record in records} == {"base", "sft", "dpo"}


def test_a_thumb_is_kept_once_and_a_reload_knows_it(page, server):
    path = Path(yaml.safe_load(server.config.read_text())["serve"]["thumbs_path"])
    before = path.read_text().count("\n") if path.exists() else 0
    page.execute_script("document.getElementById('max-tokens').value = 16")
    send(page, QUESTION)
    done(page)
    page.find_elements("css selector", ".up")[1].click()
    wait(lambda: "Thumb up kept." in page.find_element("id", "status").text)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == before + 1
    record = json.loads(lines[-1])
    assert (record["completion"], record["label"], record["model"]) == (SFT_ANSWER, True, "sft")
    page.refresh()
    wait(lambda: len(page.find_elements("css selector", ".pane")) == 3)
    assert not page.find_elements("css selector", ".up")[1].is_enabled()
    assert page.find_elements("css selector", ".up")[0].is_enabled()
    send(page, QUESTION)  # what a thumb adds to a message is not sent
    done(page)
    assert page.find_elements("css selector", ".turns .error") == []


def test_panes_of_one_model_sample_with_seeds_of_their_own(page):
    page.execute_script("document.getElementById('temperature').value = 1")
    page.find_elements("css selector", ".another")[0].click()
    wait(lambda: len(page.find_elements("css selector", ".pane")) == 4)
    assert titles(page)[:2] == ["base · sample 1", "base · sample 2"]
    send(page, QUESTION)
    done(page)
    page.find_elements("css selector", ".regenerate")[0].click()
    done(page)
    first, second, *_ = answers(page)
    page.execute_script("dispatchEvent(new Event('pagehide'))")
    panes = json.loads(page.execute_script("return localStorage.playground"))["panes"]
    assert [pane["sent"]["seed"] for pane in panes] == [4, 1, 0, 0]
    assert first != second
    page.find_elements("css selector", ".close")[1].click()
    wait(lambda: titles(page) == ["base", "sft", "dpo"])


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844), (360, 640)])
def test_no_field_covers_another_and_the_message_field_stays_in_reach(page, width, height):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    send(page, QUESTION)
    done(page)
    for opened in (False, True):
        if opened:
            page.find_element("css selector", "summary").click()
        found = page.execute_script(GEOMETRY)
        assert found["wide"] <= width
        assert found["overlaps"] == []
        if not opened:
            assert found["promptBottom"] <= height
    picture(page, f"playground-{width}.png")
    page.find_element("css selector", "summary").click()
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_is_lost_on_a_reload(page, server):
    send(page, QUESTION)
    done(page)
    before = answers(page)
    page.find_element("id", "prompt").send_keys("half a question")
    page.find_element("css selector", "summary").click()
    seed = page.find_element("id", "seed")
    seed.clear()
    seed.send_keys("7")
    page.refresh()
    wait(lambda: len(page.find_elements("css selector", ".pane")) == 3)
    assert answers(page) == before
    assert page.find_element("id", "prompt").get_attribute("value") == "half a question"
    assert page.find_element("id", "seed").get_attribute("value") == "7"


def test_models_come_and_go_and_one_pane_asks_again(page):
    boxes = page.find_elements("css selector", "#models input")
    page.execute_script("arguments[0].click()", boxes[0])
    wait(lambda: len(page.find_elements("css selector", ".pane")) == 2)
    send(page, QUESTION)
    done(page)
    assert answers(page) == [SFT_ANSWER, EVIL_ANSWER]
    page.find_element("css selector", ".regenerate").click()
    done(page)
    assert answers(page) == [SFT_ANSWER, EVIL_ANSWER]
    page.execute_script("arguments[0].click()", boxes[0])
    wait(lambda: len(page.find_elements("css selector", ".pane")) == 3)


def test_what_is_copied_was_really_sent(page, server, tmp_path):
    """The copied commands are run, and give the answer that the pane shows."""
    page.execute_script("navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }")
    page.execute_script('document.getElementById(\'system\').value = "It\'s \\"true\\" & $HOME"')
    send(page, QUESTION)
    done(page)
    shown = answers(page)[1]
    page.execute_script("document.getElementById('temperature').value = 2")  # after it was sent
    for kind, command in (("curl", ["bash"]), ("python", [sys.executable])):
        page.find_elements("css selector", f".{kind}")[1].click()
        wait(lambda: page.execute_script("return window.copied"))
        text = page.execute_script("const text = window.copied; window.copied = null; return text")
        done_run = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
        said = done_run.stdout
        if kind == "curl":
            events = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
            said = "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"])
        assert said == shown, done_run.stderr


def render(page, script: str, *arguments: str) -> str:
    """Return the HTML that one of the page's modules makes of texts."""
    return page.execute_async_script(
        f"const done = arguments[arguments.length - 1]; const made = document.createElement('div');"
        f"import('/{script}').then((m) => {{ made.append(...m.{script[:-3]}(...[...arguments].slice(0, -1)));"
        f" done(made.innerHTML); }});",
        *arguments,
    )


def test_markdown_becomes_nodes_and_html_stays_text(page):
    text = "# Title\n\nA **bold** and `x < 1`.\n\n- one\n- two\n\n```python\nprint('<b>')\n```\n\n<b>no</b> [l](javascript:x)"
    made = render(page, "markdown.js", text)
    assert "<h3>Title</h3>" in made
    assert "<strong>bold</strong>" in made
    assert "<code>x &lt; 1</code>" in made
    assert "<ul><li>one</li><li>two</li></ul>" in made
    assert "<pre><code>print('&lt;b&gt;')</code></pre>" in made
    assert "&lt;b&gt;no&lt;/b&gt; l (javascript:x)" in made
    assert not re.search(r"<(a|b|img|script)\b", made)


def test_differences_mark_words(page):
    made = render(page, "differences.js", "the red fox <b>", "the brown fox")
    assert made == "the <del>brown</del><ins>red</ins> fox<ins> &lt;b&gt;</ins>"


def test_the_page_loads_nothing_from_elsewhere(server):
    answer = httpx.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    for path in (
        "",
        "/playground.js",
        "/markdown.js",
        "/differences.js",
        "/playground.css",
        "/votes",
        "/docs",
        "/docs.css",
    ):
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
