"""Scrub personal data from training records with Presidio, and write down what was done.

Reads JSONL, JSON, CSV, Parquet or plain text; writes the same format, <out>.deid_report.json and .html, and, when records
are held back, <out>.quarantine.jsonl. --sample N draws a review sheet, <out>.deid_sample.html, which holds personal data.
Needs requirements.extra.txt; no network. Exit 3: too many records held back.

    python scripts/deid_presidio.py --in data/sft/sample_sft.jsonl --out data/sft/sample_sft.deid.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.common.artifacts import locked_run_dir, replace_durably, sha256_file, write_text_durably
from scripts.common.config import add_config_arguments, load_config
from scripts.common.deid_report import report_path
from scripts.common.errors import UserError, entry_point
from scripts.common.machine import available_cores, peak_resident_gib
from scripts.common.run import set_up_logging
from scripts.common.schema import Config, Deid
from scripts.common.signals import trapped_signals
from scripts.dataset.files import BadRow
from scripts.dataset.writing import open_output
from scripts.deid.evaluation import evaluate, read_gold
from scripts.deid.files import check_paths, count_rows, read_input
from scripts.deid.replacement import Replacer, check_operators, decrypt, read_key
from scripts.deid.report import FileFacts, Report, Tally, Timing, describe_run, render_html
from scripts.deid.sample import Sample, write_sheet
from scripts.deid.scrubbing import missing_fields, usual_language
from scripts.deid.workers import Workers

log = logging.getLogger(__name__)

EXIT_QUARANTINE = 3
SMALL_BYTES = 500_000
# Flags that stand for a key of the section `deid`.
FLAGS = {"profile": str, "operator": str, "fields": str, "workers": str, "max_quarantine": int}


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in", dest="source", required=True, type=Path, metavar="FILE", help="records to scrub")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="scrubbed records, same format")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--profile", help="default, strict, hipaa-safe-harbor or secrets-only")
    parser.add_argument("--operator", help="tag, tag-index, surrogate, mask, redact, hash, encrypt or keep")
    parser.add_argument("--fields", help="dotted paths of the fields to scrub, separated by commas")
    parser.add_argument("--workers", help="processes; the output is the same for any number")
    parser.add_argument("--max-quarantine", type=int, metavar="N", help="records that may be held back before exit 3")
    parser.add_argument("--evaluate", type=Path, metavar="GOLD", help="also measure recall on labelled texts (JSONL)")
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="also draw N records, before and after, into a page that holds personal data",
    )
    parser.add_argument("--decrypt", action="store_true", help="put back what `encrypt` replaced, with the same key")
    add_config_arguments(parser)
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Check, scrub, read back, report, publish."""
    arguments = build_parser().parse_args(argv)
    config = config_of(arguments)
    settings, source, out, gold = config.deid, arguments.source, arguments.out, arguments.evaluate
    check_paths(source, out, overwrite=arguments.overwrite)
    if arguments.sample is not None and arguments.sample < 1:
        raise UserError(f"--sample {arguments.sample}: wanted a number of records, at least 1.")
    set_up_logging()
    out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.decrypt:
        return restore(source, out)
    key = check_operators(settings)
    check_fields(source, settings)
    check_gold(gold)
    started = time.monotonic()
    sample = Sample(arguments.sample, config.seed) if arguments.sample else None
    with trapped_signals(), locked_run_dir(out, passing=True) as run_dir:
        part, quarantine = run_dir / out.name, run_dir / "quarantine.jsonl"
        with unchanged(source) as source_facts, load_workers(config, source, key) as workers:
            tally = scrub_file(workers, source, part, quarantine, sample)
            check_written(part, tally)
            evaluation = measure(gold, workers) if gold else None
        report = describe_run(
            settings,
            Replacer(settings, config.seed, key),
            workers.facts,
            tally,
            source=source_facts,
            output=FileFacts(name=out.name, sha256=sha256_file(part)),
            evaluation=evaluation,
            timing=timing_of(tally, workers, time.monotonic() - started),
        )
        if sample:
            write_sheet(sheet_path(out), sample, out.name, report.output.sha256)
        publish(part, out, quarantine, report)
    return conclude(tally, settings, out)


def config_of(arguments: argparse.Namespace) -> Config:
    """Load the configuration; a flag overrides its key."""
    overrides = list(arguments.overrides)
    for name, kind in FLAGS.items():
        value = getattr(arguments, name)
        if value is not None:
            value = [part.strip() for part in value.split(",")] if name == "fields" else value
            overrides.append(f"deid.{name}={json.dumps(value) if kind is not str or name == 'fields' else value}")
    return load_config(arguments.config, overrides).values


def check_fields(source: Path, settings: Deid) -> None:
    """Refuse an empty input, or fields that the first record does not have."""
    first = next((row for _, row in read_input(source) if not isinstance(row, BadRow)), None)
    if first is None:
        if next(read_input(source), None) is None:
            raise UserError(f"--in {source}: the file holds no record.")
        return
    for key, paths in (("fields", settings.fields or ()), ("columns", [] if _nested(first) else [*settings.columns])):
        if missing := missing_fields(first, paths):
            raise UserError(f"deid.{key}: found {', '.join(missing)}, but the first record has: {', '.join(first)}.")


def _nested(row: dict[str, Any]) -> bool:
    """Say whether a column may stand deeper in a record than at its top."""
    return any(isinstance(value, dict | list) for value in row.values())


def check_gold(gold: Path | None) -> None:
    """Refuse labelled texts that are not there, before the work starts."""
    if gold and not gold.is_file():
        raise UserError(f"--evaluate {gold}: no such file.")


@contextmanager
def unchanged(source: Path) -> Iterator[FileFacts]:
    """Hash the input, and refuse the result if the input is another one in the end."""
    facts = FileFacts(name=source.name, sha256=sha256_file(source))
    yield facts
    if sha256_file(source) != facts.sha256:
        raise UserError(f"--in {source}: changed while it was read. Run again when nothing writes it.")


def load_workers(config: Config, source: Path, key: bytes | None) -> Workers:
    """Prepare the processes that load the recognizers."""
    count = worker_count(config.deid, source)
    log.info("loading the recognizers in %d process%s", count, "es" if count > 1 else "")
    return Workers(count, config.deid, config.seed, key, language_of_file(source, config.deid))


def language_of_file(source: Path, settings: Deid) -> str:
    """Say in which language most records are written; those too short to tell are read in it."""
    if not settings.detect_language or settings.profile == "secrets-only":
        return settings.language
    return usual_language((row for _, row in read_input(source)), settings)


def worker_count(settings: Deid, source: Path) -> int:
    """Take the cores, but for a small file only one, since every process loads the models."""
    if settings.workers != "auto":
        return settings.workers
    return 1 if source.stat().st_size < SMALL_BYTES else available_cores()


def sheet_path(out: Path) -> Path:
    """Return where the review sheet of an output lies."""
    return out.with_name(out.name + ".deid_sample.html")


def scrub_file(workers: Workers, source: Path, part: Path, quarantine: Path, sample: Sample | None = None) -> Tally:
    """Write every scrubbed record, and the place and reason of every one held back."""
    from tqdm import tqdm

    tally, started = Tally(), time.monotonic()
    interval = 0.5 if sys.stderr.isatty() else 15
    outcomes = tqdm(
        workers.scrub(read_input(source)),
        total=count_rows(source),
        unit=" records",
        mininterval=interval,
        desc="scrubbing",
    )
    with open_output(part, source) as write, quarantine.open("w", encoding="utf-8", newline="\n") as held_back:
        rows = read_input(source) if sample else itertools.repeat(("", None))
        for outcome, (where, row) in zip(outcomes, rows, strict=False):
            if not outcome.reason:
                try:
                    write(outcome.row)
                except ValueError as error:
                    outcome.reason = str(error)
            if outcome.reason:
                held_back.write(json.dumps({"record": outcome.source, "reason": outcome.reason}) + "\n")
            elif sample:
                sample.offer(where, row, outcome.row)
            tally.add(outcome)
    tally.seconds = time.monotonic() - started
    return tally


def check_written(part: Path, tally: Tally) -> None:
    """Read the output back before it gets its name: as many rows as were counted, each one readable."""
    rows = [isinstance(row, BadRow) for _, row in read_input(part)]
    if len(rows) != tally.written or any(rows):
        raise UserError(f"{part}: reads back as {len(rows)} records, wanted {tally.written}. Nothing was published.")


def measure(gold: Path, workers: Workers) -> dict[str, Any]:
    """Measure the recognizers as configured on labelled texts."""
    first, second = itertools.tee(read_gold(gold))
    rows = ((f"{gold.name}:{n}", {"text": row["text"]}) for n, row in enumerate(first, 1))
    pairs = (
        (row, None if outcome.reason else outcome.spans_of_text)
        for row, outcome in zip(second, workers.scrub(rows), strict=True)
    )
    return {"gold": {"name": gold.name, "sha256": sha256_file(gold)}, **evaluate(pairs)}


def timing_of(tally: Tally, workers: Workers, seconds: float) -> Timing:
    """Say what the run took, once its workers have ended, whose memory is known only then."""
    return Timing(
        seconds=round(seconds, 2),
        workers=workers.count,
        peak_memory_gib=round(peak_resident_gib(of_children=True), 3),
        characters=tally.characters,
        characters_per_second=round(tally.characters / max(tally.seconds, 1e-9)),
    )


def publish(part: Path, out: Path, quarantine: Path, report: Report) -> None:
    """Put report and output in their places, the output last: what has its name is finished and vouched for."""
    path = report_path(out)
    write_text_durably(path.with_suffix(".html"), render_html(report))
    write_text_durably(path, report.as_json())
    held_back = out.with_name(out.name + ".quarantine.jsonl")
    if report.counts.quarantined:
        quarantine.replace(held_back)
    else:
        held_back.unlink(missing_ok=True)
    replace_durably(part, out)


def conclude(tally: Tally, settings: Deid, out: Path) -> int:
    """Say what was done; return the exit code, which shows that too many records were held back."""
    log.info("%d records read, %d written, %d held back", tally.read, tally.written, tally.quarantined)
    log.info("found: %s", ", ".join(f"{name} {n}" for name, n in tally.entities.most_common()) or "nothing")
    log.info("the report is in %s", report_path(out))
    if tally.quarantined <= settings.max_quarantine:
        return 0
    log.warning(
        "%d records were held back, more than deid.max_quarantine: %d; reasons in %s.quarantine.jsonl",
        tally.quarantined,
        settings.max_quarantine,
        out,
    )
    return EXIT_QUARANTINE


def restore(source: Path, out: Path) -> int:
    """Write the records of an encrypted output with their original values."""
    with locked_run_dir(out, passing=True) as run_dir:
        part = run_dir / out.name
        log.info("%d records restored", decrypt_file(source, part, read_key()))
        replace_durably(part, out)
    return 0


def decrypt_file(source: Path, part: Path, key: bytes) -> int:
    """Put every encrypted value back; return how many records there are."""
    count = 0

    def put_back(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: put_back(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [put_back(inner) for inner in value]
        return decrypt(value, key) if isinstance(value, str) else value

    with open_output(part, source) as write:
        for where, row in read_input(source):
            if isinstance(row, BadRow):
                raise UserError(f"--in {where}: {row.reason}.")
            write(put_back(row))
            count += 1
    return count


if __name__ == "__main__":
    sys.exit(main())
