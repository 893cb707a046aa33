"""Bind a training run to the de-identification report of its data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.common.pairs_manifest import PairsManifest, pairs_manifest_path, read_pairs_manifest

REPORT_SCHEMA = 1


def report_path(dataset_path: str | Path) -> Path:
    """Return where the report of a scrubbed file lies: beside it."""
    path = Path(dataset_path)
    return path.with_name(path.name + ".deid_report.json")


def check_deid_report(dataset_path: str | Path, sha256: str, report: str | Path | None = None) -> dict[str, Any]:
    """Return what the report says about a dataset; without `report`, the one beside the data is taken.

    Pairs that make_pairs has written need none of their own when reports vouch for all that they descend from.
    Raises: UserError when no report vouches for exactly these bytes.
    """
    path = Path(report) if report is not None else report_path(dataset_path)
    if report is None and not path.exists() and (made := read_pairs_manifest(dataset_path)):
        return _vouched_by_descent(dataset_path, sha256, made)
    make_it = f"python scripts/deid_presidio.py --in RAW --out {dataset_path}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vouched, counts = content["output"]["sha256"], content["counts"]
        schema = content["schema"]
        if not isinstance(vouched, str):
            raise TypeError(vouched)
    except FileNotFoundError:
        raise UserError(
            f"deid.required: {path}: no such report for {dataset_path}. Make both with: {make_it}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"deid.required: {path}: not a de-identification report. Make it again: {make_it}") from None
    if schema != REPORT_SCHEMA:
        raise UserError(f"{path}: found schema {schema}, wanted {REPORT_SCHEMA}. Make it again: {make_it}")
    if vouched != sha256:
        raise UserError(
            f"deid.required: {dataset_path} has sha256 {sha256[:16]}…, but {path} vouches for {vouched[:16]}…: "
            f"the data was changed after it was scrubbed. Scrub it again: {make_it}"
        )
    return {"report": path.name, "output_sha256": vouched, "counts": counts, "created": content.get("created")}


def _vouched_by_descent(dataset_path: str | Path, sha256: str, made: PairsManifest) -> dict[str, Any]:
    """Return in place of a report what those of the data say from which pairs descend."""
    make_it = "make the pairs again: python -m scripts.make_pairs"
    name = pairs_manifest_path(dataset_path).name
    if made.sha256 != sha256:
        raise UserError(
            f"deid.required: {dataset_path} has sha256 {sha256[:16]}…, but {name} vouches for {made.sha256[:16]}…: the pairs "
            f"were changed after they were made. Scrub them (python scripts/deid_presidio.py --in {dataset_path} --out FILE), "
            f"or {make_it}"
        )
    if without := [source.path for source in made.descends_from if source.deid_report is None]:
        raise UserError(
            f"deid.required: {dataset_path} descends from {', '.join(without)}, for which no de-identification report "
            f"vouched when it was made. Scrub that, train on it, and {make_it}"
        )
    reports = [source.deid_report for source in made.descends_from if source.deid_report]
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update({key: value for key, value in report["counts"].items() if isinstance(value, int)})
    return {"report": name, "output_sha256": sha256, "counts": dict(counts), "created": made.created}
