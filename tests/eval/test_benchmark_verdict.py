"""The error rates of the verdict, on fewer reports than the benchmark draws: noise is not sold, and what is there is found."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from eval.benchmarks import verdict as benchmark
from eval.benchmarks.verdict import Cell, cells, draw, measure, power_cells, share_of

REPORTS = 250


@pytest.mark.parametrize("cell", [
    Cell("binary", 3, 84, 4, 0.04), Cell("continuous", 3, 300, 1, 0.04), Cell("continuous", 5, 84, 1, 0.02),
    Cell("binary", 1, 40, 10, 0.0), Cell("continuous", 1, 40, 4, 0.0),
    Cell("continuous", 3, 40, 4, 0.02, gap=-0.05, margin=0.05), Cell("binary", 1, 84, 1, 0.0, gap=-0.05, margin=0.05),
])  # fmt: skip
def test_noise_is_sold_in_few_reports(cell: Cell) -> None:
    wrong = share_of(cell, measure(cell, REPORTS))
    assert wrong <= 0.06 + 3 * math.sqrt(0.06 * 0.94 / REPORTS), cell


@pytest.mark.parametrize(("cell", "least"), list(zip(power_cells(), [0.80, 0.80, 0.65, 0.65, 0.80, 0.80], strict=True)))
def test_what_is_there_is_found(cell: Cell, least: float) -> None:
    assert share_of(cell, measure(cell, REPORTS)) >= least - 3 * math.sqrt(least * (1 - least) / REPORTS), cell


def test_the_cells_are_those_that_are_promised() -> None:
    found = list(cells())
    assert len(found) == 2 * 3 * 3 * 7 * 2
    assert {(c.kind, c.seeds, c.prompts, c.pairs, c.scatter) for c in found if c.seeds > 1} == {
        (kind, seeds, prompts, pairs, scatter)
        for kind in ("binary", "continuous")
        for seeds in (3, 5)
        for prompts in (40, 84, 300)
        for pairs in (1, 4, 10)
        for scatter in (0.0, 0.02, 0.04)
    }


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_what_is_drawn_is_what_the_cell_says(kind: str) -> None:
    """The gap, the scatter of seeds, the ties, and what the items of a prompt have in common."""
    generator = np.random.default_rng(0)
    cell = Cell(kind, 5, 300, 4, 0.04, gap=0.08)
    tables = [draw(cell, generator) for _ in range(150)]
    gaps = np.array([(each.values["dpo"] - each.values["sft"]).mean(axis=1) for each in tables])
    assert gaps.mean() == pytest.approx(0.08, abs=0.006)
    assert gaps.std(axis=1, ddof=1).mean() == pytest.approx(0.04, abs=0.008)
    difference = tables[0].values["dpo"] - tables[0].values["sft"]
    assert np.mean(difference == 0) == pytest.approx(benchmark.TIES[kind], abs=0.05)
    by_prompt = difference.reshape(5, 300, 4) - difference.mean()
    within = np.mean(by_prompt[..., 0] * by_prompt[..., 1]) / np.mean(by_prompt**2)
    assert 0.05 < within < 0.5


def test_the_same_cell_gives_the_same_reports() -> None:
    cell = Cell("binary", 3, 40, 1, 0.02)
    assert measure(cell, 20) == measure(cell, 20)


def test_the_command_writes_tables_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "PROMPTS", (40,))
    monkeypatch.setattr(benchmark, "PAIRS", (1,))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{benchmark.START}\nold\n{benchmark.END}\nafter\n", encoding="utf-8")
    assert benchmark.main(["--reports", "10", "--out", str(tmp_path / "out.json"), "--paste", str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{benchmark.START}\nMeasured on ")
    assert "| 5 | 40 | " in text
    assert "old" not in text
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert len(rows) == 2 * 7 * 2 + 6
    assert "10 reports per cell" in capsys.readouterr().out
