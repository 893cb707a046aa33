"""Files of every type: the same rows, and every file or line that cannot be read with its reason."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from scripts.common.errors import UserError
from scripts.common.schema import Data, WeightedDataset
from scripts.dataset.files import read_rows
from scripts.dataset.records import (
    load_datasets,
    parse_record,
    write_rejects,
)
from tests.conftest import ROOT, write_jsonl
from tests.support.records import KEY, PLAIN, instruction, load, refusal, talk


def test_the_same_rows_are_read_from_every_file_type(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [instruction(1, input='with "quotes", commas\nand a line'), instruction(2, input="ü\u2028 é")]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")

    read = {
        ending: [r.messages for r in load(tmp_path / f"a.{ending}")] for ending in ("jsonl", "json", "csv", "parquet")
    }

    assert read["jsonl"] == [
        tuple(talk(f"question {n}\n\n{row['input']}", f"answer {n}")) for n, row in enumerate(rows, 1)
    ]
    assert read["json"] == read["csv"] == read["parquet"] == read["jsonl"]


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\r", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_jsonl_record(tmp_path: Path, odd: str) -> None:
    """Other line separators stand unescaped in real files; splitting there would cut the record."""
    row = instruction(1, input=f"left{odd}right")
    text = json.dumps(row, ensure_ascii=False).replace(
        json.dumps(odd)[1:-1], odd if odd > "\x1f" else json.dumps(odd)[1:-1]
    )
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{text}\r\n{text}\n".encode())

    loaded = load(path)

    assert [record.source for record in loaded] == [f"{path}:1", f"{path}:2"]
    assert all(f"left{odd}right" in record.messages[0]["content"] for record in loaded)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path, ending: str) -> None:
    text = {
        "jsonl": json.dumps(instruction(1)),
        "json": json.dumps([instruction(1)]),
        "csv": "instruction,output\nquestion 1,answer 1\n",
    }[ending]
    path = tmp_path / f"a.{ending}"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())

    assert load(path)[0].answer == "answer 1"


def test_csv_with_windows_line_ends_keeps_answers_clean(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'instruction,output\r\nq1,a1\r\nq2,"a2 line 1\r\nline 2"\r\n')

    answers = [record.answer for record in load(path)]

    assert answers[0] == "a1"
    assert answers[1].split() == ["a2", "line", "1", "line", "2"]
    assert answers[1] == "a2 line 1\r\nline 2", "inside quotes every character is the user's"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_is_read_with_the_separator_of_its_header(tmp_path: Path, separator: str) -> None:
    """A letter is never taken for one, and the other separators are text."""
    path = tmp_path / "a.csv"
    path.write_text(
        "\n".join(
            (separator.join(("instruction", "output", "MAX_X_PIXELS")), separator.join(("q", '"a, b; c\td"', "7")))
        ),
        encoding="utf-8",
    )

    assert load(path)[0].messages == tuple(talk("q", "a, b; c\td"))


@pytest.mark.parametrize(
    ("separator", "question"),
    [(";", "Name, Vorname, Frage"), ("\t", "Question, in short"), (";", '"Frage; kurz, bitte"'), (",", "Note;Question"), ("\t", "a;b,c;d")],
)  # fmt: skip
def test_separator_is_chosen_by_the_rows_where_a_name_holds_another_one(
    tmp_path: Path, separator: str, question: str
) -> None:
    lines = [f"{question}{separator}Answer", f'"Who; where,\nand, when?"{separator}Ann', f"And then?{separator}Bob"]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines), encoding="utf-8")

    name = question.strip('"')
    assert [row for _, row in read_rows(path)] == [
        {name: "Who; where,\nand, when?", "Answer": "Ann"},
        {name: "And then?", "Answer": "Bob"},
    ]


def test_csv_row_is_located_by_its_line_even_after_quoted_newlines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('instruction,output\n"two\nlines",a\nq2\n\nq3,"a\nb",extra\n', encoding="utf-8")

    message = refusal(path)

    assert f"  {path}:4: columns: found 1 cells, wanted the 2 of the header" in message.splitlines()
    assert f"{path}:6: columns: found 3 cells, wanted the 2 of the header" in message
    assert "2 of 3 rows cannot be used" in message


def test_csv_cell_as_long_as_a_document_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("instruction,output\nq," + "word " * 60_000 + "\n", encoding="utf-8")

    assert len(load(path)[0].answer) == 300_000
    assert csv.field_size_limit() < 2**31, "Windows takes no more"


def test_csv_with_an_open_quote_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('instruction,output\nq,"never closed\n', encoding="utf-8")

    assert "not valid CSV" in refusal(path)


# --- bad files


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"[\n{]", ":2: not valid JSON (Expecting property name enclosed in double quotes). Wanted a list of objects."),
        ("a.json", b"{}\n{}\n", ":2: not valid JSON (Extra data). Wanted a list of objects; one object per line is .jsonl."),
        ("a.json", b'[{"output": "a", "id": 1, "id": 2}]', ": not valid JSON (`id` is written twice). Wanted a list of objects."),
        ("a.json", b"{}", ": found dict, wanted a list of objects; one object per line is .jsonl."),
        ("a.jsonl", b" [\n1\n]", ":1: JSON that goes over several lines, wanted one object per line. A list [...] is read from a file that ends in .json."),
        ("a.jsonl", b"{\n}", ":1: JSON that goes over several lines, wanted one object per line. A list [...] is read from a file that ends in .json."),
        ("a.csv", b"output,instruction,output\na,q,b\n", ":1: the column `output` stands twice. Rename or remove one."),
        ("a.csv", b'instruction,output\nq,"never closed\n', ":2: not valid CSV (unexpected end of data)."),
        ("a.csv", b"instruction,output\rq,a\r", ":1: not valid CSV (a bare carriage return ends a line; save the file with line ends of today, \\n or \\r\\n)."),
        ("a.txt", b"hello", ": found the ending `.txt`, wanted one of .jsonl, .json, .csv, .tsv, .parquet, .xlsx, .xlsm, .xls, .ods. python -m scripts.start makes records of documents."),
    ],
)  # fmt: skip
def test_unusable_file_is_reported_in_these_words(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    assert refusal(path) == f"{path}{said}"


BEYOND_PYTHON = {"nested too deeply": "[" * 200_000, "a number with thousands of digits": "[" + "1" * 5000 + "]"}


@pytest.mark.parametrize("reason", BEYOND_PYTHON)
def test_json_that_python_cannot_hold_is_reported_with_its_reason(tmp_path: Path, reason: str) -> None:
    lines, whole = tmp_path / "a.jsonl", tmp_path / "a.json"
    for path in (lines, whole):
        path.write_text(BEYOND_PYTHON[reason], encoding="utf-8")

    assert refusal(lines).splitlines()[1] == f"  {lines}:1: json: not valid JSON ({reason}); one object per line"
    assert refusal(whole) == f"{whole}: not valid JSON ({reason}). Wanted a list of objects."


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_reported_at_once_with_how_to_convert_it(tmp_path: Path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes("\ufeff[]\n".encode(encoding))

    assert refusal(path) == (
        f"{path}:1: is UTF-16. Save the file as UTF-8: in Excel as `CSV UTF-8`, in an editor under Encoding, or "
        "`iconv -f UTF-16 -t UTF-8 OLD > NEW`."
    )


def test_rows_of_a_json_list_are_reported_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([instruction(1), 3, {"instruction": "q", "output": ""}]), encoding="utf-8")

    assert refusal(path).splitlines()[1:-1] == [
        f"  {path}: record 2: json: found int, wanted an object",
        f"  {path}: record 3: output: is empty",
    ]
    assert load_datasets(str(path), parse_record, Data(on_bad_row="skip"), KEY)[0].records[0].source == (
        f"{path}: record 1"
    )


def test_rows_of_a_parquet_file_are_reported_by_their_number_and_rejected_with_every_value(tmp_path: Path) -> None:
    """A date is nothing that JSON can write as it is."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    rows = [{**instruction(n), "day": date(2026, 1, n)} for n in (1, 2)]
    rows[1]["output"] = ""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    files = load_datasets(str(path), parse_record, Data(on_bad_row="skip"), KEY)
    write_rejects(tmp_path / "rejects.jsonl", files)

    assert files[0].records[0].source == f"{path}: record 1"
    assert json.loads((tmp_path / "rejects.jsonl").read_text(encoding="utf-8")) == {
        "source": f"{path}: record 2",
        "field": "output",
        "reason": "is empty",
        "row": {"instruction": "question 2", "output": "", "day": "2026-01-02"},
    }


def test_complaint_about_a_parquet_file_is_one_line_of_200_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet

    def refuse(path: Path) -> None:
        raise ValueError("no footer\n" * 100)

    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet")
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", refuse)

    assert refusal(path) == f"{path}: not a Parquet file that can be read ({'no footer ' * 20})."


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trian.jsonl", "no such file. Did you mean train.jsonl?"),
        ("data/sft/sample_sf.jsonl", f"no such file. Did you mean {ROOT / 'data/sft/sample_sft.jsonl'}?"),
        ("a/b/c", "no such file. Correct the path, or give a Hub dataset id of the form owner/name."),
        ("owner/name.csv", "no such file. Correct the path, or give a Hub dataset id of the form owner/name."),
        ("folder", "is a folder, wanted one file; list several files with their weights."),
        ("x" * 300, "File name too long. Correct the path."),
    ],
)
def test_path_that_leads_to_no_file_is_reported_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [instruction(1)])
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)

    assert refusal(Path(name)) == f"{KEY}: {name}: {said}"


def test_file_is_found_from_the_working_folder_and_else_from_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "mine.jsonl", [instruction(1)])
    monkeypatch.chdir(tmp_path)

    assert [record.source for record in load(Path("mine.jsonl"))] == ["mine.jsonl:1"]
    assert load(Path("data/sft/sample_sft.jsonl"))[0].source == f"{ROOT / 'data/sft/sample_sft.jsonl'}:1"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "the file holds no record"),
        ("a.jsonl", b"\n \n", "the file holds no record"),
        ("a.json", b"[]", "the file holds no record"),
        ("a.csv", b"", "the file holds no record"),
        ("a.csv", b"instruction,output\n", "the file holds no record"),
        ("a.json", b"", "not valid JSON"),
        ("a.json", b"[\n{]", ":2: not valid JSON"),
        ("a.json", b"{}", "found dict, wanted a list of objects"),
        ("a.json", b'["caf\xe9"]', "byte 6 is not UTF-8"),
        ("a.csv", b"instruction,output\ncaf\xe9,b\n", "is not UTF-8"),
        ("a.parquet", b"not parquet", "not a Parquet file"),
        ("a.txt", b"hello", "found the ending `.txt`, wanted one of .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)
def test_unusable_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    message = refusal(path)

    assert str(path) in message
    assert said in message


def test_json_nested_too_deeply_is_a_mistake_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * 200_000, encoding="utf-8")

    assert str(path) in refusal(path)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "data/nowhere.jsonl", "a/b/c"])
def test_missing_file_is_refused(name: str) -> None:
    assert f"{name}: no such file" in refusal(Path(name))


def test_folder_of_this_repository_is_not_taken_for_a_hub_dataset() -> None:
    """The datasets library would read every file in it, unchecked."""
    assert "data/sft: is a folder, wanted one file" in refusal(Path("data/sft"))


def test_hub_dataset_that_cannot_be_reached_is_refused_with_the_key() -> None:
    message = refusal(Path("nobody-at-all/no-such-set"))

    assert message.startswith(f"{KEY}: cannot load the Hub dataset nobody-at-all/no-such-set")
    assert "use a local file" in message


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    """Stand in for the Hub: what is put here under a name and a split is what the datasets library loads."""
    import datasets

    tables: dict[tuple[str, str], Any] = {}

    def load_dataset(name: str, configuration: str | None, *, split: str) -> Any:
        try:
            return datasets.Dataset.from_list(tables["/".join(filter(None, (name, configuration))), split])
        except KeyError:
            raise ConnectionError("no route to host") from None

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return tables


def test_hub_dataset_is_read_from_its_train_split_as_a_file_is(hub: dict[tuple[str, str], Any]) -> None:
    rows = [instruction(1), instruction(2), {"instruction": "q", "output": ""}]
    hub["owner/name", "train"] = rows

    (file,) = load_datasets("owner/name", parse_record, Data(on_bad_row="skip"), KEY)

    assert (file.path, file.sha256) == ("owner/name", hashlib.sha256(json.dumps(rows).encode()).hexdigest())
    assert [(record.source, record.answer) for record in file.records] == [
        ("owner/name:1", "answer 1"),
        ("owner/name:2", "answer 2"),
    ]
    assert [(str(bad), bad.row) for bad in file.bad_rows] == [("owner/name:3: output: is empty", rows[2])]


def test_hub_dataset_is_read_from_the_split_and_the_configuration_that_are_named(
    hub: dict[tuple[str, str], Any],
) -> None:
    hub["owner/name/de", "test_sft"] = [instruction(1)]
    source = WeightedDataset(path="owner/name", name="de", split="test_sft")

    (file,) = load_datasets([source], parse_record, PLAIN, KEY)

    assert [record.answer for record in file.records] == ["answer 1"]


def test_hub_dataset_that_cannot_be_loaded_is_reported_with_what_to_do(hub: dict[tuple[str, str], Any]) -> None:
    hub["owner/name", "test"] = [instruction(1)]

    assert refusal(Path("owner/name")) == (
        f"{KEY}: cannot load the Hub dataset owner/name, split train (ConnectionError: no route to host). "
        "Are path, name and split right and the Hub reachable? Without a network, use a local file."
    )


def test_line_that_is_not_utf8_is_reported_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(instruction(1)).encode() + b'\n{"instruction": "caf\xe9", "output": "a"}\n')

    assert f"{path}:2: encoding: byte 21 of the line is not UTF-8" in refusal(path)


@pytest.mark.parametrize(("start", "line"), [(b"\xff", 1), (b"\n\xff\xfe", 2), (b"\n\xfe\xff", 2)])
def test_bytes_that_are_not_utf8_cost_only_their_line(tmp_path: Path, start: bytes, line: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(start + b"\n" + json.dumps(instruction(1)).encode())

    (bad,) = load_datasets(str(path), parse_record, Data(on_bad_row="skip"), KEY)[0].bad_rows

    assert str(bad) == f"{path}:{line}: encoding: byte 1 of the line is not UTF-8; save the file as UTF-8"


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_random_bytes_never_end_in_a_traceback(tmp_path: Path, ending: str) -> None:
    """The answer is always records or a message; anything else raised here fails the test."""
    generator = random.Random(ending)
    pieces = [b'{"instruction": "q", "output": "a"}', b'{"messages": [', b'"role"', b"{", b"]", b",", b'"', b"\\u", b"\xff",
              b"\x00", b"\r", b"null", b"1e999", b"instruction,output", b"\xef\xbb\xbf", b"NaN", b'{"prompt": {}, "completion": []}',
              b'{"messages": [{"role": null, "content": {}}]}', b"\xe2\x80\xa8"]  # fmt: skip
    path = tmp_path / f"a.{ending}"
    read, messages = 0, []
    for _ in range(300):
        path.write_bytes(
            b"".join(
                generator.choice([*pieces, b"\n", b"\n", generator.randbytes(3)])
                for _ in range(generator.randrange(12))
            )
        )
        for data in (PLAIN, Data(on_bad_row="skip")):
            try:
                files = load_datasets(str(path), parse_record, data, KEY)
                write_rejects(tmp_path / "rejects.jsonl", files)
                read += 1
            except UserError as error:
                messages.append(str(error))

    assert messages
    assert all(str(path) in message for message in messages)
    assert read > 0 or ending != "jsonl"
