"""The two labelled sets: valid, varied, and the one that figures are reported from unchanged since it was written."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from eval.benchmarks.deid import CHECKSUMMED, IDS, LANGUAGES_TUNING, LANGUAGES_UNSEEN, TUNING, UNSEEN
from scripts.common.artifacts import sha256_file
from scripts.deid.evaluation import read_gold

# Written before the rules it judges. A change here would make the figures those of a set that was fitted to the rules.
SHA256 = {
    UNSEEN: "d9a4b9ee4e42395af0d7abfcb6547c4b2a005daa5cc458f3b7a369b00e892dd7",
    LANGUAGES_UNSEEN: "63393e8de7f725ebc92ee8bd2a9a48382ae34ba732be790087d6ec97655b5a77",
    IDS: "43c856416e776cb8981e82ca8b95422a4ba03c74aee455db1bdb21f109151226",
}
HALVES = ((TUNING, UNSEEN), (LANGUAGES_TUNING, LANGUAGES_UNSEEN))


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def values(path, label):
    return [row["text"][s["start"] : s["end"]] for row in rows_of(path) for s in row["spans"] if s["label"] == label]


@pytest.mark.parametrize("path", SHA256, ids=lambda path: path.stem)
def test_what_figures_are_reported_from_is_what_was_written(path):
    assert sha256_file(path) == SHA256[path]


def test_the_unseen_half_is_large_and_varied():
    rows = rows_of(UNSEEN)
    labels = Counter(span["label"] for row in rows for span in row["spans"])
    assert len({row["style"] for row in rows}) >= 25
    assert labels["PERSON"] >= 150
    assert labels["SECRET"] >= 100
    assert sum(labels[name] for name in CHECKSUMMED) >= 100
    assert sum(row["style"] == "maths" for row in rows) >= 100
    assert sum(row["style"] == "clean" and not row["spans"] for row in rows) >= 100


def test_the_unseen_half_of_the_languages_holds_names_in_each():
    names = Counter(row["style"] for row in rows_of(LANGUAGES_UNSEEN) for s in row["spans"] if s["label"] == "PERSON")
    assert {*names} == {"de", "fr", "es", "it", "pt", "nl"}
    assert min(names.values()) >= 60


@pytest.mark.parametrize("halves", HALVES, ids=["English", "languages"])
def test_labelled_rows_are_well_formed_and_shared_by_no_half(halves):
    texts = [[row["text"] for row in read_gold(path)] for path in halves]
    assert not {*texts[0]} & {*texts[1]}
    for path, held in zip(halves, texts, strict=True):
        assert len({*held}) == len(held)
        for row in rows_of(path):
            ends = [0, *(span["end"] for span in row["spans"])]
            assert all(span["start"] >= end for span, end in zip(row["spans"], ends, strict=False))


def luhn(digits):
    doubled = [int(d) * (2 if n % 2 else 1) for n, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


@pytest.mark.parametrize("path", [TUNING, UNSEEN])
def test_numbers_with_a_checksum_are_valid(path):
    def digits(label):
        return [re.sub(r"\D", "", value) for value in values(path, label)]

    assert all(luhn(number) for label in ("CARD", "IMEI", "SIN") for number in digits(label))
    assert all(luhn("80840" + number) for number in digits("NPI"))
    for iban in values(path, "IBAN"):
        plain = iban.replace(" ", "")
        assert int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1
    for number in digits("NHS"):
        assert sum(int(d) * weight for d, weight in zip(number, (*range(10, 1, -1), 1), strict=True)) % 11 == 0
    for number in digits("ABA"):
        assert sum(int(d) * weight for d, weight in zip(number, (3, 7, 1) * 3, strict=True)) % 10 == 0


def test_scanners_of_secrets_pass_the_files_by():
    for path in (TUNING, UNSEEN):
        assert not re.search(
            r"PRIVATE KEY-|ghp_\w{36}|AKIA[A-Z0-9]{16}|sk_live_\w{24}", path.read_text(encoding="utf-8")
        )
