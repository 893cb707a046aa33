"""Measure the de-identification stage: recall, precision, leaking records, over-flagging, speed and memory.

Reads labelled or clean JSONL files, or this repository's labelled sets when none is named, each in two halves: one that the
rules were tuned on and one that they were not. Writes tables by type, style and language to the terminal and, with --out, the
figures as JSON. Runs the command line of the stage, so it measures what a user gets; then times the stage beside plain
Presidio. Needs requirements.extra.txt.

    python -m eval.benchmarks.deid
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from eval.benchmarks.deid_speed import compare
from scripts.common.deid_report import report_path
from scripts.common.errors import UserError, entry_point
from scripts.common.paths import ROOT
from scripts.common.run import set_up_logging
from scripts.dataset.files import BadRow, read_rows
from scripts.deid.evaluation import share as share_of
from scripts.deid.languages import READABLE

log = logging.getLogger(__name__)

TEXT_FIELDS = ("text", "input", "instruction", "prompt", "output", "completion", "chosen", "rejected")
EXIT_QUARANTINE = 3
# Measured when no file is named. Rules are tuned on the first; figures are reported from the second.
TUNING = ROOT / "eval" / "benchmarks" / "deid_tuning.jsonl"
UNSEEN = ROOT / "eval" / "benchmarks" / "deid_unseen.jsonl"
# Six languages, in two halves as well, and invented numbers of some forty countries.
LANGUAGES_TUNING = ROOT / "eval" / "benchmarks" / "deid_languages_tuning.jsonl"
LANGUAGES_UNSEEN = ROOT / "eval" / "benchmarks" / "deid_languages_unseen.jsonl"
IDS = ROOT / "eval" / "benchmarks" / "deid_ids.jsonl"
# Labels that stand for a number with a checksum.
CHECKSUMMED = ("ABA", "BTC", "CARD", "DEA", "IBAN", "IMEI", "NHS", "NPI", "SIN", "TFN", "VIN")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gold",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="labelled texts; repeatable (default: the two sets of this repository)",
    )
    parser.add_argument(
        "--clean",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="records without personal data; repeatable",
    )
    parser.add_argument(
        "--speed-mb", type=float, default=1.0, metavar="MB", help="size of the speed runs; 0 leaves them out"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns beside plain Presidio; 0 leaves it out")
    parser.add_argument("--workers", default="auto", help="processes of the speed run (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="passed on")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all figures as JSON")
    return parser


def texts_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield labelled rows; the first text field of a row without labels is a text without personal data."""
    for where, row in read_rows(path):
        if isinstance(row, BadRow):
            raise UserError(f"{where}: {row.reason}")
        if "spans" in row:
            yield {key: row[key] for key in ("text", "spans", "style") if key in row}
            continue
        text = next((row[name] for name in TEXT_FIELDS if isinstance(row.get(name), str) and row[name]), None)
        if text:
            yield {"text": text, "spans": []}


def run_stage(source: Path, out: Path, *flags: str) -> dict[str, Any]:
    """Run the stage as a user would and return its report."""
    command = [
        sys.executable,
        "-m",
        "scripts.deid_presidio",
        "--in",
        str(source),
        "--out",
        str(out),
        "--overwrite",
        *flags,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, EXIT_QUARANTINE):
        raise UserError(f"the stage failed with {done.returncode}: {done.stderr.strip()[-600:]}")
    return dict(json.loads(report_path(out).read_text(encoding="utf-8")))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def measure(path: Path, folder: Path, flags: list[str]) -> dict[str, Any]:
    """Measure one file."""
    gold = write_rows(folder / "gold.jsonl", list(texts_of(path)))
    # The stage needs an input; what counts is the gold file.
    one = write_rows(folder / "one.jsonl", [{"text": "x"}])
    return dict(run_stage(one, folder / "one.deid.jsonl", "--evaluate", str(gold), *flags)["evaluation"])


def texts_for_speed(paths: Sequence[Path], megabytes: float) -> list[str]:
    """Return texts of all the files up to a size, each of them once: a repeated text is read only once in its chunk."""
    texts = list(dict.fromkeys(row["text"] for path in paths for row in texts_of(path)))
    sizes = itertools.accumulate(map(len, texts))
    return [text for text, size in zip(texts, sizes, strict=True) if size <= megabytes * 1e6]


def measure_speed(paths: Sequence[Path], megabytes: float, folder: Path, flags: list[str]) -> dict[str, Any]:
    """Scrub up to so many megabytes of the files' texts and return characters per second and the peak memory."""
    rows = [{"id": number, "text": text} for number, text in enumerate(texts_for_speed(paths, megabytes))]
    source = write_rows(folder / "speed.jsonl", rows)
    report = run_stage(source, folder / "speed.deid.jsonl", *flags)
    return {**report["timing"], "records": len(rows), "held_back": report["counts"]["quarantined"]}


def say(line: str) -> None:
    """Write a line of the table."""
    sys.stdout.write(line + "\n")


def show(name: str, result: dict[str, Any]) -> None:
    """Print the figures of one file."""

    def line(title: str, share: dict[str, Any]) -> None:
        if share["total"]:
            low, high = share["wilson95"]
            say(f"  {title:<44}{share['share']:>8.3f}  [{low:.3f}, {high:.3f}]  {share['hits']}/{share['total']}")

    say(f"{name}: {result['records']} records, {result['held_back']} held back")
    line("recall, span covered whole", result["recall"])
    for label, share in result["recall_by_label"].items():
        line(f"  {label}", share)
    if checked := [share for label, share in result["recall_by_label"].items() if label in CHECKSUMMED]:
        hits, total = (sum(share[key] for share in checked) for key in ("hits", "total"))
        line("recall of numbers with a checksum", share_of(hits, total))
    line("precision, found span touches a labelled one", result["precision"])
    line("records that leak", result["leaking_records"])
    line("records without personal data touched", result["touched_clean_records"])
    line("records that lose a plain number", result["records_losing_numbers"])
    line("other letters and digits flagged", result["flagged_characters_without_personal_data"])
    if result["by_style"] and {*result["by_style"]} <= {*READABLE}:
        show_languages(result["by_style"])
        return
    for style, part in result["by_style"].items():
        for title, key in (
            ("covered", "recall"),
            ("touched", "touched_clean_records"),
            ("lose a number", "records_losing_numbers"),
        ):
            if part[key]["total"] and (key == "recall" or style in ("clean", "maths")):
                line(f"  {style}: {title}", part[key])


def show_comparison(figures: dict[str, Any]) -> None:
    """Print the speeds beside plain Presidio's."""
    say(
        f"one core of {figures['machine']}, {figures['records']} texts, {figures['characters']:,} characters, "
        f"medians of {figures['rounds']} alternating rounds:"
    )
    for name, speed in figures["characters_per_second"].items():
        ratio = f"  {figures['ratio'][name]:.2f} of plain Presidio" if name in figures["ratio"] else ""
        say(f"  {name:<18}{speed:>8,} characters/s{ratio}")


def show_languages(languages: dict[str, Any]) -> None:
    """Print what is found and lost in each language."""
    say("  language    names covered          all spans covered      other letters flagged   held back")
    for language, part in languages.items():
        cells = [part[key] for key in ("names", "recall", "flagged_characters_without_personal_data")]
        columns = "".join(f"{cell['share']:>8.3f} {cell['hits']:>5}/{cell['total']:<8}" for cell in cells)
        say(f"  {language:<8}{columns}{part['held_back']:>8}")


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure every file, then the speed over all of them."""
    arguments = build_parser().parse_args(argv)
    set_up_logging()
    paths = [*arguments.gold, *arguments.clean] or [TUNING, UNSEEN, LANGUAGES_TUNING, LANGUAGES_UNSEEN, IDS]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file.")
    flags = [part for item in arguments.overrides for part in ("--set", item)]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for path in paths:
            log.info("measuring on %s", path)
            figures[f"{path.parent.name}/{path.name}"] = measure(path, folder, flags)
            show(f"{path.parent.name}/{path.name}", figures[f"{path.parent.name}/{path.name}"])
        if arguments.speed_mb:
            log.info("measuring the speed")
            figures["speed"] = measure_speed(
                paths, arguments.speed_mb, folder, [*flags, "--workers", arguments.workers]
            )
            speed = figures["speed"]
            say(
                f"speed: {speed['characters_per_second']:,} characters/s with {speed['workers']} workers, "
                f"largest process {speed['peak_memory_gib']:.2f} GiB"
            )
        if arguments.speed_mb and arguments.rounds:
            english = [*arguments.gold, *arguments.clean] or [TUNING, UNSEEN]
            figures["beside_plain_presidio"] = compare(texts_for_speed(english, arguments.speed_mb), arguments.rounds)
            show_comparison(figures["beside_plain_presidio"])
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
