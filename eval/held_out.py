"""What no stage has trained on: the validation side of the datasets, on which every model is measured."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from scripts.common.config import LoadedConfig
from scripts.common.errors import UserError
from scripts.common.records import (
    Preference,
    Record,
    is_validation,
    load_datasets,
    parse_preference,
    parse_record,
)


@dataclass(frozen=True)
class HeldOut:
    """What no stage has trained on."""

    records: tuple[Record, ...]
    pairs: tuple[Preference, ...]

    def questions(self, most: int | None) -> list[tuple[str, tuple[dict[str, str], ...], str]]:
        """Return (source, prompt, reference answer) of every different prompt."""
        found: dict[tuple[tuple[str, ...], ...], tuple[str, tuple[dict[str, str], ...], str]] = {}
        items: list[Record | Preference] = [*self.records, *self.pairs]
        for item in items:
            key = tuple((message["role"], message["content"]) for message in item.prompt)
            found.setdefault(key, (item.source, item.prompt, item.answer))
        return list(found.values())[:most]


def read_held_out(config: LoadedConfig, stages: Collection[str]) -> HeldOut:
    """Read the validation side of the datasets that these stages train on."""
    values = config.values
    sides: list[tuple[Any, ...]] = []
    for name, section, parse in (("sft", values.sft, parse_record), ("dpo", values.dpo, parse_preference)):
        if name not in stages:
            sides.append(())
            continue
        records = [
            r
            for file in load_datasets(section.dataset_path, parse, values.data, f"{name}.dataset_path")
            for r in file.records
        ]
        sides.append(tuple(record for record in records if is_validation(record.prompt, values.data)))
    if not any(sides):
        raise UserError(
            "data.validation_ratio: nothing is held out, so nothing can be compared. Raise it and train again."
        )
    return HeldOut(sides[0], sides[1])
