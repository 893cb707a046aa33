"""The record of a study, study.json: what it is, so that another one is not mixed with it, and what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from scripts.common.artifacts import write_text_durably
from scripts.common.errors import UserError
from scripts.common.schema import Config
from scripts.common.stages import SFT
from scripts.dataset.records import PARSERS, load_datasets
from scripts.studies.plan import Variant, arms_of
from scripts.training.resume import DECIDING_PERFORMANCE, DECIDING_SECTIONS, differences

RECORD = "study.json"


class Ranked(BaseModel):
    """A variant of an arm and what it reaches on the validation side: the primary measure, its mean over the seeds."""

    name: str  # with its arm in front where a study has several
    arm: str = "dpo"
    settings: dict[str, Any]
    value: float | None = None  # null where an arm has one variant only


class Result(BaseModel):
    """What a study found: how the variants of its arms rank, and which of each arm the report is about."""

    seeds: list[int]  # of which every run is finished
    missing: list[str]
    measure: str | None = None  # null where there was nothing to rank
    title: str = ""
    unit: str = ""
    variants: list[Ranked]
    chosen: str  # names, between commas where a study has several arms


class Record(BaseModel):
    """What a study is, what its runs took, and what it found."""

    settings: dict[str, Any]
    data: dict[str, str]  # the hash of each file
    mlflow_run_id: str | None = None
    seconds: dict[str, list[float]] = {}  # of each kind of run
    compared: dict[str, str] = {}  # what each comparison was made of
    result: Result | None = None

    def save(self, folder: Path) -> None:
        """Write the record, so that a study that is killed continues from here."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text_durably(folder / RECORD, self.model_dump_json(indent=1) + "\n")


def find_record(folder: Path, values: Config, variants: Sequence[Variant]) -> Record:
    """Return the record of the study that a folder holds, or a new one; all data are read, so that a bad row shows now.

    Raises: UserError when the folder holds something else, or a study of other settings or data.
    """
    fresh = Record(settings=deciding_settings(values, variants[0].settings), data=hash_data(variants))
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return fresh
    try:
        record = Record.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"study.output_dir: {folder} is there already, and its {RECORD} is not that of a study. "
            "Choose another folder, or remove it."
        ) from None
    changes = [  # what only one of them has belongs to arms or variants that the other does not have
        line
        for before, now in ((record.settings, fresh.settings), (record.data, fresh.data))
        for line in differences({key: value for key, value in before.items() if key in now}, now)
    ]
    if changes:
        raise UserError(
            f"study.output_dir: {folder} holds another study ({'; '.join(changes)}). Restore what was changed, or choose "
            f"another folder, as in --set study.output_dir={folder}-2. Nothing was changed."
        )
    return record.model_copy(update={"settings": fresh.settings | record.settings, "data": record.data | fresh.data})


def deciding_settings(values: Config, varied: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that every run of a study has in common, and mark the keys that vary."""
    tree = values.model_dump(mode="json")
    for key in varied:
        *sections, last = key.split(".")
        inner = tree
        for part in sections:
            inner = inner[part]
        inner[last] = "one of --vary"
    arms = arms_of(values)
    stages = {SFT.name: SFT, **{arm.stage.name: arm.stage for arm in arms}}
    for stage in stages:
        tree[stage].pop("output_dir")
        if "init_from" in tree[stage]:
            tree[stage]["init_from"] = tree[stage]["init_from"] and SFT.name
    performance = {key: tree["performance"][key] for key in DECIDING_PERFORMANCE}
    shared = [key for key in DECIDING_SECTIONS if key != "seed"]
    made = {"pairs": tree["pairs"]} if any(arm.by for arm in arms) else {}
    if any(arm.by == "checks" for arm in arms):
        made["checks"] = {"rules": tree["eval"]["checks"]}
    return {key: tree[key] for key in (*shared, *stages)} | {"performance": performance} | made


def hash_data(variants: Sequence[Variant]) -> dict[str, str]:
    """Read and check the records of every run, and return the hash of each file; pairs that a study makes come later."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for values in (variant.config.values for variant in variants):
        stages = {SFT.name: SFT, **{arm.stage.name: arm.stage for arm in arms_of(values) if not arm.by}}
        for stage in stages.values():
            path, key = getattr(values, stage.name).dataset_path, f"{stage.name}.dataset_path"
            source = repr((key, path, values.data))
            if source not in seen:
                files = load_datasets(path, PARSERS[stage.records], values.data, key)
                found |= {file.path: file.sha256 for file in files}
            seen.add(source)
    return found
