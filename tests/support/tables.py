"""Tables of a comparison, as they are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eval.tables import Table


def table(
    values: Mapping[str, Sequence[Sequence[float]]],
    name: str = "all_rules",
    pairs: int = 1,
    weights: Sequence[float] | None = None,
    seeds: Mapping[str, tuple[int | None, ...]] | None = None,
    **facts: object,
) -> Table:
    """Lay out one measure; `values` holds a row per seed for each arm, `pairs` says how many items a prompt has."""
    arrays = {arm: np.array(rows, dtype=float) for arm, rows in values.items()}
    count = next(iter(arrays.values())).shape[1]
    everyday = {
        "title": name.capitalize(), "phrase": f"the share of {name}", "unit": "share", "better": "higher", "group": "checks",
        "noun": "prompts" if pairs == 1 else "pairs",
        "binary": weights is None and all(np.isin(rows, (0, 1)).all() for rows in arrays.values()),
    }  # fmt: skip
    return Table(
        name=name,
        items=tuple(f"data.jsonl:{number}" for number in range(count)),
        clusters=tuple(str(number // pairs) for number in range(count)),
        seeds=seeds or {arm: (None,) if arm == "base" else tuple(range(len(rows))) for arm, rows in arrays.items()},
        values=arrays,
        weights=None if weights is None else np.array(weights, dtype=float),
        **{**everyday, **facts},
    )


def passes(rate: float, count: int = 84, seeds: int = 1, chance: int = 0) -> list[list[float]]:
    """Return outcomes of a model that passes at a rate."""
    return (np.random.default_rng(chance).random((seeds, count)) < rate).astype(float).tolist()
