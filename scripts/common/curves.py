"""The figures behind the curves of a training run: what the adapter folder keeps of the trainer's log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

CURVES = "curves.json"


class Panel(NamedTuple):
    """What is drawn over one axis."""

    title: str
    unit: str
    series: tuple[str, ...]  # as the trainer calls them


PANELS = (
    Panel("loss", "loss in nats", ("loss", "eval_loss")),
    Panel("rewards", "implicit reward", ("rewards/chosen", "rewards/rejected", "eval_rewards/margins")),
)


class Curves(BaseModel):
    """The curves of one run: of each series its points, which are pairs of step and value."""

    stage: str
    seed: int | None = None
    series: dict[str, list[tuple[int, float]]]

    @classmethod
    def of(cls, history: Iterable[Mapping[str, Any]], stage: str, seed: int | None = None) -> Curves:
        """Pick what is drawn out of a trainer's log; a value that is no number has no place on an axis."""
        entries = list(history)
        series = {
            key: [(entry["step"], entry[key]) for entry in entries if key in entry and math.isfinite(entry[key])]
            for panel in PANELS
            for key in panel.series
        }
        return cls(stage=stage, seed=seed, series={key: points for key, points in series.items() if points})

    @property
    def panels(self) -> list[Panel]:
        """The panels of which there is something to draw."""
        return [panel for panel in PANELS if set(panel.series) & set(self.series)]


def label(key: str) -> str:
    """Name a series for a reader."""
    return key.replace("eval_", "held-out ") if key.startswith("eval_") else f"training {key}"


def write_curves(folder: Path, curves: Curves) -> None:
    """Keep the curves in an adapter folder."""
    (folder / CURVES).write_text(curves.model_dump_json() + "\n", encoding="utf-8", newline="\n")


def read_curves(folder: Path) -> Curves | None:
    """Return the curves of an adapter folder; those of earlier versions hold only a picture of them."""
    path = folder / CURVES
    return Curves.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None
