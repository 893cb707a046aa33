"""Layouts people have: each is read as the same conversation, or one message says what to do; nothing is lost unsaid."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest

from scripts.common.errors import UserError
from scripts.common.schema import Data, WeightedDataset
from scripts.dataset.files import read_rows
from scripts.dataset.records import (
    PARSERS,
    DatasetFile,
    describe_reading,
    load_datasets,
    parse_preference,
    parse_record,
)
from scripts.dataset.split import side_of
from scripts.dataset.writing import open_output
from tests.conftest import write_jsonl
from tests.support.records import KEY, PLAIN, refusal, talk

SYSTEM = {"role": "system", "content": "Answer as a baker."}
PAIRS = "dpo.dataset_path"


def read(path: Path, parse: Any = parse_record, data: Data = PLAIN, **source: Any) -> DatasetFile:
    """Read one file as a source of a configuration."""
    (file,) = load_datasets([WeightedDataset(path=str(path), **source)], parse, data, KEY)
    return file


def refused(path: Path, parse: Any = parse_record, **source: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, parse, **source)
    return str(caught.value)


# --- conversations

CONVERSATIONS = {
    "ShareGPT": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "ShareGPT under messages": {"messages": [{"from": "user", "value": "q"}, {"from": "model", "value": "a"}]},
    "question and answer": {"question": "q", "answer": "a"},
    "query and response": {"query": "q", "response": "a"},
    "prompt and response": {"prompt": "q", "response": "a"},
    "input and output": {"input": "q", "output": "a"},
    "capital letters and spaces": {"Question": "q", " ANSWER ": "a"},
    "no instruction": {"instruction": None, "input": "q", "output": "a"},
    "NaN for no input": {"instruction": "q", "input": float("nan"), "output": "a"},
    "the word nan for no input": {"instruction": "q", "input": "nan", "output": "a"},
    "content parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, *talk("", "a")[1:]]},
    "JSON in a text": {"messages": json.dumps(talk("q", "a"))},
    "Python's lists in a text": {"messages": str(talk("q", "a"))},
    "prompt and completion as texts of lists": {"prompt": json.dumps(talk("q")), "completion": str(talk("", "a")[1:])},
    "no tools and no pictures": {"instruction": "q", "output": "a", "tools": [], "images": None},
    "a trade's tools": {"instruction": "q", "output": "a", "tools": "saw, plane"},
    "a class as label": {"instruction": "q", "output": "a", "label": 3},
    "a column of zeros and ones": {"instruction": "q", "output": "a", "label": 1},
}


@pytest.mark.parametrize("layout", CONVERSATIONS)
def test_layout_is_read_as_the_same_conversation_on_the_same_side(layout: str) -> None:
    record = parse_record(CONVERSATIONS[layout], "here", PLAIN)
    plain = parse_record({"prompt": "q", "completion": "a"}, "here", PLAIN)

    assert record == plain
    assert side_of(record, Data(test_ratio=0.5)) == side_of(plain, Data(test_ratio=0.5))


SYSTEMS = [
    {"system": SYSTEM["content"], "instruction": "q", "output": "a"},
    {"system_prompt": SYSTEM["content"], "question": "q", "response": "a"},
    {"system": SYSTEM["content"], "messages": talk("q", "a")},
    {"system": SYSTEM["content"], "messages": [SYSTEM, *talk("q", "a")]},
    {"conversations": [{"from": "system", "value": SYSTEM["content"]}, *talk("q", "a")]},
    {"messages": [{**SYSTEM, "role": "developer"}, *talk("q", "a")]},
]


@pytest.mark.parametrize("row", SYSTEMS)
def test_system_message_of_a_row_is_used_and_wins_over_the_configured_one(row: dict) -> None:
    data = Data(system_prompt="Another.")

    assert list(parse_record(row, "here", data).messages) == [SYSTEM, *talk("q", "a")]


@pytest.mark.parametrize(
    "history", [[["a", "b"], ["c", "d"]], json.dumps([["a", "b"], ["c", "d"]]), talk("a", "b", "c", "d")]
)
def test_history_becomes_turns_before_the_question(history: Any) -> None:
    row = {"history": history, "system": SYSTEM["content"], "instruction": "q", "input": "x", "output": "e"}

    record = parse_record(row, "here", PLAIN)

    assert list(record.messages) == [SYSTEM, *talk("a", "b", "c", "d", "q\n\nx", "e")]
    assert record.trained == (2, 4, 6)


@pytest.mark.parametrize("none", [None, [], "", "nan", "[]"])
def test_empty_history_is_none(none: Any) -> None:
    row = {"history": none, "instruction": "q", "output": "a"}

    assert list(parse_record(row, "here", PLAIN).messages) == talk("q", "a")


def weighted(*weights: Any) -> list[dict]:
    turns = [dict(turn) for turn in talk(*"abcdef"[: 2 * len(weights)])]
    for turn, weight in zip(turns[1::2], weights, strict=True):
        turn |= {"weight": weight}
    return turns


@pytest.mark.parametrize(
    ("weights", "trained", "turns"),
    [((0, 1), (3,), 4), ((1, 0), (1,), 2), ((None, 1), (1, 3), 4), ((0, 1, 0), (3,), 4), ((True, False), (1,), 2)],
)
def test_answer_of_weight_zero_is_not_trained_and_no_answer_to_compare_with(weights, trained, turns) -> None:  # type: ignore[no-untyped-def]
    record = parse_record({"messages": weighted(*weights)}, "here", PLAIN)

    assert (record.trained, len(record.messages)) == (trained, turns)
    assert record.messages[-1]["role"] == "assistant"
    assert all(message.keys() == {"role", "content"} for message in record.messages)


def test_reasoning_in_a_column_stands_before_its_answer() -> None:
    row = {"question": "1+1?", "reasoning_content": "I add.", "answer": "2"}

    assert parse_record(row, "here", PLAIN).answer == "<think>\nI add.\n</think>\n\n2"


def test_consecutive_turns_are_joined_on_request(tmp_path: Path) -> None:
    turns = [*talk("a"), *talk("b", "c"), *talk("", "d")[1:]]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])

    assert "data.merge_turns: true joins" in refusal(path)
    assert list(read(path, data=Data(merge_turns=True)).records[0].messages) == talk("a\n\nb", "c\n\nd")


REFUSED = {
    "KTO": ({"prompt": "q", "completion": "a", "label": False}, ["label", "scripts.train_kto", "columns: {label: null}"]),
    "KTO in a CSV": ({"prompt": "q", "completion": "a", "label": "True"}, ["scripts.train_kto"]),
    "KTO with numbers": ({"prompt": "q", "completion": "a", "label": 0}, ["scripts.train_kto"]),
    "KTO of messages": ({"messages": talk("q", "a"), "kto_tag": True}, ["kto_tag", "scripts.train_kto"]),
    "tools": ({"tools": [{"name": "x"}], "messages": talk("q", "a")}, ["tools: holds tools", "columns: {tools: null}"]),
    "tools as JSON": ({"tools": '[{"name": "x"}]', "messages": talk("q", "a")}, ["tools: holds tools"]),
    "a call": ({"messages": [*talk("q"), {"role": "assistant", "content": "a", "tool_calls": [{}, 1]}]}, ["messages[1].tool_calls"]),
    "a call alone": ({"messages": [*talk("q"), {"role": "assistant", "content": None, "function_call": {"name": "x"}}]}, ["messages[1].function_call"]),
    "a tool's turn": ({"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "a"}]}, ["conversations[1].from", "tools"]),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}, *talk("", "a")[1:]]}, ["messages[0].content", "'image'"]),
    "pictures": ({"images": ["x.png"], "messages": talk("q", "a")}, ["images: holds pictures"]),
    "weight of a half": ({"messages": weighted(0.5)}, ["messages[1].weight: found 0.5"]),
    "no weight at all": ({"messages": weighted(0, 0)}, ["no answer to train"]),
    "two system messages": ({"system": "x", "messages": [SYSTEM, *talk("q", "a")]}, ["system: differs"]),
    "a list that numpy wrote": ({"messages": "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]"}, ["looks like a list of messages"]),
    "nan as an answer": ({"instruction": "q", "output": "nan"}, ["output: is the word nan"]),
    "NaN as an answer": ({"instruction": "q", "output": float("nan")}, ["output"]),
    "a number": ({"question": "1+1?", "answer": 2}, ["answer: found int", 'in quotes: "2"']),
    "two questions": ({"question": "q", "query": "r", "answer": "a"}, ["question and query", "columns: {question: instruction}", "columns: {query: instruction}"]),
    "an input beside a prompt": ({"prompt": "q", "input": "x", "completion": "a"}, ["columns: {prompt: instruction}", "columns: {input: null}"]),
    "one text": ({"text": "Q: q A: a"}, ["found text: one text", "columns:"]),
    "another language": ({"Frage": "q", "Antwort": "a"}, ["columns: {Frage: instruction, Antwort: output}"]),
    "a history of words": ({"history": "as before", "instruction": "q", "output": "a"}, ["history: found text"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_lose_its_meaning_is_refused_by_name_with_a_way_out(tmp_path: Path, case: str) -> None:
    row, said = REFUSED[case]
    message = refusal(write_jsonl(tmp_path / "a.jsonl", [row]))

    assert [text for text in said if text not in message] == [], message
    assert "dpo.dataset_path" not in message


# --- pairs

PREFERENCES = [
    {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    {"question": "q", "response_j": "good", "response_k": "bad"},
    {"prompt": "q", "chosen": ["good"], "rejected": ["bad"]},
    {"prompt": "q", "chosen": "['good']", "rejected": '["bad"]'},
    {"prompt": "q", "chosen": str(talk("q", "good")), "rejected": json.dumps(talk("q", "bad"))},
    {"chosen": json.dumps(talk("q", "good")), "rejected": json.dumps(talk("q", "bad"))},
]


@pytest.mark.parametrize("row", PREFERENCES)
def test_layout_of_preferences_is_read_as_the_same_pair(row: dict) -> None:
    pair = parse_preference(row, "here", PLAIN)
    with_system = parse_preference({**row, "system": SYSTEM["content"]}, "here", PLAIN)

    assert (list(pair.prompt), pair.chosen, pair.rejected) == (talk("q"), "good", "bad")
    assert list(with_system.prompt) == [SYSTEM, *talk("q")]


REFUSED_PAIRS = {
    "KTO": ({"prompt": "q", "completion": "a", "label": True}, ["scripts.train_kto"]),
    "several answers": ({"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"]}, ["rejected: found a list of 2 answers"]),
    "a space more": ({"prompt": "Name one", "chosen": talk("Name one ", "a"), "rejected": talk("Name one ", "b")}, ["turn 1 is user 'Name one '", "in the prompt user 'Name one'", "columns: {prompt: null}"]),
    "far into a text": ({"prompt": "x" * 100 + "y", "chosen": talk("x" * 100 + "z", "a"), "rejected": "b"}, ["xxz'", "xxy'"]),
    "a system message more": ({"prompt": "q", "chosen": [SYSTEM, *talk("q", "a")], "rejected": [SYSTEM, *talk("q", "b")]}, ["turn 1 is system"]),
    "parted early": ({"chosen": talk("q", "a", "r", "b"), "rejected": talk("q", "c", "r", "d")}, ["differ from turn 2 on", "'a'", "'c'"]),
    "no prompt": ({"ask": "q", "chosen": "a", "rejected": "b"}, ["prompt: is missing", "columns: {ask: prompt}"]),
    "other names": ({"ask": "q", "better": "a", "worse": "b"}, ["columns: {ask: prompt, better: chosen, worse: rejected}"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_PAIRS)
def test_pair_that_cannot_be_read_says_where_and_what_to_write(tmp_path: Path, case: str) -> None:
    row, said = REFUSED_PAIRS[case]
    message = refused(write_jsonl(tmp_path / "a.jsonl", [row]), parse_preference)

    assert [text for text in said if text not in message] == [], message
    assert "sft.dataset_path to this file" not in message


def test_prompt_that_almost_agrees_is_read_when_its_column_is_left_out(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": [SYSTEM, *talk("q ", "a")], "rejected": [SYSTEM, *talk("q ", "b")]}
    path = write_jsonl(tmp_path / "a.jsonl", [row])

    assert list(read(path, parse_preference, columns={"prompt": None}).records[0].prompt) == [SYSTEM, *talk("q ")]


# --- a map of columns


def test_each_source_has_its_own_map_of_columns(tmp_path: Path) -> None:
    german = write_jsonl(tmp_path / "a.jsonl", [{"Frage": "q", "Antwort": "a", "Rolle": "s", "Kunde": 7}])
    other = write_jsonl(
        tmp_path / "b.jsonl", [{"talk": [{"from": "human", "value": "q"}, *talk("", "a")[1:]], "Kunde": 8}]
    )
    sources = [
        WeightedDataset(
            path=str(german), weight=2, columns={"Frage": "instruction", "Antwort": "output", "Rolle": "system"}
        ),
        WeightedDataset(path=str(other), columns={"talk": "messages"}),
    ]

    one, two = load_datasets(sources, parse_record, Data(group_field="Kunde"), KEY)

    assert list(one.records[0].messages) == [{"role": "system", "content": "s"}, *talk("q", "a")]
    assert list(two.records[0].messages) == talk("q", "a")
    assert (one.weight, one.records[0].group, two.records[0].group) == (2, "7", "8")
    assert one.unused == two.unused == ()


def test_map_decides_between_layouts_and_leaves_columns_out(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c", "chosen": "x", "rejected": "y", "messages": talk("q", "a"), "label": True}
    path = write_jsonl(tmp_path / "a.jsonl", [row])

    file = read(path, columns={"messages": "messages", "label": None})

    assert list(file.records[0].messages) == talk("q", "a")
    assert sorted(file.unused) == ["chosen", "completion", "prompt", "rejected"]


def test_map_of_a_column_that_is_not_there_or_of_one_field_twice_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"Frage": "q", "Antwort": "a"}])

    assert "names `Frag`, which no row has. Found: Frage, Antwort." in refused(path, columns={"Frag": "instruction"})
    assert "two columns to `output`" in refused(path, columns={"Frage": "output", "Antwort": "output"})
    assert "`split`, which only a dataset of the Hub has" in refused(path, split="test")


# --- nothing is lost unsaid

ROWS: list[tuple[Any, dict[str, Any]]] = [
    (parse_record, {"instruction": "Slice it.", "input": "bread", "output": "Sliced."}),
    (parse_record, {"system": "Be kind.", "question": "Slice it?", "answer": "Sliced."}),
    (parse_record, {"history": [["Hi.", "Hello."]], "query": "Slice it?", "response": "Sliced."}),
    (parse_record, {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}),
    (parse_record, {"prompt": talk("Hi."), "completion": "Hello."}),
    (parse_preference, {"system": "Be kind.", "question": "Slice it?", "chosen": "Sliced.", "rejected": "No."}),
    (parse_preference, {"instruction": "Slice it.", "input": "bread", "response_j": "Sliced.", "response_k": "No."}),
]  # fmt: skip
OTHERS = [
    "id",
    "Category",
    "tools",
    "functions",
    "images",
    "reasoning_content",
    "label",
    "column 3",
    "notes",
    "context",
    "weight",
    "text",
]


def texts_in(value: Any) -> list[str]:
    """Return every text in a value but names of roles."""
    if isinstance(value, dict):
        return [text for key, inner in value.items() if key not in ("role", "from") for text in texts_in(inner)]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in texts_in(inner)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("seed", range(40))
def test_columns_that_are_shuffled_renamed_and_added_are_used_named_or_refused(tmp_path: Path, seed: int) -> None:
    """What a row holds stands in the record, or its column is named; a rename with its map changes no record."""
    chance = random.Random(seed)
    refusals: list[tuple[str, list[str]]] = []
    for number, (parse, row) in enumerate(ROWS):
        plain = parse(row, "here", PLAIN)
        added = {
            name: chance.choice([f"extra {name}", ["x"], [{"name": "x"}], 5, True]) for name in chance.sample(OTHERS, 3)
        }
        added = {name: value for name, value in added.items() if name not in row}
        renamed = {name: f"Spalte {index}" for index, name in enumerate(row) if chance.random() < 0.5}
        columns = {"question": "instruction", "query": "instruction", "answer": "output", "response": "output",
                   "conversations": "messages", "response_j": "chosen", "response_k": "rejected"}  # fmt: skip
        own = {new: columns.get(old, old) for old, new in renamed.items()}
        items = [*((renamed.get(name, name), value) for name, value in row.items()), *added.items()]
        chance.shuffle(items)
        path = write_jsonl(tmp_path / f"{number}.jsonl", [dict(items)])
        try:
            file = read(path, parse, columns=own)
        except UserError as error:
            refusals.append((str(error), [*added]))
            continue
        (record,) = file.records
        kept = "\n".join(texts_in([*record.messages]))
        said = " ".join(describe_reading(file))
        for name, value in items:
            inside = all(text in kept for text in texts_in(value)) and texts_in(value)
            assert inside or name in said, (name, value, said)
        if not any(text in kept for value in added.values() for text in texts_in(value) if text.startswith("extra")):
            assert record.messages == plain.messages
    assert [message for message, added in refusals if not any(name in message for name in added)] == []


def test_unused_columns_and_keys_are_listed_once_and_empty_ones_not_at_all(tmp_path: Path) -> None:
    rows = [
        {"messages": [{**turn, "name": "Ann"} for turn in talk("q", str(n))], "id": n, "empty": None} for n in range(5)
    ]

    file = read(write_jsonl(tmp_path / "a.jsonl", rows))

    assert file.unused == ("id", "messages[].name")
    assert len(describe_reading(file)) == 1


# --- files


def test_excel_sep_line_unnamed_columns_and_commas_at_the_end_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"\xef\xbb\xbfsep=;\r\n;;instruction;input;output;\r\n0;0;q;nan;a\r\n1;1;r;x;b;;;\r\n".replace(
            b"nan;a", b"nan;a;"
        )
    )

    file = read(path)

    assert [list(record.messages) for record in file.records] == [talk("q", "a"), talk("r\n\nx", "b")]
    assert [record.source for record in file.records] == [f"{path}:3", f"{path}:4"]
    assert describe_reading(file) == [
        f"{path}: not used: column 1, column 2. If one belongs to the records, name it in `columns`.",
        f"{path}: input: 1 cells hold nan or <NA> and are taken as empty",
    ]


def test_scrubbed_copy_keeps_sep_line_and_columns_without_a_name(tmp_path: Path) -> None:
    source, out = tmp_path / "a.csv", tmp_path / "b.csv"
    source.write_text("sep=|\n|instruction|output|\n0|q|a|\n", encoding="utf-8")
    with open_output(out, source) as write:
        for _, row in read_rows(source):
            write(row)

    assert out.read_text(encoding="utf-8") == source.read_text(encoding="utf-8")


def test_backslashed_quotes_are_refused_with_their_cure(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"Who said \\"stop\\" first?","Ann said \\"stop\\"."\n', encoding="utf-8")

    assert 'written twice, "", not \\"' in refusal(path)


def test_separator_in_front_of_an_open_text_is_still_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("instruction,output\nq,a,b,\n", encoding="utf-8")

    assert "found 3 cells, wanted the 2" in refusal(path)


TABLE = [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]
SHAPES = {
    "a.json": json.dumps({"version": 1, "records": TABLE}),
    "b.json": json.dumps({name: {str(n): row[name] for n, row in enumerate(TABLE)} for name in TABLE[0]}),
    "c.json": json.dumps({name: [row[name] for row in TABLE] for name in TABLE[0]}),
    "d.json": json.dumps({"columns": [*TABLE[0]], "index": [0, 1], "data": [[*row.values()] for row in TABLE]}),
    "e.jsonl.gz": gzip.compress("\n".join(map(json.dumps, TABLE)).encode()),
    "f.json.gz": gzip.compress(json.dumps(TABLE).encode()),
    "g.csv.gz": gzip.compress(b"question,answer\nq,a\nr,b\n"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_wrapped_packed_and_turned_tables_are_read(tmp_path: Path, name: str) -> None:
    content = SHAPES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    assert [list(r.messages) for r in read(tmp_path / name).records] == [talk("q", "a"), talk("r", "b")]


def workbook(*sheets: list[list[Any]]) -> bytes:
    """Make an .xlsx of plain cells."""

    def cell(value: Any) -> str:
        text = isinstance(value, str)
        return f'<c t="inlineStr"><is><t>{value}</t></is></c>' if text else f"<c><v>{value}</v></c>"

    numbers, head = range(1, len(sheets) + 1), '<?xml version="1.0" encoding="UTF-8"?>'
    main, of = (
        "http://schemas.openxmlformats.org/spreadsheetml/2006/main",
        "http://schemas.openxmlformats.org/officeDocument/2006/relationships",
    )
    listed = "".join(f'<sheet name="Sheet{n}" sheetId="{n}" r:id="r{n}"/>' for n in numbers)
    targets = "".join(
        f'<Relationship Id="r{n}" Type="{of}/worksheet" Target="worksheets/sheet{n}.xml"/>' for n in numbers
    )
    relations = "http://schemas.openxmlformats.org/package/2006/relationships"
    parts = {
        "xl/workbook.xml": f'{head}<workbook xmlns="{main}" xmlns:r="{of}"><sheets>{listed}</sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'{head}<Relationships xmlns="{relations}">{targets}</Relationships>',
        "[Content_Types].xml": f'{head}<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"/>',
        "_rels/.rels": f'{head}<Relationships xmlns="{relations}"><Relationship Id="r" Type="{of}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
    }  # fmt: skip
    for n, rows in zip(numbers, sheets, strict=True):
        body = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
        parts[f"xl/worksheets/sheet{n}.xml"] = (
            f'{head}<worksheet xmlns="{main}"><sheetData>{body}</sheetData></worksheet>'
        )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in parts.items():
            archive.writestr(name, text)
    return packed.getvalue()


def test_sheet_is_read_with_numbers_as_they_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    path.write_bytes(workbook([["Question", "Answer"], ["1+1?", 2], ["half of 5?", 2.5], ["two\nlines?", "a"]], [[]]))

    file = read(path)

    assert [record.answer for record in file.records] == ["2", "2.5", "a"]
    assert [record.source for record in file.records] == [f"{path}:{line}" for line in (2, 3, 4)]
    assert file.records[2].messages[0]["content"] == "two\nlines?"


def test_workbook_with_several_sheets_is_refused_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    path.write_bytes(workbook([["question", "answer"], ["q", "a"]], [["question", "answer"], ["r", "b"]]))

    assert "found 2 sheets (Sheet1, Sheet2), wanted one" in refusal(path)


def test_csv_written_by_the_standard_library_from_any_cells_comes_back(tmp_path: Path) -> None:
    chance = random.Random(3)
    pieces = ["a", '"', ",", ";", "\n", "\r\n", "\\", "sep=;", "nan ", "ü", " "]
    rows = [["x" + "".join(chance.choices(pieces, k=8)) for _ in range(2)] for _ in range(200)]
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["instruction", "output"], *rows])

    assert [[r.messages[0]["content"], r.answer] for r in read(path).records] == rows


# --- the small files that users of such tools report

CASES = {
    "01-kto": None, "02-alpaca-history": parse_record, "03-system-column-dpo": parse_preference,
    "06-sharegpt": parse_record, "12-json-shapes/wrapped.json": parse_record, "12-json-shapes/columns.json": parse_record,
    "12-json-shapes/sft.jsonl.gz": parse_record, "12-json-shapes/nan_input.jsonl": parse_record,
    "12-json-shapes/null_instruction.jsonl": parse_record, "12-json-shapes/number_output.jsonl": None,
    "04-stringified-lists/dpo_python_repr.csv": parse_preference, "04-stringified-lists/sft_messages_json.csv": parse_record,
    "04-stringified-lists/sft_messages_json_string.jsonl": parse_record,
    "04-stringified-lists/sft_prompt_completion_string.jsonl": parse_record,
    "05-message-keys/openai_weight_zero.jsonl": parse_record, "05-message-keys/reasoning_content.jsonl": parse_record,
    "05-message-keys/tool_calls_with_text.jsonl": None, "07-preference-layouts/llamafactory.jsonl": parse_preference,
    "07-preference-layouts/response_jk.jsonl": parse_preference, "07-preference-layouts/prompt_list_of_one_answer.jsonl": None,
    "08-prompt-inside-almost": None, "11-csv/backslash_quotes.csv": None, "11-csv/excel_sep_line.csv": parse_record,
    "11-csv/nan_cells.csv": parse_record, "11-csv/two_unnamed.csv": parse_record, "13-text-column/input_output.jsonl": parse_record,
    "13-text-column/query_response.jsonl": parse_record, "13-text-column/question_answer.jsonl": parse_record,
    "13-text-column/text.jsonl": None, "09-nfd-text/sft.jsonl": parse_record, "09-nfd-text/hindi.jsonl": parse_record,
    "15-reasoning-data": parse_record, "16-new-special-tokens": parse_record, "18-strftime": parse_record,
}  # fmt: skip


def test_reported_thumbs_are_read_by_kto(shared_data: Path) -> None:
    file = shared_data.parent / "cases/01-kto/kto.jsonl"
    if not file.is_file():
        pytest.skip("the reported files are not here")
    assert {record.liked for record in read(file, PARSERS["feedback"]).records} == {True, False}


def test_every_reported_folder_is_in_the_table(shared_data: Path) -> None:
    folders = [folder.name for folder in (shared_data.parent / "cases").glob("*/")]
    assert [name for name in folders if not any(case.partition("/")[0] == name for case in CASES)] == []


@pytest.mark.parametrize("case", CASES)
def test_reported_file_is_read_whole_or_refused_in_one_short_message(shared_data: Path, case: str) -> None:
    place = shared_data.parent / "cases" / case
    files = [place] if place.is_file() else sorted(place.glob("*"))
    if not files:
        pytest.skip("the reported files are not here")
    for file in files:
        parse = CASES[case]
        if parse:
            assert len(read(file, parse).records) >= 10
            continue
        for parse in (parse_record, parse_preference):
            assert len(refused(file, parse).splitlines()) <= 2
