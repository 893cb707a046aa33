"""The scrubber's promises, on real recognizers: same person same name, twice is once, doubt holds a record back."""

from __future__ import annotations

import json
import random
import re
from datetime import datetime

import pytest

from scripts.common.errors import UserError
from scripts.common.schema import Deid
from scripts.deid import replacement

pytest.importorskip("presidio_analyzer", reason="needs requirements.extra.txt")

from scripts.deid.evaluation import evaluate, wilson
from scripts.deid.rampart import is_plain, is_spent, load_rampart
from scripts.deid.recognizers import load_detector
from scripts.deid.replacement import Replacer, check_operators, decrypt, identify
from scripts.deid.scrubbing import scrub_chunk
from scripts.deid.spans import TAG, Span
from tests.deid.conftest import KEY

PEOPLE = ["Maria Gonzalez", "Peter Hansen", "Amelia Thompson", "Robert Mitchell", "Karen Sanderson"]


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("My SSN is 536-90-4399.", "536-90-4399"),
        ("ssn:536904399", "536904399"),
        ("SSN 536‑90‑4399", "536‑90‑4399"),
        ("Use 078-05-1120 as SSN", "078-05-1120"),
        ("Mail bob [at] acme [dot] com", "bob [at] acme [dot] com"),
        ("mail b\u200bob@acme.com", "acme"),
        ("Name:Alice Jones\nSSN:536-90-4399", "Alice"),
        ("MRN: 00482913 was seen", "00482913"),
        ("his policy number is ZX-99812-7", "ZX-99812-7"),
        ("VIN 1HGCM82633A004352", "1HGCM82633A004352"),
        ("password: hunter2!x", "hunter2!x"),
        ("key AKIAABCDEFGHIJKLMNOP leaked", "AKIAABCDEFGHIJKLMNOP"),
        ("Ship to P.O. Box 552, Springfield, IL 62704", "62704"),
        ("Ring +49 30 901820 after six", "901820"),
        ("He is 93 years old.", "93"),
        ("follow @maria_g", "maria_g"),
        ("card 4111111111111111 expired", "4111111111111111"),
        ("She's 93 and well", "93"),
        ("daughter Trish (555-0177)", "555-0177"),
        ("Claim CL-2024-00917 was paid", "00917"),
        ("pay to 60-22-18 33419027", "33419027"),
        ("my insta is @milo.bakes now", "bakes"),
        ("sshd[2211]: Failed password for cdubois from 203.0.113.80 port 52144 ssh2", "cdubois"),
        ("K. Klein, Flat 3, 88 Copper Street", "Flat 3"),
    ],
)
def test_what_presidio_alone_lets_through_is_found(scrub, text, gone):
    [outcome] = scrub({"text": text})
    assert not outcome.reason
    assert gone not in outcome.row["text"]


@pytest.mark.parametrize(
    "text",
    [
        "Boil the pasta for 45 minutes and add 3 cups of water.",
        "xs.append(4) adds to the list; obj.name reads it.",
        "The method was published in 2017 and is used in public policy.",
        "There are 1,234,567 ways and 98765 more.",
        "What can I do if my card still has not arrived?",
    ],
)
def test_plain_text_stays_as_it_is(scrub, text):
    assert scrub({"text": text})[0].row == {"text": text}


def test_a_person_gets_the_same_surrogate_in_every_field(scrub):
    rng = random.Random(1)
    rows = []
    for number in range(12):
        name = rng.choice(PEOPLE)
        first = name.split()[0]
        rows.append(
            {
                "id": f"r{number}",
                "prompt": f"My name is {name}.",
                "chosen": f"Hello {first}!",
                "rejected": f"{name}, no.",
            }
        )
    for outcome in scrub(*rows, operator="surrogate"):
        row = outcome.row
        new = re.fullmatch(r"My name is (.+)\.", row["prompt"])[1]
        assert row["chosen"] == f"Hello {new.split()[0]}!"
        assert row["rejected"] == f"{new}, no."
        assert new not in PEOPLE
        assert row["id"] in {source["id"] for source in rows}


def test_two_people_of_a_record_stay_two(scrub):
    text = "Maria Gonzalez wrote to Peter Hansen. Hansen answered Maria Gonzalez."
    [outcome] = scrub({"text": text}, operator="tag-index")
    assert outcome.row["text"] == "<PERSON_1> wrote to <PERSON_2>. <PERSON_2> answered <PERSON_1>."


def test_a_name_that_fits_two_people_is_neither():
    found = [("PERSON", "Maria Diaz"), ("PERSON", "Maria Lopez"), ("PERSON", "Maria")]
    assert len(set(identify(found).values())) == 3


def test_scrubbing_twice_is_scrubbing_once(scrub, repository_samples):
    once = [outcome.row for outcome in scrub(*repository_samples) if not outcome.reason]
    twice = scrub(*once)
    assert [outcome.reason for outcome in twice] == [""] * len(once)
    assert [outcome.row for outcome in twice] == once


@pytest.fixture
def repository_samples():
    """Return sample records of every format, with and without personal data."""
    from tests.conftest import ROOT

    rows = []
    for name in ("data/sft/sample_pii.jsonl", "data/sft/sample_sft.jsonl", "data/dpo/sample_dpo.jsonl"):
        with (ROOT / name).open(encoding="utf-8", newline="\n") as file:
            rows += [json.loads(line) for line in file][:25]
    return rows


def test_nothing_but_text_changes(scrub):
    row = {
        "id": "mg-1", "n": 3, "x": 1.5, "none": None, "flag": True, "label": "PERSON of Berlin",
        "messages": [{"role": "user", "content": "I am Maria Gonzalez"}, {"role": "assistant", "content": ""}], "list": [[], {}],
    }  # fmt: skip
    [outcome] = scrub(row)
    expected = json.loads(json.dumps(row))
    expected["messages"][0]["content"] = "I am <PERSON>"
    assert outcome.row == expected
    assert list(outcome.row) == list(row)
    assert row["messages"][0]["content"] == "I am Maria Gonzalez"


def test_numbers_are_searched_with_the_name_of_their_field(scrub):
    row = {"ssn": 536904399, "phone": 4155552671.0, "zip": 94107, "count": 94108, "orders": 3}
    [outcome] = scrub(row)
    assert outcome.row == {
        "ssn": "<US_SSN>",
        "phone": "<PHONE_NUMBER>",
        "zip": "<ZIP_CODE>",
        "count": 94108,
        "orders": 3,
    }
    [outcome] = scrub(row, operator="surrogate")
    assert isinstance(outcome.row["ssn"], int)
    assert outcome.row["ssn"] != 536904399


def test_a_number_found_by_its_label_is_covered_where_it_stands_bare(scrub):
    [outcome] = scrub({"prompt": "MRN: 00482913", "completion": "Yes, 00482913 was seen."})
    assert outcome.row["completion"] == "Yes, <ID_NUMBER> was seen."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": b"bytes"}, "type bytes"),
        ({"text": "data:image/png;base64,iVBORw0KGgo"}, "binary"),
        ({"maria.gonzalez@example.com": "hello"}, "name of a field"),
        ({"notes of Rachel Bergstrom": "hello"}, "name of a field"),
        ({"text": "half a pair \ud800 of Maria Gonzalez"}, "UnicodeEncodeError"),
        ({"text": "x" * 1_000_001}, "more than"),
        ({"text": "MRN: 00482913", "label": "00482913"}, "not scrubbed"),
    ],
)
def test_doubt_holds_a_record_back_and_the_others_pass(scrub, row, reason):
    held, passed = scrub(row, {"text": "All is well."})
    assert reason in held.reason
    assert held.row is None
    assert "Gonzalez" not in held.reason
    assert passed.row == {"text": "All is well."}


def test_a_recognizer_that_fails_holds_back_only_its_record(detector, scrub):
    from presidio_analyzer import Pattern, PatternRecognizer

    class Broken(PatternRecognizer):
        def analyze(self, text, *arguments, **keywords):
            if "poison" in text:
                raise RuntimeError(text)
            return []

    broken = Broken("PERSON", name="broken", patterns=[Pattern("none", "never", 0.5)])
    detector.analyzer.registry.add_recognizer(broken)
    try:
        outcomes = scrub({"text": "fine"}, {"text": "poison of Maria Gonzalez"}, {"text": "I am Peter Hansen"})
    finally:
        detector.analyzer.registry.remove_recognizer("broken")
    assert [outcome.reason for outcome in outcomes] == ["", "RuntimeError while scrubbing", ""]
    assert outcomes[2].row == {"text": "I am <PERSON>"}


def test_a_field_that_is_missing_holds_the_record_back():
    settings = Deid(profile="secrets-only", fields=["a.b"])
    detector = load_detector(settings)
    rows = [{"a": [{"b": "password: hunter2x"}], "c": "password: other1x"}, {"a": {}}]
    outcomes = scrub_chunk([(n, "f", row) for n, row in enumerate(rows)], detector, Replacer(settings, 0, None))
    assert outcomes[0].row == {"a": [{"b": "password: <SECRET>"}], "c": "password: other1x"}
    assert "a.b is missing" in outcomes[1].reason


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("tag", "Ask <PERSON> now"),
        ("tag-index", "Ask <PERSON_1> now"),
        ("mask", "Ask ***** ******** now"),
        ("redact", "Ask  now"),
        ("keep", "Ask Maria Gonzalez now"),
    ],
)
def test_operators(scrub, operator, expected):
    assert scrub({"text": "Ask Maria Gonzalez now"}, operator=operator)[0].row["text"] == expected


def test_an_entity_can_have_its_own_operator(scrub):
    [outcome] = scrub({"text": "Ask Maria Gonzalez on 3 March 2024"}, operators={"DATE_TIME": "keep"})
    assert outcome.row["text"] == "Ask <PERSON> on 3 March 2024"


def test_a_keyed_hash_depends_on_the_person_and_the_key_only(scrub, detector):
    one, two = scrub({"text": "Ask Maria Gonzalez"}, {"text": "MARIA  GONZALEZ? Ask Maria Gonzalez"}, operator="hash")
    tag = TAG.search(one.row["text"])[0]
    assert tag in two.row["text"]
    other = scrub_chunk(
        [(1, "f", {"text": "Ask Maria Gonzalez"})], detector, Replacer(Deid(operator="hash"), 0, b"x" * 32)
    )
    assert TAG.search(other[0].row["text"])[0] != tag


def test_encrypted_values_come_back_with_the_key_and_with_no_other(scrub):
    text = "Ask Maria Gonzalez at maria@example.com"
    [outcome] = scrub({"text": text}, operator="encrypt")
    assert "Maria" not in outcome.row["text"]
    assert decrypt(outcome.row["text"], KEY) == text
    with pytest.raises(UserError, match="wrong key"):
        decrypt(outcome.row["text"], b"x" * 32)


def test_file_wide_surrogates_do_not_depend_on_the_place(scrub):
    rows = [{"text": "Ask Maria Gonzalez"}, {"text": "Ask Peter Hansen"}]
    forward = [o.row for o in scrub(*rows, operator="surrogate", consistency="file")]
    backward = [o.row for o in scrub(*rows[::-1], operator="surrogate", consistency="file")]
    assert forward == backward[::-1]
    assert forward[0] != forward[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operator": "hash"}, "DEID_KEY_FILE"),
        ({"operator": "hash", "profile": "hipaa-safe-harbor"}, "Safe Harbor"),
        ({"operator": "tag-index", "consistency": "file"}, "within a record"),
    ],
)
def test_operators_that_would_not_keep_their_promise_are_refused(settings, message, monkeypatch):
    monkeypatch.delenv(replacement.KEY_VARIABLE, raising=False)
    with pytest.raises(UserError, match=message):
        check_operators(Deid(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spacy_model": "en_core_web_none"}, "no installed spaCy model"),
        ({"language": "de"}, "reads en"),
        ({"entities": ["PERSONS"]}, "PERSONS"),
        ({"operators": {"NAME": "keep"}}, "NAME"),
        ({"thresholds": {"PERSON": 1.0}}, "self-test"),
        ({"recognizers": "missing.yaml"}, "missing.yaml"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        load_detector(Deid(rampart="off", **settings))


@pytest.mark.parametrize(
    ("field", "value", "entity"),
    [
        ("id", "maria.g@fjord.test", "EMAIL_ADDRESS"), ("source", "Interview with Rachel Bergstrom", "PERSON"), ("category", "536-90-4399", "US_SSN"),
        ("label", "card 4111 1111 1111 1111", "CREDIT_CARD"), ("split", "password: hunter2x", "SECRET"), ("lang", "ring +49 30 901820", "PHONE_NUMBER"),
        ("id", "gonzalez_17", "PERSON"),  # the name of somebody whom the record speaks of
    ],
)  # fmt: skip
def test_personal_data_in_a_safe_field_holds_the_record_back(scrub, field, value, entity):
    held, passed = scrub({field: value, "text": "I am Maria Gonzalez."}, {field: "train", "text": "All is well."})
    assert held.row is None
    assert f"the safe field {field} holds {entity}" in held.reason
    assert value not in held.reason
    assert passed.row[field] == "train"


@pytest.mark.parametrize(
    "value",
    ["r-17", "20240318", "536904399", "123e4567-e89b-42d3-a456-426614174000", "https://en.wikipedia.org/wiki/Norway", "2024-03-18", "user",
     "Apple Pay", "card_arrival", "Wikipedia", "7c4a8d09ca3762af61e59520943dc26494f8941b", "en"],
)  # fmt: skip
def test_ids_and_labels_in_safe_fields_keep_their_value(scrub, value):
    rows = [{name: value, "text": "All is well."} for name in ("id", "source", "category", "adapter_sha256")]
    assert [outcome.row for outcome in scrub(*rows)] == rows


def test_safe_fields_are_the_ones_configured():
    detector = load_detector(Deid(profile="secrets-only", safe_fields=["note"]))
    rows = [{"id": "password: hunter2x", "note": "fine"}, {"id": "a", "note": "password: swordfish7"}]
    outcomes = scrub_chunk([(n, "f", row) for n, row in enumerate(rows)], detector, Replacer(Deid(), 0, None))
    assert outcomes[0].row == {"id": "password: <SECRET>", "note": "fine"}
    assert "safe field note holds SECRET" in outcomes[1].reason


def test_rampart_is_asked_for_by_its_key():
    """Installed or not: `on` is never taken for `auto` or `off`."""
    polish = {"language": "pl", "entities": ["EMAIL_ADDRESS"]}
    with pytest.raises(UserError, match=r"deid\.rampart: found on"):
        load_rampart(Deid(rampart="on", **polish))
    assert load_rampart(Deid(rampart="off", **polish)) is None


def test_allow_list_deny_list_and_own_recognizers(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "recognizers:\n- name: badge\n  supported_entity: BADGE\n  patterns: [{name: b, regex: 'B-[a-z]{4}', score: 0.9}]\n"
    )
    settings = Deid(profile="secrets-only", entities=["BADGE", "CUSTOM"], recognizers=str(own), deny_list=["Zephyr"],
                    allow_list=["b-good"])  # fmt: skip
    detector = load_detector(settings)
    [outcome] = scrub_chunk([(1, "f", {"text": "B-evil, B-good and zephyr"})], detector, Replacer(settings, 0, None))
    assert outcome.row["text"] == "<BADGE>, B-good and <CUSTOM>"


def test_evaluation_counts_known_answers():
    rows = [
        ({"text": "ab cd", "spans": [{"start": 0, "end": 2, "label": "X"}]}, [Span(0, 2, "PERSON", 1.0)]),
        ({"text": "ab cd", "spans": [{"start": 0, "end": 5, "label": "X"}]}, [Span(0, 2, "PERSON", 1.0)]),
        ({"text": "ab cd", "spans": []}, [Span(3, 5, "PERSON", 1.0)]),
        ({"text": "ab cd", "spans": [{"start": 0, "end": 2, "label": "X"}]}, None),
    ]
    result = evaluate(rows)
    assert (result["recall"]["hits"], result["recall"]["total"]) == (1, 2)
    assert (result["precision"]["hits"], result["precision"]["total"]) == (2, 3)
    assert (result["leaking_records"]["hits"], result["leaking_records"]["total"]) == (1, 3)
    assert result["flagged_characters_without_personal_data"]["hits"] == 2
    assert result["held_back"] == 1


def test_wilson_interval_of_a_worked_example():
    assert wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert wilson(0, 0) is None


def test_recall_on_the_development_set(detector, shared_data):
    with (shared_data / "pii_presidio_generated_large/data.jsonl").open(encoding="utf-8", newline="\n") as file:
        gold = [json.loads(line) for line in file][::15]
    outcomes = scrub_chunk(
        [(n, "f", {"text": row["text"]}) for n, row in enumerate(gold)], detector, Replacer(Deid(), 0, None)
    )
    result = evaluate((row, o.spans_of_text) for row, o in zip(gold, outcomes, strict=True))
    assert result["recall"]["share"] >= 0.85
    assert result["recall_by_label"]["PERSON"]["share"] >= 0.88
    assert sum(bool(o.reason) for o in outcomes) <= 0.02 * len(gold)


def test_rampart_finds_names_and_addresses():
    if load_rampart(Deid()) is None:
        pytest.skip("needs make setup")
    rampart = load_rampart(Deid(rampart="on"))
    texts = ["john lives at 12 oak lane", "", "word " * 600 + "My name is Maria Gonzalez."]
    found = rampart.detect(texts)
    assert {"PERSON", "STREET_ADDRESS"} <= {span.entity for span in found[0]}
    assert found[1] == []
    assert any(texts[2][span.start : span.end] in "Maria Gonzalez" for span in found[2])


def test_rampart_leaves_out_what_is_known():
    if load_rampart(Deid()) is None:
        pytest.skip("needs make setup")
    rampart = load_rampart(Deid(rampart="on"))
    text = "Maria Gonzalez met Peter Hansen."
    assert {span.start for span in rampart.detect([text])[0]} == {0, 19}
    assert {span.start for span in rampart.detect([text], [[Span(0, 14, "SECRET", 1.0)]])[0]} == {19}


@pytest.mark.parametrize(
    ("sentence", "plain"),
    [
        ("She buys 12 apples and eats two of them.", True),
        ("how do I change the card that I ordered?", True),
        ("can you ask dana about the boxes?", False),
        ("Artemis makes tea every day.", False),
        ("The boxes are with Okafor now.", False),
        ("i live at 12 oak street near the park", False),
        ("The code for the door is 441 now.", False),
        ("ask the man", False),
    ],
)
def test_only_sentences_of_ordinary_words_are_plain(sentence, plain):
    assert is_plain(sentence) is plain


@pytest.mark.parametrize(
    ("text", "spent"),
    [
        ("<PERSON> takes 500 mg, MRN <ID_NUMBER>.", True),
        ("DB_PASSWORD=<SECRET>", True),
        ("<PERSON> and Okafor signed.", False),
        ("CALL <PERSON> AND FATIMA", False),
        ("TELL <PERSON> THAT TRUUS RANG", False),
        ("<PERSON> lives in PORSGRUNN", False),
        ("<PERSON>, room 4411", False),
        ("The parcel is at the door.", False),
    ],
)
def test_a_text_is_spent_when_no_name_can_be_left_beside_its_tags(text, spent):
    assert is_spent(text) is spent


def test_columns_reach_lists_and_what_lies_in_a_field():
    settings = Deid(
        rampart="off", profile="secrets-only", columns={"guests": "SECRET", "who.nick": "SECRET", "id": "text"}
    )
    row = {
        "guests": ["Quux", {"first": "Zyx"}, None],
        "who": {"nick": "Vex", "id": 7},
        "nick": "stays",
        "id": "password: hunter2!x",
    }
    [outcome] = scrub_chunk([(1, "f:1", row)], load_detector(settings), Replacer(settings, seed=0, key=KEY))
    assert outcome.row == {
        "guests": ["<SECRET>", {"first": "<SECRET>"}, None], "who": {"nick": "<SECRET>", "id": 7}, "nick": "stays", "id": "password: <SECRET>",
    }  # fmt: skip


def test_a_tag_is_no_label_for_what_stands_after_it(scrub):
    text = "Ask @maria_g: rotate the key. Aged 93, 12 of them."
    left = scrub({"text": text})[0].row["text"]
    assert "rotate" in left
    assert "12" in left


def test_dates_of_a_record_move_by_the_same_days_in_every_format_and_keep_their_intervals(scrub):
    text = "Admitted 2019-03-12, seen on March 15, 2019 and on 20 March 2019, left on 03/22/2019. Deborah signed."
    first, second = (o.row["text"] for o in scrub({"text": text}, {"text": text}, operators={"DATE_TIME": "shift"}))
    assert first != second  # records move by days of their own
    assert "<DATE_TIME>" not in first
    found = re.search(r"Admitted (\S+), seen on (\w+ \d+, \d+) and on (\d+ \w+ \d+), left on (\S+)\. ", first)
    formats = ("%Y-%m-%d", "%B %d, %Y", "%d %B %Y", "%m/%d/%Y")
    dates = [datetime.strptime(written, form) for written, form in zip(found.groups(), formats, strict=True)]
    assert [(date - dates[0]).days for date in dates] == [0, 3, 8, 10]
    assert 30 <= (datetime(2019, 3, 12) - dates[0]).days <= 365


def test_dates_of_a_file_move_by_the_days_that_its_key_gives(scrub):
    rows = [{"text": "Deborah came on 2019-03-12."}, {"text": "Carlos came on 2019-03-12."}]
    settings = {"operators": {"DATE_TIME": "shift"}, "consistency": "file"}
    left = [o.row["text"].split(" on ")[1] for o in scrub(*rows, **settings)]
    assert left[0] == left[1] != "2019-03-12."


def test_dates_and_ages_become_coarse(scrub):
    text = "Deborah, 47 years old, came on 2019-03-12 and on 12 May; Carlos is 94 years old."
    [outcome] = scrub({"text": text}, operators={"DATE_TIME": "generalise", "AGE": "generalise"})
    assert outcome.row["text"] == (
        "<PERSON>, 40-49 years old, came on 2019 and on <DATE_TIME>; <PERSON> is 90+ years old."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operator": "shift"}, "deid.operator: found shift for every entity"),
        ({"operators": {"PERSON": "generalise"}}, "deid.operators.PERSON: found generalise"),
        ({"profile": "hipaa-safe-harbor", "operators": {"DATE_TIME": "shift"}}, "found shift"),
    ],
)
def test_operators_of_dates_are_refused_for_others_and_where_they_are_not_allowed(settings, message):
    with pytest.raises(UserError, match=message):
        check_operators(Deid(**settings))


def test_the_same_person_number_and_day_in_two_forms_are_one(scrub):
    text = "Smith, Deborah: call (415) 555-2671. Deborah Smith came on 2019-03-12. 415.555.2671 rang on March 12, 2019."
    left = scrub({"text": text}, operator="tag-index")[0].row["text"]
    assert left.count("<PHONE_NUMBER_1>") == 2
    assert left.count("<DATE_TIME_1>") == 2
    assert "_2>" not in left


def test_a_first_name_keeps_its_gender_and_a_list_its_order():
    from faker.providers.person.en_US import Provider

    replacer = Replacer(Deid(operator="surrogate"), seed=0, key=KEY)
    for number, (name, names) in enumerate(
        {"Deborah Klein": Provider.first_names_female, "Robert Klein": Provider.first_names_male}.items()
    ):
        [left] = replacer.replace(number, [(name, [Span(0, len(name), "PERSON", 1.0)])])
        assert left.split()[0] in names
    [left] = replacer.replace(1, [("Klein, Deborah", [Span(0, 14, "PERSON", 1.0)])])
    assert re.fullmatch(r"\w+, \w+", left)


def test_a_couple_keeps_one_family_name_and_everybody_their_own_first_name(scrub):
    text = "Anna and Peter Schmidt moved. Anna Schmidt called, Mr Schmidt did not. Maria Gonzalez knows Peter Schmidt."
    [outcome] = scrub({"text": text}, operator="surrogate")
    new = re.fullmatch(
        r"(N) and (N) (N) moved. (N) (N) called, (?:Mr |N )?(N) did not. N (N) knows (N) (N).".replace(
            "N", r"[\w'’-]+"
        ),
        outcome.row["text"],
    )
    first, second, family, again, hers, his, other, third, last = new.groups()
    assert family == hers == his == last
    assert (first, second) == (again, third)
    assert first != second
    assert other != family


def test_surrogates_are_of_the_language_of_the_record_and_of_the_file_where_they_hold_for_it():
    from faker.providers.person.de_DE import Provider

    replacer = Replacer(Deid(operator="surrogate"), seed=0, key=KEY)
    name = "Waltraud Heinemann"
    texts = [(name, [Span(0, len(name), "PERSON", 1.0)])]
    german = [replacer.replace(number, texts, "de")[0].split()[0] for number in range(20)]
    assert {*german} <= {*Provider.first_names_female}
    of_file = Replacer(Deid(operator="surrogate", consistency="file"), seed=0, key=KEY)
    assert of_file.replace(1, texts, "de") == of_file.replace(2, texts, "en")


@pytest.mark.parametrize(
    "field", ["question", "Answer", "context", "query", "response", "response_j", "system_prompt", "value"]
)
def test_the_fields_that_training_reads_as_texts_are_prose(detector, field):
    from scripts.deid.scrubbing import read_leaves

    [leaf] = read_leaves({field: "The boiler is cold."}, detector)
    assert leaf.label == ""


def test_who_speaks_and_how_much_it_counts_stay(scrub):
    row = {
        "conversations": [
            {"from": "human", "value": "I am Maria Gonzalez."},
            {"from": "gpt", "value": "Hello Maria!", "weight": 0.25},
        ],
        "kto_tag": "true",
    }
    [outcome] = scrub(row)
    said = outcome.row["conversations"]
    assert [turn["from"] for turn in said] == ["human", "gpt"]
    assert [turn["value"] for turn in said] == ["I am <PERSON>.", "Hello <PERSON>!"]
    assert said[1]["weight"] == 0.25
    assert outcome.row["kto_tag"] == "true"
    assert scrub({"from": "maria.gonzalez@acme.org", "text": "Hello"})[0].row["from"] == "<EMAIL_ADDRESS>"
