"""Numbers that states give to people: valid ones are found by label or form, others stay."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("presidio_analyzer", reason="needs requirements.extra.txt")

from eval.benchmarks.deid import IDS
from scripts.common.schema import Deid
from scripts.deid.countries import COUNTRIES, NUMBERS, find_country_numbers

ROWS = [json.loads(line) for line in IDS.read_text(encoding="utf-8").splitlines()]


def test_valid_numbers_of_forty_countries_are_found_whole():
    found = {row["id"]: find_country_numbers(row["text"], COUNTRIES) for row in ROWS}
    missed = [
        row["id"]
        for row in ROWS
        if not any(s.start <= row["spans"][0]["start"] and row["spans"][0]["end"] <= s.end for s in found[row["id"]])
    ]
    assert missed == []
    assert len({row["spans"][0]["label"] for row in ROWS}) >= 40


def test_a_changed_digit_is_noticed():
    """Most forms have one check digit; a few numbers of another kind of the same country pass by chance."""
    changed = noticed = 0
    for row in ROWS:
        span = row["spans"][0]
        number = row["text"][span["start"] : span["end"]]
        for at in (index for index, character in enumerate(number) if character.isdigit()):
            wrong = number[:at] + str((int(number[at]) + 1) % 10) + number[at + 1 :]
            changed += 1
            noticed += not find_country_numbers(row["text"].replace(number, wrong), [span["label"]])
    assert noticed > 0.85 * changed


def test_only_the_countries_that_are_named_are_looked_for():
    assert find_country_numbers("PESEL 44051401359", ["PL"])
    assert find_country_numbers("PESEL 44051401359", ["DE"]) == []


def test_plain_numbers_need_a_label():
    for text in ("The total is 111222333 and 44051401359.", "12345678901 + 1", "part no. 390712345"):
        assert find_country_numbers(text, COUNTRIES) == []


def test_the_schema_knows_every_country_and_each_check_can_be_loaded():
    assert set(Deid().countries) == set(COUNTRIES) == {number.country for number in NUMBERS}


def test_a_phone_number_is_no_health_number(detector):
    [[*spans]] = detector.detect(["Call 415-555-2671 today"])
    assert {span.entity for span in spans} == {"PHONE_NUMBER"}
    [[*spans]] = detector.detect(["NHS number 401-023-2137"])
    assert "UK_NHS" in {span.entity for span in spans}


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("Meet Deborah at 52.52001, 13.40495 at noon", "52.52001"),
        ("she lives at 52°31'12\"N 13°24'18\"E", "31'12"),
        ("send it to 0x52908400098527886E0F7030069857D2E4169EE7", "52908400"),
        ("call Deborah on ext. 4471", "4471"),
        ("NI number AB 12 34 56 C", "12 34"),
        ("her NRIC is S1234567D", "1234567"),
    ],
)
def test_coordinates_wallets_extensions_and_forms_of_their_own_are_found(scrub, text, gone):
    assert gone not in scrub({"text": text})[0].row["text"]


@pytest.mark.parametrize(
    "address",
    [
        "Hauptstraße 14, 10115 Berlin",
        "14 rue de la Paix, 75002 Paris",
        "Calle Mayor 21, 28013 Madrid",
        "Keizersgracht 120, 1015 CJ Amsterdam",
        "Rua Augusta 45, 1100-048 Lisboa",
        "27 Banbury Road, Oxford OX2 6NN",
    ],
)
def test_addresses_of_other_countries_are_not_cut_in_half(scrub, address):
    left = scrub({"text": f"Please send the parcel to Deborah Klein, {address}"})[0].row["text"]
    assert re.findall(r"\d\w*", left) == []
    assert not any(word in left for word in re.findall(r"[^\W\d_]{3,}", address))
