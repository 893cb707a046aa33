"""Of each layout that files have: the stages can run on the configuration that `start` writes for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import start
from scripts.common.stages import TRAINING_STAGES
from tests.conftest import run_python, write_jsonl
from tests.support.chain import dpo_rows, kto_rows, sft_rows
from tests.support.emails import HEADER, as_csv, emails

Write = Callable[[Path], list[Path]]


def table(folder: Path) -> list[Path]:
    (folder / "emails.csv").write_bytes(as_csv(HEADER, emails()))
    return [folder / "emails.csv"]


def gaps(folder: Path) -> list[Path]:
    rows = [(*row[:3], "" if number % 9 == 4 else row[3], row[4]) for number, row in enumerate(emails())]
    (folder / "emails.tsv").write_bytes(as_csv(HEADER, rows, "\t"))
    return [folder / "emails.tsv"]


def sharegpt(folder: Path) -> list[Path]:
    rows = [
        {"system": "Be kind.", "conversations": [{"from": "human", "value": row["instruction"]}, {"from": "gpt", "value": row["output"]}]}
        for row in sft_rows()
    ]  # fmt: skip
    return [write_jsonl(folder / "talks.jsonl", rows)]


def twice(folder: Path) -> list[Path]:
    rows = [
        {"messages": [{"role": role, "content": f"{role} {n}"} for role in ("user", "user", "assistant")]}
        for n in range(30)
    ]
    (folder / "talks.json").write_text(json.dumps(rows), encoding="utf-8")
    return [folder / "talks.json"]


def pairs(folder: Path) -> list[Path]:
    return [write_jsonl(folder / "pairs.jsonl", dpo_rows())]


def german_pairs(folder: Path) -> list[Path]:
    names = {"prompt": "Frage", "chosen": "bessere Antwort", "rejected": "schlechtere Antwort"}
    rows = [{name: f"{row[field]} ist es" for field, name in names.items()} for row in dpo_rows()]
    return [write_jsonl(folder / "pairs.jsonl", rows)]


def thumbs(folder: Path) -> list[Path]:
    rows = [
        {"Frage": r["prompt"], "Antwort": r["completion"], "Daumen": ("down", "up")[r["label"]]} for r in kto_rows()
    ]
    return [write_jsonl(folder / "thumbs.jsonl", rows)]


def documents(folder: Path) -> list[Path]:
    files = [folder / f"{number}.md" for number in range(12)]
    for number, file in enumerate(files):
        file.write_text(f"# Letter {number}\n\nThe parcel {number} is on its way to you.\n", encoding="utf-8")
    return files


def everything(folder: Path) -> list[Path]:
    return [*table(folder), *pairs(folder), *thumbs(folder)]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Return a function that makes a working folder with one model, and no other model on the machine."""

    def make(model: Path) -> Path:
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "tiny").symlink_to(model)
        monkeypatch.setattr("scripts.starting.bases.ROOT", tmp_path)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make


def run_stage(name: str, *flags: str) -> int:
    code: int = import_module(TRAINING_STAGES[name].script).main(["--config", "mine.yaml", *flags])
    return code


LAYOUTS: dict[Write, list[str]] = {
    table: ["sft"], gaps: ["sft"], sharegpt: ["sft"], twice: ["sft"], documents: ["sft"],
    pairs: ["sft", "dpo"], german_pairs: ["sft", "dpo"], thumbs: ["kto"], everything: ["sft", "dpo", "kto"],
}  # fmt: skip


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_stages_can_run_on_what_start_has_written(
    write: Write, project: Callable[[Path], Path], tiny_llama: Path, capsys: Any
) -> None:
    folder = project(tiny_llama)

    assert start.main([*map(str, write(folder)), "--yes", "--out", "mine.yaml"]) == 0
    shown = capsys.readouterr().out

    config = yaml.safe_load((folder / "mine.yaml").read_text(encoding="utf-8"))
    stages = [name for name in TRAINING_STAGES if config[name]["dataset_path"]]
    assert stages == LAYOUTS[write]
    for name in stages:
        assert f"python -m {TRAINING_STAGES[name].script} --config mine.yaml" in shown
        assert run_stage(name, "--dry-run") == 0
        if name == "sft" and len(stages) > 1:  # what comes next starts from its adapter
            assert run_stage(name, "--set", 'sft.trainer={"max_steps": 2}') == 0


def test_records_longer_than_a_base_can_read_are_left_out_and_said(
    project: Callable[[Path], Path], tiny_gpt2: Path, capsys: Any
) -> None:
    folder = project(tiny_gpt2)
    rows = [*sft_rows(), *({"instruction": f"write {n}", "output": f"long {n} " * 300} for n in range(3))]

    assert start.main([str(write_jsonl(folder / "long.jsonl", rows)), "--yes", "--out", "mine.yaml"]) == 0

    assert "up to 3 records are longer than the 512 tokens that models/tiny reads" in capsys.readouterr().out
    assert run_stage("sft", "--dry-run") == 0


def test_somebody_who_looks_at_a_table_waits_for_no_heavy_library(tmp_path: Path) -> None:
    (path,) = table(tmp_path)
    out = tmp_path / "mine.yaml"
    code = (
        "import sys; from scripts.start import main; "
        f"code = main([{str(path)!r}, '--yes', '--out', {str(out)!r}]); "
        "print({'torch', 'transformers', 'trl', 'sklearn', 'pandas'} & {*sys.modules}); sys.exit(code)"
    )

    done = run_python("-c", code, HF_HUB_CACHE=str(tmp_path))

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
