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
# A stage of the pipeline, or a tool about it: what a user starts.
STAGES = ENTRY_POINTS


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


# --- layers: a rule about folders

SOURCES = sorted(
    path.relative_to(ROOT) for folder in ("scripts", "serve", "eval") for path in (ROOT / folder).rglob("*.py")
)
MODULES = {module_name(path).removesuffix(".__init__"): path for path in SOURCES}
# What a room may import besides itself. Commands are the scripts and everything in serve and eval.
BELOW: dict[str, tuple[str, ...]] = {
    "common": (),
    "dataset": ("common",),
    "model": ("common", "dataset"),
    "speed": ("common", "dataset", "model"),
    "training": ("common", "dataset", "model", "speed"),
    "deid": ("common", "dataset", "model"),
    "export": ("common", "dataset", "model"),
    "pairs": ("common", "dataset", "model", "speed"),
    "starting": ("common", "dataset", "model", "training"),
    "studies": ("common", "dataset", "model", "speed", "training"),
}


def room_of(module: str) -> str | None:
    """Name the room a module lies in; None for the commands."""
    parts = module.split(".")
    return parts[1] if parts[0] == "scripts" and (ROOT / "scripts" / parts[1]).is_dir() else None


def imported_modules(path: Path) -> set[str]:
    """Name every module of the project that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & MODULES.keys() or {node.module or ""}
    return (names & MODULES.keys()) - {module_name(path)}


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a ring, or nothing."""
    done: set[str] = set()

    def follow(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for name in sorted(arrows[module]):
            if circle := follow(name, [*trail, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in sorted(arrows) if (circle := follow(module, []))), [])


def test_every_room_has_its_floor() -> None:
    rooms = {path.name for path in (ROOT / "scripts").iterdir() if path.is_dir() and any(path.glob("*.py"))}

    assert rooms == BELOW.keys()


@pytest.mark.parametrize("path", [path for path in SOURCES if room_of(module_name(path))], ids=str)
def test_a_room_imports_only_from_the_rooms_below_it(path: Path) -> None:
    room = room_of(module_name(path))
    assert room

    up = {name for name in imported_modules(path) if room_of(name) not in (room, *BELOW[room]) and name != "scripts"}

    assert not up


@pytest.mark.parametrize("path", [path for path in SOURCES if room_of(module_name(path)) != "speed"], ids=str)
def test_speed_has_one_door(path: Path) -> None:
    assert {name for name in imported_modules(path) if room_of(name) == "speed"} <= {"scripts.speed.speed_up"}


@pytest.mark.parametrize("path", STAGES, ids=str)
def test_stages_never_import_stages(path: Path) -> None:
    stages = {module_name(stage) for stage in STAGES}

    assert not imported_modules(path) & stages


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Not even inside functions or for types only."""
    assert circle_in({module: imported_modules(path) for module, path in MODULES.items()}) == []


def test_a_circle_would_be_seen() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_common_imports_no_torch() -> None:
    """Every command needs it, also those that end with a message about the configuration."""
    names = [name for name in MODULES if name.startswith("scripts.common")]
    program = (
        f"import sys, {', '.join(names)}; "
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'mlflow', 'datasets', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )

    assert len(names) > 10
    assert run_python("-c", program).stderr == ""


@pytest.mark.parametrize("path", STAGES, ids=str)
def test_importing_a_stage_loads_nothing_heavy(path: Path) -> None:
    """--help and configuration mistakes must answer at once."""
    program = (
        f"import sys, {module_name(path)}; "
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'mlflow', 'datasets', 'lm_eval', 'presidio_analyzer'} & set(sys.modules); "
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )

    assert run_python("-c", program).stderr == ""
