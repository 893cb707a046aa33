"""What no stage has trained on: the validation side of the datasets, on which every model is measured."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from scripts.common.artifacts import Manifest
from scripts.common.config import LoadedConfig
from scripts.common.errors import UserError, listing
from scripts.common.schema import Data
from scripts.common.stages import TRAINING_STAGES
from scripts.dataset.chat_format import ChatFormat, UnfitRow
from scripts.dataset.records import PARSERS, Message, Preference, Record, load_datasets
from scripts.dataset.rendering import check_rendered, check_rendered_pair, render_pair, render_record
from scripts.dataset.split import is_validation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A prompt that every model answers, and the answer that the data give to it."""

    source: str
    prompt: tuple[Message, ...]
    target: str

    @property
    def text(self) -> str:
        """Return what a user wrote or the record's own system message says, without earlier answers."""
        return "\n".join(message["content"] for message in self.prompt if message["role"] != "assistant")


@dataclass(frozen=True)
class HeldOut:
    """The records that no stage has trained on."""

    records: tuple[Record | Preference, ...]

    @property
    def pairs(self) -> list[Preference]:
        """Return those that compare two answers."""
        return [record for record in self.records if isinstance(record, Preference)]

    def questions(self, most: int | None) -> list[Question]:
        """Return every different prompt once."""
        found: dict[tuple[tuple[str, str], ...], Question] = {}
        for record in self.records:
            key = tuple((message["role"], message["content"]) for message in record.prompt)
            found.setdefault(key, Question(record.source, record.prompt, record.answer))
        return list(found.values())[:most]


def read_held_out(config: LoadedConfig, stages: Collection[str]) -> HeldOut:
    """Read the validation side of the datasets that these stages train on.

    Without the configured system message: each model reads the one that it was trained with.
    Raises: UserError when nothing is held out.
    """
    values = config.values
    data = values.data.model_copy(update={"system_prompt": None})
    held_out = tuple(
        record
        for stage in TRAINING_STAGES.values()
        if stage.name in stages
        for file in load_datasets(
            getattr(values, stage.name).dataset_path, PARSERS[stage.records], data, f"{stage.name}.dataset_path"
        )
        for record in file.records
        if is_validation(record.prompt, data)
    )
    if not held_out:
        raise UserError(
            "data.validation_ratio: nothing is held out, so nothing can be compared. Raise it and train again."
        )
    return HeldOut(held_out)


def leave_out_unfit(held_out: HeldOut, chat: ChatFormat, positions: int | None, data: Data) -> HeldOut:
    """Return the records that a model can read and answer; training set the others aside, too.

    `positions` is the length of a model's table of them. Raises: UserError unless `data.on_bad_row` is `skip`.
    """
    fit: list[Record | Preference] = []
    unfit: list[str] = []
    for record in held_out.records:
        try:
            longest = max(len(ids) for ids in _checked_rows(chat, record))
        except UnfitRow as error:
            unfit.append(str(error))
            continue
        if positions and longest > positions:
            unfit.append(f"{record.source}: {longest} tokens, and the base has {positions} positions")
        else:
            fit.append(record)
    if unfit:
        head = f"{len(unfit)} of {len(held_out.records)} held-out records cannot be measured"
        if data.on_bad_row != "skip" or not fit:
            raise UserError(listing(head, unfit, "Change them, or set data.on_bad_row: skip to leave them out."))
        log.warning("%s", listing(head, unfit, "They are left out."))
    return HeldOut(tuple(fit))


def _checked_rows(chat: ChatFormat, record: Record | Preference) -> list[list[int]]:
    if isinstance(record, Preference):
        pair = render_pair(chat, record)
        check_rendered_pair(chat, record, pair)
        return [pair.input_ids]
    rows = render_record(chat, record)
    check_rendered(chat, record, rows)
    return [row.input_ids for row in rows]


def check_split(folder: Path, manifest: Manifest, config: LoadedConfig) -> None:
    """Refuse a model that may know the held-out prompts, because other ones were held out when it was trained.

    Raises: UserError naming both splits.
    """
    data, split = config.values.data, manifest.split
    if (split.seed, split.ratio) != (data.split_seed, data.validation_ratio):
        raise UserError(
            f"{folder}: was trained with the split of seed {split.seed} and ratio {split.ratio}, but the configuration "
            f"holds out by seed {data.split_seed} and ratio {data.validation_ratio}, so it may have seen these prompts. "
            "Give the configuration it was trained with (--config)."
        )
