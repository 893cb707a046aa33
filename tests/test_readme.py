"""README is true: each command in it exists, its flags parse, its configuration loads, its figures have a source."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from scripts.common.config import load_config
from scripts.common.reference import updated_readme
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "eval/benchmarks/README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:bash|powershell)[^\n]*\n(.*?)```", README + BENCHMARKS, re.DOTALL)
INLINE = re.findall(r"`((?:python|make|uvicorn|mlflow|pytest) [^`]+)`", README + BENCHMARKS)
COMMANDS = sorted({line.strip() for block in BLOCKS for line in block.splitlines() if line.strip()} | set(INLINE))
PYTHON = [
    command for command in COMMANDS if re.match(r"(\w+=\S+ )*python (-m (scripts|eval)\.|scripts/|eval/)", command)
]


def test_there_are_commands_to_check() -> None:
    assert len(PYTHON) >= 6


@pytest.mark.parametrize("command", PYTHON)
def test_command_exists_and_its_flags_parse(command: str) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    if words[1] == "-m":
        module, arguments = importlib.import_module(words[2]), words[3:]
    else:
        file = ROOT / words[1]
        module, arguments = importlib.import_module(".".join(Path(words[1]).with_suffix("").parts)), words[2:]
        assert file.is_file()
    if not hasattr(module, "build_parser"):  # a generator without flags
        assert not arguments
        return
    parsed = module.build_parser().parse_args(arguments)
    if getattr(parsed, "config", None):
        load_config(ROOT / parsed.config, getattr(parsed, "overrides", []))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake (?:-\S+ )?([a-z-]+)\b", " ".join(COMMANDS)))))
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:configs|data|eval|scripts|serve|tests)/[\w./-]+\.\w+)`", README)))
)
def test_named_file_exists(path: str) -> None:
    made = ("data/sft/mydata.jsonl", "data/sft/sample_pii.deid.jsonl")
    assert path in made or (ROOT / path).exists()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_configuration_reference_is_current() -> None:
    assert updated_readme(README) == README
