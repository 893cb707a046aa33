"""Check a comparison: recompute every figure and the verdict from the values of single items, and name what disagrees.

Reads report.json, items.jsonl and samples.jsonl of a comparison and their hashes. Writes nothing; exits with 1 where a
figure, an item or an answer is not what it was, with its file and line. Needs requirements.txt.

    python -m eval.verify outputs/comparison
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.common.artifacts import Manifest, read_manifest, sha256_file, sha256_json
from scripts.common.errors import UserError, entry_point, listing
from scripts.common.run import set_up_logging

if TYPE_CHECKING:
    from eval.report import Report

log = logging.getLogger(__name__)

REPORT, SAMPLES = "report.json", "samples.jsonl"
SAME = 1e-9  # another machine adds up in another order
NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][-+]?\d+)?")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a comparison, such as outputs/comparison")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Recompute, and say whether all is as it was written."""
    folder = build_parser().parse_args(argv).folder
    set_up_logging()
    manifest = read_manifest(folder, stages=("comparison",), verify=False)
    problems = [*disagreeing_lines(folder), *changed_files(folder, manifest)]
    if problems:
        log.error(
            "%s", listing(f"{folder}: {len(problems)} disagree", problems, "Restore the folder, or compare again.")
        )
        return 1
    log.info("%s: every figure and the verdict follow from the items, and no file has changed", folder)
    return 0


def changed_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Name the files that are not those whose hash the manifest holds."""
    for name, digest in manifest.files.items():
        file = folder / name
        if not file.is_file():
            yield f"{file}: is missing"
        elif sha256_file(file) != digest:
            yield f"{file}: its sha256 is not that in manifest.json"


def disagreeing_lines(folder: Path) -> list[str]:
    """Name the lines of the report, of its items and of its samples that do not hold together."""
    from eval.report import read_report
    from eval.tables import read_tables

    problems = [*broken_lines(folder / SAMPLES), *broken_json(folder / REPORT)]
    if problems:
        return problems
    try:
        report = read_report(folder)
    except (ValueError, KeyError, TypeError) as error:
        return [f"{folder / REPORT}: is not a report that a comparison wrote ({error})"]
    if report.question is None:
        raise UserError(
            f"{folder}: was made by an earlier version, which kept no items. Compare again to have it checked."
        )
    try:
        tables = read_tables(folder, report)
    except UserError as error:
        return [str(error)]
    return list(unlike_lines(folder / REPORT, recomputed(report, tables)))


def broken_lines(path: Path) -> Iterator[str]:
    """Name the lines of answers whose hash is not their own; earlier versions wrote none."""
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
        try:
            line = json.loads(text)
            digest = line.pop("sha256", None)
        except (ValueError, AttributeError):
            yield f"{path}:{number}: is not a line that a comparison wrote"
            continue
        if digest is not None and digest != sha256_json(line):
            yield f"{path}:{number}: its sha256 is not that of the line"


def broken_json(path: Path) -> Iterator[str]:
    """Name the line at which a report stops being JSON."""
    try:
        json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        yield f"{path}:{error.lineno}: is not JSON ({error.msg})"


def recomputed(report: Report, tables: Sequence[Any]) -> Report:
    """Return the report with every figure that its items give, and the verdict that follows from them."""
    from eval.metrics import build_metrics
    from eval.verdict import decide

    assert report.question is not None, "the caller has looked"
    metrics = build_metrics(tables, report.question)
    for metric, written in zip(metrics, report.metrics, strict=True):
        metric.baselines = written.baselines  # they rest on the lengths of answers, which are no items
    verdict, notes = decide(metrics, report.question)
    kept = report.notes[len(notes) :]
    return report.model_copy(update={"metrics": metrics, "verdict": verdict, "notes": [*notes, *kept]})


def unlike_lines(path: Path, wanted: Report) -> Iterator[str]:
    """Name the lines of a report that a recomputed one has otherwise, with both."""
    from eval.report import figures_of

    found = path.read_text(encoding="utf-8").split("\n")
    lines = zip_longest(found, figures_of(wanted).split("\n"), fillvalue="nothing")
    for number, (ours, theirs) in enumerate(lines, 1):
        if not _are_alike(ours, theirs):
            yield f"{path}:{number}: found {ours.strip(' ,')}, and the items give {theirs.strip(' ,')}"


def _are_alike(found: str, wanted: str) -> bool:
    """Compare two lines; numbers may differ in the last digits."""
    if found == wanted:
        return True
    if NUMBER.sub("0", found) != NUMBER.sub("0", wanted) or '": "' in found:
        return False
    pairs = zip(NUMBER.finditer(found), NUMBER.finditer(wanted), strict=True)
    return all(math.isclose(float(a[0]), float(b[0]), rel_tol=SAME, abs_tol=SAME**2) for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
