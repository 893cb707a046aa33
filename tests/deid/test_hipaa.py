"""Safe Harbor: what goes and what stays, for each of the 18 identifiers."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

pytest.importorskip("presidio_analyzer", reason="needs requirements.extra.txt")

from scripts.common.schema import Deid
from scripts.deid.hipaa import IDENTIFIERS, SMALL_AREAS
from scripts.deid.recognizers import load_detector
from scripts.deid.replacement import Replacer
from scripts.deid.report import hipaa_table
from scripts.deid.scrubbing import scrub_chunk

OLD = datetime.now(UTC).year - 95


@pytest.fixture(scope="module")
def safe_harbor():
    settings = Deid(rampart="off", profile="hipaa-safe-harbor")
    detector, replacer = load_detector(settings), Replacer(settings, seed=0, key=None)
    return lambda text: scrub_chunk([(1, "f:1", {"text": text})], detector, replacer)[0].row["text"]


CASES = [
    ("A", "Deborah Klein and her husband Carlos came.", ["Deborah", "Klein", "Carlos"], ["husband"]),
    ("B", "Deborah lives at 12 Oak Lane, Toledo.", ["12 Oak", "Toledo"], ["lives"]),
    ("B", "Deborah is from Toledo, Ohio, USA.", ["Toledo"], ["Ohio", "USA"]),
    ("B", "ZIP code 94107", ["07"], ["941"]),
    ("B", "ZIP code 03601", ["036"], []),
    ("C", "Deborah was seen on 12/03, 02-Jan-2024 and March 12, 2019.", ["12/03", "Jan", "March 12"], ["2024", "2019"]),
    ("C", "Seen 2019-03-12 for 45 minutes.", ["03-12"], ["2019", "45 minutes"]),
    ("C", "He is 93. His son is 63 years old.", ["93"], ["63 years old"]),
    ("C", "a 94 y.o. man", ["94"], []),
    ("C", f"Born in {OLD}.", [str(OLD)], []),
    ("C", "Born in 1991, smoker since 2016.", [], ["1991", "2016"]),
    ("D", "Call (415) 555-2671 today.", ["2671"], ["Call"]),
    ("E", "Fax: 415-555-2671", ["2671"], ["Fax"]),
    ("F", "Write to deborah@clinicmail.org", ["deborah", "clinicmail"], ["Write"]),
    ("G", "SSN 536-90-4399", ["4399"], ["SSN"]),
    ("H", "MRN: 00482913", ["00482913"], ["MRN"]),
    ("I", "member id XKD-88120-4", ["88120"], ["member"]),
    ("J", "account number 8812004417", ["8812004417"], ["account"]),
    ("K", "DEA number BB1388568 and licence no. A-449120", ["BB1388568", "449120"], ["DEA"]),
    ("L", "VIN 1HGCM82633A004352, plate KTR 4471", ["1HGCM", "4471"], ["VIN"]),
    ("M", "Serial number: QX-8841-ZZ7", ["8841"], ["Serial"]),
    ("N", "See https://clinicmail.org/klein for it.", ["klein"], ["See"]),
    ("O", "It came from 203.0.113.77.", ["203.0"], []),
    ("R", "Key 123e4567-e89b-42d3-a456-426614174000.", ["123e4567"], ["Key"]),
]  # fmt: skip


@pytest.mark.parametrize(("identifier", "text", "gone", "stays"), CASES)
def test_what_the_rule_forbids_goes_and_what_it_allows_stays(safe_harbor, identifier, text, gone, stays):
    left = safe_harbor(text)
    assert [value for value in gone if value in left] == []
    assert [value for value in stays if value not in left] == []


def test_images_and_fingerprints_hold_the_record_back():
    settings = Deid(rampart="off", profile="hipaa-safe-harbor")
    rows = [(1, "f:1", {"text": "data:image/png;base64," + "iVBORw0KGgo" * 40})]
    [outcome] = scrub_chunk(rows, load_detector(settings), Replacer(settings, seed=0, key=None))
    assert outcome.reason.startswith("binary content")


def test_the_table_of_the_report_has_all_eighteen_and_says_what_stays_and_what_is_partial():
    settings = Deid(rampart="off", profile="hipaa-safe-harbor")
    rows = {
        row.identifier[0]: row.method
        for row in hipaa_table(list(load_detector(settings).entities), Replacer(settings, 0, None))
    }
    assert list(rows) == list("ABCDEFGHIJKLMNOPQR") == [name[0] for name in IDENTIFIERS]
    assert {case[0] for case in CASES} | {"P", "Q"} == set(rows)
    assert "stays: states" in rows["B"]
    assert "stays: years, ages up to 89" in rows["C"]
    assert "partial: found by their label" in rows["H"]
    assert len(SMALL_AREAS) == 17
