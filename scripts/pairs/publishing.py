"""Write a file of pairs and its manifest, with what both descend from, and lose no other file in doing so."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.common.artifacts import Manifest, sha256_file, write_text_durably
from scripts.common.deid_report import check_deid_report
from scripts.common.errors import UserError, listing
from scripts.common.lineage import ancestors
from scripts.common.pairs_manifest import (
    PairFacts,
    PairsManifest,
    SourceFacts,
    pairs_manifest_path,
    read_pairs_manifest,
)
from scripts.common.paths import portable_path, resolve
from scripts.pairs.choosing import Pair, rows_of


def check_out(out: Path, run_dir: Path, adapter: str, manifest: Manifest) -> None:
    """Refuse to replace anything but an earlier file of pairs, and one that the adapter was trained on.

    Raises: UserError naming another way.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: found the ending `{out.suffix}`, wanted `.jsonl`.")
    trained_on = (resolve(source.path) for made in _chain(adapter, manifest) for source in made.datasets)
    if out.exists() and any(path.exists() and path.samefile(out) for path in trained_on):
        raise UserError(
            f"--out {out}: {adapter} was trained on it, and it would be replaced. Give each round a file of its own, such as "
            f"--out {out.with_name(f'{out.stem}_2.jsonl')}"
        )
    if not out.exists():
        return
    made = read_pairs_manifest(out)
    finished = run_dir / out.name  # of a run that was killed between the file and its manifest
    known = {made.sha256 if made else None, sha256_file(finished) if finished.is_file() else None}
    if out.is_dir() or sha256_file(out) not in known:
        raise UserError(
            f"--out {out}: is there already and not as this command has written it, so it will not be replaced. Choose "
            "another name, or move it away."
        )


def _chain(folder: str, manifest: Manifest) -> Iterator[Manifest]:
    """Yield an adapter's manifest and those of the adapters it continues, as far as they are there."""
    yield manifest
    yield from (made for _, made in ancestors(manifest))


def find_descent(sources: Sequence[tuple[str, str]], adapter: str, manifest: Manifest) -> list[SourceFacts]:
    """Return all data that pairs descend from, each with its de-identification report: their own, and the adapter's.

    `sources` are paths with their sha256. An adapter that is not there any more stands for the data that it was made of.
    """
    found = dict.fromkeys((portable_path(path), sha256) for path, sha256 in sources)
    last = manifest
    for last in _chain(adapter, manifest):
        found |= dict.fromkeys((source.path, source.sha256) for source in last.datasets)
    if last.parent:
        found[last.parent.path, last.parent.sha256] = None
    return [SourceFacts(path=path, sha256=sha256, deid_report=_report(path, sha256)) for path, sha256 in found]


def _report(path: str, sha256: str) -> dict[str, object] | None:
    try:
        return check_deid_report(resolve(path), sha256)
    except UserError:
        return None


def check_deidentified(descent: Sequence[SourceFacts]) -> None:
    """Refuse data without a report where `deid.required` asks for one.

    Raises: UserError listing them.
    """
    if without := [source.path for source in descent if source.deid_report is None]:
        raise UserError(
            listing(
                "deid.required: pairs descend from the data of their prompts and of the adapter, and no report vouches for",
                without,
                "Scrub them (python scripts/deid_presidio.py --in RAW --out FILE) and train again, or set deid.required: false.",
            )
        )


def write_pairs(out: Path, run_dir: Path, pairs: Sequence[Pair], facts: PairsManifest) -> None:
    """Put file and manifest into their places, the manifest last; a copy of the file shows who wrote it if that is cut short."""
    group_field = facts.split.group_field
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(pairs, group_field))
    lines = [
        PairFacts(
            source=portable_path(pair.prompt.source),
            seed=pair.prompt.seed,
            chosen=pair.candidate.chosen.number,
            rejected=pair.candidate.rejected.number,
            labeller=pair.candidate.labeller,
        )
        for pair in pairs
    ]
    write_text_durably(run_dir / out.name, text)
    manifest = facts.model_copy(update={"sha256": sha256_file(run_dir / out.name), "pairs": lines})
    write_text_durably(out, text)
    write_text_durably(pairs_manifest_path(out), manifest.as_json())
