"""Records: every format and file type, every bad row with its place, and one split for all stages."""

from __future__ import annotations

import hashlib
import json
import locale
from pathlib import Path

import pytest

from scripts.common.errors import UserError
from scripts.common.schema import Data, WeightedDataset
from scripts.dataset.records import (
    count_duplicates,
    load_datasets,
    parse_feedback,
    parse_preference,
    parse_record,
    write_rejects,
)
from tests.conftest import write_jsonl
from tests.support.records import KEY, PLAIN, instruction, load, refusal, talk

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


# --- thumbs


@pytest.mark.parametrize(
    ("label", "liked"),
    [
        *((label, True) for label in (True, 1, 1.0, "true", "True", "TRUE", "1", " up", "Up")),
        *((label, False) for label in (False, 0, 0.0, "false", "False", "0", "down", "DOWN ")),
    ],
)
def test_a_thumb_is_read_as_files_and_tables_write_it(label: object, liked: bool) -> None:
    feedback = parse_feedback({"prompt": "q", "completion": "a", "label": label}, "here:1", PLAIN)

    assert (feedback.liked, list(feedback.messages), feedback.trained) == (liked, talk("q", "a"), (1,))
    assert feedback.answer == "a"


@pytest.mark.parametrize("value", [False, "true", "N/A"])
def test_a_column_without_a_name_is_none_that_a_layout_lacks(tmp_path: Path, value: object) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "q", "output": "a", "": value}])
    (file,) = load_datasets(str(path), parse_record, Data(), "sft.dataset_path")
    assert [list(record.messages) for record in file.records] == [talk("q", "a")]


def test_a_rated_conversation_trains_its_last_answer_only() -> None:
    row = {"prompt": talk("q", "a", "q2"), "completion": talk("x", "b")[1:], "label": False}
    feedback = parse_feedback(row, "here:1", Data(system_prompt="Be brief."))

    assert list(feedback.messages) == [SYSTEM, *talk("q", "a", "q2", "b")]
    assert feedback.answers == ("b",)


def test_a_pair_is_a_thumb_up_and_a_thumb_down_on_the_same_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b", "customer": n} for n in range(2)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    (file,) = load_datasets(str(path), parse_feedback, Data(group_field="customer"), "kto.dataset_path")

    found = [(record.source, list(record.messages), record.liked, record.group) for record in file.records]
    assert found[:2] == [(f"{path}:1", talk("q0", "a"), True, "0"), (f"{path}:1", talk("q0", "b"), False, "0")]
    assert len(found) == 4


RATED = {"prompt": "q", "completion": "a"}
BAD_THUMBS = [
    *(({**RATED, "label": label}, f"label: found {label!r}, wanted true or false") for label in (2, -1, 0.5, "good", [True])),
    *(({**RATED, "label": label}, "label: is missing, wanted prompt, completion and label") for label in (None, "")),
    (RATED, "label: is missing, wanted prompt, completion and label; set sft.dataset_path to this file, if all are good"),
    ({**RATED, "lable": True}, "label: is missing, wanted prompt, completion and label; rename `lable` to `label`"),
    ({**RATED, "label": True, "completion": talk("q", "a")}, "completion: wanted exactly one assistant turn"),
    ({**RATED, "label": True, "prompt": talk("q", "a")}, "messages: found the turns user, assistant"),
    ({**RATED, "label": True, "completion": " "}, "completion: is empty"),
    ({"prompt": "q", "chosen": "a", "rejected": "a "}, "rejected: is the same as chosen"),
    (instruction(1), "fields: found instruction/input/output, wanted prompt, completion and label; set sft.dataset_path"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "said"), BAD_THUMBS)
def test_bad_thumb_is_reported_with_its_field_and_reason(tmp_path: Path, row: dict, said: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])

    with pytest.raises(UserError) as caught:
        load_datasets(str(path), parse_feedback, PLAIN, "kto.dataset_path")

    assert f"{path}:1: {said}" in str(caught.value)


@pytest.mark.parametrize("label", [True, False, 0, "1", "down"])
@pytest.mark.parametrize("parse", [parse_record, parse_preference])
def test_thumbs_given_to_another_stage_name_the_stage_that_learns_from_them(tmp_path: Path, parse, label) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**RATED, "label": label}])

    with pytest.raises(UserError) as caught:
        load_datasets(str(path), parse, PLAIN, "x.dataset_path")

    assert f"{path}:1: label: " in str(caught.value)
    assert "set kto.dataset_path to this file and run python -m scripts.train_kto" in str(caught.value)


@pytest.mark.parametrize("label", ["billing", 7, None])
def test_a_label_that_is_no_thumb_is_no_matter_to_sft(label: object) -> None:
    assert parse_record({**RATED, "label": label}, "here:1", PLAIN).answer == "a"


BAD_PAIRS = [
    (instruction(1), "fields: found instruction/input/output, wanted prompt, chosen and rejected; set sft.dataset_path to this file"),
    ({"chosen": "a", "rejected": "b"}, "prompt: is missing; only message lists may carry it inside chosen and rejected"),
    ({"chosen": "a", "rejected": talk("q", "b")}, "prompt: is missing; only message lists may carry it inside chosen and rejected"),
    ({"chosen": talk("q", "a"), "rejected": "b"}, "prompt: is missing; only message lists may carry it inside chosen and rejected"),
    ({"prompt": "q", "chosen": talk("q", "a", "q2", "b"), "rejected": "b"}, "chosen: wanted exactly one assistant turn after the prompt"),
    ({"prompt": "q", "chosen": "a", "rejected": talk("other", "b")}, "rejected: wanted exactly one assistant turn after the prompt; its turn 1 is user 'other', in the prompt user 'q'. Make both the same, or take the prompt from chosen and rejected: columns: {prompt: null}"),
    ({"prompt": "q", "chosen": talk("a"), "rejected": "b"}, "chosen: wanted exactly one assistant turn after the prompt"),
    ({"prompt": "q", "chosen": " a", "rejected": "a\n"}, "rejected: is the same as chosen, so there is nothing to prefer"),
    ({"prompt": talk("q", "a"), "chosen": "a", "rejected": "b"}, "messages: found the turns user, assistant; wanted [system,] user, assistant, … ending with user"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt: found int, wanted text or a list of messages with role and content"),
    ({"chosen": talk("q", "a"), "rejected": talk("q", "b", "q2", "c")}, "rejected: wanted a pair that shares everything before its last answer; chosen and rejected differ from turn 2 on: assistant 'a' and assistant 'b'"),
    ({"prompt": "q", "chosen": " ", "rejected": "b"}, "chosen: is empty"),
    ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected: found NoneType, wanted text or a list of messages with role and content"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "said"), BAD_PAIRS)
def test_bad_pair_is_reported_with_its_field_and_reason(tmp_path: Path, row: dict, said: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])

    with pytest.raises(UserError) as caught:
        load_datasets(str(path), parse_preference, PLAIN, "dpo.dataset_path")

    assert str(caught.value).splitlines()[1:-1] == [f"  {path}:1: {said}"]


# --- bad rows

BAD_ROWS = [
    ('{"instruction": 5, "output": "a"}', "instruction: found int, wanted text"),
    ('{"instruction": "q", "output": null}', "output: found NoneType, wanted text"),
    ('{"instruction": "q", "output": " \\n"}', "output: is empty"),
    ('{"instruction": "", "input": " ", "output": "a"}', "instruction: instruction and input are both empty"),
    ('{"instruction": "q", "input": 3, "output": "a"}', "input: found int, wanted text"),
    ('{"instruction": "q", "output": "\\ud800"}', "output: holds half of a surrogate pair"),
    ('{"ask": "q", "tell": "a"}', "fields: found ask, tell; say beside the path which column is which, such as columns: {ask: instruction, tell: output}"),
    ("{}", "fields: found none; wanted one of"),
    ('{"instruction": "q", "output"', "json: not valid JSON"),
    ("[1]", "json: found list, wanted an object"),
    ('"text"', "json: found str, wanted an object"),
    ("null", "json: found NoneType, wanted an object"),
    ('{"prompt": "q", "chosen": "a", "rejected": "b"}', "fields: found preference pairs, wanted instruction records"),
    ('{"messages": []}', "messages: found list, wanted text or a list of messages"),
    ('{"messages": 3}', "messages: found int, wanted text or a list of messages"),
    ('{"messages": ["a"]}', "messages[0]: wanted an object with role and content"),
    ('{"messages": [{"role": "narrator", "content": "a"}]}', "messages[0].role: found 'narrator', wanted one of system, user"),
    ('{"messages": [{"role": ["user"], "content": "a"}]}', "messages[0].role: found ['user'], wanted one of"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "messages: found the turns user; wanted"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages: found the turns assistant; wanted"),
    ('{"messages": [{"role": "system", "content": "a"}]}', "messages: found the turns system; wanted"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "messages: found the turns user, user"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 1}]}', "messages[1].content: found int"),
    ('{"prompt": "q", "completion": [{"role": "user", "content": "a"}]}', "messages: found the turns user, user"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "said"), BAD_ROWS)
def test_bad_row_is_reported_with_file_line_field_and_reason(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{line}\n", encoding="utf-8")

    message = refusal(path)

    heading, row, fix = message.splitlines()
    assert heading == "1 of 1 rows cannot be used"
    assert row.startswith(f"  {path}:2: {said}")
    assert fix == "Fix them, or set data.on_bad_row: skip to set them aside."


WANTED = "wanted one of: instruction + output; chosen + rejected; prompt + completion; messages; other names are mapped with columns: {name: field}"


ORDER = "wanted [system,] user, assistant, … ending with assistant"


WHOLE_REASONS = [
    ('{"instruction": 5, "output": "a"}', 'instruction: found int, wanted text; write a number in quotes: "5"'),
    ('{"instruction": "", "input": " ", "output": "a"}', "instruction: instruction and input are both empty"),
    ('{"instruction": "q", "output": " "}', "output: is empty"),
    ('{"instruction": "q", "output": "\\ud800"}', "output: holds half of a surrogate pair, which no tokenizer can read"),
    ('{"instruction": "q", "output": "\\udfff"}', "output: holds half of a surrogate pair, which no tokenizer can read"),
    ('{"output": "a"}', f"fields: found output; {WANTED}"),
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
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', f"messages: found the turns user, user; {ORDER}; data.merge_turns: true joins consecutive turns of one role"),
    ('{"prompt": 1, "completion": "a"}', "prompt: found int, wanted text or a list of messages with role and content"),
    ('{"prompt": "q", "completion": " "}', "completion: is empty"),
    ('{"instruction": "q", "outputs": "a"}', "fields: found instruction, outputs; rename `outputs` to `output`, or write beside the path columns: {outputs: output}"),
    ('{"images": [], "text": "a"}', "fields: found images, text: one text with question and answer in it; only the answer is trained, so put them apart, into two columns such as instruction and output; other names are mapped beside the path: columns: {question: instruction, answer: output}"),
    ('"text"', "json: found str, wanted an object {…}"),
    ('{"instruction": "q", "output": "a", "output": "b"}', "json: not valid JSON (`output` is written twice); one object per line"),
    ('{"instruction": "q", "output": "a"},', "json: not valid JSON (Extra data: line 1 column 36 (char 35)); one object per line, without a comma at its end"),
    ('\ufeff{"instruction": "q", "output": "a"}', "json: not valid JSON (Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 column 1 (char 0)); one object per line"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), WHOLE_REASONS)
def test_reason_of_a_bad_row_is_reported_in_these_words(tmp_path: Path, line: str, reason: str) -> None:
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


def test_rejects_are_utf8_in_every_locale(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("count", [2, 30])
def test_file_whose_rows_all_fail_for_one_reason_is_reported_once(tmp_path: Path, count: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "q", "output": ""}] * count)

    assert refusal(path) == (
        f"{KEY}: none of the {count} rows can be used, all for one reason\n  {path}:1: output: is empty"
    )


def test_rows_that_fail_for_several_reasons_are_reported_one_by_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "q", "output": ""}, {"instruction": "q", "output": []}])

    assert refusal(path) == (
        f"2 of 2 rows cannot be used\n  {path}:1: output: is empty\n  {path}:2: output: found list, wanted text or a list of messages with role and content\n"
        "Fix them, or set data.on_bad_row: skip to set them aside."
    )


def test_all_bad_rows_are_reported_at_once_the_first_twenty_in_full(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [instruction(0), *({"instruction": "q", "output": ""} for _ in range(25))])

    message = refusal(path)

    assert "25 of 26 rows cannot be used" in message
    assert [f"{path}:{line}: " in message for line in range(2, 27)] == [True] * 20 + [False] * 5
    assert "… and 5 more" in message
    assert "data.on_bad_row: skip" in message


def test_bad_rows_of_all_files_are_reported_together(tmp_path: Path) -> None:
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
