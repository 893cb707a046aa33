"""Files as people have them are read as they mean them; no cell is lost without a word."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.common.errors import UserError
from scripts.starting.asking import Asker
from scripts.starting.sources import Source, better_answers_of, look_at
from tests.conftest import write_jsonl
from tests.support.emails import HEADER, as_csv, emails

NOBODY = Asker(assume=True)


def look(path: Path, *more: Path, asker: Asker = NOBODY) -> Source:
    """Look at files of which one source is made."""
    (source,) = look_at([str(path), *map(str, more)], asker, path.parent / "records", "mine")
    return source


def turns(source: Source, number: int = 0) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in source.file.records[number].messages]


# --- tables

HEADERS = {
    "German": ("Kundenanfrage", "Unsere Antwort"), "Spanish": ("Pregunta del cliente", "Respuesta"), "French": ("Demande", "Réponse"),
    "Italian": ("Domanda", "Risposta"), "Portuguese": ("Pergunta", "Resposta"), "Dutch": ("Vraag", "Antwoord"),
    "Chinese": ("问题", "回答"), "capital letters": ("CUSTOMER MAIL", "OUR REPLY"), "one letter": ("Q", "A"), "an answer to a question": ("Eingang", "Antwort auf Anfrage"),
}  # fmt: skip


@pytest.mark.parametrize("language", HEADERS)
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_are_found_by_names_of_any_language(tmp_path: Path, language: str, separator: str) -> None:
    question, answer = HEADERS[language]
    rows = [(row[3], row[0], row[2]) for row in emails(9)]
    path = tmp_path / ("mine.tsv" if separator == "\t" else "mine.csv")
    path.write_bytes(as_csv((answer, "Nr", question), rows, separator))

    source = look(path)

    assert turns(source) == [("user", rows[0][2]), ("assistant", rows[0][0])]
    assert source.file.unused == ("Nr",)


def test_a_subject_stands_before_the_message(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(
        as_csv(("Asunto", "Mensaje", "Respuesta"), [("Luz", f"No hay luz, {n}", "Ya va un técnico") for n in range(5)])
    )

    assert turns(look(path))[0] == ("user", "Luz\n\nNo hay luz, 0")


def test_rows_without_an_answer_are_named_with_their_line(tmp_path: Path, capsys: Any) -> None:
    rows = [(*row[:3], "" if number in (3, 7) else row[3], row[4]) for number, row in enumerate(emails(12))]
    path = tmp_path / "mine.csv"
    path.write_bytes(as_csv(HEADER, rows))

    source = look(path)

    assert len(source.file.records) == 10
    assert "Unsere Antwort: is empty" in capsys.readouterr().out or [row.source for row in source.file.bad_rows]


NAMED = {
    "question": ["Frage", "Pregunta", "Customer question", "QUERY text", "demande"],
    "answer": ["Antwort", "Respuesta", "Our reply", "RÉPONSE", "risposta"],
}
OTHERS = ["Nr", "Datum", "id", "Kategorie", "Region", "Bearbeiter", "Fecha", "País", "status", "column 9"]
CELL = st.text(st.characters(codec="utf-8", categories=("Lu", "Ll", "Nd", "Lo")), min_size=1, max_size=12)


@st.composite
def tables(draw: Any) -> tuple[list[str], list[dict[str, str]], str, str]:
    """Draw a table: columns shuffled, renamed and added, with gaps."""
    question, answer = (draw(st.sampled_from(NAMED[kind])) for kind in ("question", "answer"))
    others = draw(st.lists(st.sampled_from(OTHERS), unique=True, max_size=4))
    header = draw(st.permutations([question, answer, *others]))
    rows = [
        {name: " ".join(draw(st.lists(CELL, min_size=3, max_size=5))) if name in (question, answer) else draw(st.one_of(st.just(""), CELL)) for name in header}
        for _ in range(draw(st.integers(2, 4)))
    ]  # fmt: skip
    if draw(st.booleans()):
        rows[-1][answer] = ""
    return list(header), rows, question, answer


@given(tables(), st.sampled_from([",", ";", "\t", "jsonl"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_cell_is_lost_without_a_word(table: tuple[list[str], list[dict[str, str]], str, str], form: str) -> None:
    header, rows, question, answer = table
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as shown:
        if form == "jsonl":
            path = write_jsonl(Path(folder) / "mine.jsonl", rows)
        else:
            path = Path(folder) / "mine.csv"
            path.write_bytes(as_csv(tuple(header), [tuple(row[name] for name in header) for row in rows], form))
        if not any(row[question].strip() and row[answer].strip() for row in rows):
            return
        source = look(path)
    assert len(source.file.records) + len(source.file.bad_rows) == len(rows)
    said = [row.row for row in source.file.bad_rows]
    used = iter(source.file.records)
    for row in rows:
        if row in said:
            assert not row[answer].strip() or not row[question].strip()
            continue
        record = next(used)
        assert row[question] in record.messages[0]["content"]
        assert record.answer == row[answer]
        for name in header:
            if row[name].strip() and name not in (question, answer):
                assert name in source.file.unused or row[name] in record.messages[0]["content"]
    assert all(f"{name}" in shown.getvalue() for name in source.file.unused)


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be short."}]])
def test_a_prompt_that_almost_agrees_with_the_answers_is_taken_from_them(tmp_path: Path, system: list[Any]) -> None:
    rows = [
        {"prompt": f"q {n}"} | {side: [*system, {"role": "user", "content": f"q {n} "}, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
        for n in range(6)
    ]  # fmt: skip

    source = look(write_jsonl(tmp_path / "mine.jsonl", rows))

    assert source.dataset.columns == {"prompt": None}
    assert [message["content"] for message in source.file.records[1].prompt] == [
        *(m["content"] for m in system),
        "q 1 ",
    ]
    better = better_answers_of(source)
    assert better
    assert [record.prompt for record in better.file.records] == [record.prompt for record in source.file.records]


def test_two_columns_of_texts_whose_names_say_nothing_are_shown_to_be_checked(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(as_csv(("eins", "zwei"), [(row[2], row[3]) for row in emails(6)]))

    source = look(path)

    assert turns(source)[1] == ("assistant", emails(1)[0][3])
    assert "eins → question, zwei → answer; is that right? (yes, no) yes  (assumed: --yes)" in capsys.readouterr().out


def test_somebody_who_is_asked_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(as_csv(("eins", "zwei"), [(row[3], row[2]) for row in emails(6)]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\nzwei\neins\n"))

    assert turns(look(path, asker=Asker(assume=False)))[1] == ("assistant", emails(1)[0][3])


def test_nobody_to_ask_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(as_csv(("eins", "zwei"), [(row[3], row[2]) for row in emails(6)]))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))

    with pytest.raises(UserError, match="add --yes"):
        look(path, asker=Asker(assume=False))


def test_columns_that_nobody_can_guess_are_refused_with_their_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(as_csv(("a1", "b1", "c1"), [(row[2], row[3], row[3][::-1]) for row in emails(6)]))

    with pytest.raises(UserError, match="found a1, b1, c1") as caught:
        look(path)
    assert "without --yes" in str(caught.value)


# --- stages

STAGES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "ShareGPT": ("sft", [{"conversations": [{"from": "human", "value": f"q {n}"}, {"from": "gpt", "value": "a"}]} for n in range(5)]),
    "two messages of one speaker": ("sft", [{"messages": [{"role": r, "content": f"{r} {n}"} for r in ("user", "user", "assistant")]} for n in range(5)]),
    "preferences": ("dpo", [{"prompt": f"q {n}", "chosen": "good one", "rejected": "bad one"} for n in range(5)]),
    "preferences with a question of another name": ("dpo", [{"Frage": f"was ist {n} denn", "chosen": "sehr gut so", "rejected": "gar nicht gut"} for n in range(5)]),
    "preferences in German": ("dpo", [{"Frage": f"was ist {n} denn", "bessere Antwort": "sehr gut so", "schlechtere Antwort": "gar nicht gut"} for n in range(5)]),
    "thumbs": ("kto", [{"prompt": f"q {n}", "completion": "a", "label": bool(n % 2)} for n in range(6)]),
    "thumbs under another name": ("kto", [{"question": f"q {n}", "answer": "a", "thumb": ("up", "down")[n % 2]} for n in range(6)]),
    "thumbs in German": ("kto", [{"Frage": f"was ist {n} denn", "Antwort": "das ist es", "Bewertung": str(n % 2)} for n in range(6)]),
}  # fmt: skip


@pytest.mark.parametrize("kind", STAGES)
def test_each_file_goes_to_the_stage_that_reads_it(tmp_path: Path, kind: str) -> None:
    stage, rows = STAGES[kind]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(rows), encoding="utf-8")

    source = look(path)

    assert source.stage.name == stage
    assert len(source.file.records) == len(rows)
    assert not source.file.bad_rows


PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "q {n}", "chosen": "good one", "rejected": "bad one"},
    "instruction and input": {"instruction": "q {n}", "input": "", "chosen": "good one", "rejected": "bad one"},
    "mapped": {"Frage": "was ist q {n}", "bessere Antwort": "good one it is", "schlechtere Antwort": "bad one it is"},
    "prompt inside": {
        side: [{"role": "user", "content": "q {n}"}, {"role": "assistant", "content": f"{side} one"}] for side in ("chosen", "rejected")
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
def test_better_answers_of_pairs_are_examples_for_sft(tmp_path: Path, kind: str) -> None:
    rows = [json.loads(json.dumps(PAIRS[kind]).replace("{n}", str(n))) for n in range(5)]
    pairs = look(write_jsonl(tmp_path / "mine.jsonl", rows))

    better = better_answers_of(pairs)

    assert better
    assert [record.answer for record in better.file.records] == [record.chosen for record in pairs.file.records]
    assert [record.prompt for record in better.file.records] == [record.prompt for record in pairs.file.records]


# --- documents and chat logs


def test_documents_get_prompts_that_differ(tmp_path: Path, capsys: Any) -> None:
    files = [tmp_path / f"{n}.md" for n in range(4)]
    for number, file in enumerate(files):
        file.write_text(
            f"# Brief {number}\n\nDer Brief ist nicht lang und das ist gut für den Leser, Nummer {number}.\n",
            encoding="utf-8",
        )

    source = look(*files)

    assert [turns(source, n)[0][1] for n in range(4)] == [f"Schreibe den Text „Brief {n}“." for n in range(4)]
    assert turns(source, 2)[1] == ("assistant", files[2].read_text(encoding="utf-8").strip())
    assert "(assumed: --yes)" in capsys.readouterr().out


def test_documents_in_one_file_are_parted_by_lines_of_dashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "all.txt"
    path.write_text("\n---\n".join(f"Report {n}\n\nAll is well at site {n}." for n in range(5)), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Report for us: {title}\n"))

    source = look(path, asker=Asker(assume=False))

    assert turns(source, 1) == [
        ("user", "Report for us: Report 1"),
        ("assistant", "Report 1\n\nAll is well at site 1."),
    ]


def test_a_template_that_makes_one_prompt_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "all.txt"
    path.write_text("\n---\n".join(f"Report {n}\n\nAll is well." for n in range(5)), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Write a report.\n"))

    with pytest.raises(UserError, match="one side of the split"):
        look(path, asker=Asker(assume=False))


@pytest.mark.parametrize("thread", [True, False])
def test_a_message_in_each_row_becomes_conversations(tmp_path: Path, thread: bool) -> None:
    header = ("role", "content", *(["chat"] * thread))
    rows = [(role, f"{role} {n}", *([f"c{n}"] * thread)) for n in range(5) for role in ("user", "assistant")]
    path = tmp_path / "mine.csv"
    path.write_bytes(as_csv(header, rows))

    source = look(path)

    assert [turns(source, n) for n in range(5)] == [
        [("user", f"user {n}"), ("assistant", f"assistant {n}")] for n in range(5)
    ]


TEXTS = {
    "headings": "### Instruction:\nName fruit {n}.\n\n### Input:\nred\n\n### Response:\nA pear.",
    "speakers": "Human: Name fruit {n}.\n\nred\nAssistant: A pear.",
    "INST": "<s>[INST] Name fruit {n}.\n\nred [/INST] A pear. </s>",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_question_and_answer_in_one_text_are_put_apart(tmp_path: Path, kind: str) -> None:
    path = write_jsonl(tmp_path / "mine.jsonl", [{"text": TEXTS[kind].format(n=n)} for n in range(5)])

    assert turns(look(path), 3) == [("user", "Name fruit 3.\n\nred"), ("assistant", "A pear.")]


def test_a_table_of_documents_takes_its_titles_and_names_what_it_leaves_out(tmp_path: Path, capsys: Any) -> None:
    rows = [
        {"title": f"Pump {n}", "body": "It is old, and the seal is of the wrong size.", "id": str(n)} for n in range(5)
    ]

    source = look(write_jsonl(tmp_path / "mine.jsonl", [*rows, {"title": "Empty", "body": "", "id": "9"}]))

    assert turns(source, 1)[0] == ("user", 'Write the text "Pump 1".')
    shown = capsys.readouterr().out
    assert "1 rows have no text in body and are left out" in shown
    assert "not used: id" in shown


LOGS = {
    "roles": "User: how are you {n}\nAssistant: fine {n}\n\n",
    "questions and answers": "Frage: wie geht es {n}\nAntwort: gut {n}\nund dir\n\n",
    "a messenger": "[1{n}.03.24, 10:15:22] Ben: how are you {n}\n[1{n}.03.24, 10:16:02] Anna: fine {n}\n",
    "an older messenger": "0{n}/03/2024, 10:15 - Ben: how are you {n}\n0{n}/03/2024, 10:16 - Support Anna: fine {n}\n",
}


@pytest.mark.parametrize("kind", LOGS)
def test_chat_logs_become_conversations(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "chat.txt"
    path.write_text("".join(LOGS[kind].format(n=n) for n in range(1, 7)), encoding="utf-8")

    source = look(path)

    assert len(source.file.records) == 6
    assert [role for role, _ in turns(source, 2)] == ["user", "assistant"]
    assert turns(source, 2)[0][1].endswith(" 3")
    assert "3" in turns(source, 2)[1][1]


def test_records_made_before_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "chat.txt"
    path.write_text("".join(LOGS["roles"].format(n=n) for n in range(6)), encoding="utf-8")
    look(path)
    look(path)  # the same once more is no harm
    path.write_text("".join(LOGS["roles"].format(n=n) for n in range(7)), encoding="utf-8")

    with pytest.raises(UserError, match="nothing is overwritten"):
        look(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("mine.docx", b"PK", "Save it as .txt"),
        ("mine.txt", b"  \n", "holds no text"),
        ("mine.txt", "größer".encode("cp1252"), "is not UTF-8"),
        ("mine.csv", b"a;b\n", "holds no record"),
    ],
)
def test_files_that_cannot_be_used_say_what_to_do(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(UserError, match=said):
        look(tmp_path / name)


def test_the_first_record_is_shown_with_what_is_good_and_what_is_not(tmp_path: Path, capsys: Any) -> None:
    kind = "preferences in German"
    look(write_jsonl(tmp_path / "pairs.jsonl", STAGES[kind][1]))
    look(write_jsonl(tmp_path / "thumbs.jsonl", STAGES["thumbs"][1]))

    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert shown[shown.index("for example was ist 0 denn") :][1:3] == ["→ sehr gut so", "and not gar nicht gut"]
    assert shown[shown.index("for example q 0") :][1] == "→ a (thumb down)"


def test_of_many_documents_the_first_are_named(tmp_path: Path, capsys: Any) -> None:
    files = [tmp_path / f"{n:02}.md" for n in range(30)]
    for number, file in enumerate(files):
        file.write_text(f"# Letter {number}\n\nThe parcel {number} is on its way to you.\n", encoding="utf-8")

    look(*files)

    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"{files[0]}, {files[1]}, {files[2]} and 27 more"
