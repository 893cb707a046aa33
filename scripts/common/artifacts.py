"""Output folders: hashes, the manifest, the lock, and the rename that makes a finished folder appear at once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scripts.common.errors import UserError, did_you_mean
from scripts.common.paths import ROOT, portable_path
from scripts.common.schema import Data

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCHEMA = 1
LOCK = "lock"
RENAME_TRIES, RENAME_SECONDS = 10, 0.2  # on Windows virus scanners and indexers open new files for a moment
SPLIT_KEY_VERSION = 1  # of cluster_of and side_of in dataset/split.py: how a record comes to its side
LOADED = (".safetensors", ".json", ".jinja")  # what libraries read on their own account
# How an adapter reads and writes conversations, beside tokenizer and template.
FORMAT_FACTS = ("chat_template_kwargs", "template_date", "system_prompt", "thinking")
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "mlflow", "lm-eval")


class _Facts(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, populate_by_name=True)


class BaseModelFacts(_Facts):
    """Which base a result rests on: the fingerprint decides, the id says where to get it."""

    id: str
    revision: str | None
    fingerprint: str


class Parent(_Facts):
    """The artifact that another one was made from."""

    path: str
    sha256: str


class DatasetFacts(_Facts):
    """One source of records; null where a side was not used."""

    path: str
    sha256: str
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    near_duplicates: int | None = None  # left out of validation and test
    items: int | None = None


class SplitFacts(_Facts):
    """What decided on which side of the split a prompt is."""

    seed: int
    validation_ratio: float
    test_ratio: float
    key_version: int = 0  # 0: the split of earlier versions, which had no test side
    group_field: str | None = None

    @classmethod
    def of(cls, data: Data) -> SplitFacts:
        """Describe the split that a configuration asks for."""
        return cls(
            seed=data.split_seed,
            validation_ratio=data.validation_ratio,
            test_ratio=data.test_ratio,
            key_version=SPLIT_KEY_VERSION,
            group_field=data.group_field,
        )

    @model_validator(mode="before")
    @classmethod
    def _from_two_sides(cls, content: Any) -> Any:
        if isinstance(content, dict) and "ratio" in content:
            return {"seed": content.get("seed"), "validation_ratio": content["ratio"], "test_ratio": 0.0}
        return content

    def __str__(self) -> str:
        text = f"seed {self.seed}, validation {self.validation_ratio:g}, test {self.test_ratio:g}"
        return text + (f", by {self.group_field}" if self.group_field else "")


class PlanFacts(_Facts):
    """The hash of the primary question and its terms, and when the first training stage wrote it down."""

    sha256: str
    frozen: str


class RunFacts(_Facts):
    """The MLflow run that wrote an artifact."""

    run_id: str | None


class GitFacts(_Facts):
    """The commit of this code and whether it was edited; nulls outside a git checkout."""

    commit: str | None
    dirty: bool | None


class Manifest(_Facts):
    """What a finished folder says about itself: what made it, from what, and the hash of each of its files.

    Keys that later versions add are null in the manifests of earlier ones.
    """

    schema_version: int = Field(SCHEMA, alias="schema")
    stage: str
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    base_model: BaseModelFacts
    tokenizer_sha256: str
    chat_template_sha256: str
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    template_date: str | None = None
    system_prompt: str | None = None
    thinking: bool = False
    parent: Parent | None = None
    datasets: list[DatasetFacts]
    split: SplitFacts
    plan: PlanFacts | None = None
    config: dict[str, Any]
    mlflow: RunFacts
    metrics: dict[str, Any]
    packages: dict[str, str] = Field(default_factory=lambda: package_versions())
    git: GitFacts = Field(default_factory=lambda: git_state())
    files: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_earlier_versions(cls, content: Any) -> Any:
        if isinstance(content, dict) and isinstance(content.get("config"), dict) and "system_prompt" not in content:
            return content | {"system_prompt": (content["config"].get("data") or {}).get("system_prompt")}
        return content

    @property
    def sha256(self) -> str:
        """Return the identity of the artifact: the hash of its file map."""
        return sha256_json(self.files)

    def as_parent(self, folder: str | Path) -> Parent:
        """Describe the artifact for the manifest of another one that is made from it."""
        return Parent(path=portable_path(folder), sha256=self.sha256)

    @property
    def section(self) -> dict[str, Any]:
        """Return the section of the configuration that the artifact's own stage was run with."""
        return dict(self.config.get(self.stage) or {})


def sha256_file(path: Path) -> str:
    """Hash a file without reading it into memory at once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def private(path: str, flags: int) -> int:
    """Open a file that only its owner may read, for `open(…, opener=private)`."""
    return os.open(path, flags, 0o600)


def sha256_json(value: Any) -> str:
    """Hash a JSON value in its canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def git_state() -> GitFacts:
    """Ask git for the commit this code is at and whether it was edited."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    changes = git("status", "--porcelain", "--untracked-files=no")
    return GitFacts(commit=git("rev-parse", "HEAD"), dirty=None if changes is None else bool(changes))


def package_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_manifest(folder: Path, manifest: Manifest, files: Iterable[Path] | None = None) -> Manifest:
    """Hash every file of a folder and write its manifest last; what made the folder stays as the manifest says.

    `files` are those that belong to the artifact where other work lies in the folder too.
    """
    if files is None:
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    hashes = {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(files)}
    manifest = manifest.model_copy(update={"files": hashes})
    content = manifest.model_dump(mode="json", by_alias=True)
    write_text_durably(folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return manifest


def read_manifest(folder: str | Path, *, stages: tuple[str, ...] = (), verify: bool = True) -> Manifest:
    """Read the manifest of a finished folder and check that its files are those it lists.

    Raises: UserError when the folder is missing, unfinished, of another stage, or its files were changed.
    """
    folder = Path(folder)
    repair_interrupted_publish(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder. Run the stage that writes it first (`python -m scripts.train_sft`, then "
            f"`python -m scripts.train_dpo`), or correct the path.{did_you_mean(folder)}"
        )
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema, stage = content.get("schema"), str(content["stage"])
        dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{folder}: no valid {MANIFEST}, so it was not finished by this project. "
            "Run the stage that writes it again (with --resume to continue from its last checkpoint)."
        ) from None
    if schema != SCHEMA:
        raise UserError(f"{path}: found schema {schema}, wanted {SCHEMA}. Make the artifact again with this version.")
    if stages and stage not in stages:
        raise UserError(f"{folder}: found a folder of stage `{stage}`, wanted {' or '.join(stages)}.")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key, problem = ".".join(map(str, first["loc"])), first["msg"].lower().partition(" or instance")[0]
        raise UserError(f"{path}: {key}: {problem}. Restore the folder or make it again.") from None
    if verify:
        _check_files(folder, manifest.files)
    return manifest


def _check_files(folder: Path, files: dict[str, str]) -> None:
    fix = f"since {MANIFEST} was written. Restore the folder or make it again."
    for name, digest in files.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise UserError(f"{folder / MANIFEST}: files: found {name!r}, wanted names inside the folder.")
        try:
            there = file.is_file() and sha256_file(file)
        except OSError as error:
            raise UserError(
                f"{file}: {error.strerror}. Let the user that runs this read it: `chmod -R a+rX {folder}`."
            ) from None
        if there != digest:
            raise UserError(f"{file}: {'changed' if there else 'is missing'} {fix}")
    for file in folder.iterdir():
        if file.suffix in LOADED and file.name not in (MANIFEST, *files):
            raise UserError(f"{file}: was added {fix}")


def check_replaceable(output_dir: str | Path, stage: str, key: str) -> None:
    """Refuse to put a result in the place of anything but an earlier one of its stage.

    Raises: UserError when something else is there, which a finished run would remove.
    """
    folder = Path(output_dir)
    repair_interrupted_publish(folder)
    if not folder.is_symlink() and (not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))):
        return
    try:
        read_manifest(folder, stages=(stage,), verify=False)
    except UserError:
        raise UserError(
            f"{key}: {folder} is there already and is not a folder of stage `{stage}`, so it will not be replaced. "
            "Choose another one, or remove it."
        ) from None


def write_text_durably(path: Path, text: str) -> None:
    """Replace a small file so that a crash leaves the old text or the new one, never half of either."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _when_free(lambda: part.replace(path))


def replace_durably(part: Path, path: Path) -> None:
    """Put a finished file in the place of another, once it is on the disk."""
    _fsync(part)
    _when_free(lambda: part.replace(path))


def run_dir_of(output_dir: str | Path) -> Path:
    """Name the place for work in progress beside an output folder."""
    return Path(output_dir).with_name(Path(output_dir).name + ".run")


@contextmanager
def locked_run_dir(output_dir: str | Path, *, passing: bool = False) -> Iterator[Path]:
    """Hold `<output_dir>.run/`, the place for work in progress, for this process alone.

    The lock dies with the process, so a killed run leaves nothing to clean up. A `passing` folder goes when all went well.
    """
    output_dir, run_dir = Path(output_dir), run_dir_of(output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{output_dir}: another process is writing it. Wait for it to end, or choose another output_dir."
        ) from None
    try:
        repair_interrupted_publish(output_dir)
        yield run_dir
        if passing:
            _empty(run_dir)
    finally:
        lock.release()
    if passing:
        with suppress(OSError):  # another process has taken the folder since
            run_dir.rmdir()


def _empty(run_dir: Path) -> None:
    """Remove what a run worked on; Windows lets nobody remove a lock that is held, and filelock does it on release."""
    for path in run_dir.iterdir():
        if path.name == LOCK and os.name == "nt":
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def wait_until_free(output_dir: str | Path) -> None:
    """Wait until no process holds an output folder, as one that was left alone by a killed parent still does."""
    run_dir = run_dir_of(output_dir)
    if not run_dir.is_dir():
        return
    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: a process still writes it; waiting for its end", output_dir)
        lock.acquire()
    lock.release()


def publish(part: Path, output_dir: str | Path) -> None:
    """Put a complete folder in its place by renaming; the previous one goes only after the new one stands.

    Raises: UserError on Windows when another program has a file of the previous one open.
    """
    output_dir = Path(output_dir)
    old = output_dir.with_name(output_dir.name + ".old")
    # safetensors makes its files readable by their owner alone, so that no service could read them.
    for weights in part.rglob("*.safetensors"):
        weights.chmod(stat.S_IMODE(part.stat().st_mode) & 0o666)
    _fsync_tree(part)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    if old.exists():
        shutil.rmtree(old)
    try:
        if output_dir.exists():
            _when_free(lambda: output_dir.rename(old))
        _when_free(lambda: part.rename(output_dir))
    except PermissionError:
        repair_interrupted_publish(output_dir)
        if os.name != "nt":
            raise
        raise UserError(
            f"{output_dir}: another program has a file in it open, so Windows does not let it be replaced. Close that program "
            f"(a server, an editor, a window of the folder). The finished result is in {part}; rename it, or run again."
        ) from None
    _fsync(output_dir.parent)
    shutil.rmtree(old, ignore_errors=True)


def repair_interrupted_publish(output_dir: Path) -> None:
    """Bring the previous folder back when a run died between the two renames."""
    if not output_dir.name:  # `.` or `/`
        return
    old = output_dir.with_name(output_dir.name + ".old")
    if old.is_dir() and not output_dir.exists():
        old.rename(output_dir)


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _fsync(path)
    _fsync(folder)


def _when_free(move: Callable[[], Any]) -> None:
    """Move a file or folder; on Windows wait a little for programs that have it open."""
    for tries_left in reversed(range(RENAME_TRIES if os.name == "nt" else 1)):
        try:
            move()
            return
        except PermissionError:
            if not tries_left:
                raise
            time.sleep(RENAME_SECONDS)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    # Windows syncs only what is open for writing; elsewhere a file without write permission is synced too.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
