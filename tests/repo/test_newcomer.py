"""A newcomer's first hour: every stumble of a walk through the README is read, or answered with what to type next."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from scripts import deid_presidio, train_dpo, train_sft
from scripts.common.config import load_config
from scripts.common.errors import UserError
from scripts.common.schema import Data
from scripts.dataset.files import read_rows
from scripts.dataset.records import load_datasets, parse_preference, parse_record
from scripts.dataset.writing import open_output
from scripts.deid.files import read_input
from scripts.model.find import find_model
from scripts.model.fingerprint import base_fingerprint
from tests.conftest import ROOT, run_python, write_jsonl
from tests.support.chain import manifest, write_chain

SFT = "sft.dataset_path"
GERMAN = "instruction;input;output\r\nSchreibe höflich;Größe: 42, rot;Sehr geehrte Frau Müller\r\n"


def refusal(path: str | Path, parse=parse_record, key: str = SFT) -> str:
    """Return the error message about a data file that cannot be used."""
    with pytest.raises(UserError) as caught:
        load_datasets(str(path), parse, Data(), key)
    return str(caught.value)


# --- data files as Excel and others write them


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_csv_of_any_country_is_read(tmp_path: Path, separator: str, mark: bytes) -> None:
    text = (GERMAN.replace("Größe: 42, rot", '"Größe: 42, rot"') if separator == "," else GERMAN).replace(
        ";", separator
    )
    path = tmp_path / "mine.csv"
    path.write_bytes(mark + text.encode() + (separator * 2 + "\r\n").encode() * 3)

    (record,) = load_datasets(str(path), parse_record, Data(), SFT)[0].records

    assert record.messages[0]["content"] == "Schreibe höflich\n\nGröße: 42, rot"
    assert record.answer == "Sehr geehrte Frau Müller"


def test_deidentified_copy_of_such_a_csv_has_the_same_rows(tmp_path: Path) -> None:
    source, out = tmp_path / "mine.csv", tmp_path / "mine.deid.csv"
    source.write_bytes(b"\xef\xbb\xbf" + GERMAN.encode())
    with open_output(out, source) as write:
        for _, row in read_input(source):
            write(row)

    assert [row for _, row in read_rows(out)] == [row for _, row in read_rows(source)]
    assert [list(row) for _, row in read_rows(out)] == [["instruction", "input", "output"]]


@pytest.mark.parametrize(
    "words",
    [
        ("请礼貌地回复", "尊敬的客户，感谢您"),
        ("اكتب ردًا مهذبًا", "عزيزي العميل، شكرًا"),
        ("Пиши вежливо", "Уважаемый клиент"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_text_of_any_language_is_read_as_it_is(tmp_path: Path, words: tuple[str, str], ending: str) -> None:
    path = tmp_path / f"mine.{ending}"
    if ending == "csv":
        path.write_text(f"instruction,output\n{words[0]},{words[1]}\n", encoding="utf-8")
    else:
        write_jsonl(path, [{"instruction": words[0], "output": words[1]}])

    (record,) = load_datasets(str(path), parse_record, Data(), SFT)[0].records

    assert (record.messages[0]["content"], record.answer) == words


UNREADABLE = {
    "cp1252.csv": (GERMAN.encode("cp1252"), ["cp1252.csv:2: byte 37 is not UTF-8", "CSV UTF-8", "iconv -f CP1252"]),
    "utf16.csv": (GERMAN.encode("utf-16"), ["utf16.csv:1: is UTF-16", "CSV UTF-8", "iconv -f UTF-16"]),
    "utf16.jsonl": ('{"instruction": "q", "output": "a"}\n'.encode("utf-16"), ["utf16.jsonl:1: is UTF-16"]),
    "pretty.jsonl": (b'[\n  {\n   "instruction": "q"\n', ["pretty.jsonl:1: JSON that goes over several lines", "ends in .json"]),
    "list.jsonl": (b'[{"instruction": "q", "output": "a"}]\n', ["a list of records is read from a file that ends in .json"]),
    "comma.jsonl": (b'{"instruction": "q", "output": "a"},\n', ["without a comma at its end"]),
    "lines.json": (b'{"a": 1}\n{"a": 2}\n', ["lines.json:2", "one object per line is .jsonl"]),
    "sheet.xlsx": (b"PK", ["sheet.xlsx: not a workbook that can be read"]),
    "unquoted.csv": (b"instruction,output\nSay hi,Hello, friend\nSay ho,Ho\n", ["unquoted.csv:2", 'put "quotes" around']),
    "typo.csv": (b"instrution,output\nq,a\nr,b\n", ["none of the 2 rows", "typo.csv:2", "rename `instrution` to `instruction`"]),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_file_that_cannot_be_used_says_how_to_save_or_rename(tmp_path: Path, name: str) -> None:
    content, said = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)

    answer = refusal(tmp_path / name)

    assert [part for part in said if part not in answer] == [], answer


def test_misspelt_column_of_preferences_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "choosen": "a", "rejected": str(n)} for n in range(30)]

    answer = refusal(write_jsonl(tmp_path / "pairs.jsonl", rows), parse_preference, "dpo.dataset_path")

    assert answer.startswith("dpo.dataset_path: none of the 30 rows can be used, all for one reason")
    assert "rename `choosen` to `chosen`" in answer
    assert len(answer.splitlines()) == 2


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ("data/sft/mydta.csv", "Did you mean data/sft/mydata.csv?"),
        ("dat/sft/mydata.csv", "Did you mean data?"),
        ("data\\sft\\mydata.csv", "Write / between folders: data/sft/mydata.csv."),
        ("~/mydata.csv", "Only a shell knows ~; write "),
        ("somewhere", "Correct the path, or give a Hub dataset id"),
    ],
)
def test_path_of_data_that_leads_nowhere(tmp_path: Path, monkeypatch, wrong: str, fix: str) -> None:
    (tmp_path / "data" / "sft").mkdir(parents=True)
    (tmp_path / "data" / "sft" / "mydata.csv").write_text("instruction,output\nq,a\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    answer = refusal(wrong)

    assert answer.startswith(f"{SFT}: {wrong}: no such file.")
    assert fix in answer


# --- the configuration


@pytest.mark.parametrize(
    ("content", "fix"),
    [
        (b"# f\xfcr uns\nseed: 1\n", "my.yaml:1: byte 4 is not UTF-8"),
        ("seed: 1\n".encode("utf-16"), "my.yaml:1: is UTF-16"),
        (b"sft:\n\toutput_dir: a\n", ":2: not valid YAML: found character '\\t' that cannot start any token; indent with spaces"),
        (b'sft:\n  dataset_path: "data\\sft\\my.csv"\n', ":2: not valid YAML: found unknown escape character 's'; in \"double"),
        (b'sft:\n  dataset_path: "C:\\Users\\me"\n', "write paths with /, or without quotes"),
        (b"base_model_id:models/x\n", "with a space after the colon"),
        (b"base_model_id:models/x\nseed: 1\n", "a space follows each key's colon"),
        (b"data:\n  system_prompt: You are kind: always\n", "text that holds `: ` stands in quotes"),
        (b"sft:\n  output_dir: out\\sft\n", ':2: sft.output_dir: found "out\\\\sft"; wanted / between folders'),
        (b"dpo:\n  output_dir: ~/out\n", ':2: dpo.output_dir: found "~/out"; wanted a path without ~'),
    ],
)  # fmt: skip
def test_configuration_that_an_editor_or_windows_spoilt(tmp_path: Path, content: bytes, fix: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(content)

    with pytest.raises(UserError) as caught:
        load_config(path)

    assert fix in str(caught.value)


def test_configuration_with_windows_line_ends_and_byte_order_mark_is_read(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())

    assert load_config(path).values == load_config(ROOT / "configs" / "demo.yaml").values


def test_missing_configuration_names_the_nearest_and_ones_that_can_be_typed_here(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 1\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError) as caught:
        load_config("mine.yml")

    assert "Did you mean mine.yaml?" in str(caught.value)
    shown = str(caught.value).partition("There are: ")[2].split(", ")
    assert len(shown) >= 4
    assert all(Path(name).is_file() for name in shown)


# --- models and adapters


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ("models/smollm2-instuct", "Did you mean models/smollm2-instruct?"),
        ("models/smol", "Did you mean models/smollm2-instruct?"),
        ("models\\smollm2-instruct", "Write / between folders: models/smollm2-instruct."),
        ("./model/smollm2-instruct", "Did you mean models?"),
    ],
)
def test_model_that_is_not_there(tmp_path: Path, monkeypatch, wrong: str, fix: str) -> None:
    (tmp_path / "models" / "smollm2-instruct").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError, match="no such model folder") as caught:
        find_model(wrong)

    assert fix in str(caught.value)


def test_model_whose_copy_was_cut_off_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    with pytest.raises(UserError, match="damaged or cut off"):
        base_fingerprint(folder)


def test_dpo_before_sft_says_which_command_comes_first(tmp_path: Path, capsys) -> None:
    config = write_chain(tmp_path)

    assert train_dpo.main(["--config", str(config), "--dry-run"]) == 2
    assert "python -m scripts.train_sft" in capsys.readouterr().err


def test_misspelt_input_of_deidentification_names_the_nearest(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("{}\n", encoding="utf-8")
    config = str(ROOT / "configs/demo.yaml")

    assert deid_presidio.main(["--config", config, "--in", "mnie.jsonl", "--out", "out.jsonl"]) == 2
    assert "Did you mean mine.jsonl?" in capsys.readouterr().err


# --- how a stage is started


def test_stage_under_a_python_without_packages_says_how_to_get_them(tmp_path: Path) -> None:
    """The commonest first stumble: the environment of `make setup` is there, but not entered."""
    # Without site-packages.
    bare = run_python("-I", "-S", ROOT / "scripts/train_sft.py", cwd=tmp_path)

    assert bare.returncode == 1
    assert "source .venv/bin/activate" in bare.stderr
    assert "python -m scripts.doctor" in bare.stderr
    assert "Traceback" not in bare.stderr


def test_own_table_in_a_folder_with_spaces_is_trained_from_another_working_folder(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    """20 records of one's own from Excel, paths relative to a folder whose name has spaces, one record held out or more."""
    home = tmp_path / "new comer" / "my project"
    home.mkdir(parents=True)
    config = yaml.safe_load(write_chain(home).read_text(encoding="utf-8"))
    rows = "".join(f"Antworte höflich {n};Größe {n};Gern, Frau Müller {n}\r\n" for n in range(20))
    (home / "mine.csv").write_bytes(b"\xef\xbb\xbfinstruction;input;output\r\n" + rows.encode())
    config["sft"] |= {"dataset_path": "mine.csv", "output_dir": "my outputs/sft", "trainer": {"max_steps": 2}}
    config["tracking"] = {"mlflow_tracking_uri": "sqlite:///my runs.db"}
    (home / "mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.chdir(home)

    code = train_sft.main(["--config", "mine.yaml", "--set", "data.system_prompt=Be kind"])

    shown = capsys.readouterr().err
    assert code == 0, shown
    assert "next           python -m scripts.train_dpo --config mine.yaml --set 'data.system_prompt=Be kind'\n" in shown
    assert 'mlflow ui --port 5000 --backend-store-uri "sqlite:///my runs.db"' in shown
    assert manifest(home / "my outputs" / "sft")["datasets"][0]["train"] in range(10, 20)
    assert (home / "my runs.db").is_file()
