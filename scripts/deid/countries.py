"""Numbers that states give to people: what they look like, the words beside them, and python-stdnum's check of each.

A number counts when its check digits are right and a label stands near. Some forms need no label: letters among the digits,
or the separators that only this number has.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from scripts.deid.spans import Span


class Number(NamedTuple):
    """One kind of number; `alone` is the part of its forms that needs no label."""

    country: str
    module: str  # of python-stdnum
    form: str
    labels: str
    alone: str = ""


_ANY = r"national (?:id|identity|identification)|identity (?:card|number|no|document)|\bid (?:card|number|no\b|nr)|personal (?:id|number|code)|tax (?:id|number|no\b|code|file)|taxpayer|social (?:security|insurance)|citizen"
_D9, _D10, _D11, _D12, _D13 = (rf"\d(?:[ .-]?\d){{{n - 1}}}" for n in (9, 10, 11, 12, 13))
NUMBERS = (
    Number("AR", "ar.cuit", r"\d{2}-?\d{8}-?\d", r"cui[tl]", r"\d{2}-\d{8}-\d"),
    Number("AT", "at.vnr", r"\d{4}[ -]?\d{6}", r"sozialversicherung|svnr|sv-nr|\bsv\b"),
    Number("AU", "au.tfn", r"\d{3} ?\d{3} ?\d{2,3}", r"tfn|tax file"),
    Number("AU", "au.abn", r"\d{2} ?\d{3} ?\d{3} ?\d{3}", r"\babn\b"),
    Number("BE", "be.nn", r"\d{2}\.?\d{2}\.?\d{2}-?\d{3}\.?\d{2}", r"rijksregister|registre national|\bniss\b|insz|national register", r"\d{2}\.\d{2}\.\d{2}-\d{3}\.\d{2}"),
    Number("BG", "bg.egn", r"\d{10}", r"\begn\b|egn"),
    Number("BR", "br.cpf", r"\d{3}\.?\d{3}\.?\d{3}-?\d{2}", r"\bcpf\b", r"\d{3}\.\d{3}\.\d{3}-\d{2}"),
    Number("BR", "br.cnpj", r"\d{2}\.?\d{3}\.?\d{3}/?\d{4}-?\d{2}", r"\bcnpj\b", r"\d{2}\.\d{3}\.\d{3}/\d{4}-\d{2}"),
    Number("CA", "ca.sin", r"\d{3}[ -]?\d{3}[ -]?\d{3}", r"\bsin\b|social insurance"),
    Number("CH", "ch.ssn", r"756[. ]?\d{4}[. ]?\d{4}[. ]?\d{2}", r"\bahv\b|\bavs\b|\bssn\b", r"756\.\d{4}\.\d{4}\.\d{2}|756\d{10}"),
    Number("CL", "cl.rut", r"\d{1,2}\.?\d{3}\.?\d{3}-?[\dkK]", r"\bru[tn]\b", r"\d{1,2}\.\d{3}\.\d{3}-[\dkK]"),
    Number("CN", "cn.ric", r"\d{17}[\dxX]", r"resident", r"\d{17}[\dxX]"),
    Number("CO", "co.nit", r"\d{3}\.?\d{3}\.?\d{3}-?\d", r"\bnit\b"),
    Number("CZ", "cz.rc", r"\d{6}/?\d{3,4}", r"rodn[eé]|birth number|\brc\b", r"\d{6}/\d{4}"),
    Number("DE", "de.idnr", r"\d{2} ?\d{3} ?\d{3} ?\d{3}", r"steuer|idnr|tax"),
    Number("DK", "dk.cpr", r"\d{6}[- ]?\d{4}", r"\bcpr\b|personnummer"),
    Number("EE", "ee.ik", r"[1-6]\d{10}", r"isikukood"),
    Number("ES", "es.dni", r"\d{8}[- ]?[A-Za-z]", r"\bdni\b|\bnif\b", r"\d{8}-?[A-Z]"),
    Number("ES", "es.nie", r"[XYZxyz][- ]?\d{7}[- ]?[A-Za-z]", r"\bnie\b", r"[XYZ]-?\d{7}-?[A-Z]"),
    Number("ES", "es.cif", r"[A-HJNP-SUVW][- ]?\d{7}[- ]?[0-9A-J]", r"\bcif\b"),
    Number("FI", "fi.hetu", r"\d{6}[-+A-FU-Y]\d{3}[0-9A-Z]", r"hetu|henkil", r"\d{6}[-+A-FU-Y]\d{3}[0-9A-Z]"),
    Number("FR", "fr.nir", r"[12] ?\d{2} ?\d{2} ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}", r"\bnir\b|s[eé]curit[eé] sociale|\binsee\b", r"[12] ?\d{2} ?[0-9]{2} ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}"),
    Number("FR", "fr.siret", r"\d{3} ?\d{3} ?\d{3} ?\d{5}", r"siret"),
    Number("GB", "gb.utr", r"\d{5} ?\d{5}", r"\butr\b|taxpayer reference"),
    Number("GR", "gr.amka", r"\d{11}", r"amka|αμκα"),
    Number("HR", "hr.oib", r"\d{11}", r"\boib\b"),
    Number("IE", "ie.pps", r"\d{7}[A-Wa-w][A-IWa-iw]?", r"\bpps", r"\d{7}[A-W][A-IW]?"),
    Number("IL", "il.idnr", r"\d{9}", r"teudat|israel"),
    Number("IN", "in_.aadhaar", r"[2-9]\d{3}[ -]?\d{4}[ -]?\d{4}", r"aadhaar|uidai"),
    Number("IN", "in_.pan", r"[A-Z]{5}\d{4}[A-Z]", r"\bpan\b|permanent account", r"[A-Z]{5}\d{4}[A-Z]"),
    Number("IS", "is_.kennitala", r"\d{6}-?\d{4}", r"kennitala|\bkt\b"),
    Number("IT", "it.codicefiscale", r"[A-Za-z]{6}\d{2}[A-Za-z]\d{2}[A-Za-z]\d{3}[A-Za-z]", r"codice fiscale|c\.?f\.?", r"[A-Za-z]{6}\d{2}[A-Za-z]\d{2}[A-Za-z]\d{3}[A-Za-z]"),
    Number("IT", "it.iva", r"\d{11}", r"partita iva|p\.? ?iva|vat"),
    Number("JP", "jp.in_", r"\d{4}[ -]?\d{4}[ -]?\d{4}", r"my number|individual number|マイナンバー"),
    Number("KR", "kr.rrn", r"\d{6}-?\d{7}", r"\brrn\b|resident registration", r"\d{6}-\d{7}"),
    Number("LT", "lt.asmens", r"[1-6]\d{10}", r"asmens"),
    Number("LV", "lv.pvn", r"\d{6}-?\d{5}", r"personas kod", r"\d{6}-\d{5}"),
    Number("MX", "mx.curp", r"[A-Za-z]{4}\d{6}[HMhm][A-Za-z]{5}[0-9A-Za-z]\d", r"curp", r"[A-Z]{4}\d{6}[HM][A-Z]{5}[0-9A-Z]\d"),
    Number("MX", "mx.rfc", r"[A-ZÑ&]{4}\d{6}[0-9A-Z]{3}", r"\brfc\b", r"[A-ZÑ&]{4}\d{6}[0-9A-Z]{3}"),
    Number("NL", "nl.bsn", r"\d{4}[. ]?\d{2}[. ]?\d{3}|\d{3}[ .]\d{3}[ .]\d{3}", r"\bbsn\b|burgerservice|sofi"),
    Number("NO", "no.fodselsnummer", r"\d{6} ?\d{5}", r"f[øo]dselsn|personnummer"),
    Number("NZ", "nz.ird", r"\d{2,3}[- ]?\d{3}[- ]?\d{3}", r"\bird\b"),
    Number("PL", "pl.pesel", r"\d{11}", r"pesel"),
    Number("PL", "pl.nip", r"\d{3}-?\d{3}-?\d{2}-?\d{2}", r"\bnip\b"),
    Number("PT", "pt.nif", r"\d{3} ?\d{3} ?\d{3}", r"\bnif\b|contribuinte"),
    Number("PT", "pt.cc", r"\d{8} ?\d ?[A-Z0-9]{2}\d", r"cart[aã]o de cidad[aã]o|\bcc\b", r"\d{8} \d [A-Z]{2}\d"),
    Number("RO", "ro.cnp", r"[1-9]\d{12}", r"\bcnp\b|cod numeric"),
    Number("SE", "se.personnummer", r"(?:\d{2})?\d{6}[-+]?\d{4}", r"personnummer|samordning", r"(?:\d{2})?\d{6}[-+]\d{4}"),
    Number("SI", "si.emso", r"\d{13}", r"em[šs]o"),
    Number("SK", "sk.rc", r"\d{6}/?\d{4}", r"rodn[eé]", r"\d{6}/\d{4}"),
    Number("TH", "th.pin", r"\d-?\d{4}-?\d{5}-?\d{2}-?\d", r"thai", r"\d-\d{4}-\d{5}-\d{2}-\d"),
    Number("TR", "tr.tckimlik", r"[1-9]\d{10}", r"kimlik|\btc\b|\bt\.c\."),
    Number("ZA", "za.idnr", r"\d{6} ?\d{4} ?\d{3}", r"south african?|\brsa\b|\bsa id\b"),
)  # fmt: skip
COUNTRIES = tuple(sorted({number.country for number in NUMBERS}))
_ENOUGH = re.compile(r"\d(?:\D{0,2}\d){3}")


def find_country_numbers(text: str, countries: Sequence[str]) -> list[Span]:
    """Return the numbers of some countries that are valid, by their own form or by a label before them."""
    return [*_valid(text, countries)] if _ENOUGH.search(text) else []


def _valid(text: str, countries: Sequence[str]) -> Iterator[Span]:
    for number in NUMBERS:
        if number.country not in countries:
            continue
        form, labels, alone = _patterns(number)
        for match in form.finditer(text):
            before = text[max(0, match.start() - 45) : match.start()]
            if (labels.search(before) or (alone and alone.fullmatch(match[0]))) and _check(number.module)(match[0]):
                yield Span(*match.span(), "ID_NUMBER", 1.0)


@cache
def _patterns(number: Number) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str] | None]:
    form = re.compile(rf"(?<![\w.-])(?:{number.form})(?![\w]|[.,-]\d)")
    return form, re.compile(f"(?i){number.labels}|{_ANY}"), re.compile(number.alone) if number.alone else None


@cache
def _check(module: str) -> Any:
    return importlib.import_module(f"stdnum.{module}").is_valid
