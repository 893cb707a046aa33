"""Each record is read in its own language, or held back."""

from __future__ import annotations

import importlib.util

import pytest

pytest.importorskip("presidio_analyzer", reason="needs requirements.extra.txt")

from scripts.common.schema import Deid
from scripts.deid.languages import READABLE, foreign_words, language_of, majority, recognizers
from scripts.deid.rampart import PACKAGE
from scripts.deid.recognizers import load_detector
from scripts.deid.replacement import Replacer
from scripts.deid.scrubbing import scrub_chunk
from tests.deid.conftest import KEY

needs_rampart = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs Rampart")

TEXTS = {
    "en": "The dog was barking at the postman because it had been alone for hours.",
    "de": "Der Hund bellte den Briefträger an, weil er stundenlang allein gewesen war.",
    "fr": "Le chien aboyait après le facteur parce qu'il était resté seul pendant des heures.",
    "es": "El perro ladraba al cartero porque había estado solo durante muchas horas.",
    "it": "Il cane abbaiava al postino perché era rimasto solo per molte ore.",
    "pt": "O cão ladrava ao carteiro porque tinha ficado sozinho durante muitas horas.",
    "nl": "De hond blafte naar de postbode omdat hij urenlang alleen was geweest.",
    "pl": "Pies szczekał na listonosza, ponieważ przez wiele godzin był sam w domu.",
    "sv": "Hunden skällde på brevbäraren eftersom den hade varit ensam i flera timmar.",
}


@pytest.mark.parametrize(("language", "text"), TEXTS.items())
def test_prose_is_known_by_its_function_words(language, text):
    assert language_of(text, "en") == language
    assert language_of(text, "de") == language


@pytest.mark.parametrize(
    "text",
    [
        "Björn Åkesson, Zoë Lefèvre, Giuseppe Bianchi", "x = np.zeros(4)  # fill",
        "Ja, oui, si", "https://example.de/der/die/das", "NL57BWQU6828890931", "The German word for it is Kindergarten.",
    ],
)  # fmt: skip
def test_names_addresses_and_code_are_no_other_language(text):
    assert language_of(text, "en") == "en"


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("de", "Name: Wilma Krüger\nTel.: 030 5550132\nStraße: Eichenweg 8, 13187 Berlin"),
        ("de", "Anmeldungen: Reuter, Ottilie; Haack, Joachim; Doğan, Emre"),
        ("de", "Betreff: Vertragsnummer 5512, Wilma Krüger"),
        ("nl", "Handtekening: Hedwig Overgaauw, plaats: Roermond"),
        ("it", "Oggetto: fattura 118 di Carlo Bonomi"),
        ("de", "Spätschicht: Pia, Okan; Frühschicht: Björn, Wencke"),
        ("de", "[14/May/2024:09:05:44 +0200] Auftrag von Insa Voigt gesperrt"),
        ("it", "2024-05-14 08:31:07 INFO accesso di Rita Ostellino riuscito"),
        ("es", "14/05/2024 09:02 archivo borrado por Marisa Fuentes"),
        ("nl", "# schrijver: Koert Valk\n# getest door Astrid Bos\ndef som(a, b):\n    return a + b"),
    ],
)
def test_forms_and_lists_are_known_by_what_heads_their_fields(language, text):
    assert language_of(text, "en") == language


def test_a_short_text_has_the_language_of_its_file():
    assert majority([TEXTS["fr"], TEXTS["fr"], TEXTS["en"], "Salut"], "en") == "fr"
    assert majority([TEXTS["pl"], TEXTS["pl"]], "en") == "en"
    assert majority([], "en") == "en"
    assert language_of("Salut Léa", "fr") == "fr"


def test_words_in_another_script_are_noticed_and_symbols_are_not():
    assert foreign_words("Please write to Иван Петров today", "en")
    assert foreign_words("山田太郎さんに電話してください", "en")
    assert foreign_words("اتصل بأحمد غدا", "en")
    assert not foreign_words("The angle α is 45° and σ² = 4 µm — naïve, Ærøskøbing, 1º, ﬁne", "en")
    assert not foreign_words("Позвоните Ивану", "ru")


@pytest.mark.parametrize(
    "text", ["山田太郎さんは東京に住んでいます。", "أحمد يسكن في القاهرة مع عائلته", TEXTS["pl"], TEXTS["sv"]]
)
def test_what_nothing_can_read_is_held_back_with_the_reason(scrub, text):
    [outcome] = scrub({"text": text})
    assert outcome.row is None
    assert "language" in outcome.reason or "script" in outcome.reason


def test_another_language_without_rampart_is_held_back_and_code_and_secrets_are_not(scrub):
    [german, code] = scrub({"text": TEXTS["de"]}, {"text": "for i in range(3):\n    print(i)"})
    assert german.reason == "written in another language (de), which needs Rampart"
    assert code.row
    settings = Deid(rampart="off", profile="secrets-only")
    rows = [(1, "f:1", {"text": TEXTS["de"]}), (2, "f:2", {"text": TEXTS["pl"]})]
    assert all(o.row for o in scrub_chunk(rows, load_detector(settings), Replacer(settings, seed=0, key=KEY)))


def test_without_detection_every_record_is_read_as_the_language_of_the_file():
    settings = Deid(rampart="off", detect_language=False, entities=["EMAIL_ADDRESS"])
    rows = [(1, "f:1", {"text": "山田太郎 taro@tokyomail.org"}), (2, "f:2", {"text": TEXTS["pl"]})]
    first, second = scrub_chunk(rows, load_detector(settings), Replacer(settings, seed=0, key=KEY))
    assert first.row == {"text": "山田太郎 <EMAIL_ADDRESS>"}
    assert second.row == {"text": TEXTS["pl"]}


@needs_rampart
@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("Sehr geehrte Frau Wüstenhagen, Ihr Termin bei Dr. Ingo Paschke ist am 14. März. Mit freundlichen Grüßen\nHeiner", ["Wüstenhagen", "Paschke", "März", "Heiner"]),
        ("Bonjour Maëlle, le dossier de M. Hervé Castagnet est prêt depuis le 3 août. Merci, Odette", ["Maëlle", "Castagnet", "août", "Odette"]),
        ("Hola Maite, la cita con la Dra. Leonor Iturbe es el 3 de agosto. Un saludo, Chema", ["Maite", "Iturbe", "agosto", "Chema"]),
        ("Ciao Ginevra, l'appuntamento con il dott. Elio Fabbri è il 3 agosto. A presto, Nicoletta", ["Ginevra", "Fabbri", "agosto", "Nicoletta"]),
        ("Olá Matilde, a consulta com o Dr. Elói Falcato é no dia 3 de agosto. Abraço, Zélia", ["Matilde", "Falcato", "agosto", "Zélia"]),
        ("Beste Marieke, de afspraak met dr. Elco Veldhuis is op 3 augustus. Groetjes, Tjeerd", ["Marieke", "Veldhuis", "augustus", "Tjeerd"]),
    ],
)  # fmt: skip
def test_names_titles_and_months_of_six_languages_are_found(multilingual, text, gone):
    [outcome] = scrub_chunk([(1, "f:1", {"text": text})], *multilingual)
    assert not outcome.reason
    assert [value for value in gone if value in outcome.row["text"]] == []


@needs_rampart
@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("Gestern rief Herr Özkan von der Hausverwaltung an, die Heizung geht wieder.", "Gestern rief <PERSON> von der Hausverwaltung an, die Heizung geht wieder."),
        ("Notiz: Anruf von Hr. Kuhn wegen der Rechnung, bitte um Rückmeldung.", "Notiz: Anruf von <PERSON> wegen der Rechnung, bitte um Rückmeldung."),
        ("Zum Training kommen Ole, Mika und Merle, sagt unser Trainer Holger.", "Zum Training kommen <PERSON>, <PERSON> und <PERSON>, sagt unser Trainer <PERSON>."),
        ("Alles Gute, lieber Opa Karl! Deine Mathilda und dein Jonte", "Alles Gute, lieber <PERSON>! Deine <PERSON> und dein <PERSON>"),
        ("Mit Silke und ihrem Onkel Anton sprachen wir über den Garten.", "Mit <PERSON> und ihrem Onkel <PERSON> sprachen wir über den Garten."),
        ("Kommt Jens mit.\nFriederike bringt den Salat und das Brot.", "Kommt <PERSON> mit.\n<PERSON> bringt den Salat und das Brot."),
        ("Ha llamado el señor Ferrer del tejado y viene por la tarde.", "Ha llamado el <PERSON> del tejado y viene por la tarde."),
        ("Il tecnico Olindo dice che la caldaia è a posto.", "Il tecnico <PERSON> dice che la caldaia è a posto."),
        ("O técnico Estêvão diz que o Olavo e a Edite vêm amanhã.", "O técnico <PERSON> diz que o <PERSON> e a <PERSON> vêm amanhã."),
        ("Gisteren belde dhr. Özkan van de woningbouw over de verwarming.", "Gisteren belde <PERSON> van de woningbouw over de verwarming."),
        ("Vraag het anders aan Frits of aan Gonda van de receptie.", "Vraag het anders aan <PERSON> of aan <PERSON> van de receptie."),
        ("Antragsteller: Rüdiger Hahn, Anschrift: Birkenallee 12, 28195 Bremen, Familienstand: ledig", "Antragsteller: <PERSON>, Anschrift: <STREET_ADDRESS>, Familienstand: ledig"),
    ],
)  # fmt: skip
def test_a_name_ends_where_the_sentence_continues(multilingual, text, scrubbed):
    [outcome] = scrub_chunk([(1, "f:1", {"text": text})], *multilingual)
    assert outcome.row == {"text": scrubbed}


@needs_rampart
@pytest.mark.parametrize(
    "text",
    [
        "Frühling, Sommer, Herbst und Winter heißen die vier Jahreszeiten.",
        "Leichte Wanderung durch Heide und Moor, Einkehr in der Waldschänke.",
        "CERCO COINQUILINO PER BILOCALE, BALCONE, ANIMALI AMMESSI.",
        "Spätschicht und Nachtschicht beginnen heute eine Stunde früher.",
    ],
)
def test_nouns_with_a_capital_are_no_names(multilingual, text):
    [outcome] = scrub_chunk([(1, "f:1", {"text": text})], *multilingual)
    assert outcome.row == {"text": text}


STAMPED = [
    "2023-11-20 17:02 access for Mary Fisher denied, too many attempts",
    "2024-05-14T08:31:07.120Z WARN login of Mary Fisher failed",
    "[14/May/2024:09:05:44 +0200] Mary Fisher deleted the file",
    "May 14 09:05:44 host sshd: Mary Fisher logged out",
    "14.05.2024 09:02 Mary Fisher has signed the form",
    "[14/05/2024, 09:12] Mary Fisher: are you there?",
]


@pytest.mark.parametrize("text", STAMPED)
def test_the_time_stamp_of_a_log_line_stays_unless_dates_are_asked_for(text):
    for settings, gone in ((Deid(rampart="off"), False), (Deid(rampart="off", profile="strict"), True),
                           (Deid(rampart="off", operators={"DATE_TIME": "shift"}), True)):  # fmt: skip
        rows = [(1, "f:1", {"text": text})]
        [outcome] = scrub_chunk(rows, load_detector(settings), Replacer(settings, seed=0, key=KEY))
        assert outcome.row["text"].startswith(text[: text.index(" ", 12)]) is not gone
        assert "Mary" not in outcome.row["text"]


def test_a_date_that_is_no_stamp_goes(scrub):
    [outcome] = scrub({"text": "Date: 1993-01-04 14:56:41\nShe came on 2024-05-14 09:30 with Mary Fisher."})
    assert outcome.row["text"] == "Date: <DATE_TIME>\nShe came on <DATE_TIME> with <PERSON>."


@needs_rampart
@pytest.mark.parametrize("language", ["de", "fr", "es", "it", "pt", "nl"])
def test_a_text_without_anybody_stays(multilingual, language):
    [outcome] = scrub_chunk([(1, "f:1", {"text": TEXTS[language]})], *multilingual)
    assert outcome.row == {"text": TEXTS[language]}


@pytest.fixture(scope="module")
def multilingual():
    settings = Deid()
    return load_detector(settings), Replacer(settings, seed=0, key=KEY)


@pytest.mark.parametrize("language", sorted(set(READABLE) - {"en"}))
def test_each_language_has_titles_labels_and_months(language):
    found = {entry["supported_entity"] for entry in recognizers(language)}
    assert found == {"PERSON", "DATE_TIME", "PHONE_NUMBER", "STREET_ADDRESS", "ID_NUMBER"}
    assert recognizers("en") == []


@pytest.mark.parametrize(
    "text",
    [
        "Mrs. Ilona Szabó Apt. 112 17 Rue de la Marne 88\nVierzon WLG 95697",
        ">Joanna van den Broek\n>Thornton Group\n>22 Kerkhovenstraat 18\n>Suite 77\n>Sint Joris\n>Tonga 04169",
        "Ludwig von der Heide\n12 Elm Road\nSpringfield, IL 62704",
    ],
)
def test_an_address_is_written_in_no_language(scrub, text):
    assert language_of(text, "en") == "en"
    assert not scrub({"text": text})[0].reason


@pytest.mark.parametrize(
    "address",
    [
        "Via Garibaldi 7, 20121 Milano", "Corso Cavour, 45, 10123 Torino (TO)", "Piazza della Signoria 3/B, 50122 Firenze",
        "Calle de Alcalá, 45, 3º B, 28014 Madrid", "Avenida de América 5, 28002 Madrid", "12 rue de la Paix, 75002 Paris",
        "14 bis, rue Lamarck, 75018 Paris", "8 place Bellecour, 69002 Lyon", "Keizersgracht 123, 1015 CJ Amsterdam",
        "Prins Hendrikkade 33, 1012 TM Amsterdam", "Rua Augusta 45, 1100-053 Lisboa", "Lindenstraße 14, 10969 Berlin",
        "Lange Straße 12, 60311 Frankfurt am Main", "Unter den Linden 77, 10117 Berlin", "Bahnhofstrasse 9, CH-8001 Zürich",
    ],
)  # fmt: skip
def test_an_address_of_another_country_goes_whole_from_english_text(scrub, address):
    [outcome] = scrub({"text": f"Please ship the order to {address} before noon, and call first."})
    assert outcome.row == {"text": "Please ship the order to <STREET_ADDRESS> before noon, and call first."}
    [outcome] = scrub({"text": f"She lives at {address}."})
    assert outcome.row == {"text": "She lives at <STREET_ADDRESS>."}


@pytest.mark.parametrize(
    "text",
    [
        "I joined via Slack, 3 of us stayed.", "Figure 7, 1998 Edition, is wrong.", "Avenue 5 and Square 12 are levels of the game.",
        "Place 12 orders, then 3000 Units ship.", "I called via WhatsApp, 5 minutes only.",
    ],
)  # fmt: skip
def test_numbers_beside_capitals_are_no_address(scrub, text):
    assert scrub({"text": text})[0].row == {"text": text}


@needs_rampart
@pytest.mark.parametrize(
    "row",
    [
        {"vorname": "Momme", "nachname": "Quandt", "geburtsdatum": "3. Mai", "straße": "Am Deich"},
        {"prénom": "Odilon", "nom_de_famille": "Quenneville", "téléphone": "4471"},
        {"nombre": "Txema", "apellidos": "Ugarte Mas", "dirección": "Barrio Alto"},
        {"cognome": "Quartapelle", "indirizzo": "frazione Alta", "codice fiscale": "XX-18"},
        {"apelido": "Quadros", "morada": "Largo Novo", "telemóvel": "88 12"},
        {"voornaam": "Tjibbe", "achternaam": "Quist", "adres": "Dijkzicht", "geboortedatum": "3 mei"},
    ],
)
def test_fields_named_in_another_language_hold_what_their_name_says(multilingual, row):
    [outcome] = scrub_chunk([(1, "f:1", row)], *multilingual)
    assert [value for value in row.values() if value in outcome.row.values()] == []


@needs_rampart
def test_columns_headed_in_another_language_hold_people(multilingual):
    row = {"text": "achternaam;plaats\nQuist;aan zee\nTerpstraat;aan zee"}
    [outcome] = scrub_chunk([(1, "f:1", row)], *multilingual)
    assert outcome.row == {"text": "achternaam;plaats\n<PERSON>;aan zee\n<PERSON>;aan zee"}
