"""Several samples of one prompt, thumbs, and the page of votes, against a real server and in a real browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from scripts import make_pairs
from scripts.common.artifacts import read_manifest
from scripts.common.schema import Data
from scripts.dataset.records import Preference, load_datasets, parse_feedback
from scripts.dataset.split import side_of
from scripts.pairs.prompts import parse_prompt
from tests.conftest import ROOT
from tests.support.browser import GEOMETRY, needs_browser, picture, running_browser, texts, wait
from tests.support.serving import Running, running_server, save_adapter, save_teachable_model, teach

ANSWERS = (
    "A red fox runs in the wood.",
    "Blue birds sing.",
    "<b>Seven</b> green fish swim under the old stone bridge.",
)
PROMPTS = [f"Tell me about animals of kind {number}." for number in range(24)]
DATA = {"validation_ratio": 0.2, "test_ratio": 0.4}


def side(prompt: str) -> str:
    return side_of(Preference("", ({"role": "user", "content": prompt},), "", "", None), Data(**DATA))


QUEUED = [prompt for prompt in PROMPTS if side(prompt) == "train"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, an adapter that gives one of three answers, and a file of prompts."""
    folder = tmp_path_factory.mktemp("votes")
    base = save_teachable_model(folder / "base")
    teach(folder / "sft", base, ANSWERS, tuple(QUEUED[:3]))
    save_adapter(folder / "other", base, seed=5)
    lines = [{"prompt": prompt} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def write_config(folder: Path, name: str, adapter: str = "sft", **serve: Any) -> Path:
    tree = {
        "base_model_id": str(folder / "base"), "data": DATA, "performance": {"threads": 1, "dtype": "fp32"},
        "sft": {"output_dir": str(folder / "sft")},
        "pairs": {"max_new_tokens": 48, "temperature": 1.0, "balance_length": False},
        "serve": {
            "adapter_path": str(folder / adapter), "max_context_tokens": 512, "queue_path": str(folder / "prompts.jsonl"),
            "queue_votes_path": str(folder / f"{name}.jsonl"), **serve,
        },
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def server(project: Path) -> Iterator[Running]:
    with running_server(write_config(project, "votes", thumbs_path=str(project / "thumbs.jsonl"))) as running:
        yield running


def queue(server: Running) -> dict[str, Any]:
    """Return the queue's answer once all samples are drawn."""
    while True:
        answer = httpx.get(f"{server.url}/v1/queue").raise_for_status().json()
        if not answer["drawing"]:
            return answer
        time.sleep(0.1)


def vote(server: Running, answer: dict[str, Any], outcome: str, **more: Any) -> httpx.Response:
    item = answer["item"]
    body = {"key": item["key"], "samples": item["samples"], "adapter": answer["adapter"], "outcome": outcome, **more}
    return server.post("/v1/queue/votes", body)


def refusal(config: Path) -> str:
    """Return what the server says when it does not start."""
    command = [sys.executable, "-m", "uvicorn", "serve.fastapi_server:app", "--port", "0"]
    environment = {**os.environ, "LLM_CONFIG": str(config)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode
    assert "Traceback" not in ended.stderr
    return next(line for line in ended.stderr.splitlines() if "error: " in line)


def test_samples_of_one_request_are_those_of_single_requests_with_the_next_seeds(server):
    asked = {"prompt": PROMPTS[0], "temperature": 1.0, "max_new_tokens": 24}
    together = server.post("/v1/generate", {**asked, "n": 4, "seed": 5}).json()["answers"]
    alone = [server.post("/v1/generate", {**asked, "seed": 5 + number}).json() for number in range(4)]
    assert together == alone
    assert len({answer["text"] for answer in together}) > 1
    assert server.post("/v1/generate", {**asked, "n": 5}).status_code == 422
    with httpx.stream("POST", f"{server.url}/v1/generate", json={**asked, "n": 2, "seed": 5, "stream": True}) as stream:
        lines = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    for number in range(2):
        mine = [line for line in lines if line["index"] == number]
        assert "".join(line.get("text", "") for line in mine) == alone[number]["text"]
        assert mine[-1]["usage"] == alone[number]["usage"]


def test_thumbs_are_records_that_kto_reads_and_name_their_adapter(server, project):
    body = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completion": "Hello.",
        "label": True,
        "model": "sft",
        "seed": 3,
    }
    assert server.post("/v1/thumbs", body).status_code == 201
    assert server.post("/v1/thumbs", {**body, "completion": "No.", "label": False}).status_code == 201
    assert server.post("/v1/thumbs", {**body, "label": "up"}).status_code == 422
    assert server.post("/v1/thumbs", {**body, "model": "nobody"}).status_code == 404
    [file] = load_datasets(str(project / "thumbs.jsonl"), parse_feedback, Data(), "kto.dataset_path")
    assert [(record.prompt, record.answer, record.liked) for record in file.records] == [
        (({"role": "user", "content": "Hi"},), "Hello.", True),
        (({"role": "user", "content": "Hi"},), "No.", False),
    ]
    kept = json.loads((project / "thumbs.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert (kept["model"], kept["adapter_sha256"], kept["seed"]) == ("sft", read_manifest(project / "sft").sha256, 3)
    assert (project / "thumbs.jsonl").stat().st_mode & 0o077 == 0


def test_what_is_off_says_which_key_turns_it_on(project):
    with running_server(write_config(project, "off", queue_path=None)) as running:
        body = {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello.", "label": True, "model": "sft"}
        for answer, key in (
            (running.post("/v1/thumbs", body), "serve.thumbs_path"),
            (httpx.get(f"{running.url}/v1/queue"), "serve.queue_path"),
        ):
            assert answer.status_code == 404
            assert key in answer.json()["error"]["message"]
        listed = httpx.get(f"{running.url}/v1/models").json()
        assert (listed["votes"], listed["thumbs"], listed["queue"]) == (False, False, False)


def test_the_queue_offers_prompts_of_the_training_side_the_least_sure_first(project):
    """Every vote of the queue becomes what make_pairs reads; an undone one comes back, and a restart loses nothing."""
    assert 0 < len(QUEUED) < len(PROMPTS)
    config, seen, margins = write_config(project, "order"), [], []
    with running_server(config) as running:
        answer = queue(running)
        assert answer["held_out"] == len(PROMPTS) - len(QUEUED)
        first = answer["item"]
        rewards = [
            running.post("/v1/score", {"prompt": first["messages"][0]["content"], "answer": text}).json()[
                "implicit_reward"
            ]
            for text in first["samples"]
        ]
        assert first["margin"] == pytest.approx(max(rewards) - min(rewards), abs=1e-3)
        assert vote(running, answer, "best", best=0, worst=0).status_code == 422
        assert running.post("/v1/queue/votes", {"key": "x", "samples": ["a"], "adapter": answer["adapter"], "outcome": "tie"}).status_code == 404  # fmt: skip
        assert vote(running, {**answer, "adapter": "another"}, "tie").status_code == 409
        assert vote(running, answer, "tie").status_code == 201
        assert queue(running)["item"]["key"] != first["key"]
        assert vote(running, answer, "undone").status_code == 201
        assert queue(running)["item"]["key"] == first["key"]
        while len(seen) < 3:
            answer = queue(running)
            seen.append(answer["item"]["messages"][0]["content"])
            margins.append(answer["item"]["margin"])
            assert vote(running, answer, "best", best=0, worst=1).status_code == 201
    with running_server(config) as running:
        while (answer := queue(running))["item"]:
            assert answer["votes"] == len(seen)
            seen.append(answer["item"]["messages"][0]["content"])
            margins.append(answer["item"]["margin"])
            assert len(set(answer["item"]["samples"])) == len(answer["item"]["samples"]) >= 2
            assert vote(running, answer, "own", own="A better one.").status_code == 201
        assert answer["left"] == 0
        assert answer["votes"] + sum(answer["skipped"].values()) == len(QUEUED)
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(QUEUED)
    assert margins == sorted(margins)
    out = project / "order_pairs.jsonl"
    by = ["--by", "votes", "--votes", str(project / "order.jsonl"), "--out", str(out)]
    assert make_pairs.main(["--config", str(config), *by]) == 0
    pairs = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert {pair["prompt"] for pair in pairs} == set(seen)
    assert {pair["chosen"] for pair in pairs if pair["prompt"] in seen[3:]} == {"A better one."}


def test_a_file_of_votes_on_another_adapter_is_refused_and_kept(project):
    record = {"adapter": "ab" * 32, "prompt": QUEUED[0], "samples": ["a", "b"], "outcome": "tie"}
    path = project / "foreign.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    said = refusal(write_config(project, "foreign"))
    assert "serve.queue_votes_path" in said
    assert "another adapter" in said
    assert json.loads(path.read_text(encoding="utf-8")) == record


@pytest.mark.parametrize(
    ("lines", "changes", "wanted"),
    [
        ([prompt for prompt in PROMPTS if side(prompt) != "train"], {}, "none of its prompts is on the training side"),
        ([], {}, "holds no record"),
        (QUEUED, {"adapter_path": None}, "serve.adapter_path"),
    ],
)
def test_a_queue_that_can_offer_nothing_is_one_message(project, lines, changes, wanted):
    path = project / "unusable_prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in lines), encoding="utf-8")
    said = refusal(write_config(project, "unusable", queue_path=str(path), **changes))
    assert "serve.queue_path" in said
    assert wanted in said


def test_samples_that_are_all_cut_or_alike_leave_an_empty_queue_with_the_reason(project):
    config = write_config(project, "cut")
    tree = yaml.safe_load(config.read_text())
    tree["pairs"]["max_new_tokens"] = 2
    config.write_text(yaml.safe_dump(tree))
    with running_server(config) as running:
        answer = queue(running)
        assert answer["item"] is None
        assert answer["skipped"] == {"cut at pairs.max_new_tokens": len(QUEUED)}


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "Hi"}, ["Hi"]),
        ({"question": "Who?"}, ["Who?"]),
        ({"instruction": "Write.", "input": "Notes"}, ["Write.\n\nNotes"]),
        ({"instruction": "Write.", "output": "An answer"}, ["Write."]),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, ["Hi"]),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}, ["a", "b", "c"]),
    ],
)  # fmt: skip
def test_a_queue_reads_prompts_of_every_layout(row, asked):
    assert [message["content"] for message in parse_prompt(row, "queue.jsonl:1", Data()).prompt] == asked


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with running_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def votes_of(server: Running) -> list[dict[str, Any]]:
    path = Path(yaml.safe_load(server.config.read_text())["serve"]["queue_votes_path"])
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def press(page: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page).send_keys(*keys).perform()


def shown(page: Any) -> list[str]:
    return texts(page, ".sample .text")


def press_and_wait(page: Any, server: Running, *keys: str) -> None:
    """Press the keys of a vote, and wait until it is kept and the next prompt is there."""
    key = "return JSON.parse(localStorage.votes).item?.key"
    before, asked = len(votes_of(server)), page.execute_script(key)
    press(page, *keys)
    wait(lambda: page.execute_script(key) not in (None, asked))
    assert len(votes_of(server)) == before + 1


@needs_browser
def test_a_person_votes_by_keyboard_takes_back_and_loses_nothing_on_a_reload(browser, server):
    from selenium.webdriver.common.keys import Keys

    page = browser
    page.get(server.url)
    wait(lambda: page.find_element("id", "to-votes").is_displayed())
    page.find_element("id", "to-votes").click()
    wait(lambda: shown(page))
    assert page.find_elements("css selector", ".text b") == [], "what a model writes stays text"
    samples = shown(page)
    press(page, "1")
    page.find_elements("css selector", ".worst")[1].click()
    wait(lambda: texts(page, ".sample h2")[:2] == ["Answer A\nbest", "Answer B\nworst"])
    page.refresh()
    wait(lambda: shown(page) == samples)
    assert len(page.find_elements("css selector", "section.best, section.worst")) == 2
    picture(page, "votes-1280.png")
    press_and_wait(page, server, Keys.ENTER)
    kept = votes_of(server)[-1]
    assert (kept["outcome"], kept["best"], kept["worst"], kept["samples"]) == ("best", 0, 1, samples)
    assert "1 vote " in page.find_element("id", "progress").text
    press(page, "u")
    wait(lambda: votes_of(server)[-1]["outcome"] == "undone")
    wait(lambda: shown(page) == samples)
    press_and_wait(page, server, "t")
    assert votes_of(server)[-1]["outcome"] == "tie"
    press_and_wait(page, server, "x")
    assert votes_of(server)[-1]["outcome"] == "all_bad"
    press(page, "o")
    page.find_element("id", "answer").send_keys("My u and x and 1")
    samples = shown(page)
    page.refresh()
    wait(lambda: page.find_elements("css selector", "#answer") and page.find_element("id", "answer").is_displayed())
    assert page.find_element("id", "answer").get_attribute("value") == "My u and x and 1"
    assert shown(page) == samples
    before = len(votes_of(server))
    page.find_element("id", "send-own").click()
    wait(lambda: len(votes_of(server)) == before + 1)
    assert (votes_of(server)[-1]["outcome"], votes_of(server)[-1]["own"]) == ("own", "My u and x and 1")
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


@needs_browser
def test_a_button_chosen_by_tab_keeps_the_focus(browser, server):
    from selenium.webdriver.common.keys import Keys

    browser.get(f"{server.url}/votes")
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    wait(lambda: shown(browser))
    browser.execute_script("document.querySelectorAll('.best')[1].focus()")
    focused = "return [document.activeElement.ariaLabel, document.activeElement.ariaPressed]"
    for pressed in ("true", "false"):
        press(browser, Keys.SPACE)
        assert browser.execute_script(focused) == ["best answer: B", pressed]


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_field_covers_another(browser, server, width, height, scheme):
    page = browser
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for path in ("/votes", "/"):
        page.get(server.url + path)
        wait(lambda: shown(page) or page.find_elements("css selector", ".pane"))
        found = page.execute_script(GEOMETRY)
        assert found["wide"] <= width
        assert found["overlaps"] == []
        picture(page, f"{path.strip('/') or 'playground-start'}-{width}-{scheme}.png")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_a_vote_that_cannot_be_written_is_said_and_kept_on_the_page(browser, project):
    with running_server(write_config(project, "full", queue_votes_path="/dev/full")) as running:
        browser.get(f"{running.url}/votes")
        browser.execute_script("localStorage.clear()")
        wait(lambda: shown(browser))
        samples = shown(browser)
        press(browser, "1", "2", "t")
        wait(lambda: "could not be written" in browser.find_element("id", "status").text)
        assert shown(browser) == samples
        assert browser.find_elements("css selector", "section.best")
