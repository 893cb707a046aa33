"""Which findings are no personal data: calculations, code, formulas, placeholders, and companies and countries by themselves."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache

from scripts.deid.languages import leads_to_name, months_of
from scripts.deid.names import CUE, INTRODUCTION, SURE, TITLE, WORDS, is_name, is_part_of_name, local_names
from scripts.deid.spans import TAG, Span
from scripts.deid.words import words

NAMES = frozenset({"PERSON", "LOCATION", "ORGANIZATION", "NRP"})
# What calculations are taken for. A card, an IBAN or an e-mail address is none.
NUMBERS = frozenset({
    "PHONE_NUMBER", "DATE_TIME", "STREET_ADDRESS", "ZIP_CODE", "AGE", "ID_NUMBER", "LOCATION", "ORGANIZATION", "PERSON", "US_SSN",
    "US_NPI", "UK_NHS", "US_ITIN", "VEHICLE_ID", "DEVICE_ID", "IP_ADDRESS", "CREDIT_CARD", "US_PASSPORT", "MEDICAL_LICENSE",
})  # fmt: skip
_OPERATOR = re.compile(
    r"\d\s?[*=^×÷·<>]\s?[\d(.-]|\d\s?[+]\s?[\d(]|\d [-−–] \d|\d\s?/\s?\d|\d\s?%|[)\d]\s?=|=\s?[(\d]|[a-z]\s?=\s?-?\d"
)
_BESIDE = re.compile(r"\.\d|\s?[*=^×÷·/+%<>]|\s[-−–]\s?[\d(]|\s?\)\s?[*/+=^-]")
_BEFORE = re.compile(r"[*=^×÷·/%<>(]\s?$|\d\s?\+\s?$|[\d)]\s[-−–]\s?$|\\$")
_UNIT = re.compile(
    r"(?i)[ -]?(?:square|cubic|sq\.?)? ?(?:feet|foot|ft|miles?|yards?|inch(?:es)?|met(?:er|re)s?|cm|mm|km|kg|grams?|lbs?|pounds?|ounces?|oz|lit(?:er|re)s?|gallons?|acres?|hectares?"
    r"|dollars?|cents?|euros?|percent|degrees?|hours?|minutes?|seconds?|days?|weeks?|months?|square|cubic|watts?|volts?|calories|points?|pages?|people|pieces?|tickets?|bottles?|hz|khz|mph|kph|rpm)\b"
)
_CAPITALISED = re.compile(r"\b[^\W\d_a-zß-öø-ÿ][a-zß-öø-ÿ]")
_PLAIN_WORDS = re.compile(r"[^\W\d_]+(?:[\s'’-]+[^\W\d_]+)*")
# What a name in small letters that is on no list must score. Below these, most of what Rampart takes for one is a word.
_LED_TO, _SURE = 0.7, 0.9
_UNSURE_NOUN = 0.8
_ARTICLE = re.compile(
    r"(?i)\b(?:im|ins|am|ans|zum|zur|beim|vom|aufs|das|des|ein|eine[mnrs]?|keine?|jede[mnrs]?|diese[mnrs]?) \Z"
)
_WITHIN = re.compile(r"[^\W\d_],? $")
_NOUN_END = re.compile(r"(?:ung|heit|keit|schaft|tion|tät|ismus|ment|nis|ling|zeug|werk|stelle)(?:en|e|s|se|sen)?$")
_DIALLED = re.compile(r"\(?\d{3}\)?[-. ]\d{3}[-.]\d{4}")
_HEALTH = re.compile(r"(?i)\b(?:nhs|health|chi|patient)\b")
_MONTH_NAME = re.compile(
    r"(?:\d{1,2} )?(?:Jan|Feb|Mar|Apr|April|May|Jun|June|Jul|July|Aug|August|Sep|Sept|Oct|Nov|Dec)"
)
_DAY_AND_MONTH = re.compile(r"(?:0[1-9]|[12]\d|3[01])/(?:0[1-9]|[12]\d|3[01])|(?:1[89]|20)\d\d")
# The date and the time of day that open a line: when a system or a chat wrote it.
_STAMP = re.compile(
    r"(?m)^[\s>*(\[<\"']{0,6}(?:\d{1,3}[.)] )?(?:(?:\d{4}[-./]\d\d?[-./]\d\d?|\d\d?[-./]\d\d?[-./](?:\d{4}|\d\d)|\d\d?[ /-][A-Z][a-z]{2}[ /-]\d{4}"
    r"|(?:[A-Z][a-z]{2} )?[A-Z][a-z]{2} [ \d]\d(?= \d\d:))[ ,T:]{1,2}(?:- )?)\d\d?:\d\d(?::\d\d)?(?:[.,]\d{1,9})?(?: ?[AaPp][Mm]\b)?"
    r"(?: ?(?:Z|UTC|GMT|CES?T|[+-]\d\d:?\d\d)\b)?(?: \d{4}\b)?"
)
_DATE_CUE = re.compile(
    r"(?i)\b(?:on|by|until|till|since|before|after|due|date|dob|born|from|of|dated?|exp(?:ires?)?|valid|visit|seen)\b\W{0,3}$"
)
# What a number after it counts, so that no street begins there.
_COUNTED = re.compile(
    r"(?i)(?:^|\W)(?:pages?|houses?|figures?|fig|tables?|chapters?|sections?|lines?|steps?|days?|weeks?|bus|gate|port|divide|add|subtract|multiply|rows?|questions?|exercises?|problems?|level|grade)\.? \d"
)
_NARRATOR = re.compile(r"(?i)\b(?:i|my|me|we|our|us|you|your)\b")
_SUM = re.compile(r"\d\s?[*^×÷]\s?[\d(]|\d\s?\+\s?\d|\d [-−–] \d|[\d)%]\s?=\s?[-(\d]")
_ERRAND = re.compile(r"@|\b(?:card|account|order|transfer|patient|phone)\b")
_DATE_WORD = re.compile(
    r"(?i)\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\b|\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b|\d:\d\d|\b\d{1,4}[/.-]\d{1,2}[/.-]\d{2,4}\b"
)
_MATHS = re.compile(
    r"(?i)\bhow (?:many|much|old|far|long|tall|fast)\b|\bwhat(?:'s| is| was| will be)(?: the)? (?:sum|total|average|difference|product|probability|area|perimeter|value|ratio|median|mean)\b"
    r"|\b(?:solve|calculate|evaluate|simplify|twice as|times as|in total|altogether|equation|(?:number|the) (?:pattern|sequence|series)|(?:next|missing) (?:number|term)|multiples? of \d"
    r"|divisible by|common (?:difference|ratio|factor|multiple)|what will (?:be )?\w+(?:['’]s)? age)\b|<<[^<>]*>>"
)
_CODE_LINE = re.compile(
    r"^\s*(?:(?:async\s+)?(?:def|class|function|func|fn)\s+\w|(?:from\s+[\w.]+\s+)?import\s+[\w{*]|(?:const|let|var|val|public|private|protected|static|final|package|using|namespace|#include|struct|enum)\b\s?\S"
    r"|(?:if|for|while|switch|catch|elif|with|match)\b.*[:{]\s*$|for \w+(?:, ?\w+)? in .*:|(?:return|raise|throw|await|yield|assert|print|echo|export|else|try|end|fi|done|pass|break)\b[\s(:;]?.*$"
    r"|@\w[\w.]*(?:\(.*\))?\s*$|[\w.\[\]'\"-]+\s?(?:[-+*/|&]?=|:=|=>|<-)\s?\S.*|[\w.]+\(.*\)[;,]?\s*$|[})\]]+[;,)]*\s*$|.*[;{]\s*$|\$ \S|[ \t]*(?:\w+\s?:\s?\w+[\w\[\], |]*(?:\s?=\s?.+)?),?$"
    r"|(?i:(?:select|insert into|update|delete from|create|alter|drop|where|group by|order by|values)\b.*))"
)
_STRONG_CODE = re.compile(
    r"\b(?:def|import|const|let|class|function|func|public|return|SELECT|INSERT|CREATE|ALTER|UPDATE)\b|=>|==|\+=|->|\(\)|\{$|;$|self\.|\w\(\w*\)\.|^\s*@\w+",
    re.M,
)
_LITERAL = re.compile(
    r"\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|`[^`\n]*`|(?:#|//|--|/\*|\*)\s[^\n]*|<!--[^\n]*|^\s*(?:>|\"\"\"|''')[^\n]*",
    re.M,
)
_FENCE = re.compile(r"```[\w+-]*\n(.*?)(?:```|\Z)", re.S)
_FORMULA = re.compile(
    r"\$\$.+?\$\$|(?<![\w$\\])\$(?=[^\s$])[^$\n]{0,200}?(?<=[^\s$\\])\$(?!\w)|\\\(.+?\\\)|\\\[.+?\\\]|\\begin\{(equation|align|gather|math|displaymath)\*?\}.+?\\end\{\1\*?\}",
    re.S,
)
_MONEY = re.compile(r"\$\d")
_DECORATOR = re.compile(r"(?m)^[ \t]*@[A-Za-z_][\w.]*(?:\(.*\))?[ \t]*(?=$)")
_DOC_TAG = re.compile(
    r"@(?:param|returns?|throws?|author|see|since|version|type|deprecated|override|media|import|keyframes|font-face|apply|include|property|dataclass|staticmethod|classmethod|abstractmethod|test|types?/|angular/|babel/|vue/)\b"
)
_IDENTIFIER = re.compile(
    r"^[$@]?\w*_\w*$|[a-z]\w*\.[a-z]\w*|\w\(|[=<>{}$\\^~]|^[a-z]+[A-Z]\w*$|^\w+\[|^[A-Z]+\d+$|::|^\.|\.\w{1,4}$(?<=[a-z])(?<!\s\w)(?<!^[A-Z]\.)"
)
_TOUCHING = re.compile(r"[_(=\[]|\.[a-z]\w*[\[(,)\s]|\.[a-z]\w*$|::|\s?=[=>\s]")
_JSON_KEY = re.compile(r"\"(?:[^\"\\]|\\.){0,200}\"\s*:")
_PLACEHOLDER_HOST = re.compile(
    r"(?i)(?:^|@|//)(?:(?:www|api|docs|app|my|your)\.)?(?:example|domain|yourdomain|mydomain|yoursite|mysite|your-?company|yourapp|test|email)\.(?:com|org|net|io|edu)(?=$|[/:?#])"
)
_PLACEHOLDER_USER = re.compile(
    r"(?i)^(?:you|your?[._-]?\w*|user\d*|username|name|firstname|first\.last|info|test\d*|foo|bar|someone|somebody|me|mail|email|e-mail|example|no-?reply|admin|hello|support|contact|abc|xyz|alice|bob)@"
)
_BRACES = re.compile(
    r"\{\{[^{}\n]*\}\}|\$\{[^{}\n]*\}|\{%[^\n]*?%\}|\{[a-z_]+\}|<(?:your|my|the|first|last|full|user|e?mail|name|address|date|insert|phone|id|token|key|password)[a-z_ -]*>|%\([a-z_]+\)s|\[(?:YOUR|INSERT|FIRST|LAST|NAME|ADDRESS|DATE)[A-Z _-]*\]"
)
_LOCAL = re.compile(r"^(?:127\.\d+\.\d+\.\d+|0\.0\.0\.0|255\.255\.255\.\d+|::1|::|localhost)$")
_NUMBER_LABEL = re.compile(
    r"(?i)\b(?:phone|tel|telephone|mobile|cell|fax|ext|extension|durchwahl|poste|interno|ramal|toestel|call|ring|text|sms|whatsapp|contact|reach|dial|number|num|no|nr|id|account|acct|passport|licen[cs]e|policy|claim|case|member|patient"
    r"|customer|ssn|sin|nhs|npi|mrn|tax|zip|post\w*|ref\w*|serial|imei|routing|iban|card)\b|#"
)
_RESIDENCE = re.compile(
    r"(?i)\b(?:i|he|she|we|they|who|friend|mother|father|brother|sister|wife|husband|son|daughter|family|grew|native)\b[^.!?\n]{0,40}\b(?:from|live[sd]?|living|moved|born|resid\w+|based|native|grew up|settled|arriv\w+|flew|moving|visited)\b"
    r"|\b(?:live[sd]? in|living in|born in|resid\w+ (?:in|of)|originally from|native of|based in|grew up in|moved (?:here|from|to)|arrived (?:at|from|in))\b|\b(?:i'm|i am|we're|we are) (?:in|from|at)\b|\b(?:works?|worked|working|employed|hired) (?:at|for|by)\b|\b(?:to visit|visited|coming to|a trip to)\b"
)


@cache
def countries() -> frozenset[str]:
    """Return the names of countries and continents in small letters."""
    from faker.providers.address.en import Provider

    return words("countries") | {name.casefold() for name in Provider.countries}


def named_by_context(text: str, span: Span) -> Span:
    """Give a number that is valid as two kinds the one that its form and its label say: a phone number is no British health number."""
    dialled = span.entity == "UK_NHS" and _DIALLED.fullmatch(text, span.start, span.end)
    if dialled and not _HEALTH.search(text, max(0, span.start - 50), span.start):
        return span._replace(entity="PHONE_NUMBER")
    return span


class Doubts:
    """What a text consists of, worked out once, so that each finding in it can be judged."""

    def __init__(self, text: str, language: str = "en", *, any_date: bool = False, stamps: bool = True) -> None:
        self.text, self.language, self.any_date = text, language, any_date
        self.stamps = _Ranges([] if stamps else [match.span() for match in _STAMP.finditer(text)])
        self.capitals = bool(_CAPITALISED.search(text))
        self.maths = len(_SUM.findall(text)) >= 2 or (bool(_MATHS.search(text)) and not _ERRAND.search(text))
        self.story = self.maths and not _NARRATOR.search(text)
        closed = [match.span() for match in _FORMULA.finditer(text) if not _MONEY.match(match[0])]
        closed += [match.span() for match in _BRACES.finditer(text)]
        self.keys = _Ranges([match.span() for match in _JSON_KEY.finditer(text)] if _is_json(text) else [])
        self.closed = _Ranges(closed)
        self.code = _Ranges(_code(text))

    def reject(self, span: Span) -> bool:
        """Say whether a finding is something else than it was taken for."""
        surface = self.text[span.start : span.end]
        if span.entity == "SECRET":
            return False
        if span.entity in ("DATE_TIME", "PHONE_NUMBER") and self.stamps.hold(span):
            return True
        if self.closed.hold(span) or (
            span.entity in ("PHONE_NUMBER", "ID_NUMBER")
            and sum(c.isdigit() for c in surface) < 7
            and _is_bare(self.text, span)
        ):
            return True
        # A score this high means a checksum or an unmistakable label.
        if (
            span.entity in NUMBERS
            and (span.score < 0.95 or (self.maths and _is_bare(self.text, span)))
            and any(c.isdigit() for c in surface)
            and self._calculation(span, surface)
        ):
            return True
        if self.language == "de" and span.entity in ("PERSON", "LOCATION") and self._noun(span, surface):
            return True
        if span.entity in NAMES and (
            self._in_date(span, surface)
            or self.code.hold(span)
            or self.keys.hold(span)
            or self._everyday(span, surface)
            or self._identifier(span, surface)
        ):
            return True
        if span.entity == "HANDLE":
            line = self.text[self.text.rfind("\n", 0, span.start) + 1 :]
            return bool(
                _DOC_TAG.match(surface) or (_DECORATOR.match(line) and "\n" in self.text) or self.code.hold(span)
            )
        if span.entity in ("URL", "EMAIL_ADDRESS"):
            # Rampart also reports pieces of addresses, which the patterns find whole.
            return _is_placeholder_address(span.entity, surface) or not re.search(
                r"@|\bat\b|%40" if span.entity == "EMAIL_ADDRESS" else r"\.", surface
            )
        return span.entity == "IP_ADDRESS" and bool(_LOCAL.match(surface))

    def _everyday(self, span: Span, surface: str) -> bool:
        """Say whether a name in small letters is more likely a word: it is on no list of names, and nothing leads to it.

        An author who writes no capitals at all writes names so too.
        """
        if not surface.islower() or not _PLAIN_WORDS.fullmatch(surface):
            return False
        before = max(0, span.start - 24)
        if self.language != "en":
            led = leads_to_name(self.language).search(self.text, before, span.start)
            listed = any(map(is_part_of_name, re.findall(r"[^\W\d_]{2,}", surface)))
            return self.capitals and span.score < (_SURE if listed else SURE) and not led
        if INTRODUCTION.search(self.text, before, span.start) or _speaks(self.text, span):
            return False
        if surface in WORDS or not self.capitals:
            return surface in WORDS and (self.capitals or not CUE.search(self.text, before, span.start))
        if span.entity != "PERSON":
            return span.entity == "ORGANIZATION" or span.score < _SURE
        parts = re.findall(r"[^\W\d_]+", surface)
        if TITLE.match(surface) or is_name(parts[0]) or (any(map(is_name, parts)) and all(map(is_part_of_name, parts))):
            return False
        return span.score < (_LED_TO if CUE.search(self.text, before, span.start) else _SURE)

    def _noun(self, span: Span, surface: str) -> bool:
        """Say whether a single German word is a noun, which has a capital as names do: on no list, and within a sentence or with
        the ending of one.
        """
        if not re.fullmatch(r"[^\W\d_]+", surface) or span.score >= SURE:
            return False
        article = _ARTICLE.search(self.text, max(0, span.start - 10), span.start)
        if span.entity == "LOCATION":
            return bool(article) and span.score < _SURE
        if leads_to_name("de").search(self.text, max(0, span.start - 24), span.start):
            return False
        if is_part_of_name(surface) and not (
            span.score < _UNSURE_NOUN and (article or surface.casefold() not in local_names("de"))
        ):
            return False
        within = surface[0].isupper() and _WITHIN.search(self.text, max(0, span.start - 3), span.start)
        return bool(_NOUN_END.search(surface) or within or article)

    def _in_date(self, span: Span, surface: str) -> bool:
        """Say whether a name is the month of a date: 30 Jan, 2-Jun-1930."""
        return bool(
            _MONTH_NAME.fullmatch(surface)
            and (
                re.search(r"\d[ .-]$", self.text[max(0, span.start - 2) : span.start])
                or re.match(r"[. -]{1,2}\d", self.text[span.end :][:3])
            )
        )

    def _calculation(self, span: Span, surface: str) -> bool:
        after, before = self.text[span.end : span.end + 24], self.text[max(0, span.start - 12) : span.start]
        if span.entity in ("LOCATION", "ORGANIZATION", "PERSON"):
            return self.maths or not re.search(r"[^\W\d_]{3}", surface)
        if span.entity == "DATE_TIME":
            if "=" not in surface and (_DATE_WORD.search(surface) or months_of(self.language).search(surface)):
                return self.story and not re.search(r"\d{4}", surface)
            if self.any_date and not self.maths and _DAY_AND_MONTH.fullmatch(surface):
                return False
            return not _DATE_CUE.search(before) or bool(_BESIDE.match(after))
        if re.match(r",\d{3}(?!\d)", after) or (
            span.entity == "STREET_ADDRESS" and _COUNTED.search(before + surface[:12])
        ):
            return True
        if surface[:1] == "+" and not re.search(r"\d\s?$", before):
            return False
        letters = re.search(r"[A-Za-z]{3}", surface)
        if _OPERATOR.search(surface) and not (letters and span.entity == "STREET_ADDRESS"):
            return True
        if (_BESIDE.match(after) and not re.match(r"\s?[/+>]", after) and not letters) or (
            _BEFORE.search(before) and not re.search(r"[=/(<>]\s?$", before) and not letters
        ):
            return True
        if _UNIT.match(after) and span.entity != "AGE" and re.search(r"\d\s?$", surface):
            return True
        if span.entity == "STREET_ADDRESS" and re.search(r"\d\s(?:square|sq|cubic)\.?$", surface):
            return True
        if self.maths and span.entity in (
            "AGE",
            "ZIP_CODE",
            "PHONE_NUMBER",
            "ID_NUMBER",
            "STREET_ADDRESS",
            "UK_NHS",
            "US_NPI",
        ):
            return (
                not (letters and span.entity == "STREET_ADDRESS")
                and not re.search(
                    r"(?i)(?:phone|tel|mobile|call|number|zip|id|no\.?|mrn|nhs|npi|account)\W{0,3}$", before
                )
                and len(re.sub(r"\D", "", surface)) < 11
            )
        return False

    def _identifier(self, span: Span, surface: str) -> bool:
        after = self.text[span.end : span.end + 12]
        if _IDENTIFIER.search(surface) and not re.search(r"[^\W_]+ [A-Z][a-z]|%20|&\w+;|\w\+\w", surface):
            return not (
                span.entity == "PERSON"
                and re.fullmatch(r"[a-z]+[_.][a-z]+\d{0,2}|(?:[A-Z]\.\s?)+\w+|[A-Za-z]+_", surface)
                and _speaks(self.text, span)
            )
        return (bool(_TOUCHING.match(after)) and " " not in surface and not surface.endswith(".")) or self.text[
            max(0, span.start - 1) : span.start
        ] in ("_", "$", "\\", "#")


def _speaks(text: str, span: Span) -> bool:
    """Say whether a finding stands where a speaker or a user stands, not a variable."""
    return bool(re.match(r":\s|>", text[span.end : span.end + 2]))


def _is_placeholder_address(entity: str, surface: str) -> bool:
    if entity == "EMAIL_ADDRESS":
        return bool(_PLACEHOLDER_HOST.search(surface) and _PLACEHOLDER_USER.match(surface))
    return bool(_PLACEHOLDER_HOST.search(surface)) and "@" not in surface and "%40" not in surface


def _is_json(text: str) -> bool:
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class _Ranges:
    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.ranges = sorted(ranges)
        self.starts = [start for start, _ in self.ranges]

    def hold(self, span: Span) -> bool:
        """Say whether a span lies within one of the ranges."""
        index = bisect_right(self.starts, span.start) - 1
        return index >= 0 and span.end <= self.ranges[index][1]


def _code(text: str) -> list[tuple[int, int]]:
    """Return the stretches of code, without the strings and comments in it, where people may be named."""
    blocks = [match.span(1) for match in _FENCE.finditer(text)]
    lines = [(m.start(), m.end()) for m in re.finditer(r"[^\n]+", text) if m[0].strip()]
    looks = sum(bool(_CODE_LINE.match(text[start:end])) for start, end in lines)
    if lines and looks >= 0.6 * len(lines) and _STRONG_CODE.search(text):
        blocks = [(0, len(text))]
    found: list[tuple[int, int]] = []
    for start, end in blocks:
        position = start
        for match in _LITERAL.finditer(text, start, end):
            found.append((position, match.start()))
            position = match.end()
        found.append((position, end))
    return [(start, end) for start, end in found if start < end]


def impersonal(text: str, spans: Sequence[Span]) -> list[Span]:
    """Return the spans without places, firms, figures of history, days and bare numbers where nobody else is near.

    A place counts beside a person, or where somebody is said to live or come from there.
    """
    public = [span for span in spans if span.entity == "PERSON" and _plain(text, span) in words("figures")]
    private = [span for span in spans if not any(one.start <= span.start and span.end <= one.end for one in public)]
    labelled = [span for span in private if span.score >= 0.95 or not _is_bare(text, span)]
    if any(span.entity in PERSONAL for span in labelled) or any(
        tag[0][1:].startswith(tuple(PERSONAL)) for tag in TAG.finditer(text)
    ):
        return list(spans)
    lives = _RESIDENCE.search(text)
    kept = []
    for span in labelled:
        word = _plain(text, span)
        if span.entity in ("LOCATION", "ORGANIZATION", "NRP"):
            if lives and not (span.entity == "ORGANIZATION" and word in words("companies")):
                kept.append(span)
        elif span.entity != "DATE_TIME" or re.search(r"\d{4}|\d\D\d+\D\d", word):
            kept.append(span)
    return kept


def _is_bare(text: str, span: Span) -> bool:
    """Say whether a number has neither a label before it nor a form of its own, so that it may count anything."""
    if span.entity not in ("PHONE_NUMBER", "ID_NUMBER", "ZIP_CODE", "UK_NHS", "US_NPI", "US_SSN", "DEVICE_ID"):
        return False
    plain = re.fullmatch(r"[\d\s,.]+", text[span.start : span.end])
    return bool(plain) and not _NUMBER_LABEL.search(text, max(0, span.start - 50), span.start)


def _plain(text: str, span: Span) -> str:
    return text[span.start : span.end].casefold().strip(" .,'\"’").removesuffix("'s").removesuffix("’s")


PERSONAL = frozenset(
    {
        "PERSON",
        "EMAIL_ADDRESS",
        "PHONE_NUMBER",
        "STREET_ADDRESS",
        "US_SSN",
        "ID_NUMBER",
        "CREDIT_CARD",
        "IBAN_CODE",
        "HANDLE",
    }
)
