"""The evidence of a run: a report in JSON and HTML beside the output, without any personal data."""

from __future__ import annotations

import html
import json
from collections import Counter
from typing import Any

from scripts.common.artifacts import sha256_json
from scripts.common.schema import Deid
from scripts.deid.replacement import Replacer
from scripts.deid.scrubbing import Outcome

# 45 CFR 164.514(b)(2)(i): the 18 identifiers and the entities that stand for each.
HIPAA = {
    "A names": ["PERSON"],
    "B places smaller than a state": ["LOCATION", "STREET_ADDRESS", "ZIP_CODE"],
    "C dates but the year, ages over 89": ["DATE_TIME", "AGE"],
    "D telephone numbers": ["PHONE_NUMBER"],
    "E fax numbers": ["PHONE_NUMBER"],
    "F e-mail addresses": ["EMAIL_ADDRESS"],
    "G social security numbers": ["US_SSN"],
    "H medical record numbers": ["ID_NUMBER"],
    "I health plan numbers": ["ID_NUMBER", "US_MBI"],
    "J account numbers": ["ID_NUMBER", "CREDIT_CARD", "IBAN_CODE"],
    "K certificate and licence numbers": ["ID_NUMBER", "MEDICAL_LICENSE", "US_NPI"],
    "L vehicle identifiers": ["VEHICLE_ID"],
    "M device identifiers": ["DEVICE_ID", "MAC_ADDRESS"],
    "N URLs": ["URL"],
    "O IP addresses": ["IP_ADDRESS"],
    "P biometric identifiers": [],
    "Q photographs": [],
    "R any other unique code": ["UUID", "HANDLE", "SECRET"],
}
LIMITS = (
    "This is no guarantee: recognizers miss personal data, names on noisy text most of all. Have people read a sample.",
    "Recall holds for text like the set it was measured on; measure on labelled records of your own with --evaluate.",
    "Whether the remaining text points at somebody (a rare illness, a unique event) is not judged.",
    "Under HIPAA the covered entity must also have no actual knowledge that somebody can be identified.",
    "Under the GDPR data replaced by hash, encrypt or consistent surrogates are pseudonymous, not anonymous.",
    "Fields that were left alone (safe fields, or those not named in deid.fields) were not searched.",
    "Relative dates, bare years and durations stay, except in the profile strict.",
)


class Tally:
    """Counts over all records of a run; holds no text."""

    def __init__(self) -> None:
        self.read = self.written = self.characters = 0
        self.reasons: Counter[str] = Counter()
        self.entities: Counter[str] = Counter()
        self.fields: dict[str, Counter[str]] = {}
        self.scores: dict[str, Counter[str]] = {}

    @property
    def quarantined(self) -> int:
        """Count the records held back."""
        return self.reasons.total()

    def add(self, outcome: Outcome) -> None:
        """Count one record that was written or held back."""
        self.read += 1
        if outcome.reason:
            self.reasons[outcome.reason] += 1
            return
        self.written += 1
        self.characters += outcome.characters
        for field, entity, score in outcome.found:
            self.entities[entity] += 1
            self.fields.setdefault(field, Counter())[entity] += 1
            self.scores.setdefault(entity, Counter())[f"{int(min(score, 0.99) * 10) / 10:.1f}"] += 1


def hipaa_table(detector: dict[str, Any], replacer: Replacer) -> list[dict[str, str]]:
    """Say for each of the 18 identifiers what was done about it."""
    table = []
    for identifier, wanted in HIPAA.items():
        done = [name for name in wanted if name in detector["entities"] and replacer.removes(name)]
        if identifier[0] in "PQ":
            method = "not recognised in text; records with base64 or binary content are held back"
        elif not done:
            method = "not covered"
        else:
            method = "; ".join(f"{name}: {replacer.operator_of(name)}" for name in done)
            missing = [name for name in wanted if name not in done]
            method += f"; not covered: {', '.join(missing)}" if missing else ""
        table.append({"identifier": identifier, "method": method})
    return table


def settings_for_report(settings: Deid) -> dict[str, Any]:
    """Return the configuration; the lists may hold names, so they appear as counts and hashes."""
    values = settings.model_dump(mode="json")
    for name in ("allow_list", "deny_list"):
        values[name] = {"count": len(values[name]), "sha256": sha256_json(values[name])}
    return values


def render_html(report: dict[str, Any]) -> str:
    """Write the report as one page that needs nothing else."""
    counts, evaluation = report["counts"], report["evaluation"]
    blocks = [
        "<p class='lead'>"
        f"{counts['input']:,} records read, {counts['output']:,} written, {counts['quarantined']:,} held back. "
        f"{sum(report['entities'].values()):,} findings replaced or kept as configured.</p>",
        _table("Files", ("", "name", "sha256"), [(k, report[k]["name"], report[k]["sha256"]) for k in ("input", "output")]),
        _table(
            "Findings", ("entity", "count", "operator"),
            [(k, f"{v:,}", report["operators"].get(k, "")) for k, v in report["entities"].items()],
        ),
        _table("Held back", ("reason", "records"), list(counts["reasons"].items())),
        _table("HIPAA Safe Harbor", ("identifier", "method"), [(r["identifier"], r["method"]) for r in report["hipaa"]]),
    ]  # fmt: skip
    if evaluation:
        rows = [("all", evaluation["recall"]), *evaluation["recall_by_label"].items()]
        shown = [(n, f"{r['share']:.1%}" if r["total"] else "–", _interval(r), f"{r['total']:,}") for n, r in rows]
        name = evaluation["gold"]["name"]
        blocks.append(_table(f"Measured recall on {name}", ("label", "covered whole", "95 % interval", "spans"), shown))
    else:
        blocks.append("<h2>Measured recall</h2><p>Not measured in this run; see --evaluate.</p>")
    blocks.append(
        "<h2>Limits</h2><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in report["limits"]) + "</ul>"
    )
    tools = json.dumps({k: report[k] for k in ("recognizers", "config", "git")}, indent=1, ensure_ascii=False)
    blocks.append(
        f"<details><summary>Configuration, versions, hashes</summary><pre>{html.escape(tools)}</pre></details>"
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>De-identification report</title><style>"
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}"
        "table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #ddd;"
        "overflow-wrap:anywhere}.lead{font-size:1.2rem}pre{white-space:pre-wrap}</style>"
        f"<h1>De-identification report</h1><p>{html.escape(report['created'])}</p>{''.join(blocks)}</html>\n"
    )


def _interval(share: dict[str, Any]) -> str:
    return " to ".join(f"{bound:.1%}" for bound in share["wilson95"]) if share["wilson95"] else "–"


def _table(title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    if not rows:
        return f"<h2>{html.escape(title)}</h2><p>None.</p>"
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<h2>{html.escape(title)}</h2><table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{cells}</table>"
