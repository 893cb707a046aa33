"""Turn what lm-eval measured into one table: stderr, paired differences per item, and what must not be compared."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from eval.figures import number
from eval.metrics import Difference, Estimate, Finding, Metric, adjust_p_values, describe
from eval.report import Benchmarks, Report, render_report
from eval.tables import Table
from scripts.common.artifacts import read_manifest, sha256_json
from scripts.common.errors import UserError
from scripts.common.paths import portable_path, resolve
from scripts.common.stages import ADAPTER_STAGES, BASE, TRAINING_STAGES

RESULTS = "results.json"
SAMPLES = "samples.jsonl"
GROUP = "lm-eval"
CHAIN = (BASE, *ADAPTER_STAGES)
NOT_PUBLISHED = "A figure from part of a task (--limit) is not comparable with published ones."

Entry = dict[str, Any]  # one model on one task; "items" holds {metric: value} per item


def collect(results: dict[str, Any], titles: dict[str, str], **facts: Any) -> list[Entry]:
    """Return an entry per task of lm-eval's results; a group such as mmlu has its members and, without items, itself."""
    entries = []
    for task, found in {**results["results"], **results.get("groups", {})}.items():
        samples = results["samples"].get(task, [])
        metrics = {}
        for key, value in found.items():
            name, comma, filtered = key.partition(",")
            if comma and not name.endswith("_stderr") and isinstance(value, int | float):
                stderr = found.get(f"{name}_stderr,{filtered}")
                metrics[_metric_name(name, filtered)] = {
                    "value": value,
                    "stderr": stderr if isinstance(stderr, int | float) else None,  # lm-eval writes "N/A"
                    "better": "lower" if results["higher_is_better"].get(task, {}).get(name) is False else "higher",
                    "title": titles.get(name, _metric_name(name, filtered)),
                }
        if not metrics:
            continue
        settings = facts["settings"] | {
            "num_fewshot": results["n-shot"].get(task),
            "task_version": results["versions"].get(task),
        }
        hashes = sorted({(sample["doc_id"], sample["doc_hash"], sample["prompt_hash"]) for sample in samples})
        entries.append(
            {
                "task": task,
                **facts,
                "settings": settings,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "n": len(hashes),
                "items_sha256": sha256_json(hashes),
                "metrics": metrics,
                "items": _items(samples),
            }
        )
    return entries


def _metric_name(name: str, filtered: str) -> str:
    return name if filtered == "none" else f"{name}.{filtered}"


def _items(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    items: dict[int, dict[str, Any]] = {}
    for sample in samples:
        item = items.setdefault(
            sample["doc_id"],
            {
                "item": sample["doc_id"],
                "prompt": sample["arguments"][0][0],
                "target": sample["target"],
                "responses": sample["filtered_resps"],
                "metrics": {},
            },
        )
        for name in sample["metrics"]:
            item["metrics"][_metric_name(name, sample["filter"])] = sample[name]
    return [items[place] for place in sorted(items)]


def read_earlier(folder: Path, new: Iterable[tuple[str, str]]) -> tuple[list[Entry], list[str]]:
    """Return the entries of an earlier call that stay: neither measured again nor of an artifact that has changed."""
    if not folder.exists():
        return [], []
    read_manifest(folder, stages=("eval",))
    replaced, kept, warnings = set(new), [], []
    entries = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["entries"]
    items = defaultdict(list)
    for line in (folder / SAMPLES).read_bytes().split(b"\n"):
        if line:
            item = json.loads(line)
            items[item.pop("task"), item.pop("model")].append(item)
    for entry in entries:
        key = entry["task"], entry["model"]
        if key in replaced:
            continue
        if entry["sha256"] != current_sha256(entry["model"]):
            warnings.append(
                f"{entry['task']}: the earlier result of {entry['model']} is dropped: the folder has changed."
            )
            continue
        kept.append(entry | {"items": items[key]})
    return kept, warnings


def current_sha256(folder: str | Path) -> str | None:
    """Return the identity of the artifact that lies in a folder now; a plain model folder has none."""
    try:
        return read_manifest(resolve(folder), verify=False).sha256
    except UserError:
        return None


def arrange(entries: list[Entry]) -> list[Entry]:
    """Put the chain's models in its order, and call models by their folders where several calls gave two one name."""
    folders: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        folders[entry["label"]].add(entry["model"])
    named = [entry | {"label": entry["model"]} if len(folders[entry["label"]]) > 1 else entry for entry in entries]
    return sorted(named, key=lambda entry: CHAIN.index(entry["label"]) if entry["label"] in CHAIN else len(CHAIN))


def compare_entries(entries: list[Entry]) -> tuple[list[Metric], list[str]]:
    """Return the report's metrics, with differences only between results of the same settings and items, and warnings."""
    by_task: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_task[entry["task"]].append(entry)
    metrics: list[Metric] = []
    findings: list[Finding] = []
    warnings: list[str] = []
    for task, found in by_task.items():
        alike: dict[str, list[Entry]] = defaultdict(list)
        for entry in found:
            alike[sha256_json([entry["settings"], entry["items_sha256"]])].append(entry)
        for group in alike.values():
            apart = f" ({_differing(group[0], found)})" if len(alike) > 1 else ""
            for name in group[0]["metrics"]:
                metric, compared = _describe(name, group, apart)
                metrics.append(metric)
                findings += compared
        for first, other in pairwise(alike.values()):
            ours, theirs = first[0]["settings"], other[0]["settings"]
            unlike = [key for key in ours if ours[key] != theirs.get(key)]
            fix = (
                "`python -m eval.compare` compares them."
                if unlike == ["chat_template"]
                else "Evaluate them in one call."
            )
            warnings.append(
                f"{task}: {_names(first)} and {_names(other)} were measured with different settings "
                f"({_differing(first[0], found)}; {_differing(other[0], found)}) and are not compared. {fix}"
            )
        if any(entry["settings"]["limit"] for entry in found):
            warnings.append(f"{task}: {NOT_PUBLISHED}")
    warnings += [note for entry in entries for note in entry.get("notes", [])] + _strangers(entries)
    adjust_p_values(findings)
    return metrics, list(dict.fromkeys(warnings))


def _strangers(entries: list[Entry]) -> list[str]:
    """Name the adapters that continue another one than that of the stage before which stands beside them."""
    warnings = []
    for entry in entries:
        stage = TRAINING_STAGES.get(entry.get("stage") or "")
        if not stage or not entry["parent"]:
            continue
        beside = {each["model"]: each["sha256"] for each in entries if each.get("stage") == stage.continues}
        if beside and entry["parent"] not in beside.values():
            warnings.append(
                f"{entry['model']} continues another {stage.continues} adapter ({entry['parent'][:12]}…) than "
                f"{', '.join(beside)}, so what differs between them is not {stage.title} alone."
            )
    return warnings


def _names(group: list[Entry]) -> str:
    return ", ".join(entry["label"] for entry in group)


def _differing(entry: Entry, found: list[Entry]) -> str:
    facts = [{**other["settings"], "items": other["items_sha256"][:8]} for other in found]
    own = {**entry["settings"], "items": entry["items_sha256"][:8]}
    keys = [key for key in own if any(other.get(key) != own[key] for other in facts)]
    return ", ".join(f"{key} {own[key]}" for key in keys)


def _describe(name: str, group: list[Entry], apart: str) -> tuple[Metric, list[Finding]]:
    """Describe one metric of models measured alike; intervals and tests where it is a mean or a rate over items."""
    measured = [entry for entry in group if name in entry["metrics"]]
    figures = {entry["label"]: entry["metrics"][name] for entry in measured}
    columns = {entry["label"]: [item["metrics"].get(name) for item in entry["items"]] for entry in measured}
    first = next(iter(figures.values()))
    task, better = group[0]["task"], first["better"]
    metric = Metric(
        name=name,
        title=f"{task}: {first['title']}{apart}",
        task=task,
        unit="",
        better=better,
        group=GROUP,
        n=group[0]["n"],
        models={label: Estimate(value=each["value"], ci_low=None, ci_high=None) for label, each in figures.items()},
        differences=[],
    )
    findings: list[Finding] = []
    is_perplexity = all(_is_perplexity(columns[label], figures[label]["value"]) for label in figures)
    if is_perplexity or all(_is_mean(columns[label], figures[label]["value"]) for label in figures):
        weights = None
        if is_perplexity:
            metric.title = f"{task}: loss, the logarithm of {first['title']}{apart}"
            metric.unit, metric.better = "nats per token" if task == "domain_reference" else "nats", "lower"
            weights = np.array([value[1] for value in next(iter(columns.values()))], float)
            columns = {label: [-value[0] for value in column] for label, column in columns.items()}
        elif all(0 <= value <= 1 for column in columns.values() for value in column):
            metric.unit = "share"
        described, findings = describe(_table(metric, columns, weights))
        metric = described.model_copy(update={"task": task})
    for label, estimate in metric.models.items():
        estimate.stderr = figures[label]["stderr"]
        estimate.perplexity = figures[label]["value"] if is_perplexity else None
    return metric, findings


def _table(metric: Metric, columns: dict[str, list[float]], weights: Any) -> Table:
    """Lay out models measured once each; every item stands alone."""
    items = tuple(str(number) for number in range(metric.n))
    return metric.table(
        binary=weights is None and all(value in (0, 1) for column in columns.values() for value in column),
        items=items,
        clusters=items,
        seeds=dict.fromkeys(columns, (None,)),
        values={label: np.array([column], float) for label, column in columns.items()},
        weights=weights,
    )


def _is_mean(column: list[Any], value: float) -> bool:
    plain = all(isinstance(item, int | float) and math.isfinite(item) for item in column)
    return bool(column) and plain and math.isclose(fmean(column), value, rel_tol=1e-6, abs_tol=1e-9)


def _is_perplexity(column: list[Any], value: float) -> bool:
    if not column or not all(isinstance(item, list | tuple) and len(item) == 2 and item[1] > 0 for item in column):
        return False
    loss = -sum(item[0] for item in column) / sum(item[1] for item in column)
    return loss < 500 and math.isclose(math.exp(loss), value, rel_tol=1e-6)


def table(metrics: list[Metric]) -> str:
    """Write a Markdown table: a line per metric, ± the standard error, differences with their 95 % intervals."""
    labels = list(dict.fromkeys(label for metric in metrics for label in metric.models))
    pairs = list(dict.fromkeys((d.a, d.b) for metric in metrics for d in metric.differences))
    rows = [["task: metric", "n", *labels, *(f"{a} − {b}" for a, b in pairs)]]
    for metric in metrics:
        differences = {(d.a, d.b): d for d in metric.differences}
        title = metric.title + (" (%)" if metric.unit == "share" else "")
        row = [title, f"{metric.n}", *(_value_cell(metric.models.get(label), metric.unit) for label in labels)]
        rows.append(row + [_difference_cell(differences.get(pair), metric.unit) for pair in pairs])
    rows.insert(1, ["---"] * len(rows[0]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def _value_cell(estimate: Estimate | None, unit: str) -> str:
    if estimate is None:
        return "–"
    shown = number(estimate.value, unit)
    if estimate.perplexity is not None:
        shown += f" (perplexity {number(estimate.perplexity)})"
    return shown + (f" ± {number(estimate.stderr, unit)}" if estimate.stderr is not None else "")


def _difference_cell(d: Difference | None, unit: str) -> str:
    if d is None:
        return "–"
    interval = f"[{number(d.ci_low, unit, True)}, {number(d.ci_high, unit, True)}]"
    return f"{number(d.value, unit, True)} {interval}" + (" *" if d.shown else "")


def write_results(part: Path, entries: list[Entry], metrics: list[Metric], warnings: list[str]) -> None:
    """Write results, samples and the report page into a folder that is not published yet."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    results = {
        "schema": 1,
        "created": created,
        "warnings": warnings,
        "metrics": [metric.model_dump() for metric in metrics],
        "entries": [{key: value for key, value in entry.items() if key != "items"} for entry in entries],
    }
    text = json.dumps(results, indent=1, ensure_ascii=False, default=str)
    (part / RESULTS).write_text(text + "\n", encoding="utf-8", errors="backslashreplace", newline="\n")
    with (part / SAMPLES).open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for entry in entries:
            for item in entry["items"]:
                line = {"task": entry["task"], "model": entry["model"], **item}
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    labels = list(dict.fromkeys(entry["label"] for entry in entries))
    page = Report(
        created=created,
        title=f"{' · '.join(labels)} under lm-eval",
        models=labels,
        benchmarks=describe_benchmarks(metrics, warnings, entries),
    )
    (part / "report.html").write_text(render_report(page), encoding="utf-8", newline="\n")


def describe_benchmarks(metrics: list[Any], warnings: list[str], entries: list[Entry]) -> Benchmarks:
    """Return what the section of a report shows."""
    settings = {entry["task"]: entry["settings"] for entry in entries}
    return Benchmarks(metrics=metrics, warnings=warnings, settings=settings)


def find_benchmarks(folder: Path, models: Iterable[Path]) -> tuple[Benchmarks | None, str | None]:
    """Return the section for a comparison of these adapters, or why there is none.

    Results of an adapter that has been trained again since are left out: they describe another model.
    """
    if not folder.is_dir():
        return None, None
    try:
        read_manifest(folder, stages=("eval",))
    except UserError as error:  # a comparison that took an hour must not be lost for an extra of its report
        return None, f"{error} Its lm-eval results are left out."
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    entries = results["entries"]
    stale = {entry["model"] for entry in entries if entry["sha256"] != current_sha256(entry["model"])}
    if stale:
        return None, f"{folder} was made with an earlier {', '.join(sorted(stale))} and is left out; evaluate again."
    if not {entry["model"] for entry in entries} & {portable_path(model) for model in models}:
        return None, f"{folder} holds results of other models and is left out."
    return describe_benchmarks(results["metrics"], results["warnings"], entries), None
