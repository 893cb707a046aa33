"""Names as people write them, and that a name found once is found everywhere in its record."""

from __future__ import annotations

import unicodedata

import pytest

pytest.importorskip("presidio_analyzer", reason="needs requirements.extra.txt")

from scripts.deid.doubts import Doubts
from scripts.deid.name_edges import extend_names, trim_names
from scripts.deid.names import find_names, is_full_name, titled
from scripts.deid.spans import Span


def apart(text: str) -> str:
    """Write accents as marks of their own."""
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("thanks, ask deborah about it", ["deborah"]),
        ("hey this is gustavo, can you call me", ["gustavo"]),
        ("PLEASE CALL ROSEMARIE HOFFMANN TODAY", ["ROSEMARIE", "HOFFMANN"]),
        ("Tell Ludmila that the parcel is here.", ["Ludmila"]),
        ("Register: Fernandez, Carlos; Adeyemi, Grace", ["Fernandez", "Carlos", "Adeyemi", "Grace"]),
        ("deborah_k: morning\ntyrone2: hello deborah_k", ["deborah_k", "tyrone2"]),
        ("[09:12] Deborah: are you there?\n[09:13] Tyrone: yes", ["Deborah", "Tyrone"]),
        ("<tyrone> anybody here", ["tyrone"]),
        ("<p>Ren&eacute;e Fontaine and Andr&#233; Fontaine called.</p>", ["Ren&eacute;e", "Andr&#233;", "Fontaine"]),
        ("/hello?name=Carlos%20Fernandez&lang=es", ["Carlos%20Fernandez"]),
        ("/hello?name=Carlos+Fernandez&lang=es", ["Carlos+Fernandez"]),
        (apart("Dear Zoë Lefèvre, we met José."), [apart("Zoë Lefèvre"), apart("José")]),
        ("signed D E B O R A H   K L E I N", ["D E B O R A H   K L E I N"]),
        ("We spoke to Carlos Fernandez-Ito, then to Deborah van der Meer.", ["Carlos", "Ito", "Deborah", "van der Meer"]),
        ("GUTIERREZ/CARLOS MR on the list", ["GUTIERREZ", "CARLOS"]),
        ("mr hoffmann and MS KLEIN are here", ["hoffmann", "KLEIN"]),
        ("Dear Candice, your order is on its way.", ["Candice"]),
        ("Bo said that the boiler is cold. Ms Ng asked Li about it.", ["Bo", "Ng", "Li"]),
        ("Assigned to: Jo\nReviewed by: Kim", ["Jo", "Kim"]),
        ("The key is at the desk.\nThanks,\nOyinkan", ["Oyinkan"]),
        ("- Jo: order paint\n- Bo: fetch it", ["Jo", "Bo"]),
        ("<quillfeather> anyone here?\n<m00nrise> yes", ["quillfeather", "m00nrise"]),
        ("Deborah Klein (dklein) cannot log in; klein.d works", ["dklein", "klein.d"]),
    ],
)  # fmt: skip
def test_a_name_is_found_however_it_is_written(scrub, text, names):
    [outcome] = scrub({"text": text})
    assert "<PERSON>" in outcome.row["text"]
    assert [name for name in names if name in outcome.row["text"]] == []


@pytest.mark.parametrize(
    "text",
    [
        "i will ask my friend about it", "The mark on the wall may rise in june.", "Add a dash of salt and a bay leaf.",
        "note: the art class is full", "User: hello\nAgent: hi", "Subject: holiday plans\nTo: all", "status: open\nprice: 12",
        "THE STORE IS CLOSED TODAY", "Python, Java and C are languages.", "Change AUD to CHF, then go to IT and do it.",
        "flood model: new maps loaded\nperfect binder overhaul: glue tank out",
    ],
)  # fmt: skip
def test_words_that_are_names_elsewhere_stay(scrub, text):
    assert scrub({"text": text})[0].row == {"text": text}


def test_words_in_small_letters_are_no_names_where_names_have_capitals():
    """What a model takes for a name in small letters needs a list, an introduction, or a score above most mistakes."""
    text = "Hamid matches the records by hand, a brake hose is late, and mbali rang; ask tunde and deborah."

    def rejected(word: str, score: float) -> bool:
        start = text.index(word)
        return Doubts(text).reject(Span(start, start + len(word), "PERSON", score))

    assert rejected("hand", 0.84)
    assert rejected("brake hose", 0.85)
    assert not rejected("mbali", 0.97)
    assert not rejected("tunde", 0.5)
    assert not rejected("deborah", 0.5)


def test_a_name_is_spread_over_fields_and_cases(scrub):
    row = {
        "prompt": "My name is Odalys Marchetti.", "chosen": "Hello ODALYS!", "rejected": "odalys marchetti wrote to o.marchetti",
        "messages": [{"role": "user", "content": "Marchetti Ltd is mine"}],
    }  # fmt: skip
    text = str(scrub(row)[0].row).casefold()
    assert "odalys" not in text
    assert "marchetti" not in text


def test_what_is_an_organisation_once_is_covered_everywhere(scrub):
    [outcome] = scrub({"a": "She works at Brightwater Holdings Ltd.", "b": "brightwater holdings ltd. pays late"})
    assert "brightwater" not in str(outcome.row).casefold()


def test_a_name_found_in_part_takes_in_the_rest():
    text = "Odile Marchand, J. R. Sommer and Ana de la Cruz met on Monday."
    starts = [(text.index(word), text.index(word) + len(word)) for word in ("Odile", "Sommer", "Ana")]
    spans = extend_names(text, [Span(start, end, "PERSON", 0.9) for start, end in starts])
    assert [text[s.start : s.end] for s in spans] == ["Odile Marchand", "J. R. Sommer", "Ana de la Cruz"]


def test_small_words_at_the_ends_are_no_part_of_a_name():
    text = "ask Odile Marchand was"
    assert [text[s.start : s.end] for s in trim_names(text, [Span(0, len(text), "PERSON", 0.9)])] == ["Odile Marchand"]


def test_capitals_are_read_as_names_and_keep_their_offsets():
    text = "IN RE: KLEIN, DEBORAH (STRAẞE) NHS"
    assert len(titled(text)) == len(text)
    assert "Klein, Deborah" in titled(text)
    assert titled("only NHS stays") == "only NHS stays"


def test_lists_of_names_know_names_and_leave_words():
    assert is_full_name("Deborah Klein")
    assert not is_full_name("Apple Pay")
    assert find_names("the bill will rise") == []


def test_a_name_with_small_words_within_stays_whole_where_a_model_takes_its_end_for_a_firm():
    text = "Heidi van der Vlist said so; Ann of the Bank did not."
    spans = [Span(0, 5, "PERSON", 0.9), Span(14, 19, "ORGANIZATION", 0.9)]
    assert extend_names(text, spans)[0][:2] == (0, 19)


def test_within_a_dutch_sentence_a_capital_van_or_de_begins_a_name():
    text = "Vraag even aan Van Leeuwen of De Bruin de sleutels heeft. De bank is dicht, Van alles is nieuw."
    assert [text[s.start : s.end] for s in find_names(text, "nl")] == ["Van Leeuwen", "De Bruin"]


@pytest.mark.parametrize(
    ("language", "text", "name"),
    [
        ("de", "Rechnung Dorothea Kluge", "Dorothea Kluge"),
        ("de", "Dorothea Kluge Kundennummer", "Dorothea Kluge"),
        ("nl", "haar kapper Wessel", "Wessel"),
        ("nl", "van den Berg", "van den Berg"),
        ("it", "parrucchiere Dino Bonomi", "Dino Bonomi"),
        ("it", "signor Dino Bonomi", "signor Dino Bonomi"),
        ("de", "Onkel Detlef", "Onkel Detlef"),
        ("es", "para la familia Quiroga", "la familia Quiroga"),
        ("nl", "bij de heer Kok", "de heer Kok"),
        ("fr", "Neveu, Claire", "Neveu, Claire"),
        ("de", "FRAU EVA LINDNER KOMMT", "FRAU EVA LINDNER"),
        ("de", "FRAU EVA QUUXEL KOMMT", "FRAU EVA QUUXEL"),
        ("nl", "MENEER JAN DE BOER BELT", "MENEER JAN DE BOER"),
        ("nl", "mevrouw de Roos", "mevrouw de Roos"),
        ("nl", "buurman meneer Wessel Kok", "meneer Wessel Kok"),
    ],
)
def test_what_heads_a_form_and_small_words_before_a_capital_are_no_part_of_a_name(language, text, name):
    assert [text[s.start : s.end] for s in trim_names(text, [Span(0, len(text), "PERSON", 0.9)], language)] == [name]


@pytest.mark.parametrize(
    ("language", "text", "name"),
    [("de", "mit ihrem Onkel Detlef", "Onkel Detlef"), ("fr", "et son oncle Armand", "oncle Armand"), ("nl", "en haar oom Wessel", "oom Wessel")],
)  # fmt: skip
def test_a_relative_that_is_spoken_of_is_no_part_of_the_name(language, text, name):
    start = text.index(name)
    [left] = trim_names(text, [Span(start, len(text), "PERSON", 0.9)], language)
    assert text[left.start : left.end] == name.split()[1]


def test_a_dutch_name_takes_in_what_stands_between():
    text = "Wessel op den Kamp en Bas gaan op de fiets."
    spans = extend_names(text, [Span(0, 6, "PERSON", 0.9), Span(22, 25, "PERSON", 0.9)], "nl")
    assert [text[s.start : s.end] for s in spans] == ["Wessel op den Kamp", "Bas"]


def test_a_german_noun_within_a_sentence_is_no_name_and_a_listed_name_is_one():
    text = "Im Beet blühen Flieder und Astern, sagt Detlef."

    def rejected(word):
        start = text.index(word)
        return Doubts(text, "de").reject(Span(start, start + len(word), "PERSON", 0.95))

    assert rejected("Flieder")
    assert rejected("Astern")
    assert not rejected("Detlef")
