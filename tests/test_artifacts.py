"""Output folders: what is finished proves itself, one writer at a time, and an interruption loses nothing."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from scripts.common import artifacts
from scripts.common.artifacts import (
    MANIFEST,
    artifact_sha256,
    git_state,
    locked_run_dir,
    parent_entry,
    portable_path,
    publish,
    read_manifest,
    sha256_file,
    sha256_json,
    update_manifest,
    write_manifest,
    write_text_durably,
)
from scripts.common.errors import UserError
from tests.conftest import ROOT

FACTS: dict = {
    "base_model": {"id": "model", "revision": None, "fingerprint": "f"}, "tokenizer_sha256": "t", "chat_template_sha256": "c",
    "parent": None, "datasets": [], "split": {}, "config": {}, "mlflow": {"run_id": None}, "metrics": {},
}  # fmt: skip


def make_artifact(folder: Path, text: str = "weights", stage: str = "sft", **facts: object) -> Path:
    """Write a small finished folder."""
    (folder / "inner").mkdir(parents=True)
    (folder / "weights.bin").write_text(text)
    (folder / "inner" / "more.txt").write_text("more")
    write_manifest(folder, stage, **{**FACTS, **facts})
    return folder


def refusal(folder: Path, **arguments) -> str:
    """Return what the user is told."""
    with pytest.raises(UserError) as caught:
        read_manifest(folder, **arguments)
    return str(caught.value)


def test_manifest_says_what_was_written_and_with_what(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a", parent=None, metrics={"loss": 1.5})

    manifest = read_manifest(folder, stages=("sft", "dpo"))

    assert manifest["stage"] == "sft"
    assert manifest["metrics"] == {"loss": 1.5}
    assert manifest["files"] == {
        "inner/more.txt": sha256_file(folder / "inner/more.txt"),
        "weights.bin": sha256_file(folder / "weights.bin"),
    }
    assert {"torch", "transformers", "trl", "peft"} <= manifest["packages"].keys()
    assert manifest["git"] == git_state()
    assert manifest["schema"] == 1
    assert datetime.now(UTC) - datetime.fromisoformat(manifest["created"]) < timedelta(minutes=5)
    assert len(manifest["created"]) == len("2026-01-01T00:00:00+00:00"), "whole seconds, in UTC"


def test_hashes_are_those_that_other_programs_compute(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")

    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"weights").hexdigest()
    assert sha256_json({"b": "ü", "a": 1}) == hashlib.sha256('{"a": 1, "b": "ü"}'.encode()).hexdigest()


def test_parent_is_named_by_its_portable_path_and_its_identity(tmp_path: Path) -> None:
    manifest = read_manifest(make_artifact(tmp_path / "a"))

    assert parent_entry(ROOT / "outputs" / "a", manifest) == {
        "path": "outputs/a",
        "sha256": sha256_json(manifest["files"]),
    }


def test_manifest_is_readable_text_and_keeps_what_made_it_when_files_are_added(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a", note="ü")
    before = read_manifest(folder)
    (folder / "card.md").write_text("card")

    after = update_manifest(folder, before)

    assert (
        after
        == read_manifest(folder)
        == {**before, "files": {**before["files"], "card.md": sha256_file(folder / "card.md")}}
    )
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    assert text.startswith('{\n "schema": 1,\n "stage": "sft",')
    assert text.endswith("}\n")
    assert '"note": "ü"' in text


def test_identity_follows_the_content_and_not_the_place_or_time(tmp_path: Path) -> None:
    first, second, other = (
        read_manifest(make_artifact(tmp_path / name, text)) for name, text in (("a", "x"), ("b", "x"), ("c", "y"))
    )

    assert artifact_sha256(first) == artifact_sha256(second) != artifact_sha256(other)


@pytest.mark.parametrize("fault", ["changed", "is missing"])
def test_folder_whose_files_are_not_those_of_its_manifest_is_refused(tmp_path: Path, fault: str) -> None:
    folder = make_artifact(tmp_path / "a")
    file = folder / "inner" / "more.txt"
    if fault == "changed":
        file.write_text("mOre")
    else:
        file.unlink()

    assert f"{file}: {fault} since manifest.json was written" in refusal(folder)
    assert read_manifest(folder, verify=False)["stage"] == "sft"


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"files": {}}', "null"])
def test_folder_without_a_valid_manifest_is_an_unfinished_run(tmp_path: Path, content: str | None) -> None:
    folder = make_artifact(tmp_path / "a")
    (folder / MANIFEST).unlink()
    if content is not None:
        (folder / MANIFEST).write_text(content)

    told = refusal(folder)

    assert "no valid manifest.json, so it was not finished" in told
    assert "--resume" in told


def test_missing_folder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    assert "no such folder. Run the stage that writes it first" in refusal(tmp_path / "absent")


def test_folder_of_another_stage_is_refused(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a", stage="merged")

    assert "found a folder of stage `merged`, wanted sft or dpo" in refusal(folder, stages=("sft", "dpo"))


def test_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a")
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))

    assert refusal(folder) == f"{path}: found schema 99, wanted 1. Make the artifact again with this version."


def test_paths_inside_the_repository_travel_with_it(tmp_path: Path) -> None:
    assert portable_path(ROOT / "data" / "sft" / "x.jsonl") == "data/sft/x.jsonl"
    assert portable_path(tmp_path / "x.jsonl") == str(tmp_path / "x.jsonl")


def test_interrupted_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_text_durably(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text_durably(path, "new")

    assert path.read_text() == "old"


# --- the lock

HOLD = "import sys; from scripts.common.artifacts import locked_run_dir\nwith locked_run_dir(sys.argv[1]): print('held', flush=True); sys.stdin.read()"


def test_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """The lock must die with its process, even when that was killed."""
    folder = tmp_path / "adapter"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing it"), locked_run_dir(folder):
            pass
    finally:
        holder.kill()
        holder.communicate()

    with locked_run_dir(folder) as run_dir:
        assert run_dir == tmp_path / "adapter.run"


def test_lock_is_given_back_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), locked_run_dir(tmp_path / "a"):
        raise RuntimeError("boom")

    with locked_run_dir(tmp_path / "a") as run_dir:
        assert run_dir.is_dir()


# --- publishing


def test_publish_replaces_the_old_folder_whole(tmp_path: Path) -> None:
    out = make_artifact(tmp_path / "out", "old")
    (out / "only-in-old.txt").write_text("x")

    publish(make_artifact(tmp_path / "part", "new"), out)

    assert (out / "weights.bin").read_text() == "new"
    assert not (out / "only-in-old.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("stop_before", [1, 2])
def test_interrupted_publish_keeps_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_before: int
) -> None:
    """Stop at each of the two renames; the reader that comes next finds the old folder complete."""
    out, part = make_artifact(tmp_path / "out", "old"), make_artifact(tmp_path / "part", "new")
    real, calls = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == stop_before:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        publish(part, out)
    monkeypatch.undo()

    assert read_manifest(out)["stage"] == "sft"
    assert (out / "weights.bin").read_text() == "old"


def test_next_writer_mends_an_interrupted_publish(tmp_path: Path) -> None:
    out = make_artifact(tmp_path / "out", "old")
    out.rename(tmp_path / "out.old")

    with locked_run_dir(out):
        assert read_manifest(out)["stage"] == "sft"


def test_leftover_of_an_earlier_publish_does_not_win_over_the_new_folder(tmp_path: Path) -> None:
    """A run that died between the last rename and the removal leaves both."""
    out = make_artifact(tmp_path / "out", "new")
    make_artifact(tmp_path / "out.old", "old")

    assert read_manifest(out)["files"]["weights.bin"] == sha256_file(out / "weights.bin")
    assert (out / "weights.bin").read_text() == "new"
    publish(make_artifact(tmp_path / "part", "newer"), out)
    assert (out / "weights.bin").read_text() == "newer"
    assert not (tmp_path / "out.old").exists()
