"""Finished documents and chat logs become records: a prompt for each document, turns for each conversation."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError, not_utf8
from scripts.dataset.columns import ASSISTANT, SPEAKERS, SYSTEM, USER, Row
from scripts.starting.asking import Asker, say
from scripts.starting.guessing import are_texts, cells_of, kind_of
from scripts.training.advice import language_of

ENDINGS = (".txt", ".md", ".markdown", ".text", ".log")
SEPARATOR = re.compile(r"^[ \t]*(?:-{3,}|={3,}|\*{3,}|_{3,}|\f)[ \t]*$", re.MULTILINE)
TITLE_WORDS, BEGINNING_WORDS = 12, 8
# How a prompt asks for a document, in the language of the documents.
TEMPLATES = {
    "English": ('Write the text "{title}".', 'Write the text that begins with "{beginning}".'),
    "German": ("Schreibe den Text „{title}“.", "Schreibe den Text, der mit „{beginning}“ beginnt."),
    "French": ("Écris le texte « {title} ».", "Écris le texte qui commence par « {beginning} »."),
    "Spanish": ("Escribe el texto «{title}».", "Escribe el texto que empieza con «{beginning}»."),
    "Italian": ("Scrivi il testo «{title}».", "Scrivi il testo che inizia con «{beginning}»."),
    "Portuguese": ("Escreve o texto «{title}».", "Escreve o texto que começa com «{beginning}»."),
    "Dutch": ("Schrijf de tekst „{title}”.", "Schrijf de tekst die begint met „{beginning}”."),
}


@dataclass(frozen=True)
class Document:
    """One finished text, and what tells it from the others."""

    text: str
    title: str | None

    @property
    def beginning(self) -> str:
        """Return its first words."""
        return " ".join(self.text.split()[:BEGINNING_WORDS])


def read_text_file(path: Path) -> str:
    """Read a file of text.

    Raises: UserError where it is not UTF-8 or holds nothing.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    if not text.strip():
        raise UserError(f"{path}: the file holds no text. Name a file with documents or a conversation.")
    return text


# --- documents


def split_documents(text: str) -> list[Document]:
    """Part a file into its documents: at lines of dashes, else at Markdown's headings of the first level, else not at all."""
    parts = [part.strip() for part in SEPARATOR.split(text)]
    if len([part for part in parts if part]) < 2:
        parts = [part.strip() for part in re.split(r"^(?=# )", text, flags=re.MULTILINE)]
    return [Document(part, title_of(part)) for part in parts if part]


def title_of(text: str) -> str | None:
    """Return a document's first line where it is a heading or as short as one."""
    line, _, rest = text.strip().partition("\n")
    title = re.sub(r"^#+\s*|\s*#+$|^\*\*|\*\*$", "", line.strip())
    short = len(title.split()) <= TITLE_WORDS and rest.strip() and title[-1:] not in ".,;"
    return title if title and (line.startswith("#") or short) else None


def write_prompts(documents: Sequence[Document], asker: Asker) -> list[dict[str, Any]]:
    """Return a record for each document, with a prompt made from a template that the user confirms.

    Raises: UserError where a template would give all documents one prompt: they could not be split.
    """
    titled = len({document.title for document in documents if document.title}) >= 0.8 * len(documents)
    languages = Counter(language_of(document.text) for document in documents)
    templates = TEMPLATES.get(languages.most_common(1)[0][0] or "", TEMPLATES["English"])
    say(
        f"  {len(documents)} finished documents without questions. Each needs a prompt, and the model will answer prompts of that "
        f"kind. {{title}} is a document's title, {{beginning}} its first {BEGINNING_WORDS} words."
    )
    template = asker.ask("  prompt template?", templates[0 if titled else 1])
    rows = [
        {
            "instruction": template.replace("{title}", document.title or document.beginning).replace(
                "{beginning}", document.beginning
            ),
            "output": document.text,
        }
        for document in documents
    ]
    different = len({row["instruction"] for row in rows})
    if different < 2:
        raise UserError(
            f"the template {template!r} gives {len(rows)} documents one prompt, and records with one prompt stay on one side "
            "of the split. Put {title} or {beginning} into it; several documents in one file are parted by lines of ---."
        )
    return rows


# --- conversations

# A date or time that programs write before the speaker.
STAMP = r"\[?\d{1,4}[./-]\d{1,2}[./-]\d{1,4},?(?:[ T]\d{1,2}[:.]\d{2}(?:[:.]\d{2})?(?:\s?[ap]\.?m\.?)?)?\]?|\[?\d{1,2}:\d{2}(?::\d{2})?\]?"
LINE = re.compile(rf"^[\u200e\ufeff]?(?:(?P<stamp>{STAMP})[ \t]*[-–:]?[ \t]*)?(?P<speaker>[^\W\d_][^:\n|]{{0,39}}?)[ \t]*:(?=\s|$)[ \t]*(?P<text>.*)$", re.IGNORECASE)  # fmt: skip
STAMPED = re.compile(rf"^[\u200e\ufeff]?(?P<stamp>{STAMP})(?P<text>.*)$", re.IGNORECASE)
MOST_SPEAKERS = 6


@dataclass(frozen=True)
class Message:
    """What somebody says in a log; `place` changes where a new conversation begins."""

    speaker: str
    text: str
    place: str


@dataclass(frozen=True)
class Log:
    """A chat log: its messages in order, and the lines of the program that kept it, such as "Anna joined"."""

    messages: list[Message]
    notices: int

    @property
    def speakers(self) -> list[str]:
        """Name the speakers in the order in which they first speak."""
        return list(dict.fromkeys(message.speaker for message in self.messages))


def read_log(text: str) -> Log | None:
    """Read a chat log; None for any other text, whose lines do not begin with a few speakers in turn."""
    lines = text.split("\n")
    spoken = [match for line in lines if (match := LINE.match(line))]
    counts = Counter(match["speaker"].strip() for match in spoken)
    stamped = sum(match["stamp"] is not None for match in spoken) > len(spoken) / 2
    # A speaker speaks again and again; `Note: ` in a document does not.
    speakers = {
        name for name, count in counts.items() if count >= max(2, len(spoken) // 20) or (stamped and count >= 2)
    }
    if not 2 <= len(speakers) <= MOST_SPEAKERS or sum(counts[name] for name in speakers) < 0.8 * len(spoken):
        return None
    filled = [line for line in lines if line.strip()]
    first = next(
        (number for number, line in enumerate(filled) if (m := LINE.match(line)) and m["speaker"].strip() in speakers),
        None,
    )
    # A messenger's log may begin with notices, another one begins with somebody who speaks.
    if first is None or first > (5 if stamped else 0) or len(spoken) < 4:
        return None
    messages: list[Message] = []
    block, notices, day = 0, 0, ""
    blank = False
    for line in lines:
        if SEPARATOR.match(line):
            block += 1
            blank = False
            continue
        if not line.strip():
            blank = True
            continue
        match = LINE.match(line)
        if match and match["speaker"].strip() in speakers:
            name = match["speaker"].strip()
            # Behind a blank line who opened the block speaks again: a new conversation, unless the log has dates for that.
            if blank and not stamped and messages and name == messages[0].speaker and messages[-1].speaker != name:
                block += 1
            day = _day(match["stamp"]) or day
            messages.append(Message(name, match["text"].strip(), f"{block} {day}"))
        elif (stamped and STAMPED.match(line)) or not messages:
            notices += 1
        else:
            last = messages[-1]
            gap = "\n\n" if blank else "\n"
            messages[-1] = Message(last.speaker, f"{last.text}{gap}{line.rstrip()}".strip(), last.place)
        blank = False
    return Log([message for message in messages if message.text], notices)


def _day(stamp: str | None) -> str | None:
    found = re.search(r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}", stamp or "")
    return found[0] if found else None


def write_conversations(log: Log, asker: Asker, path: Path) -> list[dict[str, Any]]:
    """Return a record for each conversation of a log, once it is known whose answers the model learns."""
    names = log.speakers
    model = _model_speaker(names)
    if model is None:
        if len(names) > 2 and asker.assume:
            raise UserError(
                f"{path}: a chat log with {len(names)} speakers ({', '.join(names)}); whose answers the model should learn, "
                "only you know. Start it again without --yes."
            )
        model = asker.choose("  whose answers should the model learn?", names, names[1])
    say(
        f"  a chat log: the model learns what {model} writes; {', '.join(name for name in names if name != model)} asks"
    )
    rows = [{"messages": turns} for turns in _conversations(log, model)]
    if len(rows) == 1 and len(rows[0]["messages"]) > 2:
        # One conversation could not be split into sides: each exchange becomes a record.
        turns = rows[0]["messages"]
        rows = [{"messages": turns[at : at + 2]} for at in range(0, len(turns) - 1, 2)]
        say("  it is one conversation, so each question with its answer becomes a record, without what was said before")
    if not rows:
        raise UserError(f"{path}: {model} never answers anybody in this log. Start again and choose another speaker.")
    if log.notices:
        say(f"  {log.notices} lines of the log have no speaker and are left out")
    left = len(log.messages) - sum(1 for _ in _used(log, model))
    if left:
        say(f"  {left} messages are left out: nobody asked before them, or nobody answered")
    return rows


def _model_speaker(names: Sequence[str]) -> str | None:
    """Return the speaker whose name says that it answers."""
    said = [name for name in names if SPEAKERS.get(name.casefold()) == ASSISTANT or kind_of(name) == "answer"]
    said = said or [
        name
        for name in names
        if re.search(r"\b(agent|support|service|team|advis[eo]r|berater\w*|bot)\b", name, re.IGNORECASE)
    ]
    return said[0] if len(said) == 1 else None


def _used(log: Log, model: str) -> Iterator[Message]:
    """Yield the messages that stand between the first question and the last answer of their conversation."""
    for place in dict.fromkeys(message.place for message in log.messages):
        talk = [message for message in log.messages if message.place == place]
        start = next((n for n, message in enumerate(talk) if message.speaker != model), len(talk))
        end = max((n for n, message in enumerate(talk) if message.speaker == model), default=-1)
        yield from talk[start : end + 1]


def _conversations(log: Log, model: str) -> Iterator[list[dict[str, str]]]:
    used = list(_used(log, model))
    for place in dict.fromkeys(message.place for message in used):
        turns: list[dict[str, str]] = []
        for message in (message for message in used if message.place == place):
            role = ASSISTANT if message.speaker == model else USER
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += f"\n{message.text}"
            else:
                turns.append({"role": role, "content": message.text})
        yield turns


def conversations_in(rows: Sequence[Row]) -> list[list[dict[str, str]]] | None:
    """Return the conversations of a table with a message in each row; None where no column says who speaks.

    A column whose values repeat row after row tells conversations apart; without one, each question begins another.
    """
    cells = cells_of(rows)
    speaker = next((name for name, values in cells.items() if len(values) == len(rows) and _are_speakers(values)), None)
    if speaker is None:
        return None
    texts = [
        name for name, values in cells.items() if name != speaker and len(values) == len(rows) and are_texts(values, 1)
    ]
    text = max(texts, key=lambda name: sum(len(str(value)) for value in cells[name]), default=None)
    if text is None:
        return None
    others = [name for name, values in cells.items() if name not in (speaker, text) and len(values) == len(rows)]
    repeats = {name: sum(left == right for left, right in pairwise(map(str, cells[name]))) for name in others}
    thread = next(
        (name for name in others if repeats[name] >= len(rows) / 4 and len({*map(str, cells[name])}) > 1), None
    )
    say(
        f"  a message in each row: {speaker} speaks, {text} is what is said"
        + (f", {thread} tells conversations apart" if thread else "")
    )
    if left_out := [name for name in cells if name not in (speaker, text, thread)]:
        say(f"  not used: {', '.join(left_out)}")
    found: dict[str, list[dict[str, str]]] = {}
    number = 0
    before = ""
    for row in rows:
        role = SPEAKERS[str(row[speaker]).strip().casefold()]
        number += role != ASSISTANT and before == ASSISTANT
        before = role
        found.setdefault(str(row[thread]) if thread else str(number), []).append(
            {"role": role, "content": str(row[text])}
        )
    return list(found.values())


def _are_speakers(values: Sequence[Any]) -> bool:
    return {SPEAKERS.get(str(value).strip().casefold()) for value in values} in (
        {USER, ASSISTANT},
        {USER, ASSISTANT, SYSTEM},
    )


# What stands before a turn where one text holds question and answer, as "### Instruction:" or "Human:".
TURN_NAMES = "|".join(
    [*SPEAKERS, "instruction", "input", "response", "output", "question", "answer", "q", "a", "frage", "antwort", "pregunta", "respuesta"]
)  # fmt: skip
TURN = re.compile(
    rf"^(?:#{{2,4}}[ \t]*(?P<headed>{TURN_NAMES})[ \t]*:?|(?P<said>{TURN_NAMES})[ \t]*:)", re.IGNORECASE | re.MULTILINE
)
INST = re.compile(r"\s*(?:<s>)?\s*\[INST\](?P<question>.*?)\[/INST\](?P<answer>.*?)(?:</s>)?\s*", re.DOTALL)


def turns_in(text: str) -> list[dict[str, str]] | None:
    """Return the turns of a text that holds question and answer behind the usual words; None for any other text."""
    if found := INST.fullmatch(text):
        return [
            {"role": USER, "content": found["question"].strip()},
            {"role": ASSISTANT, "content": found["answer"].strip()},
        ]
    marks = list(TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        return None
    turns: list[dict[str, str]] = []
    for mark, end in zip(marks, [*(mark.start() for mark in marks[1:]), len(text)], strict=True):
        name = (mark["headed"] or mark["said"]).casefold()
        role = SPEAKERS.get(name) or (ASSISTANT if kind_of(name) == "answer" else USER)
        content = text[mark.end() : end].strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = "\n\n".join(part for part in (turns[-1]["content"], content) if part)
        else:
            turns.append({"role": role, "content": content})
    return turns if {turn["role"] for turn in turns} >= {USER, ASSISTANT} else None


# --- the file of records


def write_records(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write records to a new file; one that is there already must hold the same.

    Raises: UserError where another file would be overwritten.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(
            f"{path}: is there already with other records, and nothing is overwritten. Move it away."
        ) from None
    say(f"  written: {path}, {len(rows)} records to look at")
