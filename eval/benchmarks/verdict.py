"""Measure how often the verdict of a comparison is wrong, and how often it finds what is there.

Draws the items of comparisons in which the truth is known and puts each through the code that makes a report: tables,
metrics, verdict. Seeds scatter, prompts have several items, and many items tie. Needs requirements.txt.

    python -m eval.benchmarks.verdict
    python -m eval.benchmarks.verdict --reports 200
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Literal

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from scipy.special import ndtri
from tqdm import tqdm

from eval.benchmarks.training_report import pasted
from eval.metrics import build_metrics
from eval.tables import Table
from eval.verdict import Question, decide
from scripts.common.errors import entry_point
from scripts.common.machine import available_cores, hardware
from scripts.common.paths import ROOT

README = ROOT / "eval" / "README.md"
START, END = "<!-- verdict: generated -->", "<!-- end of verdict -->"

Kind = Literal["binary", "continuous"]
KINDS: tuple[Kind, ...] = ("binary", "continuous")
PROMPTS, SCATTER, PAIRS = (40, 84, 300), (0.0, 0.02, 0.04), (1, 4, 10)
MARGIN = 0.05
LIMIT = 0.06  # of false alarms at 5 %
# Of an item's variance, what its prompt has in every seed, its prompt in this seed, and it alone in every seed.
SHARED = (0.15, 0.15, 0.15)
TIES = {"binary": 0.70, "continuous": 0.40}  # items on which both models do the same
ITEM_SD = 0.30  # of a continuous difference


@dataclass(frozen=True)
class Cell:
    """Comparisons of one kind: how large they are, how far seeds scatter, and the true difference."""

    kind: Kind
    seeds: int
    prompts: int
    pairs: int
    scatter: float
    gap: float = 0.0
    margin: float | None = None
    ties: float | None = None


def cells() -> Iterator[Cell]:
    """Yield every cell in which a better, worse or no worse is wrong."""
    for kind in KINDS:
        for prompts in PROMPTS:
            for pairs in PAIRS:
                for seeds, scatter in [(1, 0.0), *((seeds, scatter) for seeds in (3, 5) for scatter in SCATTER)]:
                    yield Cell(kind, seeds, prompts, pairs, scatter)
                    yield Cell(kind, seeds, prompts, pairs, scatter, gap=-MARGIN, margin=MARGIN)


def power_cells() -> Iterator[Cell]:
    """Yield the cells in which a better is right: five seeds, 8 points, a standard deviation of 0.30 between items."""
    for prompts, scatter in ((84, 0.02), (84, 0.04), (300, 0.04)):
        yield Cell("binary", 5, prompts, 1, scatter, gap=0.08, ties=1 - (ITEM_SD**2 + 0.08**2))
        yield Cell("continuous", 5, prompts, 1, scatter, gap=0.08)


def draw(cell: Cell, generator: np.random.Generator) -> Table:
    """Draw one comparison of two arms, `dpo` and `sft`."""
    seeds, items = cell.seeds, cell.prompts * cell.pairs
    ties = TIES[cell.kind] if cell.ties is None else cell.ties

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    prompt, prompt_seed, item = (math.sqrt(share) for share in SHARED)
    by_prompt = prompt * normal(1, cell.prompts) + prompt_seed * normal(seeds, cell.prompts)
    latent = np.repeat(by_prompt, cell.pairs, axis=1) + item * normal(1, items)
    latent += math.sqrt(1 - sum(SHARED)) * normal(seeds, items)
    gaps = cell.gap + cell.scatter * normal(seeds, 1)
    if cell.kind == "binary":
        changed = np.maximum(1 - ties, np.abs(gaps))
        up, down = (changed + gaps) / 2, (changed - gaps) / 2
        wins, losses = latent > ndtri(1 - up), latent < ndtri(down)
        both = generator.random((seeds, items)) < 0.5
        sft, dpo = np.where(wins, 0.0, np.where(losses, 1.0, both)), np.where(losses, 0.0, np.where(wins, 1.0, both))
    else:
        moved = generator.random((seeds, items)) >= ties
        sft = normal(seeds, items)
        dpo = sft + moved * (gaps / (1 - ties) + ITEM_SD / math.sqrt(1 - ties) * latent)
    names, prompts = _names(cell.prompts, cell.pairs)
    both_seeds = {"sft": tuple(range(seeds)), "dpo": tuple(range(seeds))}
    return Table(
        name="measure",
        title="Measure",
        phrase="the measure",
        unit="share" if cell.kind == "binary" else "",
        better="higher",
        group="checks",
        noun="items",
        binary=cell.kind == "binary",
        items=names,
        clusters=prompts,
        seeds=both_seeds,
        values={"sft": sft, "dpo": dpo},
    )


_KNOWN: dict[tuple[int, int], tuple[tuple[str, ...], tuple[str, ...]]] = {}


def _names(prompts: int, pairs: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if (prompts, pairs) not in _KNOWN:
        numbers = range(prompts * pairs)
        _KNOWN[prompts, pairs] = tuple(map(str, numbers)), tuple(str(number // pairs) for number in numbers)
    return _KNOWN[prompts, pairs]


def measure(cell: Cell, reports: int) -> dict[str, int]:
    """Count the outcomes of so many reports; what chance does follows from the cell alone."""
    numbers = (KINDS.index(cell.kind), cell.seeds, cell.prompts, cell.pairs, cell.scatter, cell.gap, cell.margin or 0)
    generator = np.random.default_rng([round(1e6 * abs(number)) for number in numbers])
    margins = {} if cell.margin is None else {"measure": cell.margin}
    question = Question(a="dpo", b="sft", measures=["measure"], margins=margins)
    outcomes: Counter[str] = Counter()
    for _ in range(reports):
        verdict, _ = decide(build_metrics([draw(cell, generator)], question), question)
        outcomes[verdict.outcome] += 1
    return dict(outcomes)


def share_of(cell: Cell, outcomes: dict[str, int]) -> float:
    """Return the share of reports with an outcome that is wrong, or in the cells of power of the one that is right."""
    counted = (
        ("better", "worse") if not cell.gap else ("better", "equivalent", "no_worse") if cell.margin else ("better",)
    )
    return sum(outcomes.get(outcome, 0) for outcome in counted) / sum(outcomes.values())


def measure_all(asked: Sequence[Cell], reports: int, processes: int) -> list[tuple[Cell, float]]:
    """Measure cells side by side, the largest first."""
    order = sorted(asked, key=lambda cell: -cell.seeds * cell.prompts * cell.pairs)
    with ProcessPoolExecutor(processes) as pool:
        counts = pool.map(measure, order, [reports] * len(order))
        found = {
            cell: share_of(cell, outcomes) for cell, outcomes in zip(order, tqdm(counts, total=len(order)), strict=True)
        }
    return [(cell, found[cell]) for cell in asked]


def errors_table(found: Sequence[tuple[Cell, float]], reports: int) -> list[str]:
    """Render the share of wrong outcomes: the highest of all kinds and numbers of pairs for each number of seeds and prompts."""
    head = " | ".join(f"seeds scatter by {100 * scatter:.0f} points" for scatter in SCATTER)
    lines = [f"| seeds | prompts | {head} |", "|---|---|" + "---|" * len(SCATTER)]
    for seeds in (1, 3, 5):
        for prompts in PROMPTS:
            row = []
            for scatter in SCATTER:
                mine = [
                    (c, share) for c, share in found if (c.seeds, c.prompts, c.scatter) == (seeds, prompts, scatter)
                ]
                alarms = max((share for c, share in mine if not c.gap), default=None)
                losses = max((share for c, share in mine if c.gap), default=None)
                row.append("–" if alarms is None or losses is None else f"{100 * alarms:.1f} · {100 * losses:.1f}")
            lines.append(f"| {seeds} | {prompts} | {' | '.join(row)} |")
    highest = LIMIT + 2 * math.sqrt(LIMIT * (1 - LIMIT) / reports)
    over = [cell for cell, share in found if share > highest]
    lines += [
        "",
        f"{len(over)} of {len(found)} cells lie above {100 * highest:.2f} %, which is 6 % and two Monte-Carlo errors.",
    ]
    return lines


def power_table(found: Sequence[tuple[Cell, float]]) -> list[str]:
    """Render how often a true difference of 8 points is found."""
    lines = ["| prompts | seeds scatter by | binary | continuous |", "|---|---|---|---|"]
    rows: dict[tuple[int, float], dict[str, float]] = {}
    for cell, share in found:
        rows.setdefault((cell.prompts, cell.scatter), {})[cell.kind] = share
    for (prompts, scatter), by_kind in rows.items():
        lines.append(
            f"| {prompts} | {100 * scatter:.0f} points | " + " | ".join(f"{by_kind[kind]:.2f}" for kind in KINDS) + " |"
        )
    return lines


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--reports", type=int, default=4000, metavar="N", help="simulated reports per cell (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="write the share of every cell as JSON")
    add(
        "--paste", nargs="?", const=str(README), metavar="FILE", help="also put the tables into eval/README.md, or FILE"
    )
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure every cell, and print the tables."""
    arguments = build_parser().parse_args(argv)
    start, processes = time.perf_counter(), available_cores()
    errors = measure_all(list(cells()), arguments.reports, processes)
    power = measure_all(list(power_cells()), arguments.reports, processes)
    about = (
        f"Measured on {hardware()}, {date.today()}: {arguments.reports:,} reports per cell, "
        f"{(time.perf_counter() - start) / 60:.0f} minutes."
    )
    table = "\n".join([about, "", *errors_table(errors, arguments.reports), "", *power_table(power)])
    sys.stdout.write(table + "\n")
    if arguments.out:
        rows = [{**asdict(cell), "share": share} for cell, share in (*errors, *power)]
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if arguments.paste:
        path = Path(arguments.paste)
        path.write_text(pasted(path, table, START, END), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
