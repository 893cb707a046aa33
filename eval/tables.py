"""Tables: what was measured, item by item and seed by seed. Every figure of a report is computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

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
