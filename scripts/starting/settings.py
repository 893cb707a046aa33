"""Choose steps, batch, learning rate and lengths for so many records on such a base, each by a rule that is stated here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from scripts.common.schema import Data
from scripts.dataset.records import Preference, Record
from scripts.dataset.split import Split, side_of, split_records
from scripts.starting.bases import USUAL_FRAME_TOKENS, Base
from scripts.starting.sources import Source

WANTED_STEPS = 40  # the demo learns its house style in 21, and few records leave fewer good ones
MOST_EPOCHS = 5
LARGEST_BATCH = 8
ENOUGH_FOR_A_FIFTH, ENOUGH_FOR_A_TENTH = (
    150,
    1500,
)  # records, of which so much is held out for the test; of fewer, a quarter
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
    test = 0.25 if total < ENOUGH_FOR_A_FIFTH else 0.2 if total < ENOUGH_FOR_A_TENTH else 0.1
    return Data(
        test_ratio=test,
        validation_ratio=0.1,
        on_bad_row="skip" if any(source.file.bad_rows for source in sources) else "stop",
        merge_turns=any(source.merges_turns for source in sources),
    )


def split_all(sources: Mapping[str, Sequence[Source]], data: Data) -> tuple[Data, dict[str, Split]]:
    """Split the records of each stage as training will; of few records, by the seed that comes closest to the shares.

    The side of a prompt is a hash, so chance may leave ten prompts without one for the test, and forty with half as many
    to learn from. Nothing is known of any outcome yet.
    """
    files = {name: [source.file for source in of_stage] for name, of_stage in sources.items() if of_stage}
    records = [record for of_stage in files.values() for file in of_stage for record in file.records]
    if len(records) < ENOUGH_FOR_A_FIFTH:
        drawn = [data.model_copy(update={"split_seed": seed}) for seed in range(SEEDS_TRIED)]
        data = min(drawn, key=lambda each: _distance(records, each))
    return data, {name: split_records(of_stage, data, 0) for name, of_stage in files.items()}


def _distance(records: Sequence[Record | Preference], data: Data) -> float:
    """Count how many records the sides have too many or too few; the seeds that are tried first win a tie."""
    sides = Counter(side_of(record, data) for record in records)
    off = abs(sides["test"] - max(1, data.test_ratio * len(records)))
    off += abs(sides["validation"] - max(1, data.validation_ratio * len(records)))
    return off if off > 2 else 0


def choose_prompts(splits: Mapping[str, Split]) -> int | None:
    """Return how many test prompts a comparison should answer; None for all."""
    tested = sum(len(split.test) for split in splits.values())
    return MOST_COMPARED if tested > 1.3 * MOST_COMPARED else None


def training_tokens(records: Sequence[Record | Preference]) -> Callable[[Base], int]:
    """Return a function that counts the tokens of records as a base does."""
    return lambda base: sum(base.count_tokens([conversation_of(record) for record in records], USUAL_FRAME_TOKENS))


def choose_rhythm(
    base: Base, records: Sequence[Record | Preference], train: int, *, preferences: bool = False
) -> Rhythm:
    """Choose batch and epochs for a sensible number of optimizer steps on so many training records."""
    largest = LARGEST_BATCH // 2 if preferences else LARGEST_BATCH
    batch = max(2 if preferences else 1, min(largest, 2 ** int(math.log2(max(1, train / 6)))))
    per_epoch = math.ceil(train / batch)
    epochs = max(1, min(MOST_EPOCHS, math.ceil(WANTED_STEPS / per_epoch)))
    rate = learning_rate_for(base.hidden) / (10 if preferences else 1)
    longest = max(base.count_tokens([conversation_of(record) for record in records]), default=1)
    return Rhythm(batch, epochs, per_epoch * epochs, rate, round_up(longest, 64))


def count_too_long(base: Base, records: Sequence[Record | Preference]) -> int:
    """Count the records that a base cannot read to their end; none where it computes its positions without a table."""
    if base.folder is None or base.positions is None:
        return 0
    lengths = base.count_tokens([conversation_of(record) for record in records])
    if not (too_long := sum(length > base.positions for length in lengths)):
        return 0
    from scripts.model.shape import position_table

    return too_long if position_table(base.folder) else 0


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


def conversation_of(record: Record | Preference) -> list[str]:
    """Return the texts of a record; of a pair, with the longer answer."""
    last = max(record.answers, key=len) if isinstance(record, Preference) else record.answer
    return [*(message["content"] for message in record.prompt), last]
