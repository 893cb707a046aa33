"""Tables: what was measured, item by item and seed by seed. Every figure of a report is computed from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from scripts.common.artifacts import sha256_json
from scripts.common.errors import UserError
from scripts.common.paths import portable_path
from scripts.common.question import ALL_RULES, CHECKS_PASSED, LOSS, PREFERENCE, REWARD, check_names
from scripts.dataset.split import cluster_of

if TYPE_CHECKING:
    from eval.measuring import Measured, Prepared

ITEMS = "items.jsonl"
NOT_BINARY = (LOSS, CHECKS_PASSED)

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Table:
    """One measure of every arm. Items of one cluster, such as the pairs of one prompt, are not independent.

    `values` holds for each arm an array of shape (seeds, items); `seeds` says which seed each row was trained with, and
    None where there is none, as for the base. With `weights`, one per item, such as its tokens, a value is a sum and the
    figure is the sum of the values over the sum of the weights.
    """

    name: str
    title: str
    phrase: str  # the measure inside a sentence
    unit: str  # a `share` holds values from 0 to 1
    better: Better
    group: str  # the section of the report
    noun: str  # what an item is, in the plural
    binary: bool
    items: tuple[str, ...]
    clusters: tuple[str, ...]
    seeds: Mapping[str, tuple[int | None, ...]]
    values: Mapping[str, NDArray[np.float64]]
    weights: NDArray[np.float64] | None = None


def build_tables(
    measured: Mapping[str, Sequence[Measured]],
    seeds: Mapping[str, tuple[int | None, ...]],
    references: Mapping[str, tuple[str, Sequence[Measured]]],
    prepared: Prepared,
) -> list[Table]:
    """Turn what was measured of each arm, the base first, into tables, the leading measure first.

    `references` holds what each member of an arm was trained against, and the name of it. An arm without has no implicit
    reward: one against another model would not be the one that was trained.
    """
    prompts = _Rows("prompts", prepared.questions, [each.cluster for each in prepared.questions], seeds)
    pairs = _Rows("pairs", prepared.pairs, [cluster_of(pair) for pair in prepared.pairs], seeds)
    checks = prepared.config.eval.checks
    columns: dict[str, Sequence[Any]] = dict(measured)
    tables = []
    if checks:
        tables.append(
            prompts.table(
                ALL_RULES, "All rules kept", "the share of answers that keep all rules", "checks",
                columns, lambda each: [all(answer.values()) for answer in each.checks],
            )
        )  # fmt: skip
    if prepared.pairs:
        tables.append(
            pairs.table(
                PREFERENCE, "Chosen answer likelier per token", "the share of pairs where the chosen answer is likelier",
                "preference", columns, lambda each: each.prefers_chosen(),
            )
        )  # fmt: skip
    if prepared.pairs and references:
        trained = {arm: list(zip(measured[arm], models, strict=True)) for arm, (_, models) in references.items()}
        against = ", ".join(f"{arm} against {name}" for arm, (name, _) in references.items())
        tables.append(
            pairs.table(
                REWARD, f"Implicit-reward accuracy ({against})",
                "the share of pairs in which the chosen answer gets the higher implicit reward", "preference",
                trained, lambda pair: pair[0].rewards_chosen(pair[1]),
            )
        )  # fmt: skip
    first = next(iter(measured.values()))[0]
    tables.append(
        prompts.table(
            LOSS, "Loss of the target answers", "the loss of the target answers", "loss",
            columns, lambda each: [-score.logps for score in each.targets],
            unit="nats per token", better="lower", weights=[score.tokens for score in first.targets],
        )
    )  # fmt: skip
    if checks:
        tables.append(
            prompts.table(
                CHECKS_PASSED, "Checks passed per answer", "the share of checks passed", "checks",
                columns, lambda each: [mean(answer.values()) for answer in each.checks],
            )
        )  # fmt: skip
    for name, check in zip(check_names(checks), checks, strict=True):
        tables.append(
            prompts.table(
                name, check.name, f"the share of answers that pass the check “{check.name}”", "checks",
                columns, lambda each, title=check.name: [answer[title] for answer in each.checks],
            )
        )  # fmt: skip
    return tables


class _Rows:
    """The items of one kind, in the order in which they were measured. What names a cluster is text of the data."""

    def __init__(
        self, noun: str, items: Sequence[Any], clusters: Sequence[str], seeds: Mapping[str, tuple[int | None, ...]]
    ) -> None:
        self.noun, self.seeds = noun, seeds
        self.items = tuple(portable_path(item.source) for item in items)
        self.clusters = tuple(hashlib.sha256(cluster.encode()).hexdigest()[:16] for cluster in clusters)

    def table(
        self,
        name: str,
        title: str,
        phrase: str,
        group: str,
        columns: Mapping[str, Sequence[Any]],
        values_of: Callable[..., Sequence[float]],
        *,
        unit: str = "share",
        better: Better = "higher",
        weights: Sequence[float] | None = None,
    ) -> Table:
        """Return one measure of these arms; `values_of` reads the values of a member, one per item."""
        return Table(
            name=name,
            title=title,
            phrase=phrase,
            unit=unit,
            better=better,
            group=group,
            noun=self.noun,
            binary=name not in NOT_BINARY,
            items=self.items,
            clusters=self.clusters,
            seeds={arm: self.seeds[arm] for arm in columns},
            values={arm: np.array([values_of(each) for each in members], float) for arm, members in columns.items()},
            weights=None if weights is None else np.array(weights, float),
        )


def write_items(folder: Path, tables: Sequence[Table]) -> None:
    """Write the values of every item of every measure, a line each, with the hash of the line."""
    with (folder / ITEMS).open("w", encoding="utf-8", newline="\n") as file:
        for line in _lines_of(tables):
            file.write(json.dumps({**line, "sha256": sha256_json(line)}, ensure_ascii=False) + "\n")


def _lines_of(tables: Sequence[Table]) -> Iterator[dict[str, Any]]:
    for table in tables:
        for place, (item, cluster) in enumerate(zip(table.items, table.clusters, strict=True)):
            yield {
                "measure": table.name,
                "item": item,
                "cluster": cluster,
                "weight": 1.0 if table.weights is None else float(table.weights[place]),
                "values": {arm: values[:, place].tolist() for arm, values in table.values.items()},
            }


def read_tables(folder: Path, report: Any) -> list[Table]:  # a Report, which is drawn from what stands on tables
    """Read what write_items wrote, with what the report says about each measure and arm.

    Raises: UserError naming file and line where a line is not as it was written, or a measure is missing.
    """
    path = folder / ITEMS
    rows: dict[str, list[dict[str, Any]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}); it holds what the report is computed from. Compare again."
        ) from None
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            digest = line.pop("sha256")
            mine = rows.setdefault(line["measure"], [])
            if line["values"].keys() != (mine or [line])[0]["values"].keys():
                raise ValueError("other arms than in the lines before")
            mine.append(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}:{number}: not a line that a comparison wrote. Compare again.") from None
        if digest != sha256_json(line):
            raise UserError(f"{path}:{number}: was changed: its sha256 is not that of the line. Compare again.")
    seeds = {name: (None,) if arm.stands or not arm.seeds else tuple(arm.seeds) for name, arm in report.arms.items()}
    missing = [metric.name for metric in report.metrics if metric.name not in rows]
    if missing:
        raise UserError(f"{path}: lacks the items of {', '.join(missing)}. Compare again.")
    return [_table_of(metric, rows[metric.name], seeds) for metric in report.metrics]


def _table_of(metric: Any, rows: Sequence[Mapping[str, Any]], seeds: Mapping[str, tuple[int | None, ...]]) -> Table:
    arms = rows[0]["values"]
    table: Table = metric.table(
        binary=metric.name not in NOT_BINARY,
        items=tuple(row["item"] for row in rows),
        clusters=tuple(row["cluster"] for row in rows),
        seeds={arm: seeds[arm] for arm in arms},
        values={arm: np.array([row["values"][arm] for row in rows], float).T for arm in arms},
        weights=np.array([row["weight"] for row in rows], float) if metric.name == LOSS else None,
    )
    return table
