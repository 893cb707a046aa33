"""Records: every format and file type, every bad row with its place, and one split for all stages."""

from __future__ import annotations

import csv
import hashlib
import json
import locale
import random
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from scripts.common.errors import UserError
from scripts.common.records import (
    Record,
    count_duplicates,
    is_validation,
    load_datasets,
    parse_preference,
    parse_record,
    shared_answers,
    split_records,
    write_rejects,
)
from scripts.common.schema import Data, WeightedDataset
from tests.conftest import ROOT, write_jsonl

PLAIN = Data()
KEY = "sft.dataset_path"


def load(path: Path, data: Data = PLAIN) -> list[Record]:
    """Read one file."""
    return list(load_datasets(str(path), parse_record, data, KEY)[0].records)


def refusal(path: Path, data: Data = PLAIN) -> str:
    """Return what the user is told."""
    with pytest.raises(UserError) as caught:
        load(path, data)
    return str(caught.value)


def talk(*contents: str) -> list[dict[str, str]]:
    """Make alternating user and assistant turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def instruction(number: int, **more: str) -> dict[str, str]:
    """Make a good row."""
    return {"instruction": f"question {number}", "output": f"answer {number}", **more}


# --- formats and file types


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Do", "input": "this", "output": "Done"}, talk("Do\n\nthis", "Done")),
        ({"instruction": "Do", "input": "", "output": "Done"}, talk("Do", "Done")),
        ({"instruction": "Do", "input": None, "output": "Done"}, talk("Do", "Done")),
        ({"instruction": "", "input": "this", "output": "Done"}, talk("this", "Done")),
        ({"instruction": "Do", "output": "Done", "id": 7}, talk("Do", "Done")),
        ({"prompt": "Hi", "completion": " Yo"}, talk("Hi", " Yo")),
        ({"prompt": "\ud7ff", "completion": "\ue000"}, talk("\ud7ff", "\ue000")),  # beside the surrogates, but none
        ({"prompt": talk("a", "b", "c"), "completion": talk("", "d")[1:]}, talk("a", "b", "c", "d")),
        ({"messages": talk("a", "b")}, talk("a", "b")),
        (
            {"messages": [{"role": "system", "content": ""}, *talk("a", "b")]},
            [{"role": "system", "content": ""}, *talk("a", "b")],
        ),
    ],
)
def test_every_format_becomes_the_same_conversation(row: dict, messages: list) -> None:
    assert list(parse_record(row, "here", PLAIN).messages) == messages


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, talk("q")),
        ({"prompt": talk("a", "b", "c"), "chosen": "good", "rejected": "bad"}, talk("a", "b", "c")),
        ({"prompt": "q", "chosen": talk("q", "good"), "rejected": talk("q", "bad")}, talk("q")),
        ({"prompt": "q", "chosen": talk("", "good")[1:], "rejected": "bad"}, talk("q")),
        ({"chosen": talk("q", "good"), "rejected": talk("q", "bad")}, talk("q")),
        ({"prompt": None, "chosen": talk("a", "b", "c", "good"), "rejected": talk("a", "b", "c", "bad")}, talk("a", "b", "c")),
        ({"chosen": [SYSTEM, *talk("q", "good")], "rejected": [SYSTEM, *talk("q", "bad")]}, [SYSTEM, *talk("q")]),
    ],
)  # fmt: skip
def test_every_preference_format_becomes_the_same_pair(row: dict, prompt: list) -> None:
    pair = parse_preference(row, "here:1", PLAIN)

    assert (pair.source, list(pair.prompt), pair.chosen, pair.rejected) == ("here:1", prompt, "good", "bad")
    assert pair.answer == "good"


def test_system_prompt_goes_before_a_pair_that_brings_none() -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}

    assert parse_preference(row, "here:1", Data(system_prompt="Be brief.")).prompt == (SYSTEM, *talk("q"))


BAD_PAIRS = [
    (instruction(1), "fields: found instruction/input/output, wanted prompt, chosen and rejected; set sft.dataset_path to this file"),
    ({"chosen": "a", "rejected": "b"}, "prompt: is missing; only message lists may carry it inside chosen and rejected"),
    ({"chosen": "a", "rejected": talk("q", "b")}, "prompt: is missing; only message lists may carry it inside chosen and rejected"),
    ({"chosen": talk("q", "a"), "rejected": "b"}, "prompt: is missing; only message lists may carry it inside chosen and rejected"),
    ({"prompt": "q", "chosen": talk("q", "a", "q2", "b"), "rejected": "b"}, "chosen: wanted exactly one assistant turn after the prompt"),
    ({"prompt": "q", "chosen": "a", "rejected": talk("other", "b")}, "rejected: wanted exactly one assistant turn after the prompt"),
    ({"prompt": "q", "chosen": talk("a"), "rejected": "b"}, "chosen: wanted exactly one assistant turn after the prompt"),
    ({"prompt": "q", "chosen": " a", "rejected": "a\n"}, "rejected: is the same as chosen, so there is nothing to prefer"),
    ({"prompt": talk("q", "a"), "chosen": "a", "rejected": "b"}, "messages: found the turns user, assistant; wanted [system,] user, assistant, … ending with user"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt: found int, wanted text or a list of messages with role and content"),
    ({"chosen": talk("q", "a"), "rejected": talk("q", "b", "q2", "c")}, "rejected: wanted exactly one assistant turn after the prompt"),
    ({"prompt": "q", "chosen": " ", "rejected": "b"}, "chosen: is empty"),
    ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected: found NoneType, wanted text or a list of messages with role and content"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "said"), BAD_PAIRS)
def test_bad_pair_is_told_with_its_field_and_reason(tmp_path: Path, row: dict, said: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])

    with pytest.raises(UserError) as caught:
        load_datasets(str(path), parse_preference, PLAIN, "dpo.dataset_path")

    assert str(caught.value).splitlines()[1:-1] == [f"  {path}:1: {said}"]


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


def test_csv_row_is_located_by_its_line_even_after_quoted_newlines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('instruction,output\n"two\nlines",a\nq2\n\nq3,"a\nb",extra\n', encoding="utf-8")

    told = refusal(path)

    assert f"  {path}:4: columns: found 1 cells, wanted the 2 of the header" in told.splitlines()
    assert f"{path}:6: columns: found 3 cells, wanted the 2 of the header" in told
    assert "2 of 3 rows cannot be used" in told


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
        ("a.txt", b"hello", ": found the ending `.txt`, wanted one of .jsonl, .json, .csv, .parquet."),
        *(
            (f"a{ending}", b"sheet", f": found the ending `{ending}`, wanted one of .jsonl, .json, .csv, .parquet. Save the sheet as `CSV UTF-8`.")
            for ending in (".xlsx", ".XLSX", ".xls", ".ods", ".tsv")
        ),
    ],
)  # fmt: skip
def test_unusable_file_is_told_in_these_words(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    assert refusal(path) == f"{path}{said}"


BEYOND_PYTHON = {"nested too deeply": "[" * 200_000, "a number with thousands of digits": "[" + "1" * 5000 + "]"}


@pytest.mark.parametrize("reason", BEYOND_PYTHON)
def test_json_that_python_cannot_hold_is_told_with_its_reason(tmp_path: Path, reason: str) -> None:
    lines, whole = tmp_path / "a.jsonl", tmp_path / "a.json"
    for path in (lines, whole):
        path.write_text(BEYOND_PYTHON[reason], encoding="utf-8")

    assert refusal(lines).splitlines()[1] == f"  {lines}:1: json: not valid JSON ({reason}); one object per line"
    assert refusal(whole) == f"{whole}: not valid JSON ({reason}). Wanted a list of objects."


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_told_at_once_with_how_to_convert_it(tmp_path: Path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes("\ufeff[]\n".encode(encoding))

    assert refusal(path) == (
        f"{path}:1: is UTF-16. Save the file as UTF-8: in Excel as `CSV UTF-8`, in an editor under Encoding, or "
        "`iconv -f UTF-16 -t UTF-8 OLD > NEW`."
    )


def test_rows_of_a_json_list_are_told_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([instruction(1), 3, {"instruction": "q", "output": ""}]), encoding="utf-8")

    assert refusal(path).splitlines()[1:-1] == [
        f"  {path}: record 2: json: found int, wanted an object",
        f"  {path}: record 3: output: is empty",
    ]
    assert load_datasets(str(path), parse_record, Data(on_bad_row="skip"), KEY)[0].records[0].source == (
        f"{path}: record 1"
    )


def test_rows_of_a_parquet_file_are_told_by_their_number_and_rejected_with_every_value(tmp_path: Path) -> None:
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
def test_path_that_leads_to_no_file_is_told_with_what_to_do(
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
        ("a.txt", b"hello", "found the ending `.txt`, wanted one of .jsonl, .json, .csv, .parquet"),
    ],
)
def test_unusable_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    told = refusal(path)

    assert str(path) in told
    assert said in told


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
    told = refusal(Path("nobody-at-all/no-such-set"))

    assert told.startswith(f"{KEY}: cannot load the Hub dataset nobody-at-all/no-such-set")
    assert "use a local file" in told


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    """Stand in for the Hub: what is put here under a name and a split is what the datasets library loads."""
    import datasets

    tables: dict[tuple[str, str], Any] = {}

    def load_dataset(name: str, *, split: str) -> Any:
        try:
            return datasets.Dataset.from_list(tables[name, split])
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


def test_hub_dataset_that_cannot_be_loaded_is_told_with_what_to_do(hub: dict[tuple[str, str], Any]) -> None:
    hub["owner/name", "test"] = [instruction(1)]

    assert refusal(Path("owner/name")) == (
        f"{KEY}: cannot load the Hub dataset owner/name (ConnectionError). "
        "Is the name right and the Hub reachable? Without a network, use a local file."
    )


# --- bad rows

BAD_ROWS = [
    ('{"instruction": 5, "output": "a"}', "instruction: found int, wanted text"),
    ('{"instruction": "q", "output": null}', "output: found NoneType, wanted text"),
    ('{"instruction": "q", "output": " \\n"}', "output: is empty"),
    ('{"instruction": "", "input": " ", "output": "a"}', "instruction: instruction and input are both empty"),
    ('{"instruction": "q", "input": 3, "output": "a"}', "input: found int, wanted text"),
    ('{"instruction": "q", "output": "\\ud800"}', "output: holds half of a surrogate pair"),
    ('{"question": "q", "answer": "a"}', "fields: found question, answer; wanted one of: instruction + output"),
    ("{}", "fields: found none; wanted one of"),
    ('{"instruction": "q", "output"', "json: not valid JSON"),
    ("[1]", "json: found list, wanted an object"),
    ('"text"', "json: found str, wanted an object"),
    ("null", "json: found NoneType, wanted an object"),
    ('{"prompt": "q", "chosen": "a", "rejected": "b"}', "fields: found preference pairs, wanted instruction records"),
    ('{"messages": []}', "messages: found list, wanted text or a list of messages"),
    ('{"messages": 3}', "messages: found int, wanted text or a list of messages"),
    ('{"messages": ["a"]}', "messages[0]: wanted an object with role and content"),
    ('{"messages": [{"role": "human", "content": "a"}]}', "messages[0].role: found 'human', wanted one of system, user"),
    ('{"messages": [{"role": ["user"], "content": "a"}]}', "messages[0].role: found ['user'], wanted one of"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "messages: found the turns user; wanted"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages: found the turns assistant; wanted"),
    ('{"messages": [{"role": "system", "content": "a"}]}', "messages: found the turns system; wanted"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "messages: found the turns user, user"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 1}]}', "messages[1].content: found int"),
    ('{"prompt": "q", "completion": [{"role": "user", "content": "a"}]}', "messages: found the turns user, user"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "said"), BAD_ROWS)
def test_bad_row_is_told_with_file_line_field_and_reason(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{line}\n", encoding="utf-8")

    told = refusal(path)

    heading, row, mend = told.splitlines()
    assert heading == "1 of 1 rows cannot be used"
    assert row.startswith(f"  {path}:2: {said}")
    assert mend == "Mend them, or set data.on_bad_row: skip to set them aside."


WANTED = "wanted one of: instruction + output; chosen + rejected; prompt + completion; messages"
ORDER = "wanted [system,] user, assistant, … ending with assistant"
WHOLE_REASONS = [
    ('{"instruction": 5, "output": "a"}', "instruction: found int, wanted text"),
    ('{"instruction": "", "input": " ", "output": "a"}', "instruction: instruction and input are both empty"),
    ('{"instruction": "q", "output": " "}', "output: is empty"),
    ('{"instruction": "q", "output": "\\ud800"}', "output: holds half of a surrogate pair, which no tokenizer can read"),
    ('{"instruction": "q", "output": "\\udfff"}', "output: holds half of a surrogate pair, which no tokenizer can read"),
    ('{"question": "q", "answer": "a"}', f"fields: found question, answer; {WANTED}"),
    ("{}", f"fields: found none; {WANTED}"),
    ("[1]", "json: found list, wanted an object {…}; a list of records is read from a file that ends in .json"),
    ("[", "json: not valid JSON (Expecting value: line 2 column 1 (char 2)); one object per line"),
    ('{"prompt": "q", "chosen": "a", "rejected": "b"}', "fields: found preference pairs, wanted instruction records; set dpo.dataset_path to this file"),
    ('{"messages": []}', "messages: found list, wanted text or a list of messages with role and content"),
    ('{"messages": "a"}', f"messages: found the turns user; {ORDER}"),
    ('{"messages": ["a"]}', "messages[0]: wanted an object with role and content"),
    ('{"messages": [{"role": "user"}]}', "messages[0]: wanted an object with role and content"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "x", "content": "a"}]}', "messages[1].role: found 'x', wanted one of system, user, assistant"),
    ('{"messages": [{"role": "user", "content": ""}]}', "messages[0].content: is empty"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', f"messages: found the turns user, user; {ORDER}"),
    ('{"prompt": 1, "completion": "a"}', "prompt: found int, wanted text or a list of messages with role and content"),
    ('{"prompt": "q", "completion": " "}', "completion: is empty"),
    ('{"Instruction": "q", " output": "a"}', "fields: found Instruction,  output; rename `Instruction` to `instruction`, ` output` to `output`"),
    ('{"instruction": "q", "outputs": "a"}', "fields: found instruction, outputs; rename `outputs` to `output`"),
    ('{"images": [], "text": "a"}', f"fields: found images, text; {WANTED}"),
    ('"text"', "json: found str, wanted an object {…}"),
    ('{"instruction": "q", "output": "a", "output": "b"}', "json: not valid JSON (`output` is written twice); one object per line"),
    ('{"instruction": "q", "output": "a"},', "json: not valid JSON (Extra data: line 1 column 36 (char 35)); one object per line, without a comma at its end"),
    ('\ufeff{"instruction": "q", "output": "a"}', "json: not valid JSON (Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 column 1 (char 0)); one object per line"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), WHOLE_REASONS)
def test_reason_of_a_bad_row_is_told_in_these_words(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{line}\n", encoding="utf-8")

    assert refusal(path).splitlines()[1] == f"  {path}:2: {reason}"


def test_reason_goes_into_the_reject_word_for_word(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("instruction,output\nü,a,b\nq,a\n", encoding="utf-8")

    files = load_datasets(str(path), parse_record, Data(on_bad_row="skip"), KEY)
    write_rejects(tmp_path / "rejects.jsonl", files)

    assert (tmp_path / "rejects.jsonl").read_text(encoding="utf-8") == (
        f'{{"source": "{path}:2", "field": "columns", "reason": "found 3 cells, wanted the 2 of the header; '
        'put \\"quotes\\" around a text that holds the separator", "row": ["ü", "a", "b"]}\n'
    )


def test_rejects_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    """As on a bare server, whose locale knows no letter beyond ASCII."""
    path = write_jsonl(tmp_path / "a.jsonl", [instruction(1), {"instruction": "ü", "output": ""}])
    files = load_datasets(str(path), parse_record, Data(on_bad_row="skip"), KEY)

    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        write_rejects(tmp_path / "rejects.jsonl", files)
    finally:
        locale.setlocale(locale.LC_CTYPE, before)

    assert json.loads((tmp_path / "rejects.jsonl").read_bytes())["row"] == {"instruction": "ü", "output": ""}


def test_nothing_is_written_where_nothing_was_rejected(tmp_path: Path) -> None:
    files = load_datasets(str(write_jsonl(tmp_path / "a.jsonl", [instruction(1)])), parse_record, PLAIN, KEY)

    assert write_rejects(tmp_path / "rejects.jsonl", files) == 0
    assert not (tmp_path / "rejects.jsonl").exists()


def test_a_source_is_described_by_its_path_its_hash_and_its_weight(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [instruction(1)])

    (file,) = load_datasets([WeightedDataset(path=str(path), weight=0.5)], parse_record, PLAIN, KEY)

    assert (file.path, file.weight, file.bad_rows) == (str(path), 0.5, ())
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_datasets(str(path), parse_record, PLAIN, KEY)[0].weight == 1


def test_line_that_is_not_utf8_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(instruction(1)).encode() + b'\n{"instruction": "caf\xe9", "output": "a"}\n')

    assert f"{path}:2: encoding: byte 21 of the line is not UTF-8" in refusal(path)


@pytest.mark.parametrize(("start", "line"), [(b"\xff", 1), (b"\n\xff\xfe", 2), (b"\n\xfe\xff", 2)])
def test_bytes_that_are_not_utf8_cost_only_their_line(tmp_path: Path, start: bytes, line: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(start + b"\n" + json.dumps(instruction(1)).encode())

    (bad,) = load_datasets(str(path), parse_record, Data(on_bad_row="skip"), KEY)[0].bad_rows

    assert str(bad) == f"{path}:{line}: encoding: byte 1 of the line is not UTF-8; save the file as UTF-8"


@pytest.mark.parametrize("count", [2, 30])
def test_file_whose_rows_all_fail_for_one_reason_is_told_once(tmp_path: Path, count: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "q", "output": ""}] * count)

    assert refusal(path) == (
        f"{KEY}: none of the {count} rows can be used, all for one reason\n  {path}:1: output: is empty"
    )


def test_rows_that_fail_for_several_reasons_are_told_one_by_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "q", "output": ""}, {"instruction": "q", "output": 1}])

    assert refusal(path) == (
        f"2 of 2 rows cannot be used\n  {path}:1: output: is empty\n  {path}:2: output: found int, wanted text\n"
        "Mend them, or set data.on_bad_row: skip to set them aside."
    )


def test_all_bad_rows_are_told_at_once_the_first_twenty_in_full(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [instruction(0), *({"instruction": "q", "output": ""} for _ in range(25))])

    told = refusal(path)

    assert "25 of 26 rows cannot be used" in told
    assert [f"{path}:{line}: " in told for line in range(2, 27)] == [True] * 20 + [False] * 5
    assert "… and 5 more" in told
    assert "data.on_bad_row: skip" in told


def test_bad_rows_of_all_files_are_told_together(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / name, [{"instruction": "q", "output": ""}]) for name in ("a.jsonl", "b.jsonl")]

    with pytest.raises(UserError) as caught:
        load_datasets([WeightedDataset(path=str(path)) for path in paths], parse_record, PLAIN, KEY)

    assert all(f"{path}:1: output: is empty" in str(caught.value) for path in paths)


def test_mixed_formats_are_refused_at_the_first_row_that_differs(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [instruction(1), {"prompt": "p", "completion": "c"}])

    assert refusal(path).splitlines()[1:-1] == [
        f"  {path}:2: format: found prompt/completion, wanted instruction/input/output as in the first row; "
        "keep one format per file"
    ]


def test_skip_keeps_the_good_rows_and_writes_the_bad_ones_with_their_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"instruction": "q", "output": ""}\n' + json.dumps(instruction(1)).encode() + b"\n\xff\n{]\n")

    files = load_datasets(str(path), parse_record, Data(on_bad_row="skip"), KEY)
    count = write_rejects(tmp_path / "rejects.jsonl", files)

    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record.answer for record in files[0].records] == ["answer 1"]
    assert count == 3
    assert [(row["source"], row["field"]) for row in rejects] == [
        (f"{path}:1", "output"),
        (f"{path}:3", "encoding"),
        (f"{path}:4", "json"),
    ]
    assert rejects[0]["row"] == {"instruction": "q", "output": ""}


def test_skip_can_write_a_row_that_holds_half_a_surrogate_pair(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "q", "output": "\\ud800"}\n' + json.dumps(instruction(1)), encoding="utf-8")

    files = load_datasets(str(path), parse_record, Data(on_bad_row="skip"), KEY)

    assert write_rejects(tmp_path / "rejects.jsonl", files) == 1
    assert json.loads((tmp_path / "rejects.jsonl").read_text(encoding="utf-8"))["field"] == "output"


def test_skip_refuses_a_file_of_bad_rows_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "q", "output": ""}])

    assert "found no usable record" in refusal(path, Data(on_bad_row="skip"))


def test_skip_names_every_file_when_none_holds_a_usable_record(tmp_path: Path) -> None:
    bad = {"instruction": "q", "output": ""}
    paths = [write_jsonl(tmp_path / name, [bad, bad]) for name in ("a.jsonl", "b.jsonl")]
    sources = [WeightedDataset(path=str(path)) for path in paths]

    with pytest.raises(UserError) as caught:
        load_datasets(sources, parse_record, Data(on_bad_row="skip"), KEY)

    assert str(caught.value) == f"{KEY}: found no usable record in {paths[0]}, {paths[1]}."


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_random_bytes_never_end_in_a_traceback(tmp_path: Path, ending: str) -> None:
    """Whatever a file holds, the answer is records or a message; anything else raised here fails the test."""
    generator = random.Random(ending)
    pieces = [b'{"instruction": "q", "output": "a"}', b'{"messages": [', b'"role"', b"{", b"]", b",", b'"', b"\\u", b"\xff",
              b"\x00", b"\r", b"null", b"1e999", b"instruction,output", b"\xef\xbb\xbf", b"NaN", b'{"prompt": {}, "completion": []}',
              b'{"messages": [{"role": null, "content": {}}]}', b"\xe2\x80\xa8"]  # fmt: skip
    path = tmp_path / f"a.{ending}"
    read, told = 0, []
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
                told.append(str(error))

    assert told
    assert all(str(path) in message for message in told)
    assert read > 0 or ending != "jsonl"


# --- what a chat trains, and the system prompt


def test_train_on_decides_which_answers_carry_the_loss() -> None:
    row = {"messages": talk("a", "b", "c", "d")}

    assert parse_record(row, "here", Data(train_on="all")).trained == (1, 3)
    assert parse_record(row, "here", Data(train_on="last")).trained == (3,)
    assert parse_record({"messages": talk(*"abcdef")}, "here", Data(train_on="last")).trained == (5,)
    assert parse_record({"messages": talk("a", "b")}, "here", Data(train_on="last")).trained == (1,)


def test_system_prompt_goes_only_before_conversations_that_bring_none() -> None:
    data = Data(system_prompt="Be brief.")
    own = [{"role": "system", "content": "Mine."}, *talk("a", "b")]

    assert parse_record({"messages": talk("a", "b")}, "here", data).messages[0]["content"] == "Be brief."
    assert parse_record({"messages": own}, "here", data).messages[0]["content"] == "Mine."


# --- the split


def test_every_file_gives_records_to_both_sides(tmp_path: Path) -> None:
    data = Data(validation_ratio=0.5)
    sources = [
        WeightedDataset(path=str(write_jsonl(tmp_path / f"{name}.jsonl", [instruction(n) for n in numbers])))
        for name, numbers in (("a", range(20)), ("b", range(20, 40)))
    ]

    split = split_records(load_datasets(sources, parse_record, data, KEY), data, seed=0)

    assert {Path(record.source).name[0] for record in split.train} == {"a", "b"}
    assert {Path(record.source).name[0] for record in split.validation} == {"a", "b"}
    assert len(split.train) + len(split.validation) == 40


def sides(rows: list[dict], tmp_path: Path, data: Data, name: str = "a.jsonl") -> dict[str, str]:
    """Map each first user turn to its side."""
    files = load_datasets(str(write_jsonl(tmp_path / name, rows)), parse_record, data, KEY)
    split = split_records(files, data, seed=0)
    return {record.messages[0]["content"]: "train" for record in split.train} | {
        record.messages[0]["content"]: "validation" for record in split.validation
    }


def test_split_ignores_order_format_file_and_later_turns(tmp_path: Path) -> None:
    data = Data(validation_ratio=0.3)
    rows = [instruction(number) for number in range(60)]
    shuffled = random.Random(1).sample(rows, len(rows))
    chats = [{"messages": talk(row["instruction"], "something", "else", "entirely")} for row in rows]

    first = sides(rows, tmp_path, data)

    assert set(first.values()) == {"train", "validation"}
    assert sides(shuffled, tmp_path, data, "b.jsonl") == first
    assert sides(chats, tmp_path, data, "c.jsonl") == first
    assert sides(rows[:20], tmp_path, data, "d.jsonl").items() <= first.items()


def test_preference_pairs_fall_on_the_same_side_as_instruction_records(tmp_path: Path) -> None:
    data = Data(validation_ratio=0.3)
    pairs = [{"prompt": f"question {n}", "chosen": "good", "rejected": "bad"} for n in range(60)]
    files = load_datasets(str(write_jsonl(tmp_path / "p.jsonl", pairs)), parse_preference, data, "dpo.dataset_path")

    held_out = [record.prompt[0]["content"] for record in split_records(files, data, seed=0).validation]

    assert held_out == [text for text, side in sides([instruction(n) for n in range(60)], tmp_path, data).items() if side == "validation"]  # fmt: skip


def test_same_prompt_with_several_answers_stays_on_one_side(tmp_path: Path) -> None:
    data = Data(validation_ratio=0.5)
    rows = [{"instruction": f"q{n % 20}" + " " * (n // 20), "output": f"a{n}"} for n in range(80)]
    split = split_records(
        load_datasets(str(write_jsonl(tmp_path / "a.jsonl", rows)), parse_record, data, KEY), data, seed=0
    )

    train, held_out = (
        {record.messages[0]["content"].strip() for record in side} for side in (split.train, split.validation)
    )

    assert len(split.train) + len(split.validation) == 80
    assert not train & held_out


def test_split_seed_changes_who_is_held_out_and_ratio_how_many() -> None:
    prompts = [talk(f"prompt {n}") for n in range(2000)]

    def held_out(**changes: object) -> list[bool]:
        return [is_validation(prompt, Data(**changes)) for prompt in prompts]

    assert sum(held_out(validation_ratio=0.2)) == pytest.approx(400, abs=70)
    assert held_out(validation_ratio=0.2) != held_out(validation_ratio=0.2, split_seed=1)
    assert sum(held_out(validation_ratio=0.0)) == 0
    assert all(b for a, b in zip(held_out(validation_ratio=0.1), held_out(validation_ratio=0.3), strict=True) if a)


def test_split_is_the_one_of_earlier_versions() -> None:
    """A changed hash would move held-out prompts into the training of users who continue old work."""
    found = [n for n in range(40) if is_validation(talk(f"prompt {n}"), Data(validation_ratio=0.2))]

    assert found == [1, 9, 10, 13, 18, 22, 26, 27, 39]


def test_one_prompt_only_cannot_be_split(tmp_path: Path) -> None:
    data = Data(validation_ratio=0.999)
    files = load_datasets(str(write_jsonl(tmp_path / "a.jsonl", [instruction(1)] * 3)), parse_record, data, KEY)

    with pytest.raises(UserError) as caught:
        split_records(files, data, seed=0)

    assert str(caught.value) == (
        "data.validation_ratio: 0.999 leaves no record to train on. Lower it, or vary the prompts: "
        "records with the same prompt always stay on one side."
    )


def test_weights_repeat_records_and_take_a_fixed_part(tmp_path: Path) -> None:
    data = Data(validation_ratio=0.2)
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"instruction": f"{name} {n}", "output": "a"} for n in range(50)])
        for name in "ab"
    ]
    sources = [WeightedDataset(path=str(paths[0]), weight=2.5), WeightedDataset(path=str(paths[1]), weight=0.5)]

    files = load_datasets(sources, parse_record, data, KEY)
    split, again = split_records(files, data, seed=3), split_records(files, data, seed=3)

    unique = [
        len({r.messages[0]["content"] for r in file.records if not is_validation(r.prompt, data)}) for file in files
    ]
    taken = [[r for r in split.train if r.source.startswith(str(path))] for path in paths]
    assert [len(part) for part in taken] == [unique[0] * 2 + round(unique[0] / 2), round(unique[1] / 2)]
    assert len({r.source for r in taken[1]}) == len(taken[1])
    assert [r.source for r in again.train] == [r.source for r in split.train]
    assert len({r.source for r in split.validation}) == len(split.validation)


def test_duplicates_and_shared_answers_are_counted(tmp_path: Path) -> None:
    rows = [instruction(1), instruction(1), instruction(1, input="x"), instruction(2)]
    data = Data(validation_ratio=0.5)
    many = [{"instruction": f"q{n}", "output": "the same"} for n in range(30)]
    split = split_records(
        load_datasets(str(write_jsonl(tmp_path / "b.jsonl", many)), parse_record, data, KEY), data, seed=0
    )

    assert count_duplicates(load(write_jsonl(tmp_path / "a.jsonl", rows))) == 1
    assert shared_answers(split) == len(split.validation) > 0


# --- data nobody here wrote


@pytest.mark.parametrize("name", ["sft_dolly_hhrlhf_1k", "sft_banking77", "sft_gsm8k_train"])
def test_public_instruction_data_loads(shared_data: Path, name: str) -> None:
    path = shared_data / name / "train.jsonl"
    lines = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))

    loaded = load_datasets(str(path), parse_record, Data(on_bad_row="skip"), KEY)[0]

    assert len(loaded.records) + len(loaded.bad_rows) == lines
    assert len(loaded.records) >= 0.99 * lines


def test_public_preference_data_is_refused_as_instruction_data(shared_data: Path) -> None:
    assert "found preference pairs, wanted instruction records" in refusal(shared_data / "pref_llmbar" / "pairs.jsonl")


def test_sample_data_has_no_bad_row_and_no_duplicate() -> None:
    loaded = load(Path("data/sft/sample_sft.jsonl"))

    assert len(loaded) >= 200
    assert count_duplicates(loaded) == 0
