"""Decide by its prompt alone whether a record trains or is held out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.common.errors import UserError
from scripts.common.schema import Data
from scripts.dataset.records import DatasetFile, Message


@dataclass(frozen=True)
class Split:
    """Training and validation records; the side follows from the prompt alone."""

    train: tuple[Any, ...]
    validation: tuple[Any, ...]


def prompt_key(messages: Sequence[Message]) -> str:
    """Return what decides the side of a record: its first user turn, ignoring case and white space.

    Conversations that open alike stay together in every format and stage, and with other turns after it.
    """
    first = next(message["content"] for message in messages if message["role"] == "user")
    return " ".join(first.casefold().split())


def is_validation(messages: Sequence[Message], data: Data) -> bool:
    """Decide by hash, so that a prompt falls on the same side in every file, stage and order of rows."""
    digest = hashlib.sha256(f"{data.split_seed}\n{prompt_key(messages)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < data.validation_ratio * 2**64


def split_records(files: Sequence[DatasetFile], data: Data, seed: int) -> Split:
    """Split by prompt, then mix the training side by the weights of the sources."""
    train: list[Any] = []
    validation: list[Any] = []
    for file in files:
        kept = [record for record in file.records if not is_validation(record.prompt, data)]
        validation += [record for record in file.records if is_validation(record.prompt, data)]
        whole, part = divmod(file.weight, 1)
        train += kept * int(whole)
        train += random.Random(seed).sample(kept, round(part * len(kept)))
    if not train:
        raise UserError(
            f"data.validation_ratio: {data.validation_ratio} leaves no record to train on. Lower it, or vary the prompts: "
            "records with the same prompt always stay on one side."
        )
    return Split(tuple(train), tuple(validation))


def shared_answers(split: Split) -> int:
    """Count validation answers that also stand in training: they make the held-out loss look better than it is."""
    trained = {record.answer.strip() for record in split.train}
    return sum(record.answer.strip() in trained for record in split.validation)
