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

from eval.drawing import axis, draw_curves
from eval.figures import number, p_value, round_ticks
from eval.metrics import Difference
from eval.report import (
    TEMPLATE,
    Report,
    find_curves,
    marked_answers,
    overview,
    read_report,
    reading,
    render_report,
    typical_answer,
    word_differences,
    write_report,
)
from scripts.common.curves import Curves, write_curves
from tests.support.reports import REPORTS, curves

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
        "curves": {"sft": picture(1), "dpo": curves("dpo", seeds=2)},
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
    for section in ("Judge", "Several runs", "Rules", "Generation health", "All answers, side by side", "Training"):
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
    curves: all(".curve").map((e) => [e.querySelector("figcaption").textContent.match(/: (\\w+)/)[1], e.querySelectorAll("polyline").length]),
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
<script>const facts = []; addEventListener("message", (e) => {
  facts.push(JSON.parse(e.data));
  if (facts.length === document.querySelectorAll("iframe").length)
    document.getElementById("facts").textContent = btoa(unescape(encodeURIComponent(JSON.stringify(facts))));
});</script>
"""
PAGE = '<iframe src="{}" style="width:{}px;height:900px;border:0"></iframe>'


def look(pages: list[Path], width: int, profile: Path) -> tuple[list[dict], str]:
    """Open pages in headless Chromium without network; return what the probe saw and what the console said."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    frame = pages[0].with_name("frame.html")
    frame.write_text(FRAME + "".join(PAGE.format(page.name, width) for page in pages), encoding="utf-8")
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
    [facts], console = look([page], width, tmp_path / "profile")
    assert console == ""
    assert facts["requests"] == []
    assert facts["attacked"] == "no"
    assert facts["width"] == width
    assert facts["content"] <= width, "the page itself must not scroll sideways"
    assert facts["tables"] >= 8
    assert facts["empty"] == 0
    assert facts["pictures"] == [600], "a run of an earlier version has kept only a picture"
    assert facts["curves"] == [["loss", 4], ["rewards", 6]], "a line for each series and seed"
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
    _, console = look([page], 1280, tmp_path / "profile")
    assert "planted" in console
    assert "Content Security Policy" in console, "the page's own policy refuses what is not in the file"


# --- the first screen, in every way that a report can look


SAID = {
    "undecided": "Between this DPO adapter and this SFT adapter no difference can be shown in the share of answers that keep all "
    "rules (81 % → 75 %); SFT is better than the base (0 % → 81 %).",
    "better": "DPO is better than SFT in the share of answers that keep all rules (72 % → 84 %); SFT is better than the base "
    "(2 % → 72 %).",
    "worse": "DPO is worse than SFT in the share of answers that keep all rules (81 % → 62 %); SFT is better than the base "
    "(0 % → 81 %).",
    "no_worse": "dpo-merged-int8 is no worse than DPO in the share of answers that keep all rules (81 % → 80 %); DPO is better "
    "than the base (2 % → 81 %).",
    "equivalent": "These DPO adapters are equivalent to these SFT adapters in the share of answers that keep all rules "
    "(81.0 % → 81.2 %); SFT is better than the base (2 % → 81 %).",
    "bare": "This SFT adapter is better than the base in the loss of the target answers (2.230 → 1.240).",
}


def said(report: Report) -> str:
    return "".join(piece.text for piece in overview(report).sentence).replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize("name", SAID)
def test_one_sentence_says_what_was_found_and_in_which_measure(name):
    assert said(REPORTS[name]()) == SAID[name]


def test_the_sentence_speaks_of_the_measure_in_which_something_was_found():
    report = REPORTS["undecided"]()
    for metric, outcome in zip(report.metrics, ("undecided", "worse"), strict=False):
        metric.differences[-1].outcome = outcome
    report.verdict = report.verdict.model_copy(update={"outcome": "worse"})
    assert "is worse than this SFT adapter in the share of pairs where the chosen answer is likelier" in said(report)
    assert said(report).endswith(
        "; SFT is better than the base in the share of answers that keep all rules (0 % → 81 %)."
    )
    report.metrics[0].differences[-1].outcome = "better"
    assert "in the share of answers that keep all rules (81 % → 75 %) but worse in the share of pairs" in said(report)


def test_a_report_of_an_earlier_version_keeps_its_own_verdict(report):
    assert report.verdict.outcome == "undecided", "which it called no_difference"
    report = report.model_copy(deep=True)
    report.metrics[1].name, report.metrics[1].differences[0].shown = "preference_accuracy", True
    assert "no difference can be shown" in said(report), "there the seeds could overrule what the items show"


def test_every_step_is_coloured_by_what_was_found_for_it():
    assert [tile.found for tile in overview(REPORTS["undecided"]()).tiles] == ["", "better", "undecided"]
    assert [tile.found for tile in overview(REPORTS["worse"]()).tiles] == ["", "better", "worse"]
    many = overview(REPORTS["many_arms"]())
    assert [tile.name for tile in many.tiles] == ["base", "beta-0.5", "beta-1.0"]
    assert len(many.picture.rows) == 8


@pytest.mark.parametrize("name", REPORTS)
def test_the_picture_holds_every_interval_and_a_ring_for_each_seed(name):
    shown = overview(REPORTS[name]())
    for row in shown.picture.rows:
        places = [row.dot, *row.line, *row.seeds]
        assert all(0 <= place <= 100 for place in places)
        assert row.line[0] <= row.dot <= row.line[1]
    trained = [len(row.seeds) for row in shown.picture.rows if row.name != "base"]
    expected = {"better": 5, "worse": 3, "many_arms": 10, "no_worse": 3, "equivalent": 2}.get(name, 0)
    assert set(trained) == {expected}, "the value of a single seed is the dot itself"


def test_the_line_below_the_sentence_names_what_it_rests_on():
    assert overview(REPORTS["undecided"]()).facts == [
        "84 prompts and 37 pairs",
        "one seed, so it speaks of these two adapters",
        "not planned before training",
        "these data were looked at 3 times",
    ]
    assert overview(REPORTS["better"]()).facts[1:] == [
        "5 seeds, so it speaks of the methods",
        "planned before training",
        "first look at these data",
    ]
    page = render_report(REPORTS["better"]())
    assert "seeds 7 %, prompts 93 %" in page
    validation = REPORTS["better"]().model_copy(update={"side": "validation"})
    assert "it proves nothing" in overview(validation).facts[-1]


def test_the_answer_that_is_shown_first_is_a_typical_one():
    report = REPORTS["undecided"]()
    rules = list(report.samples[0].checks["base"])
    for place, sample in enumerate(report.samples):  # the base keeps one rule more from prompt to prompt
        sample.checks["base"] = {rule: number < min(place, 4) for number, rule in enumerate(rules)}
        sample.checks["dpo"] = dict.fromkeys(rules, True)
    kept = sum(typical_answer(report).sample.checks["base"].values())
    assert kept == 3, "on average it keeps 2.9 of 4"
    assert typical_answer(report.model_copy(update={"samples": []})) is None


def test_a_difference_without_an_interval_is_shown_without_one():
    report = REPORTS["undecided"]()
    for each in report.metrics[0].differences:
        each.ci_low = each.ci_high = None
    page = render_report(report)
    assert "no interval can be given" in page
    assert not re.search(r">(None|nan)<", page)


def test_scales_end_in_round_numbers_and_hold_what_is_drawn():
    assert round_ticks(0.3, 9.7) == [0, 2, 4, 6, 8, 10]
    assert round_ticks(-1.2, 0.4) == [-1.5, -1.0, -0.5, 0.0, 0.5]
    assert round_ticks(3, 3)[0] <= 3 <= round_ticks(3, 3)[-1]
    assert len(round_ticks(0, 0)) > 1


def test_curves_are_found_as_figures_or_as_the_picture_of_an_earlier_version(tmp_path):
    assert find_curves([tmp_path]) is None
    (tmp_path / "curves.png").write_bytes(b"a picture")
    assert find_curves([tmp_path]) == "data:image/png;base64," + base64.b64encode(b"a picture").decode()
    [run] = curves("dpo")
    write_curves(tmp_path, run)
    assert find_curves([tmp_path, tmp_path]) == [run, run]


def test_a_curve_of_one_point_or_of_one_value_is_drawn():
    [drawing] = draw_curves([Curves(stage="sft", series={"loss": [(1, 2.0)]})])
    assert drawing.lines[0].points == [(drawing.lines[0].points[0])]
    assert draw_curves([Curves(stage="sft", series={})]) == []


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_in_light_and_in_dark(scheme):
    blocks = re.findall(r":root \{([^}]*--m7[^}]*)\}", TEMPLATE.read_text(encoding="utf-8"))
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]+);", blocks[scheme]))
    grounds = [colours[name] for name in ("paper", "card", "soft", "good-soft", "bad-soft")]
    for name in ("ink", "muted"):
        assert min(contrast(colours[name], ground) for ground in grounds) >= 4.5, name
    for name, ground in (("good", "good-soft"), ("bad", "bad-soft"), ("even", "soft")):
        assert min(contrast(colours[name], colours[each]) for each in (ground, "paper")) >= 4.5, name
    for name in ("old", "new"):
        assert contrast(colours["ink"], colours[name]) >= 4.5, name
    for hue in range(8):
        assert contrast(colours[f"m{hue}"], colours["paper"]) >= 3, "marks stand out from the page"


FIRST_SCREEN = """<script>
const all = (selector) => [...document.querySelectorAll(selector)];
const bottom = (selector) => Math.max(0, ...all(selector).map((e) => e.getBoundingClientRect().bottom));
const cut = (box) => all(".keyed .key").filter((e) => {
  const outer = e.closest(".scroll").getBoundingClientRect(), inner = e.getBoundingClientRect();
  return inner.width && (inner.left < outer.left - 1 || inner.right > outer.right + 1);
}).length;
addEventListener("load", () => {
  const facts = {
    width: innerWidth, content: document.documentElement.scrollWidth, tiles: bottom(".tiles"), picture: bottom(".picture"),
    example: bottom(".example"), keys: all(".keyed .key").length, cut: cut(), title: document.title,
    outside: all("main *").filter((e) => {
      const box = e.closest(".reached, .example") || document.documentElement;
      return !e.closest(".scroll") && e.getBoundingClientRect().right > box.getBoundingClientRect().right + 1;
    }).map((e) => e.className),
    last: all("section[id]").at(-1).id,
  };
  all(".scroll").forEach((e) => { e.scrollLeft = 10000; });
  facts.scrolled = all(".scroll").filter((e) => e.scrollLeft > 0).length;
  facts.cutAfterScrolling = cut();
  const folded = all("#more .sample"), seen = () => folded.filter((e) => e.checkVisibility()).length;
  facts.open = all("#samples > .sample").length;
  facts.folded = [folded.length, seen()];
  const more = document.querySelector("#more > summary");
  if (more) more.click();
  facts.unfolded = seen();
  parent.postMessage(JSON.stringify(facts), "*");
});
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800)])
def test_the_first_screen_holds_the_story_and_no_key_column_is_cut(tmp_path, width, height):
    pages = []
    for name, make in REPORTS.items():
        pages.append(tmp_path / f"{name}.html")
        pages[-1].write_text(render_report(make()).replace("</body>", FIRST_SCREEN + "</body>"), encoding="utf-8")
    found, console = look(pages, width, tmp_path / "profile")
    assert console == ""
    assert len(found) == len(pages)
    for facts in found:
        name = facts["title"]
        assert facts["width"] == width
        assert facts["content"] <= width, name
        assert facts["outside"] == [], name
        assert 0 < facts["tiles"] < facts["picture"], name
        if "very-long-name" not in name:
            assert facts["picture"] <= height, name
            assert width < 1000 or 0 < facts["example"] <= height, name
        assert facts["keys"] > 0, name
        assert (facts["cut"], facts["cutAfterScrolling"]) == (0, 0), name
        assert width > 1000 or facts["scrolled"] > 0, "there was something to scroll"
        assert facts["last"] == "lineage"
    assert sorted({(facts["open"], *facts["folded"], facts["unfolded"]) for facts in found}) == [
        (3, 0, 0, 0),
        (5, 4, 0, 4),
    ]
