"""The prompts that are sampled: those of the training side, each once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.common.artifacts import sha256_json
from scripts.common.errors import UserError
from scripts.common.schema import Config, Data
from scripts.dataset.columns import PAIR, find_layout
from scripts.dataset.records import (
    DatasetFile,
    Message,
    Preference,
    Record,
    load_datasets,
    parse_preference,
    parse_record,
)
from scripts.dataset.split import side_of


@dataclass(frozen=True)
class Prompt:
    """A prompt with the user's own answer to it, the group it stands in, and the seed of its samples."""

    source: str
    messages: tuple[Message, ...]
    answer: str
    group: str | None
    seed: int


def read_prompts(config: Config, queue: str | None = None) -> tuple[list[DatasetFile], list[Prompt]]:
    """Read the SFT data, or a file of the server's queue, and return its different prompts of the training side in order.

    `pairs.max_prompts` draws some by their own hash. They come without the configured system message: an adapter answers
    with the one that it was trained with.
    Raises: UserError when no prompt is on the training side.
    """
    data = config.data.model_copy(update={"system_prompt": None})
    key = "serve.queue_path" if queue else "sft.dataset_path"
    files = load_datasets(queue or config.sft.dataset_path, parse_prompt if queue else parse_record, data, key)
    found: dict[str, Record | Preference] = {}
    for file in files:
        for record in file.records:
            if side_of(record, data) == "train":
                found.setdefault(sha256_json(record.prompt), record)
    if not found:
        raise UserError(
            f"{key}: none of its prompts is on the training side (data.validation_ratio: "
            f"{data.validation_ratio:g}, data.test_ratio: {data.test_ratio:g}), and others are never sampled. Lower these."
        )
    drawn = sorted(found, key=lambda key: sha256_json([config.seed, key]))[: config.pairs.max_prompts]
    kept = found.keys() & set(drawn)
    return files, [
        Prompt(record.source, record.prompt, record.answer, record.group, seed_of(config.seed, key))
        for key, record in found.items()
        if key in kept
    ]


def parse_prompt(row: dict[str, Any], where: str, data: Data) -> Record | Preference:
    """Map a row of any layout, or one of a prompt alone, to a record whose prompt is asked."""
    layout = find_layout(row)
    if layout is None:
        return parse_record({**row, "completion" if "prompt" in row else "output": "-"}, where, data)
    return parse_preference(row, where, data) if layout.name == PAIR else parse_record(row, where, data)


def seed_of(seed: int, prompt: str) -> int:
    """Return the seed of a prompt's samples, which depends on no other prompt."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:6], "big")


def text_of(messages: Sequence[Message]) -> str:
    """Return a conversation as a judge reads it: a single question as it is, else with who says what."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].upper()}: {message['content']}" for message in messages)
