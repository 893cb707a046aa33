"""Spans: what is read, what is covered, and that offsets always point into the original."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from scripts.deid.spans import PRIORITY, TAG, Span, merge_addresses, normalise, tidy, to_original, union


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("536‑90‑4399", "536-90-4399"),
        ("5\u200b3\u200b6", "536"),
        ("ＳＳＮ：１２", "SSN:12"),
        ("a\u00a0b", "a b"),
        ("plain", "plain"),
        ("/find?who=Odile+Marchetti+1984&n=2", "/find?who=Odile Marchetti+1984&n=2"),
        ("API_TOKEN=hrkVbNqTe+zXoPmtRu4YbaRhTj", "API_TOKEN=hrkVbNqTe+zXoPmtRu4YbaRhTj"),
        ("key=qWe+rTy/uIo+pAs=", "key=qWe+rTy/uIo+pAs="),
    ],
)
def test_disguises_are_read_as_plain_text(text, read):
    assert normalise(text)[0] == read


def test_offsets_lead_back_to_the_original():
    text = "ﬁrst \u200b536‑90‑4399 end"
    clean, offsets = normalise(text)
    start = clean.index("536")
    span = to_original(Span(start, start + 11, "US_SSN", 1.0), offsets)
    assert text[span.start : span.end] == "536‑90‑4399"


def test_spans_grow_to_whole_words_and_lose_white_space():
    text = "call Maria-Luz, now"
    assert tidy(text, [Span(6, 8, "PERSON", 0.9)])[0][:2] == (5, 10)
    assert tidy(text, [Span(4, 15, "PERSON", 0.9)])[0][:2] == (5, 14)
    assert tidy(text, [Span(14, 16, "PERSON", 0.9)]) == []


def test_union_covers_what_any_finding_covered_and_never_overlaps():
    rng = random.Random(0)
    for _ in range(200):
        spans = []
        for _ in range(rng.randrange(1, 8)):
            start = rng.randrange(50)
            spans.append(Span(start, start + rng.randrange(1, 12), rng.choice(PRIORITY), 0.5))
        joined = union(spans)
        assert {i for s in spans for i in range(s.start, s.end)} == {i for s in joined for i in range(s.start, s.end)}
        assert all(a.end <= b.start for a, b in itertools.pairwise(joined))


def test_the_more_specific_entity_names_an_overlap():
    assert union([Span(0, 5, "LOCATION", 0.9), Span(3, 9, "EMAIL_ADDRESS", 0.5)]) == [Span(0, 9, "EMAIL_ADDRESS", 0.9)]


def test_a_tag_is_left_out_of_a_finding():
    text = "by <PERSON> Smith"
    tags = [(m.start(), m.end()) for m in TAG.finditer(text)]
    assert [text[s.start : s.end] for s in tidy(text, [Span(3, 17, "PERSON", 0.9)], tags)] == ["Smith"]


@pytest.mark.parametrize("text", ["<DIV_1>", "<Maria_1>", "<PERSON:Maria Diaz>", "<PERSON:short>", "<person>"])
def test_what_is_not_our_tag_hides_nothing(text):
    assert not TAG.search(text)


def test_an_address_block_becomes_one_address():
    block = "12 Oak Lane\n Suite 5\n Springfield\n Norway 46894"
    text = f"Send it to {block} by noon"
    start = text.index("Norway")
    spans = [Span(11, 22, "STREET_ADDRESS", 0.7), Span(start, start + 6, "LOCATION", 0.8)]
    assert [text[s.start : s.end] for s in merge_addresses(text, spans)] == [block]


def test_an_address_stops_at_the_end_of_the_sentence():
    text = "She lives at 12 Oak Lane. Paris is nice."
    spans = [Span(13, 24, "STREET_ADDRESS", 0.7), Span(26, 31, "LOCATION", 0.8)]
    assert merge_addresses(text, spans) == spans


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("An Talstraße 4, 01097 Dresden, Kundennummer KD-448120", "Talstraße 4, 01097 Dresden"),
        ("Sent to 12 Oak Lane, Springfield, Invoice 4481-20 follows", "12 Oak Lane, Springfield"),
        ("Sent to 12 Oak Lane, order 48812 was late", "12 Oak Lane"),
        ("Sent to 12 Oak Lane, Springfield, IL", "12 Oak Lane, Springfield, IL"),
    ],
)
def test_a_word_before_the_next_finding_is_no_town(text, address):
    """Only the end of the text, a line or a comma ends an address, not that something was found behind it."""
    street = re.search(r"Talstraße 4|12 Oak Lane", text)
    parts = [(street, "STREET_ADDRESS"), (re.search("Dresden", text), "LOCATION")]
    parts.append((re.search(r"KD-448120|4481-20|48812", text), "ID_NUMBER"))
    found = merge_addresses(text, [Span(*match.span(), entity, 0.9) for match, entity in parts if match])
    assert text[found[0].start : found[0].end] == address
