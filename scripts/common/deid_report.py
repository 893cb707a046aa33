"""Bind a training run to the de-identification report of its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError

REPORT_SCHEMA = 1


def report_path(dataset_path: str | Path) -> Path:
    """Return where the report of a scrubbed file lies: beside it."""
    path = Path(dataset_path)
    return path.with_name(path.name + ".deid_report.json")


def check_deid_report(dataset_path: str | Path, sha256: str, report: str | Path | None = None) -> dict[str, Any]:
    """Return what the report says about a dataset; without `report`, the one beside the data is taken.

    Raises: UserError when no report vouches for exactly these bytes.
    """
    path = Path(report) if report is not None else report_path(dataset_path)
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
