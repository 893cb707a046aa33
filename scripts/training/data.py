"""The data of a training run: read, check, split and render its records."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from scripts.common.artifacts import DatasetFacts
from scripts.common.deid_report import check_deid_report
from scripts.common.distributed import is_main_process, world_size
from scripts.common.errors import UserError, listing
from scripts.common.pairs_manifest import are_made_pairs
from scripts.common.paths import portable_path
from scripts.common.run import Run
from scripts.dataset.chat_format import ChatFormat, UnfitRow
from scripts.dataset.records import (
    DatasetFile,
    Parser,
    Preference,
    Record,
    describe_reading,
    load_datasets,
    load_rest_of_chain,
    write_rejects,
)
from scripts.dataset.rendering import render_and_check
from scripts.dataset.split import Side, Split, describe_near_duplicates, shared_answers, split_records
from scripts.training.advice import advise_on_records, advise_on_run
from scripts.training.start import Start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """The files of a run and the sides their records fall on."""

    files: list[DatasetFile]
    split: Split

    @property
    def records(self) -> list[Record | Preference]:
        """Return the records that training reads: nothing of the test side."""
        return [*self.split.train, *self.split.validation]

    @property
    def facts(self) -> list[DatasetFacts]:
        """Describe the data for the manifest."""

        def count(records: Iterable[Record | Preference], file: DatasetFile) -> int:
            own = {record.source for record in file.records}
            return sum(record.source in own for record in records)

        near = [each.record for each in self.split.near_duplicates]

        return [
            DatasetFacts(
                path=portable_path(file.path),
                sha256=file.sha256,
                train=count(self.split.train, file),
                validation=count(self.split.validation, file),
                test=count(self.split.test, file),
                near_duplicates=count(near, file),
            )
            for file in self.files
        ]


def read_data(run: Run, parse: Parser, deid_report: str | None) -> TrainingData:
    """Read, check and split the records, and say what stands out in them.

    `deid_report` is what `--require-deid-report` says: null where it was not given, empty for the report beside the data.
    """
    values = run.values
    files = load_datasets(run.section.dataset_path, parse, values.data, f"{run.stage}.dataset_path")
    if values.deid.required or deid_report is not None:
        for file in files:
            check_deid_report(file.path, file.sha256, deid_report or None)
    split = split_records(files, values.data, values.seed, load_rest_of_chain(values, [run.stage]))
    records = [record for file in files for record in file.records]
    log.info(
        "%d records: %d to train on, %d for validation, %d for the test",
        len(records), len(split.train), len(split.validation), len(split.test),
    )  # fmt: skip
    if split.near_duplicates:
        kept: dict[Side, int] = {"validation": len(split.validation), "test": len(split.test)}
        log.warning("%s", describe_near_duplicates(split.near_duplicates, kept))
    if not run.dry and is_main_process() and (rejected := write_rejects(run.run_dir / "rejects.jsonl", files)):
        log.warning("%d bad rows set aside in %s", rejected, run.run_dir / "rejects.jsonl")
    for file in files:
        for line in describe_reading(file):
            log.info("%s", line)
    made = not split.validation and not split.test and are_made_pairs(file.path for file in files)
    for advice in advise_on_records(run.stage, split, records, tested=not made):
        log.warning("%s", advice)
    if shared := shared_answers(split):
        log.warning("%d of %d validation answers also occur in training", shared, len(split.validation))
    if made:
        log.info(
            "the pairs were made of training prompts, so none is held out: the last checkpoint is kept, and the comparison "
            "asks the test prompts of sft.dataset_path"
        )
        return TrainingData(files, split)
    if not split.validation:
        log.warning("no record is for validation, so the last checkpoint is kept; see data.validation_ratio")
    return TrainingData(files, split)


def render_rows(
    run: Run,
    start: Start,
    split: Split,
) -> tuple[list[Any], list[Any]]:
    """Turn both sides into token ids; a record that does not fit is refused or set aside, never cut."""
    sides = _rendered(run, start.chat, split)
    longest = max((len(row.input_ids) for side in sides for _, row in side), default=0)
    limit, reason, fix = _longest_record(run, start, longest)
    too_long = [(record, len(row.input_ids)) for side in sides for record, row in side if len(row.input_ids) > limit]
    if too_long:
        problems = [f"{record.source}: {tokens} tokens" for record, tokens in too_long]
        head = f"{len(too_long)} records are longer than {reason}"
        if run.values.data.on_bad_row != "skip":
            raise UserError(listing(head, problems, f"{fix}, shorten them, or set data.on_bad_row: skip."))
        log.warning("%s", listing(head, problems, "They are left out."))
    train, validation = ([row for _, row in side if len(row.input_ids) <= limit] for side in sides)
    if not train:
        raise UserError(f"{run.stage}.max_length: no training record fits into {limit} tokens. {fix}.")
    for advice in advise_on_run(run.values, run.stage, train, world_size()):
        log.warning("%s", advice)
    counts = Counter(token for row in train for token in set(start.chat.added_tokens_in(row.in_one_row().labels)))
    if counts:
        named = ", ".join(f"{token} in {count}" for token, count in counts.most_common(10))
        log.info("answers hold added tokens of the tokenizer, each trained as one token: %s of %d", named, len(train))
    return train, validation


def _rendered(run: Run, chat: ChatFormat, split: Split) -> list[list[tuple[Any, Any]]]:
    """Render both sides; a record that does not survive the tokenizer is refused or set aside."""
    sides: list[list[tuple[Any, Any]]] = [[], []]
    unfit: list[str] = []
    for side, records in zip(sides, (split.train, split.validation), strict=True):
        for record in records:
            try:
                side.extend((record, row) for row in render_and_check(chat, record))
            except UnfitRow as error:
                unfit.append(str(error))
    head = f"{len(unfit)} of {len(split.train) + len(split.validation)} records cannot be trained on"
    if unfit and (run.values.data.on_bad_row != "skip" or not sides[0]):
        raise UserError(listing(head, unfit, "Change them, or set data.on_bad_row: skip to leave them out."))
    if unfit:
        log.warning("%s", listing(head, unfit, "They are left out."))
    return sides


def _longest_record(run: Run, start: Start, longest: int) -> tuple[int, str, str]:
    """Return how many tokens a record may have, what says so, and what to do for one of `longest` tokens."""
    from scripts.model.shape import ModelShape, position_table

    key, max_length = f"{run.stage}.max_length", run.section.max_length
    cut = f"{key} ({max_length}), so the end of their answers would be cut"
    positions = ModelShape.of_folder(start.base_folder).positions
    if positions is None or not 0 < positions < longest:
        return max_length, cut, f"Raise {key} to {longest}"
    if position_table(start.base_folder) is None:
        if max_length > positions:
            log.warning(
                "the longest record has %d tokens, but the base was made for %d; what lies beyond is learnt badly, and "
                "the server reads no further", longest, positions,
            )  # fmt: skip
        return max_length, cut, f"Raise {key} to {longest}"
    if max_length < positions:
        return max_length, cut, f"Raise {key} to {positions}, all the positions the base has"
    reason = f"the base has positions ({positions}), which {key} ({max_length}) cannot change"
    return positions, reason, f"Choose a base with at least {longest} positions"
