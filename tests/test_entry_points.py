"""Every entry point has the one shape, answers --help in both forms, and layers point down only."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_python

GUARD = 'if __name__ == "__main__":'
ENTRY_POINTS = sorted(
    path.relative_to(ROOT)
    for folder in ("scripts", "eval", "serve")
    for path in (ROOT / folder).rglob("*.py")
    if GUARD in path.read_text(encoding="utf-8")
)
# The generator of configs/ is a developer's tool without options.
STAGES = [path for path in ENTRY_POINTS if "common" not in path.parts]


def module_name(path: Path) -> str:
    """Name a file as a module."""
    return ".".join(path.with_suffix("").parts)


def tree_of(path: Path) -> ast.Module:
    """Parse a file of the repository."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def commands_in(docstring: str, path: Path) -> list[str]:
    """Return the arguments of each command that a docstring shows, in module form or in path form."""
    return re.findall(rf"python (?:-m {re.escape(module_name(path))}|{re.escape(path.as_posix())})(.*)", docstring)


def test_the_stages_that_exist_are_seen() -> None:
    assert {Path("scripts/train_sft.py"), Path("scripts/get_demo_model.py")} <= set(STAGES)


@pytest.mark.parametrize("path", STAGES, ids=str)
def test_help_is_answered_in_module_form_and_in_path_form_from_anywhere(path: Path, tmp_path: Path) -> None:
    module = run_python("-m", module_name(path), "--help")
    file = run_python(ROOT / path, "--help", cwd=tmp_path)

    assert (module.returncode, file.returncode) == (0, 0), module.stderr + file.stderr
    assert module.stdout.startswith("usage: ")
    assert module.stdout.partition("\n\n")[2] == file.stdout.partition("\n\n")[2]


@pytest.mark.parametrize("path", STAGES, ids=str)
def test_entry_point_has_docstring_parser_and_main(path: Path) -> None:
    module = importlib.import_module(module_name(path))

    assert commands_in(module.__doc__, path)
    assert "eeds requirements" in module.__doc__, "the docstring names the requirements file"
    assert isinstance(module.build_parser(), argparse.ArgumentParser)
    assert callable(module.main)


@pytest.mark.parametrize("path", STAGES, ids=str)
def test_command_in_the_docstring_parses(path: Path) -> None:
    module = importlib.import_module(module_name(path))
    for arguments in commands_in(module.__doc__, path):
        parsed = module.build_parser().parse_args(arguments.split())
        if "config" in vars(parsed):
            assert (ROOT / parsed.config).is_file()


@pytest.mark.parametrize("path", STAGES, ids=str)
def test_unknown_flag_is_refused_without_a_traceback(path: Path) -> None:
    shown = commands_in(importlib.import_module(module_name(path)).__doc__, path)[0].split()
    done = run_python(ROOT / path, *shown, "--no-such-flag")

    assert done.returncode == 2
    assert "--no-such-flag" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=str)
def test_path_form_idiom_stands_before_the_first_project_import(path: Path) -> None:
    body = tree_of(path).body
    idiom = [
        place
        for place, node in enumerate(body)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "not __package__"
    ]
    imports = [place for place, node in enumerate(body) if isinstance(node, ast.ImportFrom) and re.match("scripts|serve|eval", node.module or "")]  # fmt: skip

    assert len(idiom) == 1
    assert idiom[0] < min(imports)


# --- layers


def project_imports(path: Path) -> set[str]:
    """Name every module of the project that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if re.match(r"(scripts|serve|eval)(\.|$)", name)}


SOURCES = sorted(
    path.relative_to(ROOT) for folder in ("scripts", "serve", "eval") for path in (ROOT / folder).rglob("*.py")
)
COMMON = [path for path in SOURCES if path.parts[:2] == ("scripts", "common") and path.stem != "__init__"]
# From the bottom up; a module imports only from lines above its own.
LAYERS = [
    {"errors", "schema"},
    {"config"},
    {"artifacts", "runtime", "deid_report", "tiny_model"},
    {"processes", "memory"},
    {"records", "tracking"},
    {"rendering", "reference_logps", "resuming", "stage"},
    {"modeling", "scoring", "adapted_linears", "compiling", "generation"},
    {"fast_path"},
    {"shared_prompts"},
    {"training", "preferences"},
    {"finishing"},
    {"lifecycle", "reference"},
]


@pytest.mark.parametrize("path", COMMON, ids=str)
def test_common_never_imports_a_stage(path: Path) -> None:
    assert {name for name in project_imports(path) if not name.startswith("scripts.common")} <= {"scripts"}


@pytest.mark.parametrize("path", [path for path in SOURCES if path in STAGES and path.parts[0] == "scripts"], ids=str)
def test_stages_never_import_stages(path: Path) -> None:
    stages = {module_name(stage) for stage in STAGES} - {module_name(path)}

    assert not project_imports(path) & stages


@pytest.mark.parametrize("path", COMMON, ids=str)
def test_arrows_between_common_modules_point_down(path: Path) -> None:
    height = {name: level for level, names in enumerate(LAYERS) for name in names}
    assert path.stem in height, f"give {path.stem} a place in LAYERS"

    for name in project_imports(path):
        imported = name.split(".")[2] if name.startswith("scripts.common.") else ""
        assert not imported or height[imported] < height[path.stem], f"{path.stem} imports {imported}"


@pytest.mark.parametrize("path", STAGES, ids=str)
def test_importing_a_stage_loads_nothing_heavy(path: Path) -> None:
    """--help and configuration mistakes must answer at once."""
    program = (
        f"import sys, {module_name(path)}; "
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'mlflow', 'datasets', 'lm_eval', 'presidio_analyzer'} & set(sys.modules); "
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )

    assert run_python("-c", program).stderr == ""
