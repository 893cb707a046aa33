"""README's section on one's own data does what it says: from a fresh clone, on a file as Excel writes it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.common.artifacts import read_manifest
from tests.conftest import ROOT, save_tiny_model
from tests.support.emails import HEADER, as_csv, emails


def section(title: str) -> str:
    """Return a section of README.md."""
    (found,) = re.findall(rf"^## {title}\n(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    return str(found)


def commands(block: str) -> list[list[str]]:
    """Return the arguments to python of a block's commands; the environment of this test is set up already."""
    lines = [shlex.split(line) for line in block.strip().splitlines()]
    assert [line for line in lines if line[0] != "python"] in (
        [],
        [["make", "setup"], ["source", ".venv/bin/activate"]],
    )
    return [line[1:] for line in lines if line[0] == "python"]


def fresh_clone(folder: Path) -> Path:
    """Copy what a clone would hold, with a tiny model where models lie."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    save_tiny_model(folder / "models" / "tiny")
    (folder / "emails.csv").write_bytes(as_csv(HEADER, emails()))
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's list of the files")
    return fresh_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def said(clone: Path) -> dict[str, str]:
    """Type the first block, with Enter as the answer to every question; return what each command said."""
    first, _ = re.findall(r"```bash\n(.*?)```", section("Your own data"), re.S)
    return type_in(clone, first)


def type_in(clone: Path, block: str) -> dict[str, str]:
    answers = {}
    for arguments in commands(block):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=clone, input="\n" * 20, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        answers[arguments[1]] = done.stdout + done.stderr
    return answers


def test_own_emails_are_learnt_and_the_adapter_answers_beside_the_base(clone: Path, said: dict[str, str]) -> None:
    assert list(said) == ["scripts.start", "scripts.train_sft", "serve.ask"]
    for part in ("a prompt that was held out", "talk to it", "python -m serve.ask"):
        assert part in said["scripts.train_sft"]
    adapter = read_manifest(clone / "outputs/mydata/sft_adapter", stages=("sft",))
    (data,) = adapter.datasets
    assert data.path == "emails.csv"
    assert (data.train or 0) + (data.validation or 0) + (data.test or 0) + data.near_duplicates == 40
    assert re.search(r"^base.*sft ", said["serve.ask"], re.M | re.S)


@pytest.mark.slow
def test_the_adapter_is_compared_and_sharpened_with_pairs_of_its_own_answers(clone: Path, said: dict[str, str]) -> None:
    _, second = re.findall(r"```bash\n(.*?)```", section("Your own data"), re.S)
    type_in(clone, second)
    assert (clone / "outputs/mydata/comparison/report.html").is_file()
    read_manifest(clone / "outputs/mydata/dpo_adapter", stages=("dpo",))
