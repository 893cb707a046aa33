"""Hostile and mistaken configurations, command lines and data, given to the commands as a user gives them.

Each line of the tables is a case: what is given, and the part of the one message that makes it helpful. The exit code is
2, there is no traceback, and nothing is written. Models and adapters: tests/model/test_bad_models.py.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from tests.support.manifests import finish_folder
from tests.support.projects import PAIRS, ROWS, Project, replace, write_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Project:
    """Return a project whose model and adapter are names only: everything here is refused before they are read."""
    for name in ("model", "sft_adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    finish_folder(tmp_path / "sft_adapter")
    monkeypatch.chdir(write_project(tmp_path))
    return Project(tmp_path, capsys)


# --- configurations ---

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "NUL": ("seed: 1\x00\n", "config.yaml:1: not valid YAML"),
    "bell": ("seed: 1\nlora:\n  r: 8\x07\n", "config.yaml:3: not valid YAML"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "config.yaml:1: is UTF-16. Save the file as UTF-8"),
    "alias to itself": ("sft: &a\n  trainer: *a\n", "config.yaml"),
    "list in itself": ("eval: {checks: &a [*a]}\n", "config.yaml"),
    "a billion laughs": (BOMB, "config.yaml"),
    "merge bomb": ("sft: &a {<<: [*a, *a]}\n", "config.yaml"),
    "nested lists": ("sft: " + "[" * 20_000, "nested too deeply"),
    "nested maps": ("sft: " + "{a: " * 5_000, "nested too deeply"),
    "impossible date": ("seed: 2026-99-99\n", "config.yaml:1"),
    "tag int": ("seed: !!int abc\n", "config.yaml:1"),
    "tag float": ("seed: !!float abc\n", "config.yaml:1"),
    "tag bool": ("offline: !!bool maybe\n", "config.yaml:1"),
    "tag timestamp": ("seed: !!timestamp soon\n", "config.yaml:1"),
    "tag binary": ("seed: !!binary '****'\n", "config.yaml:1"),
    "tag set": ("seed: !!set {a, b}\n", "seed: found"),
    "tag of Python": ("seed: !!python/name:os.system\n", "config.yaml:1: not valid YAML"),
    "own tag": ("seed: !secret x\n", "config.yaml:1: not valid YAML"),
    "number of 5000 digits": (f"seed: {'9' * 5000}\n", "config.yaml:1"),
    "merge of a number": ("lora:\n  <<: 3\n", "config.yaml:2: not valid YAML"),
    "key that begins like a type": ("strategy: 1\n", "config.yaml:1: strategy: unknown key"),
    "key of brackets": ("lora: {'[r]': 1}\n", "config.yaml:1: lora.[r]: unknown key"),
    "tab": ("lora:\n\tr: 8\n", "config.yaml:2: not valid YAML"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "config.yaml:2: not valid YAML"),
    "unknown alias": ("seed: *other\n", "config.yaml:1: not valid YAML"),
    "number as key": ("1: 2\n", "config.yaml:1: 1: unknown key"),
    "null as key": ("~: 2\n", "config.yaml"),
    "list as key": ("? [a]\n: b\n", "config.yaml:1: not valid YAML"),
    "date as key": ("2026-01-01: 1\n", "config.yaml:1: 2026-01-01: unknown key"),
    "section as list": ("lora:\n- r: 8\n", "config.yaml:1: lora: found"),
    "section as text": ("lora: 'r: 8'\n", "config.yaml:1: lora: found"),
    "no space after the colon": ("lora:\n  r:8\n", "config.yaml:1: lora: found"),
    "indented wrongly": ("lora:\n  r: 8\n alpha: 3\n", "config.yaml:3: not valid YAML"),
    "Windows path in double quotes": ('sft:\n  dataset_path: "C:\\data\\mine.jsonl"\n', "write paths with /, or without quotes"),
    "Norway": ("deid:\n  language: no\n", "deid.language: found false; wanted a text"),
    "number as name": ("base_model_id: 7\n", "config.yaml:1: base_model_id: found 7; wanted a text"),
    "octal": ("lora:\n  r: 08\n", 'config.yaml:2: lora.r: found "08"'),
    "seed too large": ("seed: 4294967296\n", "config.yaml:1: seed: found 4294967296; wanted less than"),
    "seed below zero": ("seed: -1\n", "config.yaml:1: seed: found -1"),
    "threads without end": ("performance:\n  threads: 1000000000\n", "config.yaml:2: performance.threads"),
    "unknown device": ("performance:\n  device: tpu\n", "wanted 'auto', 'cpu' or 'cuda'"),
    "4 and 8 bits": ("quantization:\n  load_in_4bit: true\n  load_in_8bit: true\n", "only one of"),
    "infinite rate": ("sft:\n  learning_rate: 1e999\n", "config.yaml:2: sft.learning_rate: found"),
    "rate with a unit": ("sft:\n  learning_rate: 2e-4/step\n", 'found "2e-4/step"; wanted a number'),
    "negative rate": ("sft:\n  learning_rate: -1e-4\n", "wanted greater than 0"),
    "rank as list": ("lora:\n  r: [8]\n", "config.yaml:2: lora.r: found [8]"),
    "rank of a universe": ("lora:\n  r: 1000000000000\n", "config.yaml:2: lora.r: found"),
    "empty list of datasets": ("sft:\n  dataset_path: []\n", "config.yaml:2: sft.dataset_path"),
    "weight of a universe": ("sft:\n  dataset_path:\n  - path: sft.jsonl\n    weight: 1e12\n", ":4: sft.dataset_path.0.weight"),
    "misspelt in a list": ("sft:\n  dataset_path:\n  - file: sft.jsonl\n", "sft.dataset_path.0.file: unknown key"),
    "output is here": ("sft:\n  output_dir: .\n", "config.yaml:2: sft.output_dir"),
    "output is above": ("sft:\n  output_dir: ../..\n", "config.yaml:2: sft.output_dir"),
    "output is the root": ("sft:\n  output_dir: /\n", "config.yaml:2: sft.output_dir"),
    "output is nothing": ("sft:\n  output_dir: ''\n", "config.yaml:2: sft.output_dir"),
    "output with NUL": ('sft:\n  output_dir: "a\\0b"\n', "config.yaml:2: sft.output_dir"),
    "one output for two stages": ("sft:\n  output_dir: o\ndpo:\n  output_dir: ./o\n", "dpo.output_dir"),
    "comparison over the adapter": ("eval:\n  output_dir: outputs/sft_adapter\n", "eval.output_dir"),
    "unknown trainer argument": ("sft:\n  trainer:\n    max_step: 3\n", "did you mean `sft.trainer.max_steps`?"),
    "NaN for TRL": ("sft:\n  trainer:\n    weight_decay: .nan\n", "sft.trainer.weight_decay: found NaN; wanted a finite number"),
    "one judge": ("eval:\n  judge:\n    models: [sft]\n", "eval.judge.models"),
    "judge with a password": ("eval:\n  judge:\n    base_url: http://me:secret@host/v1\n", "eval.judge.base_url"),
    "judge by file": ("eval:\n  judge:\n    base_url: file:///etc/passwd\n", "eval.judge.base_url"),
    "unknown operator": ("deid:\n  operators:\n    PERSON: explode\n", "deid.operators.PERSON"),
    "threshold above 1": ("deid:\n  thresholds:\n    PERSON: 3\n", "deid.thresholds.PERSON"),
    "unknown loss": ("dpo:\n  loss_type: sigmoids\n", "dpo.loss_type"),
    "beta of zero": ("dpo:\n  beta: 0\n", "dpo.beta: found 0; wanted greater than 0"),
    "secret in the wrong place": ("serve:\n  api_key: hunter2\n", "serve.api_key: unknown key"),
    "JSON with a comma too many": ('{"seed": 1,, "offline": true}', "config.yaml:1: not valid YAML"),
    "XML": ("<config><seed>1</seed></config>\n", "found str, wanted `key: value` lines"),
    "TOML": ("[lora]\nr = 8\n", "config.yaml"),
    "Git conflict": ("seed: 1\n<<<<<<< HEAD\nlora:\n  r: 8\n=======\n", "config.yaml:3: not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_configuration(case: str, project: Project) -> None:
    content, said = CONFIGS[case]
    replace(project.folder / "config.yaml", content)

    project.refused(said, "sft", "--config", "config.yaml", "--dry-run")


# --- the command line ---

CLI: list[tuple[str, list[str], str]] = [
    ("sft", ["config.yaml"], "unrecognized arguments: config.yaml"),
    ("sft", ["--config"], "expected one argument"),
    ("sft", ["--config", ""], "wanted a YAML file"),
    ("sft", ["--config", "."], "wanted a YAML file"),
    ("sft", ["--config", "config.yaml/inner.yaml"], "config.yaml/inner.yaml: no such configuration file"),
    ("sft", ["--config", "x" * 5000], "File name too long"),
    ("sft", ["--config", "loop.yaml"], "loop.yaml"),
    ("sft", ["--config", "/dev/null/config.yaml"], "no such configuration file"),
    ("sft", ["--config", "config.yaml", "--set"], "expected one argument"),
    ("sft", ["--config", "config.yaml", "--set", ""], "wanted KEY=VALUE"),
    ("sft", ["--config", "config.yaml", "--set", "=1"], "wanted KEY=VALUE"),
    ("sft", ["--config", "config.yaml", "--set", "..=1"], "wanted KEY=VALUE"),
    ("sft", ["--config", "config.yaml", "--set", "sft.=1"], "wanted KEY=VALUE"),
    ("sft", ["--config", "config.yaml", "--set", "sft=1"], "--set: sft: found 1"),
    ("sft", ["--config", "config.yaml", "--set", "seed=" + "[" * 100_000], "--set: seed: found"),
    ("sft", ["--config", "config.yaml", "--set", "seed=" + "9" * 5000], "--set: seed: found"),
    ("sft", ["--config", "config.yaml", "--set", "sft.learning_rate=NaN"], "--set: sft.learning_rate: found NaN"),
    ("sft", ["--config", "config.yaml", "--set", "base_model_id=\udcff"], "a text holds something that is not a character"),
    ("sft", ["--config", "config.yaml", "--set", "sft.trainer.x.y=1"], "sft.trainer.x: TRL's SFTConfig has no such argument"),
    ("sft", ["--config", "config.yaml", "--set", "seed.x=1"], "--set: seed: found"),
    ("dpo", ["--config", "config.yaml", "--set", "dpo.beta=1e-4x"], "--set: dpo.beta"),
    ("export", ["--format", "zip"], "invalid choice: 'zip'"),
    ("export", ["--dtype", "int3"], "invalid choice: 'int3'"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--out_dir", "model"], "is there already and is not a folder of stage `merged`"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--out_dir", "sft.jsonl"], "is there already and is not a folder of stage `merged`"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--out_dir", "sft.jsonl/x"], "sft.jsonl"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--out_dir", "."], "--out_dir: . is there already"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--out_dir", ".."], "--out_dir: .. is there already"),
    ("lmeval", ["--task", "domain"], "required: --model_path"),
    ("lmeval", ["--model_path", "base"], "required: --task"),
    ("lmeval", ["--model_path", "base", "--task", "domain", "--limit", "many"], "invalid int value: 'many'"),
    ("lmeval", ["--config", "config.yaml", "--model_path", "", "--task", "domain"], "no valid manifest.json"),
    ("lmeval", ["--config", "config.yaml", "--model_path", "sft.jsonl", "--task", "domain"], "sft.jsonl: no such folder"),
    ("lmeval", ["--config", "config.yaml", "--model_path", "base", "--task", "multiple_choice=model"], "model: no such file"),
    ("compare", ["--config", "config.yaml"], "there is no adapter to compare"),
    ("compare", ["--config", "config.yaml", "--set", 'eval.checks=[{"name": "a", "regex": "("}]'], "eval.checks[0].regex"),
    ("compare", ["--config", "config.yaml", "--set", 'eval.checks=[{"name": "a"}, {"name": "a"}]'], "two checks share a name"),
    ("judge", ["--config", "config.yaml"], "one of the arguments --by --votes is required"),
    ("judge", ["--config", "config.yaml", "--by", "dice"], "invalid choice: 'dice'"),
    ("judge", ["--config", "config.yaml", "--by", "human", "--votes", "v.jsonl"], "not allowed with"),
    ("judge", ["--config", "config.yaml", "--by", "html"], "out/comparison: no such folder"),
    ("deid", [], "required: --in, --out"),
    ("deid", ["--in", "sft.jsonl", "--out", "o.jsonl", "--max-quarantine", "few"], "invalid int value: 'few'"),
    ("deid", ["--in", "nowhere.jsonl", "--out", "o.jsonl"], "--in nowhere.jsonl: no such file"),
    ("deid", ["--in", "model", "--out", "o.jsonl"], "--in model: no such file"),
    ("deid", ["--in", "sft.jsonl", "--out", "o.docx"], "found the ending `.docx`"),
    ("deid", ["--in", "sft.jsonl", "--out", "sft.jsonl/o.jsonl"], "sft.jsonl"),
    ("deid", ["--in", "sft.jsonl", "--out", "o.jsonl", "--workers", "-3"], "deid.workers: found -3"),
    ("deid", ["--in", "sft.jsonl", "--out", "o.jsonl", "--workers", "all"], 'deid.workers: found "all"'),
    ("deid", ["--in", "sft.jsonl", "--out", "o.jsonl", "--profile", "strictest"], 'deid.profile: found "strictest"'),
    ("get_model", ["--out"], "expected one argument"),
    ("get_model", ["--out", "."], "."),
    ("get_model", ["--out", "sft_adapter"], "sft_adapter"),
    ("get_model", ["--out", "sft.jsonl"], "sft.jsonl"),
    ("demo", ["fast"], "unrecognized arguments: fast"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "arguments", "said"), CLI, ids=[f"{n}-{stage}" for n, (stage, *_) in enumerate(CLI)])
def test_command_line(stage: str, arguments: list[str], said: str, project: Project) -> None:
    (project.folder / "loop.yaml").symlink_to("loop.yaml")

    project.refused(said, stage, *arguments)


# --- data ---


def parquet(columns: dict[str, list]) -> bytes:
    """Write a table as Parquet."""
    import pyarrow
    import pyarrow.parquet

    target = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), target)
    return target.getvalue()


TABLE = {"instruction": [row["instruction"] for row in ROWS], "output": [row["output"] for row in ROWS]}
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
HEAD = "instruction,output\n"
DATA: dict[str, tuple[str, str, str | bytes, str]] = {
    "UTF-16": ("sft", "a.jsonl", LINES.encode("utf-16"), "a.jsonl:1: is UTF-16. Save the file as UTF-8"),
    "gzip": ("sft", "a.jsonl", b"\x1f\x8b\x08\x00" + bytes(range(256)), "a.jsonl:1: encoding"),
    "padded with NUL after a crash": ("sft", "a.jsonl", LINES + "\0" * 500, "a.jsonl:13: json: not valid JSON"),
    "cut off": ("sft", "a.jsonl", LINES[:-20], "a.jsonl:12: json: not valid JSON"),
    "one list in .jsonl": ("sft", "a.jsonl", json.dumps(ROWS), "a list of records is read from a file that ends in .json"),
    "one indented list in .jsonl": ("sft", "a.jsonl", json.dumps(ROWS, indent=1), "is read from a file that ends in .json"),
    "lines in .json": ("sft", "a.json", LINES, "one object per line is .jsonl"),
    "number of 5000 digits in .json": ("sft", "a.json", f'[{{"n": {"9" * 5000}}}]', "a number with thousands of digits"),
    "number of 5000 digits": ("sft", "a.jsonl", f'{{"n": {"9" * 5000}}}\n', "a.jsonl:1: json: not valid JSON (a number with"),
    "nested": ("sft", "a.jsonl", "[" * 100_000, "a.jsonl:1: json: not valid JSON (nested too deeply)"),
    "key written twice": ("sft", "a.jsonl", '{"instruction": "q", "output": "a", "output": "b"}\n', "a.jsonl:1: json: not valid JSON (`output` is written twice)"),
    "key written twice in .json": ("sft", "a.json", '[{"instruction": "q", "output": "a", "output": "b"}]', "`output` is written twice"),
    "under a key": ("sft", "a.json", json.dumps({"train": ROWS, "test": ROWS}), "found lists of records under train, test, wanted one"),
    "NaN": ("sft", "a.jsonl", '{"instruction": NaN, "output": "a"}\n', "a.jsonl:1: instruction: is empty"),
    "ShareGPT": ("sft", "a.jsonl", '{"conversations": [{"from": "human", "value": "q"}]}\n', "found the turns user; wanted"),
    "content in parts": ("sft", "a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "q"}]}]}\n', "messages[0].content: holds a part of type 'image_url'"),
    "messages as one object": ("sft", "a.jsonl", '{"messages": {"role": "user", "content": "q"}}\n', "messages: found dict"),
    "tool turn": ("sft", "a.jsonl", '{"messages": [{"role": "tool", "content": "q"}]}\n', "messages[0].role: found 'tool'"),
    "line ends of an old Mac": ("sft", "a.csv", "instruction,output\rq,a\r", "a bare carriage return ends a line"),
    "column written twice": ("sft", "a.csv", "instruction,output,output\nq,a,b\n", "a.csv:1: the column `output` stands twice"),
    "no header": ("sft", "a.csv", "name a colour,red\nname a fruit,plum\n", "a table without a header needs one"),
    "text after a quote": ("sft", "a.csv", HEAD + '"q" x,a\n', "a.csv:2: not valid CSV"),
    "UTF-16 CSV of a spreadsheet": ("sft", "a.csv", (HEAD + "q,a\n").encode("utf-16"), "Save the file as UTF-8"),
    "workbook": ("sft", "a.xlsx", b"PK\x03\x04", "a.xlsx: not a workbook that can be read"),
    "archive": ("sft", "a.jsonl.gz", b"\x1f\x8b", "a.jsonl.gz: not a gzip file that can be read"),
    "no ending": ("sft", "data", LINES, "found the ending ``, wanted one of"),
    "Parquet cut off": ("sft", "a.parquet", parquet(TABLE)[:-30], "a.parquet: not a Parquet file"),
    "Parquet with holes": ("sft", "a.parquet", parquet(TABLE)[:40] + bytes(60) + parquet(TABLE)[100:], "a.parquet"),
    "Parquet footer of nonsense": ("sft", "a.parquet", parquet(TABLE)[:-80] + b"\xff" * 72 + parquet(TABLE)[-8:], "a.parquet: not a Parquet file"),
    "Parquet with an absent answer": ("sft", "a.parquet", parquet({"instruction": ["q"], "output": [None]}), "a.parquet: record 1: output: found NoneType"),
    "Parquet with bytes": ("sft", "a.parquet", parquet({"instruction": [b"q"], "output": [b"a"]}), "a.parquet: record 1: instruction: found bytes"),
    "Parquet without a row": ("sft", "a.parquet", parquet({"instruction": [], "output": []}), "the file holds no record"),
    "pairs for SFT": ("sft", "a.jsonl", json.dumps(PAIRS[0]) + "\n", "set dpo.dataset_path to this file"),
    "records for DPO": ("dpo", "a.jsonl", LINES, "set sft.dataset_path to this file"),
    "a pair without a prompt": ("dpo", "a.jsonl", '{"chosen": "a", "rejected": "b"}\n', "a.jsonl:1: prompt: is missing"),
    "an empty prompt": ("dpo", "a.jsonl", '{"prompt": "", "chosen": "a", "rejected": "b"}\n', "a.jsonl:1: prompt: is empty"),
    "a prompt that ends with an answer": ("dpo", "a.jsonl", '{"prompt": [{"role": "assistant", "content": "q"}], "chosen": "a", "rejected": "b"}\n', "ending with user"),
    "answers of several turns": ("dpo", "a.jsonl", '{"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], "rejected": "b"}\n', "chosen: wanted exactly one assistant turn"),
    "ranked answers": ("dpo", "a.jsonl", '{"prompt": "q", "responses": ["a", "b"], "ranking": [1, 0]}\n', "found prompt, responses, ranking; wanted one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_data(case: str, project: Project) -> None:
    stage, name, content, said = DATA[case]
    replace(project.folder / name, content)
    project.configure(**{f"{stage}__dataset_path": name, "data__validation_ratio": 0.0})

    project.refused(said, stage, "--config", "config.yaml", "--dry-run")


PATHS = {
    "": "sft.dataset_path",
    ".": "is a folder, wanted one file",
    "nowhere.jsonl": "sft.dataset_path: nowhere.jsonl: no such file",
    "a" * 5000 + ".jsonl": "sft.dataset_path: aaaa",
    "a\0b.jsonl": "sft.dataset_path",
    "loop.jsonl": "sft.dataset_path: loop.jsonl: no such file",
    "dangling.jsonl": "sft.dataset_path: dangling.jsonl: no such file",
    "pipe.jsonl": "sft.dataset_path: pipe.jsonl: no such file",
    "sft.jsonl/inner.jsonl": "no such file",
    "~/mine.jsonl": "no such file",
    "C:\\Users\\me\\mine.jsonl": "no such file",
    "https://host.example/mine.jsonl": "no such file",
    "/dev/null": "no such file",
    "nobody/nothing": "cannot load the Hub dataset nobody/nothing",
}


@pytest.mark.parametrize("path", PATHS, ids=[str(number) for number in range(len(PATHS))])
def test_path_of_data(path: str, project: Project) -> None:
    (project.folder / "loop.jsonl").symlink_to("loop.jsonl")
    (project.folder / "dangling.jsonl").symlink_to("gone.jsonl")
    os.mkfifo(project.folder / "pipe.jsonl")
    project.configure(sft__dataset_path=path)

    project.refused(PATHS[path], "sft", "--config", "config.yaml", "--dry-run")


REPORTS = {
    "nothing": ("", "not a de-identification report"),
    "list": ("[]", "not a de-identification report"),
    "nested": ("[" * 100_000, "not a de-identification report"),
    "not text": ("\udcff", "not a de-identification report"),
    "number for a hash": ('{"schema": 1, "counts": {}, "output": {"sha256": 5}}', "not a de-identification report"),
    "other data": ('{"schema": 1, "counts": {}, "output": {"sha256": "00"}}', "changed after it was scrubbed"),
    "other version": ('{"schema": 9, "counts": {}, "output": {"sha256": "00"}}', "found schema 9, wanted 1"),
}


@pytest.mark.parametrize("case", REPORTS)
def test_report_of_the_deidentification(case: str, project: Project) -> None:
    content, said = REPORTS[case]
    (project.folder / "sft.jsonl.deid_report.json").write_bytes(content.encode("utf-8", "surrogateescape"))

    project.refused(said, "sft", "--config", "config.yaml", "--dry-run", "--require-deid-report")


OUTPUTS = {
    "data": "is there already",
    "sft.jsonl": "is there already",
    "sft.jsonl/inner": "sft.jsonl",
    "model": "is there already",
    "x" * 300: "File name too long",
    "loop/inner": "loop",
}


@pytest.mark.parametrize("path", OUTPUTS, ids=[str(number) for number in range(len(OUTPUTS))])
def test_output_that_would_cost_the_user_something(path: str, project: Project) -> None:
    (project.folder / "data").mkdir()
    (project.folder / "data" / "thesis.txt").write_text("years of work", encoding="utf-8")
    (project.folder / "loop").symlink_to("loop")

    project.refused(OUTPUTS[path], "sft", "--config", "config.yaml", "--set", f"sft.output_dir={path}")

    assert (project.folder / "data" / "thesis.txt").read_text(encoding="utf-8") == "years of work"


TRAINER = {
    'max_steps="ten"': 'sft.trainer.max_steps: found "ten"; wanted a whole number',
    "max_steps=1.5": "sft.trainer.max_steps: found 1.5; wanted a whole number",
    'lr_scheduler_type="zigzag"': "sft.trainer",
    'optim="magic"': "sft.trainer",
    'eval_strategy="sometimes"': 'wanted "no" or "steps" or "epoch"',
    'save_strategy="never"': "sft.trainer",
    'warmup_steps="a few"': "sft.trainer",
    "weight_decay=[]": "sft.trainer",
    'max_grad_norm="big"': "sft.trainer",
}


@pytest.mark.parametrize("argument", TRAINER)
def test_argument_that_trl_refuses(argument: str, project: Project) -> None:
    project.refused(TRAINER[argument], "sft", "--config", "config.yaml", "--set", f"sft.trainer.{argument}")
