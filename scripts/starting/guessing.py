"""Guess which columns of a table are question, answer and the like: by their names in several languages, then by their texts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.dataset.columns import Row, is_missing, thumb_of

SHARE = 0.9  # of the cells of a column, which makes it one of a kind
WORDS_OF_TEXT = 3  # in the median cell of a column of texts

# Beginnings of words, without accents, that name a column. The first that occurs in a name counts: "Antwort auf Anfrage".
STEMS: dict[str, str] = {
    "chosen": "chosen better besser bevorzugt prefer accepted winner mejor elegid meilleur choisi migliore melhor",
    "rejected": "reject worse schlechter abgelehnt dispreferred loser peor rechazad pire peggiore pior",
    "answer": (
        "antwort reply replies respon answer respuesta contestacion repons rispost respost antwoord svar odpowied cevap "
        "ответ 回答 回复 答 답변 output completion ausgabe salida sortie uscita saida target ideal expected erwartet "
        "assistant summary zusammenfassung resumen resume riassunto resumo translation ubersetzung traduccion"
    ),
    "question": (
        "frage anfrage question query pregunta consulta solicitud demande domanda pergunta vraag pytanie soru вопрос "
        "问 質問 질문 prompt instruction anweisung aufgabe instruccion consigne istruzione instrucao request inquiry enquiry "
        "input eingabe entrada entree"
    ),
    "subject": "betreff subject asunto objet oggetto assunto onderwerp titel title titulo titre titolo thema topic",
    "label": "label thumb daumen rating bewertung feedback liked vote valoracion pulgar voto",
    # Who or what wrote to us; weaker than a word for a question.
    "message": (
        "message nachricht mensaje mensagem messaggio bericht e-mail email mail correo brief letter ticket kunde customer "
        "client cliente user received eingang eingegangen incoming erhalten recibid recu text texte texto testo source note notiz "
        "stichpunkt beschreibung description"
    ),
}
_WORDS = {kind: tuple(text.split()) for kind, text in STEMS.items()}
SIDES = {"q": "question", "a": "answer", "f": "question", "p": "question", "r": "answer"}  # as one letter of a header


@dataclass(frozen=True)
class Guess:
    """What the columns of a table probably are: our field for each, and whether their names say so.

    Where only one column holds texts, `document` names it; `title` is the column that tells the documents apart.
    """

    columns: dict[str, str] = field(default_factory=dict)
    sure: bool = True
    document: str | None = None
    title: str | None = None


def guess_columns(rows: Sequence[Row]) -> Guess | None:
    """Return what the columns of rows probably are; None where neither names nor texts tell."""
    cells = cells_of(rows)
    texts = [name for name, values in cells.items() if are_texts(values)]
    kinds = {name: kind_of(name) for name in cells}

    def named(kind: str, among: Iterable[str]) -> list[str]:
        return [name for name in among if kinds[name] == kind]

    chosen, rejected = named("chosen", texts), named("rejected", texts)
    thumbs = [name for name in named("label", cells) if all(thumb_of(value) is not None for value in cells[name])]
    subjects = named("subject", cells)
    if len(chosen) == len(rejected) == 1:
        question = _one(named("question", cells) or named("message", texts), cells) or _one(subjects, cells)
        return (
            Guess(_drop_missing({question: "prompt", chosen[0]: "chosen", rejected[0]: "rejected"}))
            if question
            else None
        )
    rest = [name for name in texts if name not in thumbs and name not in subjects]
    answer = _one(named("answer", cells), cells)
    question = _one(named("question", cells), cells) or _one([n for n in named("message", texts) if n != answer], cells)
    sure = answer is not None and question is not None
    others = [name for name in rest if name not in (answer, question)]
    unnamed = [name for name in others if kinds[name] is None] or others
    if answer and not question:
        question = unnamed[0] if len(unnamed) == 1 else _one(subjects, cells)
    elif question and not answer:
        labels = [name for name in cells if kinds[name] == "label" and name not in thumbs] or unnamed
        answer = labels[0] if len(labels) == 1 else None
    elif not answer and len(rest) == 2:
        question, answer = rest
    if answer is None or question is None:
        return _one_document(rest, cells, subjects)
    if len(thumbs) == 1:
        return Guess({question: "prompt", answer: "completion", thumbs[0]: "label"}, sure)
    subject = _one([name for name in subjects if name not in (question, answer)], cells)
    if subject:
        return Guess({subject: "instruction", question: "input", answer: "output"}, sure)
    return Guess({question: "instruction", answer: "output"}, sure)


def _one_document(texts: Sequence[str], cells: Mapping[str, list[Any]], subjects: Sequence[str]) -> Guess | None:
    """Return the one column of texts as documents without questions."""
    if len(texts) != 1:
        return None
    return Guess(document=texts[0], title=_one(subjects, cells), sure=False)


def cells_of(rows: Iterable[Row]) -> dict[str, list[Any]]:
    """Return the cells of each column that hold something, for columns that hold any."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            if not is_missing(value):
                found.setdefault(str(name), []).append(value)
    return found


def kind_of(name: str) -> str | None:
    """Return what a column's name says it is, by the stem that stands first in it."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name.casefold()) if not unicodedata.combining(c))
    if plain.strip() in SIDES:
        return SIDES[plain.strip()]
    places = {
        kind: min((found.start() for word in words if (found := re.search(_pattern(word), plain))), default=-1)
        for kind, words in _WORDS.items()
    }
    kinds = [kind for kind, place in places.items() if place >= 0]
    strong = [kind for kind in kinds if kind != "message"] or kinds
    return min(strong, key=lambda kind: places[kind], default=None)


def _pattern(word: str) -> str:
    """Short stems must begin a word; longer ones may stand inside, as German joins words."""
    return re.escape(word) if len(word) > 4 or not word.isascii() else rf"(?<![a-z]){re.escape(word)}"


def _one(names: Sequence[str], cells: Mapping[str, list[Any]]) -> str | None:
    """Return the column that says most, of several of one kind; the longest texts say most."""
    return max(names, key=lambda name: _median([len(str(value)) for value in cells[name]]), default=None)


def are_texts(values: Sequence[Any], words: int = WORDS_OF_TEXT) -> bool:
    """Tell whether cells are texts: letters in nearly all, and so many words in the middle one."""
    texts = [value for value in values if isinstance(value, str) and any(map(str.isalpha, value))]
    if len(texts) < SHARE * len(values):
        return False
    unspaced = any("\u3040" <= character <= "\u9fff" for text in texts[:20] for character in text)
    return unspaced or _median([len(text.split()) for text in texts]) >= words


def _median(numbers: Sequence[int]) -> int:
    return sorted(numbers)[len(numbers) // 2] if numbers else 0


def _drop_missing(columns: Mapping[str | None, str]) -> dict[str, str]:
    return {name: kind for name, kind in columns.items() if name is not None}
