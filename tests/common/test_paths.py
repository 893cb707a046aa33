"""Paths are looked up here first, then in the repository, and written down so that they travel."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.common import paths
from scripts.common.paths import portable_path, resolve
from tests.conftest import ROOT


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Take a folder for the repository, and stand in another one beside it."""
    repository, here = tmp_path / "repository", tmp_path / "here"
    repository.mkdir()
    here.mkdir()
    monkeypatch.setattr(paths, "ROOT", repository)
    monkeypatch.chdir(here)
    return repository


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_lies_here_wins_over_the_repository(repository: Path, kind: str) -> None:
    for folder in (repository, Path()):
        (folder / "data").mkdir() if kind == "folder" else (folder / "data").write_text("x")

    assert resolve("data") == Path("data")
    assert resolve(Path("data")) == Path("data")


def test_what_lies_in_the_repository_alone_is_found_there(repository: Path) -> None:
    (repository / "data").mkdir()
    (repository / "data/rows.jsonl").write_text("x")

    assert resolve("data/rows.jsonl") == repository / "data/rows.jsonl"
    assert resolve("data") == repository / "data"


@pytest.mark.parametrize("path", ["absent/rows.jsonl", "", "owner/name", "/no/such/file"])
def test_what_lies_in_neither_comes_back_as_it_is(repository: Path, path: str) -> None:
    assert resolve(path) == Path(path)


def test_an_absolute_path_is_never_looked_up_elsewhere(repository: Path, tmp_path: Path) -> None:
    (repository / "rows.jsonl").write_text("x")

    assert resolve(tmp_path / "rows.jsonl") == tmp_path / "rows.jsonl"


def test_paths_inside_the_repository_travel_with_it(tmp_path: Path) -> None:
    assert portable_path(ROOT / "data" / "sft" / "x.jsonl") == "data/sft/x.jsonl"
    assert portable_path(tmp_path / "x.jsonl") == str(tmp_path / "x.jsonl")


def test_a_relative_path_inside_the_repository_is_written_from_its_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "data")

    assert portable_path("sft/x.jsonl") == "data/sft/x.jsonl"
