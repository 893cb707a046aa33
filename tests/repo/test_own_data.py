"""Somebody with forty e-mails from Excel types four commands, no editor, and reads an adapter's answer beside the base's."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, save_tiny_model
from tests.support.emails import HEADER, as_csv, emails


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a fresh copy of the program, with a tiny model as the only one on the machine."""
    folder = tmp_path_factory.mktemp("fresh") / "project"
    for name in ("scripts", "eval", "serve", "configs", "data/sft"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "mydata*"))
    save_tiny_model(folder / "models" / "tiny")
    (folder / "emails.csv").write_bytes(as_csv(HEADER, emails()))
    return folder


def type_in(command: str, project: Path) -> str:
    """Run a command as it is typed, in the folder of the program; return what the terminal shows."""
    _, *words = shlex.split(command.partition("    #")[0])
    done = subprocess.run(
        [sys.executable, *words], cwd=project, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_CACHE": str(project / "cache"), "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_four_commands_from_forty_emails_to_two_answers(project: Path) -> None:
    shown = type_in("python -m scripts.start emails.csv --yes", project)
    train, compare, ask = re.findall(r"^  (python -m .*)$", shown, re.MULTILINE)

    assert "40 rows" in shown
    assert "Kundenmail → question, Unsere Antwort → answer" in shown
    assert "not used: Nr, Datum, Kategorie" in shown
    assert [words.split()[2] for words in (train, compare, ask)] == ["scripts.train_sft", "eval.compare", "serve.ask"]
    written = yaml.safe_load((project / "configs/mydata.yaml").read_text(encoding="utf-8"))
    names = " ".join(check["name"] for check in written["eval"]["checks"])
    assert all(part in names for part in ("Guten Tag", "Ihr Team Nord", "Viele Grüße", "words", "German", "no bullets"))

    type_in(train, project)
    assert (project / "outputs/mydata/sft_adapter/manifest.json").is_file()
    type_in(compare, project)
    assert (project / "outputs/mydata/comparison/report.html").is_file()

    answers = type_in(ask, project)
    assert "base" in answers
    assert "sft (outputs/mydata/sft_adapter)" in answers


def test_what_is_there_is_never_overwritten(project: Path) -> None:
    out = project / "configs" / "kept.yaml"
    out.write_text("seed: 1\n", encoding="utf-8")
    words = [sys.executable, "-m", "scripts.start", "emails.csv", "--yes", "--out", "configs/kept.yaml"]
    done = subprocess.run(words, cwd=project, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr.startswith("error: --out configs/kept.yaml: exists already")
    assert "kept2.yaml" in done.stderr
    assert out.read_text(encoding="utf-8") == "seed: 1\n"
