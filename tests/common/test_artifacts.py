"""Output folders: what is finished proves itself, one writer at a time, and an interruption loses nothing."""

from __future__ import annotations

import hashlib
import json
import locale
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest

from scripts.common import artifacts
from scripts.common.artifacts import (
    MANIFEST,
    DatasetFacts,
    GitFacts,
    Parent,
    check_replaceable,
    git_state,
    locked_run_dir,
    package_versions,
    private,
    publish,
    read_manifest,
    sha256_file,
    sha256_json,
    write_manifest,
    write_text_durably,
)
from scripts.common.errors import UserError
from tests.conftest import ROOT
from tests.support.manifests import FACTS, change_manifest, finish_folder

DATA = Path(__file__).parent / "data"


def make_artifact(folder: Path, text: str = "weights", stage: str = "sft", **facts: object) -> Path:
    """Write a small finished folder."""
    (folder / "inner").mkdir(parents=True)
    (folder / "weights.bin").write_text(text)
    (folder / "inner" / "more.txt").write_text("more")
    finish_folder(folder, stage, **facts)
    return folder


def refusal(folder: Path, **arguments) -> str:
    """Return the message that a user sees."""
    with pytest.raises(UserError) as caught:
        read_manifest(folder, **arguments)
    return str(caught.value)


def test_manifest_says_what_was_written_and_with_what(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a", parent=None, metrics={"loss": 1.5})

    manifest = read_manifest(folder, stages=("sft", "dpo"))

    assert manifest.stage == "sft"
    assert manifest.metrics == {"loss": 1.5}
    assert manifest.files == {
        "inner/more.txt": sha256_file(folder / "inner/more.txt"),
        "weights.bin": sha256_file(folder / "weights.bin"),
    }
    assert {"torch", "transformers", "trl", "peft"} <= manifest.packages.keys()
    assert manifest.packages["torch"] == version("torch")
    assert manifest.git == git_state()
    assert manifest.schema_version == 1
    assert datetime.now(UTC) - datetime.fromisoformat(manifest.created) < timedelta(minutes=5)
    assert len(manifest.created) == len("2026-01-01T00:00:00+00:00"), "whole seconds, in UTC"


@pytest.fixture
def ascii_locale() -> Iterator[None]:
    """Write and read text as a bare server does, whose locale knows no letter beyond ASCII."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    yield
    locale.setlocale(locale.LC_CTYPE, before)


@pytest.mark.usefixtures("ascii_locale")
def test_manifest_is_utf8_in_every_locale(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a", metrics={"note": "ü"})

    assert '"note": "ü"'.encode() in (folder / MANIFEST).read_bytes()
    assert read_manifest(folder).metrics["note"] == "ü"


def test_versions_are_those_installed_and_a_package_that_is_not_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "PACKAGES", ("filelock", "no-such-package", "pydantic"))

    assert package_versions() == {"filelock": version("filelock"), "pydantic": version("pydantic")}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Take a new git checkout with one commit for the one this code lies in."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (
        ("GIT_CONFIG_GLOBAL", os.devnull), ("GIT_CONFIG_NOSYSTEM", "1"), ("GIT_CEILING_DIRECTORIES", str(tmp_path)),
        *((f"GIT_{who}_{what}", "someone") for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "code.py").write_text("1")
    for arguments in (["init", "-q"], ["add", "code.py"], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    monkeypatch.setattr(artifacts, "ROOT", folder)
    return folder


def test_git_state_names_the_commit_and_whether_its_files_were_edited(checkout: Path) -> None:
    log = subprocess.run(["git", "log", "-1", "--format=%H"], cwd=checkout, capture_output=True, text=True, check=True)
    commit = log.stdout.strip()

    assert git_state() == GitFacts(commit=commit, dirty=False)
    (checkout / "outputs.txt").write_text("a file that git does not track is not an edit")
    assert git_state() == GitFacts(commit=commit, dirty=False)
    (checkout / "code.py").write_text("2")
    assert git_state() == GitFacts(commit=commit, dirty=True)


def test_git_state_is_null_where_git_cannot_tell(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(checkout / ".git")
    assert git_state() == GitFacts(commit=None, dirty=None), "no checkout"

    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    assert git_state() == GitFacts(commit=None, dirty=False), "no commit yet"

    monkeypatch.setenv("PATH", str(checkout))
    assert git_state() == GitFacts(commit=None, dirty=None), "git is not installed"


def test_private_file_is_open_to_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for text in ("one\n", "two\n"):
            with open(tmp_path / "log", "a", encoding="utf-8", opener=private) as file:
                file.write(text)
    finally:
        os.umask(before)

    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600


def test_hashes_are_those_that_other_programs_compute(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")

    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"weights").hexdigest()
    assert sha256_json({"b": "ü", "a": 1}) == hashlib.sha256('{"a": 1, "b": "ü"}'.encode()).hexdigest()


def test_parent_is_named_by_its_portable_path_and_its_identity(tmp_path: Path) -> None:
    manifest = read_manifest(make_artifact(tmp_path / "a"))

    assert manifest.as_parent(ROOT / "outputs" / "a") == Parent(path="outputs/a", sha256=sha256_json(manifest.files))


def test_manifest_is_readable_text_and_keeps_what_made_it_when_files_are_added(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a", metrics={"note": "ü"})
    before = read_manifest(folder)
    (folder / "card.md").write_text("card")

    after = write_manifest(folder, before)

    files = {**before.files, "card.md": sha256_file(folder / "card.md")}
    assert after == read_manifest(folder) == before.model_copy(update={"files": files})
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    assert text.startswith('{\n "schema": 1,\n "stage": "sft",')
    assert text.endswith("}\n")
    assert '"note": "ü"' in text


def test_identity_follows_the_content_and_not_the_place_or_time(tmp_path: Path) -> None:
    first, second, other = (
        read_manifest(make_artifact(tmp_path / name, text)) for name, text in (("a", "x"), ("b", "x"), ("c", "y"))
    )

    assert first.sha256 == second.sha256 != other.sha256


@pytest.mark.parametrize("fault", ["changed", "is missing"])
def test_folder_whose_files_are_not_those_of_its_manifest_is_refused(tmp_path: Path, fault: str) -> None:
    folder = make_artifact(tmp_path / "a")
    file = folder / "inner" / "more.txt"
    if fault == "changed":
        file.write_text("mOre")
    else:
        file.unlink()

    assert f"{file}: {fault} since manifest.json was written" in refusal(folder)
    assert read_manifest(folder, verify=False).stage == "sft"


@pytest.mark.parametrize("name", ["../outside.bin", "inner/../../outside.bin", "{outside}", "weights\0.bin"])
def test_manifest_that_names_a_file_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder, outside = make_artifact(tmp_path / "a"), tmp_path / "outside.bin"
    outside.write_text("secret")
    name = name.format(outside=outside)
    change_manifest(folder, files={name: sha256_file(outside)})

    assert refusal(folder) == f"{folder / MANIFEST}: files: found {name!r}, wanted names inside the folder."


def test_file_that_a_library_would_load_unasked_is_refused_and_any_other_is_not(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a")
    (folder / "notes.txt").write_text("x")
    assert read_manifest(folder).stage == "sft"

    (folder / "config.json").write_text("{}")

    assert refusal(folder) == (
        f"{folder / 'config.json'}: was added since manifest.json was written. Restore the folder or make it again."
    )
    assert read_manifest(folder, verify=False).stage == "sft"


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"base_model": ["model"]}, "base_model: input should be a valid dictionary"),
        ({"base_model": {**FACTS["base_model"], "revision": 3}}, "base_model.revision: input should be a valid string"),
        ({"base_model": {"id": "model", "revision": None}}, "base_model.fingerprint: field required"),
        ({"datasets": [{"path": "x.jsonl", "sha256": "0"}, "a"]}, "datasets.1: input should be a valid dictionary"),
        ({"mlflow": {}}, "mlflow.run_id: field required"),
    ],
)
def test_model_whose_manifest_lacks_a_fact_is_refused(tmp_path: Path, facts: dict, said: str) -> None:
    folder = make_artifact(tmp_path / "a")
    change_manifest(folder, **facts)

    assert refusal(folder) == f"{folder / MANIFEST}: {said}. Restore the folder or make it again."


@pytest.mark.parametrize("stage", ["sft", "dpo", "comparison", "merged"])
def test_manifest_of_the_first_release_is_read_as_it_was_written(tmp_path: Path, stage: str) -> None:
    written = (DATA / f"manifest_{stage}.json").read_text(encoding="utf-8")
    (tmp_path / MANIFEST).write_text(written, encoding="utf-8")

    manifest = read_manifest(tmp_path, stages=(stage,), verify=False)

    content, now = json.loads(written), manifest.model_dump(mode="json", by_alias=True)
    for before, after in zip(content.pop("datasets"), now.pop("datasets"), strict=True):
        assert after == dict.fromkeys(after) | before, "what it lacks is null"
    lacking = {
        "chat_template_kwargs": {},
        "template_date": None,
        "system_prompt": None,
        "thinking": False,
        "plan": None,
    }
    old = content.pop("split")
    assert now.pop("split") == {
        "seed": old["seed"], "validation_ratio": old["ratio"], "test_ratio": 0.0, "key_version": 0, "group_field": None
    }, "it had two sides"  # fmt: skip
    assert now == content | lacking, "it prints today's date, and is given nothing"
    assert (manifest.parent is None) == (stage == "sft")
    assert manifest.section == manifest.config.get(stage, {})


def test_an_earlier_manifest_has_the_system_prompt_of_its_configuration(tmp_path: Path) -> None:
    content = json.loads((DATA / "manifest_sft.json").read_text(encoding="utf-8"))
    content["config"]["data"]["system_prompt"] = "Be brief."
    (tmp_path / MANIFEST).write_text(json.dumps(content))

    assert read_manifest(tmp_path, verify=False).system_prompt == "Be brief."


def test_what_an_earlier_manifest_lacks_is_null(tmp_path: Path) -> None:
    content = json.loads((DATA / "manifest_sft.json").read_text(encoding="utf-8"))
    del content["parent"]
    for side in ("train", "validation"):
        del content["datasets"][0][side]
    (tmp_path / MANIFEST).write_text(json.dumps(content))

    manifest = read_manifest(tmp_path, verify=False)

    assert manifest.parent is None
    data = content["datasets"][0]
    assert manifest.datasets == [DatasetFacts(path=data["path"], sha256=data["sha256"], train=None, validation=None)]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"files": {}}', "null"])
def test_folder_without_a_valid_manifest_is_an_unfinished_run(tmp_path: Path, content: str | None) -> None:
    folder = make_artifact(tmp_path / "a")
    (folder / MANIFEST).unlink()
    if content is not None:
        (folder / MANIFEST).write_text(content)

    assert refusal(folder) == (
        f"{folder}: no valid manifest.json, so it was not finished by this project. "
        "Run the stage that writes it again (with --resume to continue from its last checkpoint)."
    )


def test_missing_folder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    assert "no such folder. Run the stage that writes it first" in refusal(tmp_path / "absent")


def test_folder_of_another_stage_is_refused(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a", stage="merged")

    assert "found a folder of stage `merged`, wanted sft or dpo" in refusal(folder, stages=("sft", "dpo"))


def test_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a")
    change_manifest(folder, schema=99)

    assert (
        refusal(folder) == f"{folder / MANIFEST}: found schema 99, wanted 1. Make the artifact again with this version."
    )


def test_interrupted_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_text_durably(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text_durably(path, "new")
    monkeypatch.undo()

    assert path.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state.json", "state.json.part"]
    write_text_durably(path, "newer")
    assert path.read_text() == "newer"
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


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


def test_result_may_be_put_where_nothing_or_an_earlier_one_of_its_stage_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    changed = make_artifact(tmp_path / "changed")
    (changed / "weights.bin").write_text("edited since")
    make_artifact(tmp_path / "interrupted").rename(tmp_path / "interrupted.old")

    for name in ("absent", "empty", "changed", "interrupted"):
        check_replaceable(tmp_path / name, "sft", "sft.output_dir")

    assert (tmp_path / "interrupted").is_dir(), "the folder that was about to be replaced is back"


@pytest.mark.parametrize("what", ["file", "empty file", "folder of the user", "other stage", "link", "dead link"])
def test_result_does_not_replace_anything_else(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "folder"
    if what in ("file", "empty file"):
        folder.write_text("mine" if what == "file" else "")
    elif what == "folder of the user":
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
    elif what == "other stage":
        make_artifact(folder, stage="dpo")
    else:
        (tmp_path / "target").mkdir()
        folder.symlink_to(tmp_path / ("target" if what == "link" else "gone"))

    with pytest.raises(UserError) as caught:
        check_replaceable(str(folder), "sft", "sft.output_dir")

    assert str(caught.value) == (
        f"sft.output_dir: {folder} is there already and is not a folder of stage `sft`, so it will not be replaced. "
        "Choose another one, or remove it."
    )


def test_first_publish_makes_the_folders_above(tmp_path: Path) -> None:
    publish(make_artifact(tmp_path / "part"), tmp_path / "outputs" / "today" / "out")

    assert read_manifest(tmp_path / "outputs" / "today" / "out").stage == "sft"


@pytest.mark.skipif(os.name == "nt", reason="permission bits")
@pytest.mark.parametrize(("folder", "weights"), [(0o755, 0o644), (0o700, 0o600)])
def test_weights_are_read_by_whom_the_folder_admits_and_private_files_stay_private(
    tmp_path: Path, folder: int, weights: int
) -> None:
    part = tmp_path / "part"
    part.mkdir()
    part.chmod(folder)
    (part / "adapter_model.safetensors").touch(0o600)  # as safetensors does
    (part / "votes.jsonl").touch(0o600)

    publish(part, tmp_path / "out")

    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {"adapter_model.safetensors": weights, "votes.jsonl": 0o600}


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv")
def test_a_file_that_may_not_be_read_is_named_with_what_to_do(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a")
    (folder / "weights.bin").chmod(0)
    program = f"from scripts.common.artifacts import read_manifest; read_manifest({str(folder)!r})"
    bound = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []

    done = subprocess.run(
        [*bound, sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )

    said = done.stderr.splitlines()[-1]
    assert said.startswith("scripts.common.errors.UserError: ")
    assert said.endswith(
        f"weights.bin: Permission denied. Let the user that runs this read it: `chmod -R a+rX {folder}`."
    )


def test_publish_succeeds_though_the_previous_folder_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another program holds one of its files open on Windows, or on a network drive."""
    out, part = make_artifact(tmp_path / "out", "old"), make_artifact(tmp_path / "part", "new")

    def busy(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "in use")

    monkeypatch.setattr(artifacts.os, "unlink", busy)
    publish(part, out)
    monkeypatch.undo()

    assert (out / "weights.bin").read_text() == "new"
    assert (tmp_path / "out.old" / "weights.bin").read_text() == "old"


def test_whole_folder_is_on_the_disk_before_it_is_renamed_and_the_rename_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut could leave a finished folder with empty files."""
    out, part = make_artifact(tmp_path / "out", "old"), make_artifact(tmp_path / "part", "new")
    synced: dict[int, str] = {}  # inode: what had its name when it was synced
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced[os.fstat(descriptor).st_ino] = (out / "weights.bin").read_text()

    monkeypatch.setattr(artifacts.os, "fsync", fsync)
    publish(part, out)

    assert synced == {path.stat().st_ino: "old" for path in (out, *out.rglob("*"))} | {tmp_path.stat().st_ino: "new"}


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

    assert read_manifest(out).stage == "sft"
    assert (out / "weights.bin").read_text() == "old"


def test_next_writer_repairs_an_interrupted_publish(tmp_path: Path) -> None:
    out = make_artifact(tmp_path / "out", "old")
    out.rename(tmp_path / "out.old")

    with locked_run_dir(out):
        assert read_manifest(out).stage == "sft"


def test_leftover_of_an_earlier_publish_does_not_win_over_the_new_folder(tmp_path: Path) -> None:
    """A run that died between the last rename and the removal leaves both."""
    out = make_artifact(tmp_path / "out", "new")
    make_artifact(tmp_path / "out.old", "old")

    assert read_manifest(out).files["weights.bin"] == sha256_file(out / "weights.bin")
    assert (out / "weights.bin").read_text() == "new"
    publish(make_artifact(tmp_path / "part", "newer"), out)
    assert (out / "weights.bin").read_text() == "newer"
    assert not (tmp_path / "out.old").exists()
