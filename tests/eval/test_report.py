"""The report is one file that needs nothing else, shows texts as text, and works in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval.metrics import Difference
from eval.report import (
    Report,
    axis,
    marked_answers,
    number,
    p_value,
    read_report,
    reading,
    render_report,
    word_differences,
    write_report,
)

HOSTILE = [
    "</script><script>window.attacked = 1</script>",
    '<img src=x onerror="window.attacked = 1"><b>bold</b> &amp; "quoted" \'single\'',
    "{{ 7 * 7 }} {% raw %} ${x} \\u003c <!-- comment",
    "שלום עולם, مرحبا \u202e reversed 👩‍👩‍👧 🎉",
    "W" * 400,
    "  two  blanks\n\nand lines\t.",
]


def picture(curve: int) -> str:
    """Draw a small curve as a data URI."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3))
    figure.add_subplot().plot([2.4, 1.9, 1.7, 1.6 - curve / 10])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def estimate(value: float, half: float) -> dict:
    return {"value": value, "ci_low": value - half, "ci_high": value + half}


def metric(name: str, title: str, unit: str, better: str, group: str, values: list[float], half: float) -> dict:
    models = ["base", "sft", "dpo"]
    estimates = {model: estimate(value, half) for model, value in zip(models, values, strict=True)}
    differences = [
        {
            "a": a, "b": b, **estimate(estimates[a]["value"] - estimates[b]["value"], half),
            "p_value": 0.0004 if b == "base" else 0.21, "p_adjusted": 0.0008 if b == "base" else 0.42,
            "test": "McNemar exact" if unit == "share" else "sign flip", "shown": b == "base",
            "needed_n": 412 if b == "sft" else None,
        }
        for a, b in (("dpo", "sft"), ("dpo", "base"), ("sft", "base"))
    ]  # fmt: skip
    baselines = {"longer answer wins": estimate(0.53, half)} if group == "preference" else {}
    return {
        "name": name, "title": title, "unit": unit, "better": better, "group": group, "n": 80,
        "models": estimates, "baselines": baselines, "differences": differences,
    }  # fmt: skip


def lineage(stage: str) -> dict:
    return {
        "path": f"outputs/{stage}_adapter", "sha256": "ab12" * 16, "created": "2026-01-02T03:04:05+00:00",
        "base_model": {"id": "models/smollm2-135m-instruct", "revision": None, "fingerprint": "cd34" * 16},
        "datasets": [{"path": f"data/{stage}/sample_{stage}.jsonl", "sha256": "ef56" * 16, "train": 320, "validation": 80}],
        "split": {"seed": 0, "validation_ratio": 0.1, "test_ratio": 0.2, "key_version": 1, "group_field": None}, "seed": 0, "git": {"commit": "9f" * 20, "dirty": True},
        "packages": {"torch": "2.13.0", "trl": "1.16.0"}, "mlflow_run_id": "77" * 16,
    }  # fmt: skip


def sample(place: int, changed: float, base: str, sft: str, dpo: str, passed: bool = True) -> dict:
    checks = {"base": {"ends politely": False}, "sft": {"ends politely": True}, "dpo": {"ends politely": passed}}
    return {
        "source": "data/sft/sample_sft.jsonl", "prompt": f"Prompt {place}: where is my order?", "reference": "On its way.",
        "answers": {"base": base, "sft": sft, "dpo": dpo}, "checks": checks, "changed": changed,
    }  # fmt: skip


def judge_row(by: str) -> dict:
    return {
        "judge": f"{by} <b>judge</b>", "by": by, "a": "dpo", "b": "sft", "n": 60, "questions": 61, "same": 19,
        "wins": 31, "losses": 20, "ties": 9, **estimate(0.59, 0.12), "p_value": 0.161, "p_adjusted": 0.322,
        "shown": False, "needed_n": 223, "changed_with_order": 0.15 if by == "endpoint" else None,
        "first_preferred": 0.55, "longer_preferred": 0.6, "text": "No preference between DPO & SFT can be shown.",
    }  # fmt: skip


@pytest.fixture(scope="session")
def report() -> Report:
    """Return a complete report whose texts come from a hostile model."""
    health = {"mean_tokens": 41.5, "repetition": 0.031, "eos_rate": 0.9875, "distinct_2": 0.74}
    training = {
        "train_seconds": 312.4, "train_tokens": 182_400, "peak_memory_gib": 2.31, "steps": 120,
        "tokens_per_second": 584.0, "held_out_loss_before": 2.871, "held_out_loss": 1.934,
    }  # fmt: skip
    polite = "Thank you for writing. Your order left us on Monday and should reach you within two days."
    facts = {
        "schema": 1, "created": "2026-01-02T03:04:05+00:00", "title": "SFT against DPO <on> sample data",
        "verdict": {
            "text": "No difference between DPO and SFT can be shown with n = 80; both are better than the base model.",
            "outcome": "no_difference", "compared": ["dpo", "sft"], "winner": None, "needed_n": 412,
        },
        "models": ["base", "sft", "dpo"],
        "metrics": [
            metric("held_out_loss", "Held-out loss", "nats per token", "lower", "loss", [2.871, 1.934, 1.921], 0.05),
            metric("accuracy", "Implicit-reward accuracy", "share", "higher", "preference", [0.5, 0.55, 0.61], 0.1),
            metric("polite", "ends politely", "share", "higher", "checks", [0.2, 0.81, 0.85], 0.09),
            metric("short", "at most <b>60</b> words", "share", "higher", "checks", [0.4, 0.9, 0.95], 0.05),
        ],
        "health": {
            "base": {**health, "kl_to_base": 0.0, "kl_to_sft": None},
            "sft": {**health, "kl_to_base": 0.412, "kl_to_sft": 0.0},
            "dpo": {**health, "kl_to_base": 0.455, "kl_to_sft": 0.0071},
        },
        "training": {"sft": training, "dpo": {**training, "held_out_loss_before": None}},
        "curves": {"sft": picture(1), "dpo": picture(2)},
        "lineage": {"base": {"base_model": lineage("sft")["base_model"]}, "sft": lineage("sft"), "dpo": lineage("dpo")},
        "samples": [
            sample(0, 0.1, "I do not know.", polite, polite.replace("two days", "three days")),
            sample(1, 0.9, "Maybe.", "Please wait.", polite, passed=False),
            *(sample(2 + i, 0.5, text, text, f"{text} more", True) for i, text in enumerate(HOSTILE)),
            sample(8, 0.0, "", "", ""),
        ],
        "judge": {"criteria": "Be <i>brief</i>.", "rows": [judge_row("endpoint"), judge_row("human")]},
        "runs": {
            "seeds": [0, 1, 2],
            "metrics": [{"title": "Held-out loss", "models": {"sft": {"mean": 1.93, "spread": 0.01, "values": [1.92, 1.93, 1.94]}}}],
        },
        "notes": ["Answers were cut at 128 tokens: 3 of 80."],
    }  # fmt: skip
    return Report.model_validate(facts)


class References(HTMLParser):
    """Collect what a page could load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep addresses and the tags that exist only to load something."""
        if tag in ("link", "iframe", "object", "embed", "base"):
            self.found.append(tag)
        self.found += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster")]


def test_what_is_written_is_read_back(report, tmp_path):
    write_report(tmp_path, report)
    assert read_report(tmp_path) == report


def test_the_page_refers_to_nothing_outside_itself(report):
    page = render_report(report)
    references = References()
    references.feed(page)
    assert references.found, "the pictures and the contents are references"
    assert [r for r in references.found if not r.startswith(("data:image/", "#"))] == []
    style_and_script = "".join(re.findall(r"<style>.*?</style>|<script>.*?</script>", page, re.S))
    assert not re.search(r"@import|url\(|https?:|//\w|fetch|import\(", style_and_script)


def test_a_curve_that_is_not_in_the_file_is_refused(report):
    broken = report.model_copy(update={"curves": {"sft": "http://example.org/curve.png"}})
    with pytest.raises(ValueError, match=r"curves\.sft: found .*wanted a data:image"):
        render_report(broken)


def test_what_was_not_measured_is_left_out_or_dashed(report):
    loss = report.metrics[0].model_dump() | {"differences": []}
    loss["models"] = {"base": {"value": None, "ci_low": None, "ci_high": None}, "sft": estimate(2.0, 0.0)}
    facts = report.model_dump(by_alias=True) | {"metrics": [loss], "judge": None, "runs": None}
    facts |= {"curves": {}, "training": {}, "samples": [], "notes": [], "health": {}}
    bare = Report.model_validate(facts)
    page = render_report(bare)
    assert not re.search(r">(None|nan|undefined)<", page)
    for section in ("Judge", "Several runs", "Checks", "Generation health", "Answers side by side"):
        assert f"<h2>{section}</h2>" not in page
    assert "2.000" in page


def test_an_answer_that_is_not_valid_unicode_can_still_be_saved(report):
    broken = report.model_copy(update={"notes": ["half a pair: \ud83d"]})
    assert "half a pair: ?" in render_report(broken).encode("utf-8").decode("utf-8")


def test_figures_are_written_for_readers():
    assert number(0.6125, "share") == "61.3"
    assert number(-0.05, "share", signed=True) == "−5.0"
    assert number(0.0123, signed=True) == "+0.012"
    assert number(0.00071) == "0.00071"
    assert number(-2e-9, "share", signed=True) == "0.0"
    assert number(-7.1e-5) == "−7.1e-05"
    assert (number(41.52), number(1234.5), number(0.0)) == ("41.5", "1,234", "0.000")
    assert number(182_400) == "182,400"
    assert number(None) == number(float("nan")) == "–"
    assert (p_value(0.0001), p_value(0.04), p_value(1.0), p_value(None)) == ("< 0.001", "0.040", "1.000", "–")


def test_a_difference_is_read_in_the_direction_of_its_metric():
    shown = Difference(
        a="dpo", b="sft", value=-0.1, ci_low=-0.2, ci_high=-0.01, p_value=0.01, test="sign flip", shown=True, needed_n=None
    )  # fmt: skip
    assert reading(shown, "lower") == "dpo is better"
    assert reading(shown, "higher") == "dpo is worse"
    unsure = shown.model_copy(update={"shown": False, "needed_n": 1412})
    assert reading(unsure, "lower").endswith("about 1,412 items")
    equal = shown.model_copy(update={"shown": False, "value": 0.0, "ci_low": 0.0, "ci_high": 0.0})
    assert reading(equal, "lower") == "no difference at all"


def test_every_interval_lies_on_the_drawn_scale(report):
    for metric in report.metrics:
        low, high = axis(metric)
        for each in [*metric.models.values(), *metric.baselines.values()]:
            assert low <= each.ci_low <= each.ci_high <= high


@pytest.mark.parametrize("first", ["", "a", "the cat sat.", *HOSTILE])
@pytest.mark.parametrize("second", ["", "the dog sat.", "the cat  sat.\n", *HOSTILE])
def test_pieces_join_to_the_texts_and_unmarked_words_are_common(first, second):
    left, right = word_differences(first, second)
    assert "".join(text for _, text in left) == first
    assert "".join(text for _, text in right) == second
    common = [" ".join(text for marked, text in side if not marked).split() for side in (left, right)]
    assert common[0] == common[1]


def test_an_answer_that_repeats_itself_is_compared_in_good_time():
    start = time.monotonic()
    left, _ = word_differences("the " * 1000, "the cat " * 500)
    assert time.monotonic() - start < 5
    assert "".join(text for _, text in left) == "the " * 1000
    assert not any(changed for changed, _ in word_differences("the " * 1000, "the " * 1000)[0])


def test_only_the_changed_words_of_the_compared_models_are_marked(report):
    marked = marked_answers(report.samples[0], ["dpo", "sft"])
    assert [text for changed, text in marked["dpo"] if changed] == ["three"]
    assert [text for changed, text in marked["sft"] if changed] == ["two"]
    assert marked["base"] == [(False, "I do not know.")]


PROBE = """<script>
const all = (selector) => [...document.querySelectorAll(selector)];
const shown = () => all(".sample").filter((e) => !e.hidden).map((e) => e.querySelector(".prompt").textContent.split(":")[0]);
const set = (id, value) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event("input")); };
addEventListener("load", () => {
  const facts = {
    attacked: window.attacked === undefined ? "no" : "yes",
    requests: performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:")),
    width: innerWidth, content: document.documentElement.scrollWidth,
    tables: all("table").length, empty: all("table").filter((t) => !t.tBodies[0].rows.length).length,
    pictures: all("img").map((i) => i.naturalWidth),
    answers: all(".answer .text-block").map((e) => e.textContent), foreign: all(".text-block :not(mark, .muted)").length,
    verdict: document.querySelector(".verdict .text").textContent,
    marked: all("mark").map((e) => e.textContent), start: shown(),
  };
  set("order", "file"); facts.file = shown();
  set("filter", "THREE days"); facts.found = shown(); set("filter", "");
  set("by-check", "fail dpo"); facts.failed = shown();
  parent.postMessage(JSON.stringify(facts), "*");
});
</script>"""


# A frame is as narrow as a phone; a desktop browser's window stops at 500 pixels.
FRAME = """<!doctype html><meta charset="utf-8"><pre id="facts"></pre>
<script>addEventListener("message", (e) => {
  document.getElementById("facts").textContent = btoa(unescape(encodeURIComponent(e.data)));
});</script>
<iframe src="PAGE" style="width:WIDTHpx;height:900px;border:0"></iframe>"""


def look(page: Path, width: int, profile: Path) -> tuple[dict, str]:
    """Open a page in headless Chromium without network; return what the probe saw and what the console said."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.replace("PAGE", page.name).replace("WIDTH", str(width)), encoding="utf-8")
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}",
            "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1400,1000",
            "--virtual-time-budget=5000", "--dump-dom", frame.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    facts = re.search(r'<pre id="facts">([^<]+)</pre>', done.stdout)
    assert facts, f"the page's script did not run to its end\n{done.stderr[-2000:]}"
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(base64.b64decode(facts[1])), console


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_a_real_browser_shows_the_report(report, tmp_path, width):
    page = tmp_path / "report.html"
    page.write_text(render_report(report).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    facts, console = look(page, width, tmp_path / "profile")
    assert console == ""
    assert facts["requests"] == []
    assert facts["attacked"] == "no"
    assert facts["width"] == width
    assert facts["content"] <= width, "the page itself must not scroll sideways"
    assert facts["tables"] >= 8
    assert facts["empty"] == 0
    assert facts["pictures"] == [600, 600]
    assert facts["verdict"] == report.verdict.text
    for text in HOSTILE:
        assert text in facts["answers"], "an answer is shown letter by letter"
    assert facts["foreign"] == 0, "no tag of an answer became an element"
    assert "three" in facts["marked"]
    order = [f"Prompt {i}" for i in (1, 2, 3, 4, 5, 6, 7, 0, 8)]
    assert facts["start"] == order, "most changed first"
    assert facts["file"] == sorted(order)
    assert facts["found"] == ["Prompt 0"]
    assert facts["failed"] == ["Prompt 1"]


@pytest.mark.slow
def test_the_browser_check_itself_notices_errors(report, tmp_path):
    page = tmp_path / "report.html"
    trap = '<img src="http://192.0.2.1/x.png"><script>throw new Error("planted")</script>'
    page.write_text(render_report(report).replace("</body>", trap + PROBE + "</body>"), encoding="utf-8")
    _, console = look(page, 1280, tmp_path / "profile")
    assert "planted" in console
    assert "Content Security Policy" in console, "the page's own policy refuses what is not in the file"
