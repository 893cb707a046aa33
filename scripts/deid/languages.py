"""Say which language a record is written in, so that it is read by rules of that language or held back.

py3langid guesses, and the function words of spaCy's lists must agree: names, addresses and code look like any language.
"""

from __future__ import annotations

import importlib
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from scripts.deid.spans import TAG
from scripts.deid.words import words

# What Rampart's model was trained on. Their records are switched to; those in other languages are held back.
READABLE = ("en", "de", "fr", "es", "it", "pt", "nl")
MIN_LETTERS = 20  # a shorter text is taken for the language of its file
_SURE, _CERTAIN, _NEIGHBOUR = 0.9, 0.999, 0.3
_WORD = re.compile(r"[^\W\d_]+")
# Letters and endings of words that no English word has.
_FOREIGN = re.compile(
    r"(?<!\w)[a-zß-öø-ÿœ]*[ß-öø-ÿœ][a-zß-öø-ÿœ]+(?!\w)|\b[^\W\d_]{4,}(?:ungen|schaft|keit|heit|nummer|zione|zioni|mento)\b|[¿¡]"
)
_NOT_PROSE = re.compile(
    r"https?://\S+|\S*[?&=/]\w+=\S*|\S+@\S+|```.*?(?:```|\Z)|^[ \t]*(?:def|return|const)\b[^\n]*[(){}=+][^\n]*$"
    r"|\d+[/-][A-Z][a-z]{2}[/-]\d+",
    re.S | re.M,
)
# Labels that are English words of another sense.
_ENGLISH = frozenset({"handy", "portable", "mobile", "me"})
# An entry of languages.yaml is made of these: a choice, letters to choose from, a letter; and each may be left out.
_PART = re.compile(r"(?:\(\?:([^()]*)\)|\[([^\]]*)\]|(\\?.))(\??)")
# The kinds of languages.yaml whose words speak for a language.
_SPOKEN = (
    "title", "elders", "name", "parties", "date", "phone", "address", "id", "greeting", "farewell", "called", "days", "people", "kin", "fields",
)  # fmt: skip
# Languages of other scripts; every other language is taken to use Latin letters.
_SCRIPTS = {
    "ru": "CYRILLIC", "uk": "CYRILLIC", "bg": "CYRILLIC", "sr": "CYRILLIC", "mk": "CYRILLIC", "be": "CYRILLIC", "el": "GREEK",
    "he": "HEBREW", "ar": "ARABIC", "fa": "ARABIC", "ur": "ARABIC", "hi": "DEVANAGARI", "mr": "DEVANAGARI", "ne": "DEVANAGARI",
    "bn": "BENGALI", "ta": "TAMIL", "te": "TELUGU", "th": "THAI", "ko": "HANGUL", "ka": "GEORGIAN", "hy": "ARMENIAN", "zh": "CJK", "ja": "CJK",
}  # fmt: skip


def language_of(text: str, expected: str) -> str:
    """Return the code of the language of a text; `expected` where it is too short or holds no prose."""
    prose = TAG.sub(" ", _NOT_PROSE.sub(" ", text))
    if sum(character.isalpha() for character in prose) < MIN_LETTERS:
        return expected
    scores = dict(_identifier().rank(prose[:4000]))
    top = max(scores.values())
    weights = {code: math.exp(score - top) for code, score in scores.items()}
    best: str = max(weights, key=lambda code: weights[code])
    sure = weights[best] / sum(weights.values())
    # zxx is no language, such as code.
    if best not in (*READABLE, expected, "zxx") and sure >= _SURE and _agrees(prose, best, expected, sure):
        return best
    readable = [code for code in READABLE if weights.get(code, 0.0) > 0]
    total = sum(weights[code] for code in {*readable, expected} & weights.keys())
    # Neighbours such as Spanish and Portuguese are told apart by their function words.
    near = [code for code in readable if code != expected and weights[code] >= _NEIGHBOUR * total]
    for code in sorted(near, key=lambda code: -weights[code]):
        share = weights[code] / total
        foreign = share >= _SURE or weights.get(expected, 0.0) < (1 - _CERTAIN) * total
        if foreign and _agrees(prose, code, expected, share):
            return code
    return expected


def majority(texts: Iterable[str], expected: str) -> str:
    """Return the language of most texts that are long enough to tell, where it is one that can be read."""
    counts = Counter(
        language_of(text, expected) for text in texts if sum(character.isalpha() for character in text) >= MIN_LETTERS
    )
    language, count = counts.most_common(1)[0] if counts else (expected, 0)
    return language if language in READABLE and 2 * count > counts.total() else expected


def foreign_words(text: str, language: str) -> bool:
    """Say whether a text holds words in a script that its language does not use. A single Greek letter is a symbol, not a word."""
    own = {"LATIN", _SCRIPTS.get(language, "LATIN")}
    count = 0
    for word in () if text.isascii() else _WORD.findall(text):
        foreign = sum(_script(character) not in own for character in word if character.isalpha())
        count += foreign if len(word) > 1 or _script(word) == "CJK" else 0
    return count >= 3


def _agrees(prose: str, language: str, expected: str, share: float) -> bool:
    """Say whether function words and labels speak for a language and not for the expected one."""
    prose = prose.lower() if prose.isupper() else prose
    ours, theirs = function_words(expected), function_words(language)
    found = Counter(match[0].casefold() for match in _WORD.finditer(_within_names().sub(" ", prose)))
    against = sum(count for word, count in found.items() if word in ours - theirs - _labels(language))
    speaking = [word for word in found if len(word) > 1 and word in theirs - ours]
    if expected == "en" and language in READABLE:
        for word in {match[0].casefold() for match in _FOREIGN.finditer(prose)} - {*speaking}:
            speaking.append(word)
            found[word] = max(found[word], 1)
    small = sum(len(word) > 2 for word in set(re.findall(r"(?<![\w.(])[^\W\d_A-Z]+(?![\w.(=])", prose)))
    if (
        language not in READABLE and not theirs
    ):  # nobody listed its words: none of a language that can be read may be there
        return small >= 8 and not any(word in function_words(code) for code in READABLE for word in found)
    if language not in READABLE:
        return len(speaking) > 1 and len(speaking) > against
    if not speaking:
        running = len(set(re.findall(r"(?<!\S)[^\W\d_A-Z]+(?![^\s.,:;!?])", prose)))  # of a sentence and not of a table
        return not against and (small >= 4 or (running >= 3 and share > 0.9999)) and share > _CERTAIN
    return sum(found[word] for word in speaking) > against and (len(speaking) > 1 or not against)


@cache
def _within_names() -> re.Pattern[str]:
    """Return a pattern of the small words that lead up to a capital, as `de la Sarthe` and `van den Berg`."""
    small = "|".join(sorted(map(re.escape, words("particles")), key=len, reverse=True))
    return re.compile(rf"\b(?:(?:{small})[ ])+(?=[^\W\d_a-zß-öø-ÿ])")


@cache
def vocabulary(language: str) -> dict[str, str]:
    """Return the words of a language that lead to personal data, as alternatives of a regular expression by kind.

    Of a language that is not listed, nothing matches.
    """
    kinds = _vocabularies().get(language, {})
    return _Vocabulary({kind: text.replace(",", "|") for kind, text in kinds.items()})


class _Vocabulary(dict[str, str]):
    def __missing__(self, kind: str) -> str:
        return "(?!)"


def recognizers(language: str) -> list[dict[str, Any]]:
    """Return recognizers in Presidio's format that read the titles, labels and months of a language."""
    lead = vocabulary(language)
    if not lead:
        return []
    word = r"(?-i:\p{Lu}(?!\p{Lu}+\b)[\p{L}'’-]+)"
    capitals = r"(?-i:\p{Lu}{2,}(?:[ ]\p{Lu}{2,})?)"
    name = rf"{word}(?:[ ](?:(?-i:\p{{Lu}}\.)|(?:d[aeio]s?|del|della|van(?: de[rn]?)?|von(?: de[rm])?|de la|ten|ter|zu|y|e)(?=[ ])|{word})){{0,3}}"
    titles = f"{lead['title']}|{lead['elders']}"
    end = r"(?=\s*(?:$|[\n,.;]))"
    kinds = {
        "PERSON": [
            ("title", rf"\b(?:{titles})[ ](?:(?:{titles})[ ])*(?:{name}|{capitals})", 0.85),
            ("label", rf"\b(?:{lead['name']}|{lead['parties']})[ ]?:[ ]*\K{name}", 0.8),
            ("greeting", rf"(?:^|\n)\s*(?:{lead['greeting']})[ ]\K(?!Grü|Kund|Gäste|Team|Kolleg|collègues|clients?\b|clientes?\b|tutti\b|todos\b){name}(?=[ ]*(?:$|[\n,.!:]))", 0.7),
            ("farewell", rf"\b(?:{lead['farewell']})[,.!]?\s+\K(?:{name}|{capitals}){end}", 0.7),
            ("relative", rf"\b(?:{lead['kin']}),?[ ]\K{name}", 0.6),
            ("rota", rf"\b(?:{lead['days']})[ ]\K{name}(?=[ ]*(?:$|[\n,;]))", 0.6),
            ("list", rf"(?<=\b(?:{lead['people']})[ ]?:[^.\n]{{0,120}})(?<=[:,;][ ]){name}(?=[ ]*(?:[,.;(]|$))", 0.6),
            ("called", rf"\b(?:{lead['called']})[ ]\K{name}", 0.7),
            ("yours", rf"(?-i:\b(?:{lead['yours']}))[ ]\K{name}(?=[ ]*(?:$|[\n,.;]|(?:en|et|y|e)[ ](?-i:\p{{Lu}})))", 0.7),
        ],
        "DATE_TIME": [
            ("day and month", rf"\b\d{{1,2}}(?:\.|er|º|°)?[ ](?:de[ ])?(?:{lead['months']})\b(?:\.?,?[ ](?:de[ ])?(?:19|20)\d\d\b)?", 0.8),
            ("label", rf"\b(?:{lead['date']})\W{{0,3}}\K\d{{1,2}}[./-]\d{{1,2}}[./-](?:\d{{4}}|\d\d)\b", 0.9),
        ],
        "PHONE_NUMBER": [("label", rf"\b(?:{lead['phone']})\W{{0,4}}\K\+?\(?\d[\d ()./-]{{5,20}}\d\b", 0.75)],
        "STREET_ADDRESS": [("label", rf"\b(?:{lead['address']})[ ]?:[ ]*\K(?=[^\n]*\d)(?:(?!,[ ]\p{{L}}[\p{{L}} ]{{2,24}}:)[^\n;|]){{5,100}}", 0.75)],
        "ID_NUMBER": [("label", rf"\b(?:{lead['id']})\b\W{{0,3}}(?:(?:ist|est|es|è|é|is)[ ])?\K(?=[A-Z]*[ -]?\d)[A-Z0-9](?:[ .\-/]?[A-Z0-9]){{4,24}}\b", 0.85)],
    }  # fmt: skip
    return [
        {"name": f"{language}: {entity}", "supported_entity": entity, "supported_language": language,
         "patterns": [{"name": title, "regex": regex, "score": score} for title, regex, score in patterns]}
        for entity, patterns in kinds.items()
    ]  # fmt: skip


@cache
def function_words(language: str) -> frozenset[str]:
    """Return the words that a language is built with, and its greetings, titles and labels."""
    try:
        listed = frozenset(importlib.import_module(f"spacy.lang.{language}.stop_words").STOP_WORDS)
    except (ModuleNotFoundError, AttributeError):
        return frozenset()
    return listed | _own_words(language)


@cache
def _labels(language: str) -> frozenset[str]:
    """Return the words that head the fields of a form in a language, those that it shares with others too."""
    return _words_of(language, ("name", "parties", "phone", "address", "fields"), 3)


@cache
def no_name(language: str) -> re.Pattern[str]:
    """Return a pattern of what heads a form or a list and is no part of a name or an address: `Rechnungsnummer`, `Betreff`."""
    fields = vocabulary(language)["fields"]
    return re.compile(
        rf"(?i)(?:{fields}|[^\W\d_]+(?:nummer|nr\.?|datum|betrag|termin|zeit|schicht|liste|lijst|auftrag|abteilung|verwaltung|gruppe|dienst))(?!\w)"
    )


@cache
def _own_words(language: str) -> frozenset[str]:
    """Return the greetings, titles and labels that only this language has."""
    others = (_words_of(code, _SPOKEN, 4) for code in _vocabularies() if code != language)
    return _words_of(language, _SPOKEN, 4).difference(words("everyday"), words("labels"), *others)


@cache
def labels(kind: str) -> frozenset[str]:
    """Return how the fields of a kind are called in any language, without spaces and marks."""
    entries = [entry for kinds in _vocabularies().values() for entry in kinds[kind].split(",")]
    return frozenset(re.sub(r"[\W_]", "", form) for entry in entries for form in _forms(entry)) - _ENGLISH


@cache
def _words_of(language: str, kinds: tuple[str, ...], shortest: int) -> frozenset[str]:
    """Return the words of so many letters or more in the entries of some kinds."""
    entries = [entry for kind in kinds for entry in _vocabularies().get(language, {}).get(kind, "").split(",")]
    forms = " ".join(form for entry in entries for form in _forms(entry))
    return frozenset(re.findall(rf"[^\W\d_]{{{shortest},}}", forms))


def _forms(entry: str) -> Iterator[str]:
    """Yield what an entry of languages.yaml stands for: `dr\\.`, `hij[oa]`, `patient(?:in)?`."""
    parts = [
        [*(group.split("|") if group else letters or [letter.lstrip("\\")]), *([""] if optional else [])]
        for group, letters, letter, optional in _PART.findall(entry)
    ]
    return map("".join, itertools.product(*parts))


@cache
def months_of(language: str) -> re.Pattern[str]:
    """Return a pattern of the months of a language."""
    return re.compile(rf"(?i)\b(?:{vocabulary(language)['months']})\b")


@cache
def leads_to_name(language: str) -> re.Pattern[str]:
    """Return a pattern that ends where a name begins: after a greeting, a title or a relative."""
    lead = vocabulary(language)
    kinds = "|".join(lead[kind] for kind in ("greeting", "title", "elders", "my", "called", "farewell", "ask"))
    return re.compile(rf"(?i)(?<!\w)(?:{kinds})[,:]?\s{{1,2}}$")


@cache
def _vocabularies() -> dict[str, dict[str, str]]:
    return dict(yaml.safe_load(Path(__file__).with_name("languages.yaml").read_text(encoding="utf-8")))


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)  # it carries its model and reaches for no network


@cache
def _script(character: str) -> str:
    name = unicodedata.name(character, "").split(" ")[0]
    return (
        "CJK"
        if name in ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")
        else "LATIN"
        if name in ("FULLWIDTH", "FEMININE", "MASCULINE", "MODIFIER", "MICRO")
        else name
    )
