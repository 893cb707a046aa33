"""Choose steps, batch, learning rate and lengths for so many records on such a base, each by a rule that is stated here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.common.schema import Data
from scripts.dataset.records import Record
from scripts.dataset.split import Split, split_records
from scripts.starting.bases import Base
from scripts.starting.sources import Source

WANTED_STEPS = 40  # the demo learns its house style in 21, and few records leave fewer good ones
MOST_EPOCHS = 5
LARGEST_BATCH = 8
ENOUGH_FOR_A_FIFTH, ENOUGH_FOR_A_TENTH = 150, 1500  # records, of which 0.2 and 0.1 make 30 and 150 for the test
MOST_COMPARED = 150  # prompts to answer in a comparison, by each model
SEEDS_TRIED = 50


@dataclass(frozen=True)
class Rhythm:
    """How a stage walks through its records."""

    batch: int
    epochs: int
    steps: int
    learning_rate: float
    max_length: int


def choose_sides(sources: Sequence[Source]) -> Data:
    """Choose how many records are held out, and a split that leaves none of the sides empty where few are there."""
    total = sum(len(source.file.records) for source in sources)
    test = 0.3 if total < ENOUGH_FOR_A_FIFTH else 0.2 if total < ENOUGH_FOR_A_TENTH else 0.1
    return Data(
        test_ratio=test,
        validation_ratio=0.1,
        on_bad_row="skip" if any(source.file.bad_rows for source in sources) else "stop",
        merge_turns=any(source.merges_turns for source in sources),
    )


def choose_split(sources: Sequence[Source], data: Data) -> tuple[Data, Split]:
    """Split the records of a stage as training will; where a side stays empty, by the first other seed that fills all.

    The side of a prompt is a hash, so ten prompts may leave none for the test.
    """
    files = [source.file for source in sources]
    split = split_records(files, data, 0)
    for seed in range(1, SEEDS_TRIED) if sum(len(file.records) for file in files) < ENOUGH_FOR_A_FIFTH else ():
        if split.test and split.validation:
            break
        other = data.model_copy(update={"split_seed": seed})
        tried = split_records(files, other, 0)
        if bool(tried.test) + bool(tried.validation) > bool(split.test) + bool(split.validation):
            data, split = other, tried
    return data, split


def choose_rhythm(base: Base, records: int, lengths: Sequence[int], *, preferences: bool = False) -> Rhythm:
    """Choose batch and epochs for a sensible number of optimizer steps on so many training records."""
    batch = max(2 if preferences else 1, min(LARGEST_BATCH // (1 + preferences), 2 ** int(math.log2(max(1, records / 6)))))
    per_epoch = math.ceil(records / batch)
    epochs = max(1, min(MOST_EPOCHS, math.ceil(WANTED_STEPS / per_epoch)))
    rate = learning_rate_for(base.hidden) / (10 if preferences else 1)
    return Rhythm(batch, epochs, per_epoch * epochs, rate, round_up(max(lengths, default=1), 64))


def learning_rate_for(hidden: int) -> float:
    """Return a learning rate for an adapter of SFT; the wider the model, the lower.

    Source: "LoRA Without Regret" (Schulman et al., Thinking Machines, 2025), 5e-4 (2000 / hidden) ** 0.78 for Llama; the
    demo's 1e-3 at 576 agrees with it.
    """
    rate = min(1e-3, 5e-4 * (2000 / hidden) ** 0.78)
    return float(f"{rate:.0e}")


def answer_limit(base: Base, answers: Sequence[str]) -> int:
    """Return how long generated answers may become: as long as one's own, with room to spare."""
    return max(32, round_up(math.ceil(1.2 * max(base.count_texts(answers), default=1)), 32))


def round_up(number: int, to: int) -> int:
    """Round up to a multiple."""
    return math.ceil(number / to) * to


def conversation_of(record: Record) -> list[str]:
    """Return the texts of a record; of a pair, with the longer answer."""
    messages = [message["content"] for message in record.prompt]
    return [*messages, max(record.answers, key=len)] if hasattr(record, "chosen") else [*messages, record.answer]
