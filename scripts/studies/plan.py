"""What a study trains: seeds, the variants that --vary spans, and one run per stage, seed and variant."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from scripts.common.artifacts import sha256_json
from scripts.common.config import LoadedConfig, check_decided, load_config, parse_override
from scripts.common.config_errors import is_section, parents_of
from scripts.common.errors import UserError
from scripts.common.schema import Config
from scripts.common.stages import DPO, SFT, TrainingStage

VARIANTS_UNASKED = 12
# What decides an SFT adapter; a key of the section dpo decides what follows it.
SFT_SECTIONS = ("quantization", "lora", "data", "sft", "performance")
ONE_SPLIT = "variants are compared on the same held-out prompts, so one study has one split"
ONE_BASE = "variants are compared on one base; make a study for each, with --set"
OWN_FOLDERS = "a study names the folders of its runs itself"
NOT_VARIED = {
    "seed": "its seeds are given by --seeds",
    "base_model_id": ONE_BASE,
    "base_model_revision": ONE_BASE,
    "data.validation_ratio": ONE_SPLIT,
    "data.test_ratio": ONE_SPLIT,
    "data.split_seed": ONE_SPLIT,
    "data.group_field": ONE_SPLIT,
    "sft.output_dir": OWN_FOLDERS,
    "dpo.output_dir": OWN_FOLDERS,
    "dpo.init_from": OWN_FOLDERS,
}


@dataclass(frozen=True)
class Variant:
    """One point of the grid: what its keys are set to, and the whole configuration with them."""

    name: str  # such as beta-0.1; empty where nothing is varied
    settings: dict[str, Any]
    config: LoadedConfig


@dataclass(frozen=True)
class Member:
    """One training run of a study; it writes an adapter."""

    stage: TrainingStage
    seed: int
    variant: str
    folder: Path
    sft_folder: Path  # of its seed and variant
    settings: dict[str, Any]
    parent: Member | None = None  # the run whose adapter it continues

    @property
    def name(self) -> str:
        """Name the run by its seed and folder."""
        return f"{self.folder.parent.name}/{self.folder.name}"


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Write settings as --set takes them."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Write settings as the command line of a stage."""
    return [part for item in as_overrides(settings) for part in ("--set", item)]


def as_list(text: str) -> str:
    """Write `1,2,7` as the list that --set takes."""
    return f"[{text}]" if "," in text and not text.lstrip().startswith("[") else text


def parse_vary(items: Sequence[str]) -> dict[str, list[Any]]:
    """Read KEY=VALUE,VALUE,… of each --vary.

    Raises: UserError when a key is there twice, may not be varied, or lacks a value.
    """
    varied: dict[str, list[Any]] = {}
    for item in items:
        name, equals, text = item.partition("=")
        parts = split_values(text) if equals else [""]
        key = ".".join(parse_override(f"{name}={parts[0]}" if equals else item, "--vary")[0])
        if key in varied:
            raise UserError(f"--vary {key}: given twice. Write all its values into one: --vary {key}=A,B,C.")
        check_may_vary(key)
        if not all(parts):
            raise UserError(f'--vary {item}: found no value where one was wanted; an empty text is written "".')
        varied[key] = [parse_override(f"{key}={part}", "--vary")[1] for part in parts]
    return varied


def split_values(text: str) -> list[str]:
    """Split at the commas outside of brackets and quotes."""
    parts, depth, quoted, escaped = [""], 0, False, False
    for sign in text:
        if sign == "," and not depth and not quoted:
            parts.append("")
            continue
        if quoted:
            quoted, escaped = sign != '"' or escaped, sign == "\\" and not escaped
        elif sign == '"' and (depth or not parts[-1].strip()):  # inside a bare word it is a sign like others
            quoted = True
        depth += 0 if quoted else (sign in "[{") - (sign in "]}" and depth > 0)
        parts[-1] += sign
    return [part.strip() for part in parts]


def check_may_vary(key: str) -> None:
    """Refuse a key that exists and would make a study unfair or change nothing that it trains."""
    reason = next((NOT_VARIED[known] for known in parents_of(key) if known in NOT_VARIED), None)
    section = key.partition(".")[0]
    if reason is None and section in Config.model_fields and section not in (*SFT_SECTIONS, DPO.name):
        reason = "it changes nothing that is trained; give it with --set"
    if reason is None and is_section(key):
        reason = f"it is a section; name a key in it, as in {key}.KEY=A,B"
    if reason:
        raise UserError(f"--vary {key}: cannot be varied: {reason}.")


def find_variants(
    path: str, overrides: Sequence[str], varied: Mapping[str, Sequence[Any]], many: bool
) -> list[Variant]:
    """Return every combination of the values, each with a configuration that its stages accept.

    Raises: UserError when a value is wrong, two variants are the same, or there are very many and `many` is not allowed.
    """
    count = prod(len(values) for values in varied.values())
    if count > VARIANTS_UNASKED and not many:
        grid = " × ".join(f"{len(values)} of {key}" for key, values in varied.items())
        raise UserError(
            f"--vary: {grid} make {count} variants, each trained under every seed; the best of many on the validation "
            f"side is partly luck. Give fewer values, or --yes for more than {VARIANTS_UNASKED}."
        )
    variants: dict[str, Variant] = {}
    for values in product(*varied.values()):
        settings = dict(zip(varied, values, strict=True))
        config = load_config(path, [*overrides, *as_overrides(settings)], origin="--vary")
        for stage in (SFT, DPO):
            check_decided(config, stage.name)
        name = name_of(config.values, list(varied))
        if name in variants:
            raise UserError(f"--vary: {', '.join(as_overrides(settings))} is there twice. Give each value once.")
        variants[name] = Variant(name, settings, config)
    return list(variants.values())


def name_of(values: Config, keys: Sequence[str]) -> str:
    """Name a combination of values so that it can be read, stand in a path, and be no other's name."""
    tree = values.model_dump(mode="json")
    short = [key.rpartition(".")[2] for key in keys]
    names = [key if short.count(last) > 1 else last for key, last in zip(keys, short, strict=True)]
    found = [reduce(lambda inner, part: inner[part], key.split("."), tree) for key in keys]
    return "_".join(f"{name}-{_in_a_path(value)}" for name, value in zip(names, found, strict=True))


def _in_a_path(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:40].strip("-.")
    return safe if safe == text.lower() else f"{safe}-{sha256_json(value)[:6]}".strip("-")


def seeds_of(values: Config) -> list[int]:
    """Return the seeds of `study.seeds`, which may count them from `seed`."""
    seeds = values.study.seeds
    return list(range(values.seed, values.seed + seeds)) if isinstance(seeds, int) else list(seeds)


def plan_members(variants: Sequence[Variant], seeds: Sequence[int], folder: Path) -> list[Member]:
    """Return every run, one seed after the other; variants of a seed share an SFT adapter unless they vary it.

    All runs of a seed lie beside each other, where DPO keeps what a reference model says about pairs for its next run.
    """
    members: dict[Path, Member] = {}
    for seed in seeds:
        for stage in (SFT, DPO):
            for variant in variants:
                member = plan_member(stage, seed, variant, folder / f"seed-{seed}", members)
                members.setdefault(member.folder, member)
    return list(members.values())


def plan_member(
    stage: TrainingStage, seed: int, variant: Variant, folder: Path, earlier: Mapping[Path, Member]
) -> Member:
    """Say what one run is given and where it writes."""
    shared = {key: value for key, value in variant.settings.items() if key.partition(".")[0] in SFT_SECTIONS}
    sft_folder = folder / _folder_name(SFT, name_of(variant.config.values, list(shared)))
    if stage is SFT:
        settings = {**shared, "seed": seed, "sft.output_dir": str(sft_folder)}
        return Member(stage, seed, variant.name, sft_folder, sft_folder, settings)
    place = folder / _folder_name(stage, variant.name)
    settings = {**variant.settings, "seed": seed, "sft.output_dir": str(sft_folder), "dpo.output_dir": str(place)}
    if variant.config.values.dpo.init_from is None:
        return Member(stage, seed, variant.name, place, sft_folder, settings)
    settings["dpo.init_from"] = str(sft_folder)
    return Member(stage, seed, variant.name, place, sft_folder, settings, earlier[sft_folder])


def _folder_name(stage: TrainingStage, variant: str) -> str:
    return "_".join(filter(None, (f"{stage.name}_adapter", variant)))
