"""Decide by its prompt alone whether a record trains, is watched during training, or is kept for the report."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scripts.common.errors import UserError, listing
from scripts.common.paths import portable_path
from scripts.common.schema import Data
from scripts.dataset.near_duplicates import find_near
from scripts.dataset.records import DatasetFile, Preference, Record

Side = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = ("train", "validation", "test")  # what one holds, none of the later ones may resemble
IF_MOST = (
    "That is most of a side, as when prompts are made from templates with a word exchanged: each is then nearly known "
    "from training. Give every record a field that names its template, customer or document, and put the name of the "
    "field into data.group_field. Whole groups are then held out, and the figures are about new ones. Train again."
)


@dataclass(frozen=True)
class NearDuplicate:
    """A record that is left out of its side, because its prompt is close to one of an earlier side."""

    record: Record | Preference
    side: Side
    like: Record | Preference
    like_side: Side

    def __str__(self) -> str:
        record, like = portable_path(self.record.source), portable_path(self.like.source)
        return f"{record} ({self.side}) is close to {like} ({self.like_side})"


@dataclass(frozen=True)
class Split:
    """The records of each side, and those that validation and test leave out."""

    train: tuple[Record | Preference, ...]
    validation: tuple[Record | Preference, ...]
    test: tuple[Record | Preference, ...]
    near_duplicates: tuple[NearDuplicate, ...] = ()


class _Spelling(dict[int, str]):
    """Blank out what writes a text without saying anything: punctuation, white space, and what nobody sees."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Cf" or 0xFE00 <= code <= 0xFE0F:  # zero-width characters, soft hyphens, variants of an emoji
            plain = ""
        else:
            plain = " " if category[0] in "PZ" or category in ("Cc", "Sk") else character
        return self.setdefault(code, plain)


_SPELLING = _Spelling()


def words_of(text: str) -> str:
    """Return the words of a text, one space between them: letters with their accents, digits and symbols, in one case.

    A text of punctuation alone keeps it.
    """
    # Twice, because compatibility forms hide punctuation: ´ used as an apostrophe would become an accent.
    folded = unicodedata.normalize("NFKC", text.translate(_SPELLING)).casefold()
    words = unicodedata.normalize("NFKC", folded).translate(_SPELLING).split()
    return " ".join(words or unicodedata.normalize("NFKC", text).split())


def cluster_of(record: Record | Preference) -> str:
    """Return what a record stands and falls with: its group, where the data have one, or else its first user turn.

    In which case, accents and symbols count but not case, white space or punctuation. Records of one cluster are always
    on one side, in every file, format and stage, and they are one observation to statistics.
    """
    if record.group is not None:
        return record.group
    first = next(message["content"] for message in record.prompt if message["role"] == "user")
    return words_of(first).replace(" ", "")


def side_of(record: Record | Preference, data: Data) -> Side:
    """Decide by the hash of the cluster and the seed.

    Test lies at the low end of the hashes and validation at the high end, so that changing the size of one moves no
    prompt into or out of the other.
    """
    digest = hashlib.sha256(f"{data.split_seed}\n{cluster_of(record)}".encode()).digest()
    position = int.from_bytes(digest[:6], "big") / 2**48
    if position < data.test_ratio:
        return "test"
    return "validation" if position >= 1 - data.validation_ratio else "train"


def split_records(files: Sequence[DatasetFile], data: Data, seed: int, others: Iterable[DatasetFile] = ()) -> Split:
    """Split as `sort_by_side` does, and mix the training side by the weights of the sources.

    Raises: UserError when nothing is left to train on.
    """
    split = sort_by_side(files, data, others)
    to_train = {id(record) for record in split.train}
    train: list[Record | Preference] = []
    for file in files:
        kept = [record for record in file.records if id(record) in to_train]
        whole, part = divmod(file.weight, 1)
        train += kept * int(whole)
        train += random.Random(seed).sample(kept, round(part * len(kept)))
    if not train:
        raise UserError(
            f"data.validation_ratio: {data.validation_ratio} and data.test_ratio: {data.test_ratio} leave no record to "
            "train on. Lower them, or vary the prompts: records with the same prompt always stay on one side."
        )
    return replace(split, train=tuple(train))


def sort_by_side(files: Iterable[DatasetFile], data: Data, others: Iterable[DatasetFile] = ()) -> Split:
    """Put each record on its side, without validation and test records whose prompts are close to one of an earlier side.

    `others` are the files of the other stages, whose prompts count too. Training leaves nothing out.
    """
    own, known = (
        [(record, side_of(record, data)) for file in several for record in file.records] for several in (files, others)
    )
    near = _near_duplicates(own, known)
    left_out = {id(each.record) for each in near}
    train, validation, test = (
        tuple(record for record, of in own if of == side and id(record) not in left_out) for side in SIDES
    )
    return Split(train, validation, test, tuple(near))


Sided = tuple[Record | Preference, Side]


def _near_duplicates(own: Sequence[Sided], known: Sequence[Sided]) -> list[NearDuplicate]:
    """Return which of a stage's own records are close to one of an earlier side, its own or another stage's."""
    if all(side == "train" for _, side in own):
        return []
    everything = [*own, *known]
    found = find_near([_asked(record) for record, _ in everything], [SIDES.index(side) for _, side in everything])
    return [NearDuplicate(*everything[index], *everything[like]) for index, like in found.items() if index < len(own)]


def _asked(record: Record | Preference) -> str:
    """Return what the user says before the answer: an earlier answer or a system message does not make two alike."""
    return words_of("\n".join(message["content"] for message in record.prompt if message["role"] == "user"))


def describe_near_duplicates(near: Sequence[NearDuplicate], kept: Mapping[Side, int]) -> str:
    """Say how many records of which sides are left out and how many are kept, list them, and say what to do about many."""
    counts = Counter(each.side for each in near)
    many = " and ".join(f"{counts[side]} of {counts[side] + kept[side]} {side}" for side in SIDES if counts[side])
    head = f"{many} records are left out: their prompts are close to one that is trained on or that a checkpoint is chosen by"
    most = any(count > kept[side] for side, count in counts.items())
    return listing(head, map(str, near), IF_MOST if most else "")


def shared_answers(split: Split) -> int:
    """Count validation answers that also stand in training: they make the held-out loss look better than it is."""
    trained = {record.answer.strip() for record in split.train}
    return sum(record.answer.strip() in trained for record in split.validation)
