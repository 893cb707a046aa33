"""Hostile and mistaken input, given to the commands as a user gives it: one message that helps, exit code 2, nothing written.

Each line of the tables is a case: what is given, and the part of the message that makes it helpful.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.common.artifacts import sha256_file
from scripts.common.errors import entry_point
from tests.conftest import ROOT, write_jsonl
from tests.exporting import save_adapter

Change = Callable[[Path], object]

ROWS = [{"instruction": f"name colour {n}", "output": f"colour number {n}"} for n in range(12)]
PAIRS = [{"prompt": f"name colour {n}", "chosen": f"number {n}", "rejected": f"letter {n}"} for n in range(12)]
STAGES = {
    "sft": "scripts.train_sft", "dpo": "scripts.train_dpo", "compare": "eval.compare", "judge": "eval.judge",
    "lmeval": "eval.run_lmeval", "export": "scripts.export_lora", "deid": "scripts.deid_presidio",
    "get_model": "scripts.get_demo_model", "demo": "scripts.demo",
}  # fmt: skip


@entry_point
def serve(argv: Sequence[str] | None = None) -> int:
    """Start the server up to the point where it would listen, with the configuration that --config names."""
    from serve.fastapi_server import load_service

    assert argv is not None
    os.environ["LLM_CONFIG"] = argv[argv.index("--config") + 1]
    load_service()
    return 0


class Place:
    """A working folder with everything right in it: model, data, adapter, configuration. Cases spoil one thing."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture) -> None:
        self.folder, self.capsys = folder, capsys
        self.tree: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))

    def configure(self, **changes: object) -> None:
        """Write the configuration with other values, given by dotted keys with __ for the dot."""
        for key, value in changes.items():
            *sections, name = key.split("__")
            tree = self.tree
            for section in sections:
                tree = tree.setdefault(section, {})
            tree[name] = value
        replace(self.folder / "config.yaml", yaml.safe_dump(self.tree))

    def run(self, stage: str, *arguments: str) -> tuple[int | str | None, str]:
        """Run a command in this process; return its exit code and what it said."""
        self.capsys.readouterr()
        main = serve if stage == "serve" else importlib.import_module(STAGES[stage]).main
        try:
            code = main(list(arguments))
        except SystemExit as leaving:  # argparse
            code = leaving.code
        return code, self.capsys.readouterr().err

    def refused(self, said: str, stage: str, *arguments: str) -> None:
        """Run a command that must be refused with this text."""
        before = sorted(self.folder.rglob("*"))
        code, told = self.run(stage, *arguments)
        assert said in told, told[-2000:]
        assert code == 2, told
        assert "Traceback" not in told
        assert len(told) < 6000, "nobody reads that"
        new = [path for path in sorted(self.folder.rglob("*")) if path not in before]
        assert not [path for path in new if not any(part.endswith(".run") for part in path.parts)], new


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, empty_store: Path) -> Path:
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_llama, folder / "model")
    write_jsonl(folder / "sft.jsonl", ROWS)
    write_jsonl(folder / "dpo.jsonl", PAIRS)
    shutil.copy(empty_store, folder / "mlflow.db")
    save_adapter(folder / "model", folder / "sft_adapter")
    tree = {
        "base_model_id": "model",
        "offline": True,
        "data": {"validation_ratio": 0.25},
        "sft": {"dataset_path": "sft.jsonl", "output_dir": "out/sft", "max_length": 200, "trainer": {"max_steps": 2}},
        "dpo": {"dataset_path": "dpo.jsonl", "output_dir": "out/dpo", "init_from": "sft_adapter", "beta": 0.1,
                "max_length": 200, "trainer": {"max_steps": 2}},
        "eval": {"output_dir": "out/comparison"},
        "lmeval": {"output_dir": "out/lmeval"},
        "export": {"output_dir": "out/merged", "gguf_dir": "out/gguf"},
        "serve": {"adapter_path": "sft_adapter", "max_context_tokens": 64, "max_concurrent": 2},
        "performance": {"dtype": "fp32", "threads": 1},
        "tracking": {"mlflow_tracking_uri": "sqlite:///mlflow.db"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Place:
    folder = tmp_path / "place"
    shutil.copytree(template, folder, copy_function=os.link)  # files are replaced, never written into
    (folder / "mlflow.db").unlink()
    shutil.copy(template / "mlflow.db", folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLM_CONFIG", "")
    return Place(folder, capsys)


def test_the_place_is_right_before_it_is_spoilt(place: Place) -> None:
    for stage in ("sft", "dpo"):
        code, told = place.run(stage, "--config", "config.yaml", "--dry-run")
        assert code == 0, told
    code, told = place.run("serve", "--config", "config.yaml")
    assert code == 0, told


# --- configurations ---

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "NUL": ("seed: 1\x00\n", "config.yaml:1: not valid YAML"),
    "bell": ("seed: 1\nlora:\n  r: 8\x07\n", "config.yaml:3: not valid YAML"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "wanted a YAML file in UTF-8"),
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
    "Windows path in double quotes": ('sft:\n  dataset_path: "C:\\data\\mine.jsonl"\n', "use / or single quotes"),
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
def test_configuration(case: str, place: Place) -> None:
    content, said = CONFIGS[case]
    replace(place.folder / "config.yaml", content)

    place.refused(said, "sft", "--config", "config.yaml", "--dry-run")


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
    ("sft", ["--config", "config.yaml", "--set", "base_model_id=\udcff"], "a text holds what is no character"),
    ("sft", ["--config", "config.yaml", "--set", "sft.trainer.x.y=1"], "sft.trainer.x: TRL's SFTConfig has no such argument"),
    ("sft", ["--config", "config.yaml", "--set", "seed.x=1"], "--set: seed: found"),
    ("dpo", ["--config", "config.yaml", "--set", "dpo.beta=1e-4x"], "--set: dpo.beta"),
    ("export", ["--format", "zip"], "invalid choice: 'zip'"),
    ("export", ["--dtype", "int3"], "invalid choice: 'int3'"),
    ("export", ["--config", "config.yaml", "--adapter", ""], "--adapter"),
    ("export", ["--config", "config.yaml", "--adapter", "sft.jsonl"], "sft.jsonl"),
    ("export", ["--config", "config.yaml", "--adapter", "nowhere"], "nowhere: no such folder"),
    ("export", ["--config", "config.yaml", "--adapter", "model"], "model: no valid manifest.json"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--out_dir", "model"], "is there already and is no folder of stage `merged`"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--out_dir", "sft.jsonl"], "is there already and is no folder of stage `merged`"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--out_dir", "sft.jsonl/x"], "sft.jsonl"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--out_dir", "."], "--out_dir: . is there already"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--out_dir", ".."], "--out_dir: .. is there already"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--base_model", "../../../etc"], "../../../etc"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--base_model", "a/b/c/d"], "a/b/c/d: no such model folder"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--base_model", "sft_adapter"], "is an adapter"),
    ("lmeval", ["--task", "domain"], "required: --model_path"),
    ("lmeval", ["--model_path", "base"], "required: --task"),
    ("lmeval", ["--model_path", "base", "--task", "domain", "--limit", "many"], "invalid int value: 'many'"),
    ("lmeval", ["--config", "config.yaml", "--model_path", "", "--task", "domain"], "no valid manifest.json"),
    ("lmeval", ["--config", "config.yaml", "--model_path", "base", "--task", ""], "--task"),
    ("lmeval", ["--config", "config.yaml", "--model_path", "sft.jsonl", "--task", "domain"], "sft.jsonl: no such folder"),
    ("lmeval", ["--config", "config.yaml", "--model_path", "base", "--task", "multiple_choice=model"], "model: no such file"),
    ("lmeval", ["--config", "config.yaml", "--model_path", "base", "--task", "multiple_choice=sft.jsonl"], "sft.jsonl:1: found instruction, output"),
    ("compare", ["--config", "config.yaml"], "there is no adapter to compare"),
    ("compare", ["--config", "config.yaml", "--set", "sft.output_dir=sft_adapter", "--set", "data.validation_ratio=0.1", "--runs", "nowhere"], "nowhere"),
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
    ("deid", ["--in", "sft.jsonl", "--out", "o.jsonl", "--fields", ""], "deid.fields"),
    ("deid", ["--in", "sft.jsonl", "--out", "o.jsonl", "--set", "deid.recognizers=sft.jsonl"], "sft.jsonl"),
    ("get_model", ["--out"], "expected one argument"),
    ("get_model", ["--out", "."], "."),
    ("get_model", ["--out", "sft_adapter"], "sft_adapter"),
    ("get_model", ["--out", "sft.jsonl"], "sft.jsonl"),
    ("demo", ["fast"], "unrecognized arguments: fast"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "arguments", "said"), CLI, ids=[f"{n}-{stage}" for n, (stage, *_) in enumerate(CLI)])
def test_command_line(stage: str, arguments: list[str], said: str, place: Place) -> None:
    (place.folder / "loop.yaml").symlink_to("loop.yaml")

    place.refused(said, stage, *arguments)


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
    "UTF-16": ("sft", "a.jsonl", LINES.encode("utf-16"), "a.jsonl:1: encoding"),
    "gzip": ("sft", "a.jsonl", b"\x1f\x8b\x08\x00" + bytes(range(256)), "a.jsonl:1: encoding"),
    "padded with NUL after a crash": ("sft", "a.jsonl", LINES + "\0" * 500, "a.jsonl:13: json: not valid JSON"),
    "cut off": ("sft", "a.jsonl", LINES[:-20], "a.jsonl:12: json: not valid JSON"),
    "one list in .jsonl": ("sft", "a.jsonl", json.dumps(ROWS), "one list is .json"),
    "one indented list in .jsonl": ("sft", "a.jsonl", json.dumps(ROWS, indent=1), "name it .json"),
    "lines in .json": ("sft", "a.json", LINES, "one object per line is .jsonl"),
    "number of 5000 digits in .json": ("sft", "a.json", f'[{{"n": {"9" * 5000}}}]', "a number with thousands of digits"),
    "number of 5000 digits": ("sft", "a.jsonl", f'{{"n": {"9" * 5000}}}\n', "a.jsonl:1: json: not valid JSON (a number with"),
    "nested": ("sft", "a.jsonl", "[" * 100_000, "a.jsonl:1: json: not valid JSON (nested too deeply)"),
    "key written twice": ("sft", "a.jsonl", '{"instruction": "q", "output": "a", "output": "b"}\n', "a.jsonl:1: json: not valid JSON (`output` is written twice)"),
    "key written twice in .json": ("sft", "a.json", '[{"instruction": "q", "output": "a", "output": "b"}]', "`output` is written twice"),
    "under a key": ("sft", "a.json", json.dumps({"data": ROWS}), "found dict, wanted a list of objects"),
    "NaN": ("sft", "a.jsonl", '{"instruction": NaN, "output": "a"}\n', "a.jsonl:1: instruction: found float, wanted text"),
    "ShareGPT": ("sft", "a.jsonl", '{"conversations": [{"from": "human", "value": "q"}]}\n', "found conversations; wanted one of"),
    "content in parts": ("sft", "a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}\n', "messages[0].content: found list, wanted text"),
    "messages as one object": ("sft", "a.jsonl", '{"messages": {"role": "user", "content": "q"}}\n', "messages: found dict"),
    "tool turn": ("sft", "a.jsonl", '{"messages": [{"role": "tool", "content": "q"}]}\n', "messages[0].role: found 'tool'"),
    "semicolons": ("sft", "a.csv", "instruction;output\nq;a\n", "a.csv:1: found `;` between the cells, wanted `,`"),
    "tabs": ("sft", "a.csv", "instruction\toutput\nq\ta\n", "a.csv:1: found a tab between the cells, wanted `,`"),
    "line ends of an old Mac": ("sft", "a.csv", "instruction,output\rq,a\r", "a bare carriage return ends a line"),
    "column written twice": ("sft", "a.csv", "instruction,output,output\nq,a,b\n", "a.csv:1: the column `output` stands twice"),
    "spaces in the header": ("sft", "a.csv", "instruction, output\nq, a\n", "found instruction,  output; wanted"),
    "no header": ("sft", "a.csv", "name a colour,red\nname a fruit,plum\n", "found name a colour, red; wanted one of"),
    "text after a quote": ("sft", "a.csv", HEAD + '"q" x,a\n', "a.csv:2: not valid CSV"),
    "long cell": ("sft", "a.csv", HEAD + f'q,"{"word " * 40_000}"\n', "longer than sft.max_length"),
    "UTF-16 CSV of a spreadsheet": ("sft", "a.csv", (HEAD + "q,a\n").encode("utf-16"), "Save the file as UTF-8"),
    "workbook": ("sft", "a.xlsx", b"PK\x03\x04", "found the ending `.xlsx`, wanted one of"),
    "archive": ("sft", "a.jsonl.gz", b"\x1f\x8b", "found the ending `.gz`, wanted one of"),
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
def test_data(case: str, place: Place) -> None:
    stage, name, content, said = DATA[case]
    replace(place.folder / name, content)
    place.configure(**{f"{stage}__dataset_path": name, "data__validation_ratio": 0.0})

    place.refused(said, stage, "--config", "config.yaml", "--dry-run")


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
def test_path_of_data(path: str, place: Place) -> None:
    (place.folder / "loop.jsonl").symlink_to("loop.jsonl")
    (place.folder / "dangling.jsonl").symlink_to("gone.jsonl")
    os.mkfifo(place.folder / "pipe.jsonl")
    place.configure(sft__dataset_path=path)

    place.refused(PATHS[path], "sft", "--config", "config.yaml", "--dry-run")


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
def test_report_of_the_deidentification(case: str, place: Place) -> None:
    content, said = REPORTS[case]
    (place.folder / "sft.jsonl.deid_report.json").write_bytes(content.encode("utf-8", "surrogateescape"))

    place.refused(said, "sft", "--config", "config.yaml", "--dry-run", "--require-deid-report")


OUTPUTS = {
    "data": "is there already",
    "sft.jsonl": "is there already",
    "sft.jsonl/inner": "sft.jsonl",
    "model": "is there already",
    "x" * 300: "File name too long",
    "loop/inner": "loop",
}


@pytest.mark.parametrize("path", OUTPUTS, ids=[str(number) for number in range(len(OUTPUTS))])
def test_output_that_would_cost_the_user_something(path: str, place: Place) -> None:
    (place.folder / "data").mkdir()
    (place.folder / "data" / "thesis.txt").write_text("years of work", encoding="utf-8")
    (place.folder / "loop").symlink_to("loop")

    place.refused(OUTPUTS[path], "sft", "--config", "config.yaml", "--set", f"sft.output_dir={path}")

    assert (place.folder / "data" / "thesis.txt").read_text(encoding="utf-8") == "years of work"


TRAINER = {
    'max_steps="ten"': 'sft.trainer.max_steps: found "ten"; wanted a whole number',
    "max_steps=1.5": "sft.trainer.max_steps: found 1.5; wanted a whole number",
    'lr_scheduler_type="zigzag"': "sft.trainer",
    'optim="magic"': "sft.trainer",
    'eval_strategy="sometimes"': 'wanted "no" or "steps" or "epoch"',
    'save_strategy="never"': "sft.trainer",
    "save_steps=0": "sft.trainer",
    "logging_steps=-1": "sft.trainer",
    'warmup_steps="a few"': "sft.trainer",
    "weight_decay=[]": "sft.trainer",
    'max_grad_norm="big"': "sft.trainer",
    "deepspeed=nowhere.json": "sft.trainer",
    "eval_steps=0": "sft.trainer",
    "max_steps=-5": "sft.trainer",
}


@pytest.mark.parametrize("argument", TRAINER)
def test_argument_that_trl_refuses(argument: str, place: Place) -> None:
    place.refused(TRAINER[argument], "sft", "--config", "config.yaml", "--set", f"sft.trainer.{argument}")


# --- adapters ---


def edit_json(name: str, **changes: object) -> Change:
    """Change keys of a JSON file; `...` removes one."""

    def change(folder: Path) -> None:
        tree = json.loads((folder / name).read_text(encoding="utf-8"))
        tree.update(changes)
        replace(folder / name, json.dumps({key: value for key, value in tree.items() if value is not ...}))

    return change


def write(name: str, content: str | bytes) -> Change:
    """Replace a file."""
    return lambda folder: replace(folder / name, content)


def replace(path: Path, content: str | bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit_tensors(change: Callable[[dict], dict], name: str = "adapter_model.safetensors") -> Change:
    """Change the tensors of a file."""

    def edit(folder: Path) -> None:
        from safetensors.torch import load, save

        replace(folder / name, save(change(load((folder / name).read_bytes())), {"format": "pt"}))

    return edit


def swap_a_and_b(tensors: dict) -> dict:
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {name.replace(part, other[part]): value for name, value in tensors.items() for part in other if part in name}


def header(text: str, length: int | None = None) -> bytes:
    """Write a safetensors file of a header only."""
    return struct.pack("<Q", len(text) if length is None else length) + text.encode()


def seal(folder: Path) -> None:
    """Make the manifest vouch for the files as they are, as whoever made a hostile adapter would."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"] = {name: sha256_file(folder / name) for name in manifest["files"] if (folder / name).is_file()}
    replace(folder / "manifest.json", json.dumps(manifest))


SLOW = "(.*a){40}$|" * 40 + "(x+x+)+y"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTERS: dict[str, tuple[Change, str]] = {
    "config is nothing": (write(CONFIG, ""), CONFIG),
    "config is a list": (write(CONFIG, "[]"), CONFIG),
    "config is empty": (write(CONFIG, "{}"), CONFIG),
    "config is nested": (write(CONFIG, "[" * 100_000), CONFIG),
    "config is not text": (write(CONFIG, b"\xff\xfe\x00"), CONFIG),
    "config is gone": (lambda folder: (folder / CONFIG).unlink(), CONFIG),
    "regex bomb for modules": (edit_json(CONFIG, target_modules=SLOW), f"{CONFIG}: target_modules"),
    "regex for modules": (edit_json(CONFIG, target_modules=".*proj"), f"{CONFIG}: target_modules"),
    "modules are numbers": (edit_json(CONFIG, target_modules=[1, 2]), f"{CONFIG}: target_modules"),
    "modules are none": (edit_json(CONFIG, target_modules=None), f"{CONFIG}: target_modules"),
    "regex bomb for excluded modules": (edit_json(CONFIG, exclude_modules=SLOW), f"{CONFIG}: exclude_modules"),
    "regex bomb for ranks": (edit_json(CONFIG, rank_pattern={SLOW: 4}), f"{CONFIG}: rank_pattern"),
    "regex bomb for alphas": (edit_json(CONFIG, alpha_pattern={SLOW: 4}), f"{CONFIG}: alpha_pattern"),
    "regex bomb for layers": (edit_json(CONFIG, layers_pattern=SLOW, layers_to_transform=[0]), f"{CONFIG}: layers_"),
    "rank of a universe": (edit_json(CONFIG, r=10**9), f"{CONFIG}: r"),
    "another rank": (edit_json(CONFIG, r=8), f"{CONFIG}: r"),
    "negative rank": (edit_json(CONFIG, r=-4), f"{CONFIG}: r"),
    "rank as text": (edit_json(CONFIG, r="4"), f"{CONFIG}: r"),
    "no rank": (edit_json(CONFIG, r=...), f"{CONFIG}: r"),
    "alpha as text": (edit_json(CONFIG, lora_alpha="8"), f"{CONFIG}: lora_alpha"),
    "alpha is no number": (edit_json(CONFIG, lora_alpha=float("nan")), f"{CONFIG}: lora_alpha"),
    "alpha without end": (edit_json(CONFIG, lora_alpha=1e308), f"{CONFIG}: lora_alpha"),
    "alpha of 400 digits": (edit_json(CONFIG, lora_alpha=10**400), f"{CONFIG}: lora_alpha"),
    "prompt tuning": (edit_json(CONFIG, peft_type="PROMPT_TUNING"), f"{CONFIG}: peft_type"),
    "unknown kind": (edit_json(CONFIG, peft_type="MAGIC"), f"{CONFIG}: peft_type"),
    "kind is a list": (edit_json(CONFIG, peft_type=["LORA"]), f"{CONFIG}: peft_type"),
    "classification": (edit_json(CONFIG, task_type="SEQ_CLS"), f"{CONFIG}: task_type"),
    "module of Python": (edit_json(CONFIG, megatron_config={"a": 1}, megatron_core="antigravity"), f"{CONFIG}: megatron_config"),
    "class of Python": (edit_json(CONFIG, auto_mapping={"base_model_class": "Popen", "parent_library": "subprocess"}), f"{CONFIG}: auto_mapping"),
    "whole modules": (edit_json(CONFIG, modules_to_save=["lm_head"]), f"{CONFIG}: modules_to_save"),
    "copied layers": (edit_json(CONFIG, layer_replication=[[0, 2], [0, 2]]), f"{CONFIG}: layer_replication"),
    "moves base weights": (edit_json(CONFIG, init_lora_weights="pissa"), f"{CONFIG}: init_lora_weights"),
    "key from the future": (edit_json(CONFIG, quantum=True), f"{CONFIG}: quantum"),
    "weights are nothing": (write(WEIGHTS, b""), "does not fit the base model"),
    "weights are cut off": (lambda folder: replace(folder / WEIGHTS, (folder / WEIGHTS).read_bytes()[:-100]), "sft_adapter"),
    "weights are an archive": (write(WEIGHTS, b"PK\x03\x04" + bytes(500)), "sft_adapter"),
    "header without end": (write(WEIGHTS, header("{}", 2**63)), "sft_adapter"),
    "header is no JSON": (write(WEIGHTS, header("{{{{{{{{")), "sft_adapter"),
    "header beyond the file": (write(WEIGHTS, header('{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}')), "sft_adapter"),
    "header of a negative shape": (write(WEIGHTS, header('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}')), "sft_adapter"),
    "no tensor": (edit_tensors(lambda tensors: {}), "does not fit the base model"),
    "a tensor too many": (edit_tensors(lambda tensors: {**tensors, "more": next(iter(tensors.values()))}), "more has no place in the base"),
    "a tensor too few": (edit_tensors(lambda tensors: dict(list(tensors.items())[1:])), "is missing from the file"),
    "A and B swapped": (edit_tensors(swap_a_and_b), "sft_adapter"),
    "whole numbers": (edit_tensors(lambda tensors: {name: value.long() for name, value in tensors.items()}), "sft_adapter"),
    "NaN": (edit_tensors(lambda tensors: {name: value * float("nan") for name, value in tensors.items()}), "NaN or infinite"),
    "infinite": (edit_tensors(lambda tensors: {name: value * float("inf") for name, value in tensors.items()}), "NaN or infinite"),
    "huge": (edit_tensors(lambda tensors: {name: value * 1e30 for name, value in tensors.items()}), "NaN or infinite"),
    "zeros": (edit_tensors(lambda tensors: {name: value * 0 for name, value in tensors.items()}), "zero"),
    "flat": (edit_tensors(lambda tensors: {name: value.reshape(-1) for name, value in tensors.items()}), "sft_adapter"),
    "pickle only": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "holds no adapter_model.safetensors"),
    "weights are a folder": (lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()), "holds no adapter_model.safetensors"),
    "weights link to themselves": (lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to(WEIGHTS)), "holds no adapter_model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("stage", ["serve", "dpo"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter(case: str, stage: str, place: Place) -> None:
    change, said = ADAPTERS[case]
    change(place.folder / "sft_adapter")
    seal(place.folder / "sft_adapter")

    place.refused(said, stage, "--config", "config.yaml")


MANIFESTS: dict[str, tuple[Change, str]] = {
    "nested": (write("manifest.json", "[" * 100_000), "no valid manifest.json"),
    "UTF-16": (write("manifest.json", "{}".encode("utf-16")), "no valid manifest.json"),
    "a folder": (lambda folder: ((folder / "manifest.json").unlink(), (folder / "manifest.json").mkdir()), "no valid manifest.json"),
    "links to itself": (lambda folder: ((folder / "manifest.json").unlink(), (folder / "manifest.json").symlink_to("manifest.json")), "no valid manifest.json"),
    "files are a list": (edit_json("manifest.json", files=["a"]), "no valid manifest.json"),
    "files are none": (edit_json("manifest.json", files={}), "manifest.json"),
    "hashes are numbers": (edit_json("manifest.json", files={"adapter_config.json": 5}), "manifest.json"),
    "file above the folder": (edit_json("manifest.json", files={"../sft.jsonl": "0" * 64}), "manifest.json"),
    "file from the root": (edit_json("manifest.json", files={"/etc/hostname": "0" * 64}), "manifest.json"),
    "file with NUL": (edit_json("manifest.json", files={"a\0b": "0" * 64}), "manifest.json"),
    "stage is a list": (edit_json("manifest.json", stage=["sft"]), "found a folder of stage"),
    "stage of another kind": (edit_json("manifest.json", stage="merged"), "found a folder of stage `merged`, wanted sft or dpo"),
    "schema of the future": (edit_json("manifest.json", schema=99), "found schema 99, wanted 1"),
    "no base": (edit_json("manifest.json", base_model=...), "manifest.json"),
    "base is text": (edit_json("manifest.json", base_model="model"), "manifest.json"),
    "base without a fingerprint": (edit_json("manifest.json", base_model={"id": "model", "revision": None}), "manifest.json"),
    "fingerprint is a number": (edit_json("manifest.json", base_model={"id": "model", "revision": None, "fingerprint": 5}), "manifest.json"),
    "base is a list": (edit_json("manifest.json", base_model={"id": ["model"], "revision": None, "fingerprint": "0"}), "manifest.json"),
    "no tokenizer": (edit_json("manifest.json", tokenizer_sha256=...), "manifest.json"),
    "template is null": (edit_json("manifest.json", chat_template_sha256=None), "manifest.json"),
    "no run": (edit_json("manifest.json", mlflow=None), "manifest.json"),
    "no split": (edit_json("manifest.json", split=...), "manifest.json"),
    "configuration is text": (edit_json("manifest.json", config="r: 8"), "manifest.json"),
    "another base": (edit_json("manifest.json", base_model={"id": "other", "revision": None, "fingerprint": "0" * 64}), "another base model"),
}  # fmt: skip


@pytest.mark.parametrize("stage", ["dpo", "export", "lmeval"])
@pytest.mark.parametrize("case", MANIFESTS)
def test_manifest(case: str, stage: str, place: Place) -> None:
    change, said = MANIFESTS[case]
    change(place.folder / "sft_adapter")
    more = {
        "dpo": ["--dry-run"],
        "export": ["--adapter", "sft_adapter"],
        "lmeval": ["--model_path", "sft_adapter", "--task", "domain"],
    }

    if case == "another base" and stage != "dpo":
        said = "model"
    place.refused(said, stage, "--config", "config.yaml", *more[stage])


# --- base models ---

TEMPLATE = "chat_template.jinja"
MODELS: dict[str, tuple[Change, str]] = {
    "config is nothing": (write("config.json", ""), "model"),
    "config is a list": (write("config.json", "[]"), "model"),
    "config is nested": (write("config.json", "[" * 100_000), "model"),
    "unknown architecture": (edit_json("config.json", model_type="magic"), "model"),
    "no architecture": (edit_json("config.json", model_type=...), "model"),
    "code of its own": (edit_json("config.json", model_type="magic", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}), "model"),
    "an encoder": (edit_json("config.json", model_type="vit"), "model"),
    "sizes are text": (edit_json("config.json", hidden_size="large"), "model"),
    "other sizes": (edit_json("config.json", hidden_size=128, intermediate_size=77), "model"),
    "layers without weights": (edit_json("config.json", num_hidden_layers=3), "model"),
    "heads that do not divide": (edit_json("config.json", num_attention_heads=7), "model"),
    "weights are nothing": (write("model.safetensors", b""), "model"),
    "weights are cut off": (lambda folder: replace(folder / "model.safetensors", (folder / "model.safetensors").read_bytes()[:-100]), "model"),
    "header without end": (write("model.safetensors", header("{}", 2**62)), "model"),
    "header is no JSON": (write("model.safetensors", header("{{{{{{{{")), "model"),
    "a tensor too few": (edit_tensors(lambda tensors: dict(list(tensors.items())[1:]), "model.safetensors"), "model"),
    "tokenizer is nothing": (write("tokenizer.json", ""), "model"),
    "tokenizer is a list": (write("tokenizer.json", "[]"), "model"),
    "tokenizer is gone": (lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], "model"),
    "tokenizer settings are a list": (write("tokenizer_config.json", "[]"), "model"),
    "template that does not parse": (write(TEMPLATE, "{% for message in messages %}{{ message"), "chat template"),
    "template that refuses": (write(TEMPLATE, "{{ raise_exception('only pirates may speak') }}"), "only pirates may speak"),
    "template without end": (write(TEMPLATE, "{% for a in range(10**9) %}{{ a }}{% endfor %}"), "chat template"),
    "template that looks around": (write(TEMPLATE, "{{ messages.__class__.__mro__ }}"), "chat template"),
    "template that writes nothing": (write(TEMPLATE, "{# nothing #}"), "chat template"),
    "template that shouts": (write(TEMPLATE, "{% for m in messages %}{{ m['content'] | upper }}{{ eos_token }}{% endfor %}"), "chat template"),
}  # fmt: skip


@pytest.mark.parametrize("stage", ["sft", "serve"])
@pytest.mark.parametrize("case", MODELS)
def test_base_model(case: str, stage: str, place: Place) -> None:
    change, said = MODELS[case]
    change(place.folder / "model")
    place.configure(serve__adapter_path=None)

    place.refused(said, stage, "--config", "config.yaml")


# --- servers, stores, votes ---

SERVERS = {
    "base as a name": ({"serve__adapters": {"base": "sft_adapter"}}, "serve.adapters.base: wanted a name"),
    "path as a name": ({"serve__adapters": {"../x": "sft_adapter"}}, "serve.adapters.../x: wanted a name"),
    "file as an adapter": ({"serve__adapter_path": "sft.jsonl"}, "sft.jsonl"),
    "data folder as an adapter": ({"serve__adapter_path": "."}, "no valid manifest.json"),
    "empty name of an adapter": ({"serve__adapter_path": ""}, "serve.adapter_path"),
    "name too long": ({"serve__adapter_path": "x" * 5000}, "serve.adapter_path"),
    "name with NUL": ({"serve__adapter_path": "a\0b"}, "serve.adapter_path"),
    "keys in no file": ({"serve__api_keys_file": "nowhere"}, "serve.api_keys_file"),
    "keys in a folder": ({"serve__api_keys_file": "model"}, "serve.api_keys_file"),
    "base that is no model": ({"base_model_id": "sft_adapter"}, "sft_adapter: is an adapter"),
    "base that is a file": ({"base_model_id": "sft.jsonl"}, "sft.jsonl"),
    "base with NUL": ({"base_model_id": "a\0b"}, "base_model_id"),
    "base that is nothing": ({"base_model_id": ""}, "base_model_id"),
    "base above": ({"base_model_id": "../../.."}, "../../.."),
    "context without end": ({"serve__max_context_tokens": 10**12}, "serve.max_context_tokens"),
}


@pytest.mark.parametrize("case", SERVERS)
def test_server(case: str, place: Place) -> None:
    changes, said = SERVERS[case]
    place.configure(**changes)

    place.refused(said, "serve", "--config", "config.yaml")


STORES = ["", "magic://host", "sqlite:///", "sqlite:////nowhere/at/all/x.db", "sft.jsonl", "sqlite:///sft.jsonl", "http://127.0.0.1:9", "a\0b"]  # fmt: skip


@pytest.mark.parametrize("uri", STORES)
def test_store(uri: str, place: Place) -> None:
    place.configure(tracking__mlflow_tracking_uri=uri)

    place.refused("tracking.mlflow_tracking_uri", "sft", "--config", "config.yaml")


def test_there_are_enough_cases() -> None:
    tables: list[Any] = [CONFIGS, CLI, DATA, PATHS, REPORTS, OUTPUTS, TRAINER, SERVERS, STORES]
    count = sum(map(len, tables)) + 2 * len(ADAPTERS) + 3 * len(MANIFESTS) + 2 * len(MODELS)

    assert count >= 150
    assert (ROOT / "tests" / Path(__file__).name).is_file()
