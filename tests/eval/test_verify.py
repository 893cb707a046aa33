"""Anyone can check a comparison: a figure, an item or an answer that was changed is named with its file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from eval import verify
from eval.metrics import build_metrics
from eval.report import Column, Report, Sample, read_report, write_report
from eval.tables import write_items
from eval.verdict import Question, decide
from scripts.common.artifacts import write_manifest
from tests.support.manifests import complete_manifest
from tests.support.tables import passes, table


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a comparison of two arms of three seeds, as eval.compare does."""
    folder = tmp_path_factory.mktemp("verify") / "comparison"
    folder.mkdir()
    rows = {"base": passes(0.2, 12), "sft": passes(0.5, 12, 3, 1), "dpo": passes(0.6, 12, 3, 2)}
    loss = {name: [[2.5 + len(name) + value for value in row] for row in found] for name, found in rows.items()}
    tables = [
        table(rows),
        table(rows, "preference_accuracy", pairs=3),
        table(loss, "held_out_loss", weights=range(5, 17), unit="nats per token", better="lower", group="loss"),
    ]
    question = Question(a="dpo", b="sft", measures=["all_rules", "preference_accuracy"])
    metrics = build_metrics(tables, question)
    verdict, notes = decide(metrics, question)
    adapters = {name: Column(kind="adapter", stage=name, seeds=[0, 1, 2]) for name in ("sft", "dpo")}
    answers = {"base": "no", "sft": "It is 7.", "dpo": "It is 8."}
    report = Report(
        created="2026-11-28T00:00:00+00:00", title="base · sft · dpo", verdict=verdict, models=list(rows), metrics=metrics,
        arms={"base": Column(kind="base", stands=True), **adapters}, question=question, notes=[*notes, "By hand, 3 times."],
        samples=[Sample(source="d:1", prompt="p", reference="r", answers=answers, checks={}, changed=0.25)],
    )  # fmt: skip
    write_report(folder, report)
    write_items(folder, tables)
    write_manifest(folder, complete_manifest("comparison"))
    return folder


@pytest.fixture
def comparison(written: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may change."""
    copy = tmp_path / "comparison"
    copy.mkdir()
    for file in written.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def sealed(folder: Path) -> None:
    """Hash a changed folder as if it had been written so."""
    write_manifest(folder, complete_manifest("comparison"))


def flip(path: Path, place: int) -> int:
    """Change one digit of a file; return its line."""
    text = path.read_text(encoding="utf-8")
    changed = "1" if text[place] != "1" else "7"
    path.write_text(text[:place] + changed + text[place + 1 :], encoding="utf-8")
    return text.count("\n", 0, place) + 1


def test_an_untouched_comparison_holds(comparison: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert verify.main([str(comparison)]) == 0


@pytest.mark.parametrize("file", ["report.json", "items.jsonl", "samples.jsonl"])
def test_one_flipped_digit_is_caught_wherever_it_stands(
    file: str, comparison: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every digit is tried in turn by a stride that meets all kinds of figures."""
    path = comparison / file
    whole = path.read_text(encoding="utf-8")
    digits = [match.start() for match in re.finditer(r"\d", whole)]
    for place in digits[:: max(1, len(digits) // 25)]:
        flip(path, place)
        assert verify.main([str(comparison)]) == 1, whole[place - 60 : place + 20]
        assert str(path) in capfd.readouterr().err
        path.write_text(whole, encoding="utf-8")


@pytest.mark.parametrize(
    "figure", ['"p_value": ', '"ci_low": ', '"value": ', '"sd_seeds": ', '"n": ', '"df": ', "n = ", "four of five"]
)
def test_a_changed_figure_is_named_with_its_line_even_where_the_hashes_were_made_to_fit(
    figure: str, comparison: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = comparison / "report.json"
    text = path.read_text(encoding="utf-8")
    place = next(match.start() for match in re.finditer(r"[2-9]", text) if match.start() > text.index(figure))
    line = flip(path, place)
    sealed(comparison)
    assert verify.main([str(comparison)]) == 1
    assert f"{path}:{line}: found " in capfd.readouterr().err


def test_changed_items_and_answers_are_named_with_their_line(
    comparison: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, old, new in (
        ("items.jsonl", '"values": {"base": [', '"values": {"base": [7'),
        ("samples.jsonl", "7.", "9."),
    ):
        path = comparison / name
        whole = path.read_text(encoding="utf-8")
        place = whole.index(old, len(whole) // 2 if name == "items.jsonl" else 0)
        path.write_text(whole[:place] + whole[place:].replace(old, new, 1), encoding="utf-8")
        sealed(comparison)
        assert verify.main([str(comparison)]) == 1
        assert f"{path}:{whole.count(chr(10), 0, place) + 1}: " in capfd.readouterr().err
        path.write_text(whole, encoding="utf-8")


def test_items_made_to_fit_their_hashes_disagree_with_the_report(
    comparison: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever changes an item and its hash must change the figures too, and then the figures say what the items say."""
    from scripts.common.artifacts import sha256_json

    path = comparison / "items.jsonl"
    first, *rest = path.read_text(encoding="utf-8").split("\n")
    line = json.loads(first)
    del line["sha256"]
    line["values"]["dpo"] = [1 - value for value in line["values"]["dpo"]]
    path.write_text("\n".join([json.dumps({**line, "sha256": sha256_json(line)}), *rest]), encoding="utf-8")
    sealed(comparison)
    assert verify.main([str(comparison)]) == 1
    assert re.search(r"report\.json:\d+: found .*, and the items give ", capfd.readouterr().err)


def test_the_last_digits_that_another_machine_computes_are_no_difference(comparison: Path) -> None:
    path = comparison / "report.json"
    text = path.read_text(encoding="utf-8")
    value = read_report(comparison).metrics[0].differences[-1].p_value
    path.write_text(text.replace(f"{value!r}", f"{value * (1 + 1e-14)!r}"), encoding="utf-8")
    sealed(comparison)
    assert verify.main([str(comparison)]) == 0


def test_missing_files_and_reports_of_earlier_versions_are_named(
    comparison: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (comparison / "items.jsonl").unlink()
    assert verify.main([str(comparison)]) == 1
    assert "items.jsonl: cannot be read" in capfd.readouterr().err
    old = json.loads((comparison / "report.json").read_text(encoding="utf-8"))
    del old["question"]
    (comparison / "report.json").write_text(json.dumps(old), encoding="utf-8")
    assert verify.main([str(comparison)]) == 2
    assert "Compare again" in capfd.readouterr().err
