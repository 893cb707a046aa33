"""What a text is made of stays: lines, cells, tags, lists, code and formulas; and what is no personal data stays too."""

from __future__ import annotations

import json
import re
import time

import pytest

from scripts.common.schema import Deid

pytest.importorskip("presidio_analyzer", reason="needs requirements.extra.txt")

from scripts.deid.recognizers import load_detector
from scripts.deid.secret_values import find_secrets
from scripts.deid.spans import Span, cut, normalise, to_original

MARKS = re.compile(r"[\n\r\t|;]|</?\w+>|^[-*] |^\d\. |\\and", re.M)
OUR_TAG = re.compile(r"<(?:[A-Z]+_)*[A-Z]+>")


@pytest.mark.parametrize(
    "text",
    [
        "name,phone,city\nDeborah Klein,312-555-0199,Peoria\nCarlos Fernandez,312-555-0121,Joliet\n",
        "name;mail\nDeborah Klein;dk@fjord.test\nCarlos Fernandez;cf@fjord.test",
        "name\tphone\nDeborah Klein\t312-555-0199\nCarlos Fernandez\t312-555-0121",
        "| name | born |\n|---|---|\n| Deborah Klein | 1988-04-12 |\n| Carlos Fernandez | 1979-11-30 |",
        "- Deborah Klein\n- Carlos Fernandez\n- Peter Hansen",
        "1. Deborah Klein\n2. Carlos Fernandez",
        "* **Deborah Klein**: done\n* **Carlos Fernandez**: blocked",
        "<ul><li>Deborah Klein</li><li>Carlos Fernandez</li></ul>",
        "<td>Deborah Klein</td><td>12 Oak Lane</td><td>Springfield, IL 62704</td>",
        "Deborah Klein\n12 Oak Lane\nSpringfield, IL 62704\n",
        "From: Deborah Klein\r\nTo: Carlos Fernandez\r\nSubject: lease",
        "\\author{Deborah Klein \\and Carlos Fernandez}",
    ],
)
def test_lines_cells_and_tags_stay_where_they_are(scrub, text):
    left = scrub({"text": text})[0].row["text"]
    assert "Deborah" not in left
    assert MARKS.findall(OUR_TAG.sub("", left)) == MARKS.findall(text)


@pytest.mark.parametrize("separator", [",", ";", "\t", " | "])
def test_the_head_of_a_column_says_what_its_cells_hold(scrub, separator):
    table = [
        ["item", "owner", "iban"],
        ["lamp", "Quuxley Vrandt", "XX00-1"],
        ["chair", "", "none"],
        ["desk", "Blorn", "ZZ99-7"],
    ]
    text = "\n".join(separator.join(row) for row in table)
    left = scrub({"text": text})[0].row["text"]
    assert [value for value in ("Quuxley", "Vrandt", "Blorn", "XX00", "ZZ99") if value in left] == []
    assert [line.count(separator) for line in left.split("\n")] == [2] * 4
    assert "none" in left
    things = "name,price\nred lamp,12\nblue vase,54"
    assert scrub({"text": things})[0].row == {"text": things}


@pytest.mark.parametrize(
    "value",
    [
        {"name": "Deborah Klein", "friends": ["Carlos Fernandez", "Peter Hansen"], "n": 3},
        [{"a": "Deborah Klein"}, {"a": "Carlos Fernandez, Peter Hansen"}],
    ],
)
def test_json_in_a_string_is_json_afterwards(scrub, value):
    left = scrub({"text": json.dumps(value)})[0].row["text"]
    assert "Deborah" not in left
    assert type(json.loads(left)) is type(value)


@pytest.mark.parametrize(
    "code",
    [
        "def f(x):\n    return x.shape[0] + x.mean()\n",
        "class Pool:\n    size: int = 10\n\n    @property\n    def free(self) -> int:\n        return self.size - len(self.used)\n",
        "@dataclass\nclass Point:\n    x: int\n    y: int\n",
        "import numpy as np\nfrom scipy.stats import norm\na = np.zeros((3, 4))\nprint(a.shape, norm.cdf(1.96))",
        "const items = data.filter(x => x.id).map(Item.from);\nexport default items;",
        "public class Foo extends Bar {\n  @Override\n  public void run() { Baz.qux(); }\n}",
        "SELECT c_2, max(price) FROM Orders WHERE region = 'north' GROUP BY c_2;",
        "for i in range(10):\n    print(i, Model.objects.get(pk=i))",
        "```python\nclass Austin(Base):\n    jordan = Paris()\n```",
        "Let $c_2 = \\alpha_1 + Maria$ and $x_1 < c_2$.",
        "\\[ \\int_0^1 f(x) dx = Newton \\]",
        "x.shape and y.mean() are attributes",
        "@media (max-width: 600px) {\n  .menu { display: none; }\n}",
        '#include <stdio.h>\nint main(void) { printf("%d", 3); return 0; }',
    ],
)
def test_code_and_formulas_stay(scrub, code):
    assert scrub({"text": code})[0].row == {"text": code}


def test_people_in_the_comments_and_strings_of_code_are_found(scrub):
    code = '# written by Deborah Klein\ndef owner():\n    return "Carlos Fernandez"\n'
    left = scrub({"text": code})[0].row["text"]
    assert left == '# written by <PERSON>\ndef owner():\n    return "<PERSON>"\n'


@pytest.mark.parametrize(
    "text",
    [
        "He has 10/2 apples.", "20700 - 20100 = 600", "A hall of 400 square feet.", "12*8=96 and 96/4 = 24", "3/4 + 1/2 = 5/4",
        "98 76 54 32 is a number pattern that falls by 22.", "What is the next term in 81 64 49 36?",
        "5 + 7 = 12, 12 - 4 = 8", "Add 2 1/2 cups to 1 3/4 cups.", "1234567 + 7654321 = 8888888", "From 1998 to 2016 there are 18 years.",
        "4150 x 26 = 107900", "24.50 and 220.50", "How old is she? Twice 12 is 24.", "98 - 45 - 12 = 41", "(15 + 27) * 3 - 18/6 = 123",
        "7 boxes of 144 screws are 7*144=1008 screws.", "It rained 4 inches in 2.5 hours.", "What is 15% of 640? 640*0.15 = 96",
        "Divide 98,765 by 5 to get 19,753.", "The frequencies are 440 880 1320 Hz.", "The digits of 123456789 add up to 45.", "On page 12 Chapter 3 begins.",
        "1 000 000 divided by 8 is 125 000.",
    ],
)  # fmt: skip
def test_calculations_keep_their_numbers(scrub, text):
    assert scrub({"text": text})[0].row == {"text": text}


@pytest.mark.parametrize(
    "text",
    [
        "Can I use Apple Pay or Google Pay?", "Do you ship to Canada and Brazil?", "What is the capital of Norway?", "Is it Visa or Mastercard?",
        "Beethoven wrote nine symphonies.", "What did Albert Einstein discover?", "The United Nations was founded in 1945.",
        "Amazon and Microsoft sell cloud storage.", "Mail user@example.com or see https://example.com/docs.", "The host is 127.0.0.1.",
        "Dear {{first_name}}, welcome!", "My order shows as pending since Monday.",
    ],
)  # fmt: skip
def test_companies_countries_figures_and_placeholders_stay_where_nobody_is_near(scrub, text):
    assert scrub({"text": text})[0].row == {"text": text}


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("Deborah Klein works for Microsoft in Norway.", ["Microsoft", "Norway"]),
        ("I was born in Norway.", ["Norway"]),
        ("She moved here from Brazil.", ["Brazil"]),
        ("She lives at 12 Oak Lane, phone 415-555-2671.", ["12", "2671"]),
        ("Born on 10/2/1984, seen on 3/4.", ["1984"]),
    ],
)
def test_the_same_counts_where_somebody_is_near(scrub, text, gone):
    left = scrub({"text": text})[0].row["text"]
    assert [value for value in gone if value in left] == []


def test_a_strict_profile_counts_countries_and_companies_alone():
    strict = load_detector(Deid(rampart="off", profile="strict"))
    assert {span.entity for span in strict.detect(["What is the capital of Norway?"])[0]} == {"LOCATION"}


def test_a_maths_problem_about_people_keeps_its_dates_and_ages(scrub):
    text = "Deborah got 12 letters on May 4 and 9 on May 5. How many letters did she get in total?"
    assert scrub({"text": text})[0].row["text"] == text.replace("Deborah", "<PERSON>")


def test_a_date_leaves_the_sentence_around_it_alone(scrub):
    text = "Minutes 4 May. Present: Deborah Klein. Term begins 6 Oct. 12 students are late."
    left = scrub({"text": text})[0].row["text"]
    assert left.startswith("Minutes <DATE_TIME>. Present")
    assert left.endswith("12 students are late.")


@pytest.mark.parametrize(
    "unit", ["a.", "a-", "AB12", "GB12ABCD", "a@", "12 ", "A ", "password: ", "a_", "%20", "&a", "x1"]
)
def test_the_time_grows_with_the_length_and_no_faster(detector, unit):
    """Compare processor seconds, which other work on the machine does not change much."""

    def seconds(length):
        text, started = (unit * length)[:length], time.process_time()
        for recognizer in detector.analyzer.registry.recognizers:
            if hasattr(recognizer, "patterns"):
                recognizer.analyze(text, recognizer.supported_entities, None)
        find_secrets(text)
        return time.process_time() - started

    assert seconds(8000) < 0.3 + 6 * seconds(2000)  # the square would be sixteen times


def test_a_finding_is_cut_at_breaks_and_a_key_is_not():
    text = "Deborah\nKlein | Carlos"
    pieces = [text[s.start : s.end] for s in cut(text, [Span(0, len(text), "PERSON", 1.0)])]
    assert pieces == ["Deborah", "Klein", "Carlos"]
    assert cut(text, [Span(0, len(text), "SECRET", 1.0)]) == [Span(0, len(text), "SECRET", 1.0)]


@pytest.mark.parametrize(
    ("text", "read", "word", "written"),
    [
        ("Ren&eacute;e!", "Renée!", "Renée", "Ren&eacute;e"),
        ("a=Zo%C3%AB&b", "a=Zoë&b", "Zoë", "Zo%C3%AB"),
        ("Zoe\u0308!", "Zoë!", "Zoë", "Zoe\u0308"),
        ("A N N A  B E E", "ANNA BEE", "BEE", "B E E"),
        ("?q=Ann+Bee", "?q=Ann Bee", "Ann Bee", "Ann+Bee"),
    ],
)
def test_disguises_lead_back_to_what_they_were_written_as(text, read, word, written):
    plain, offsets = normalise(text)
    assert plain == read
    start = plain.index(word)
    span = to_original(Span(start, start + len(word), "PERSON", 1.0), offsets)
    assert text[span.start : span.end] == written
