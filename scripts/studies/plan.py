"""What a study makes: seeds, the variants that --vary spans, and one run per arm, seed and variant."""

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
from scripts.common.stages import SFT, TRAINING_STAGES, TrainingStage, planned_stages

VARIANTS_UNASKED = 12
# What decides an SFT adapter; a key of the section dpo or kto decides what follows it.
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
    **{f"{name}.output_dir": OWN_FOLDERS for name in TRAINING_STAGES},
    **{f"{name}.init_from": OWN_FOLDERS for name, stage in TRAINING_STAGES.items() if stage.continues},
    "pairs": "all variants are given the same pairs; give it with --set",
}


@dataclass(frozen=True)
class Arm:
    """What is trained from the SFT adapter of each seed and compared."""

    name: str
    stage: TrainingStage
    by: str | None = None  # who prefers in pairs of the seed's own answers; None trains on the data of the stage

    @property
    def data_key(self) -> str:
        """Name the key of the data that it trains on."""
        return f"{self.stage.name}.dataset_path"

    def is_decided_by(self, key: str) -> bool:
        """Tell whether a key of the configuration changes what is trained."""
        section = key.partition(".")[0]
        return section in SFT_SECTIONS or (section == self.stage.name and not (self.by and key == self.data_key))


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
    arm: str  # or sft
    variant: str
    varied: dict[str, Any]  # the keys of --vary that decide it
    path: Path
    sft_folder: Path  # of its seed and variant
    settings: dict[str, Any]
    parent: Member | None = None  # the run whose adapter it continues
    pairs: PairsMember | None = None  # the run that makes its data

    @property
    def name(self) -> str:
        """Name the run by its seed and folder."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def kind(self) -> str:
        """Name what takes about as long as this run."""
        return self.arm

    @property
    def script(self) -> str:
        """Return the command."""
        return self.stage.script

    @property
    def flags(self) -> list[str]:
        """Return what the command is given."""
        return [*as_flags(self.settings), "--resume"]

    @property
    def needs(self) -> list[RunOfStudy]:
        """Return the runs that have to be finished before."""
        return [run for run in (self.parent, self.pairs) if run]


@dataclass(frozen=True)
class PairsMember:
    """One run of make_pairs; it writes a file of pairs of the answers of an SFT adapter."""

    by: str
    seed: int
    path: Path
    settings: dict[str, Any]
    parent: Member  # the run whose adapter answers

    @property
    def name(self) -> str:
        """Name the run by its seed and file."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def kind(self) -> str:
        """Name what takes about as long as this run."""
        return f"pairs_{self.by}"

    @property
    def script(self) -> str:
        """Return the command."""
        return "scripts.make_pairs"

    @property
    def flags(self) -> list[str]:
        """Return what the command is given."""
        made = ["--by", self.by, "--from", str(self.parent.path), "--out", str(self.path)]
        return [*as_flags(self.settings), *made]

    @property
    def needs(self) -> list[RunOfStudy]:
        """Return the run that has to be finished before."""
        return [self.parent]


RunOfStudy = Member | PairsMember


def arms_of(values: Config) -> list[Arm]:
    """Return the arms of `study.arms`, or else one for each stage that has data and continues SFT."""
    default = [stage.name for stage in planned_stages(values) if stage.continues]
    parted = [name.partition("_") for name in values.study.arms or default]
    return [Arm(stage + _ + by, TRAINING_STAGES[stage], by or None) for stage, _, by in parted]


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
    if reason is None and section in Config.model_fields and section not in (*SFT_SECTIONS, *TRAINING_STAGES):
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
        arms = arms_of(config.values)
        for stage in {SFT.name: SFT, **{arm.stage.name: arm.stage for arm in arms}}:
            check_decided(config, stage)
        for key in varied:
            if not any(arm.is_decided_by(key) for arm in arms):
                named = ", ".join(arm.name for arm in arms)
                raise UserError(f"--vary {key}: changes no arm of this study ({named}). Name others in study.arms.")
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


def plan_members(variants: Sequence[Variant], seeds: Sequence[int], folder: Path) -> list[RunOfStudy]:
    """Return every run, one seed after the other; variants of a seed share what the keys of --vary do not decide.

    All runs of a seed lie beside each other, where DPO keeps what a reference model says about pairs for its next run, and
    make_pairs what it has sampled.
    """
    planned: dict[Path, RunOfStudy] = {}
    arms = arms_of(variants[0].config.values)
    for seed in seeds:
        place = folder / f"seed-{seed}"
        sft = [plan_sft(seed, variant, place) for variant in variants]
        pairs = [{by: plan_pairs(by, each) for by in dict.fromkeys(arm.by for arm in arms) if by} for each in sft]
        trained = [
            plan_arm(arm, seed, variant, parent, made.get(arm.by or ""))
            for arm in arms
            for variant, parent, made in zip(variants, sft, pairs, strict=True)
        ]
        of_seed: list[RunOfStudy] = [*sft, *(one for made in pairs for one in made.values()), *trained]
        for run in of_seed:
            planned.setdefault(run.path, run)
    return list(planned.values())


def plan_sft(seed: int, variant: Variant, folder: Path) -> Member:
    """Say what the SFT run of a variant is given and where it writes."""
    varied = {key: value for key, value in variant.settings.items() if key.partition(".")[0] in SFT_SECTIONS}
    name = name_of(variant.config.values, list(varied))
    place = folder / _named("sft_adapter", name)
    settings = {**varied, "seed": seed, "sft.output_dir": str(place)}
    return Member(SFT, seed, SFT.name, name, varied, place, place, settings)


def plan_pairs(by: str, parent: Member) -> PairsMember:
    """Say where the pairs of an SFT adapter's answers are written; the sides are those of its split."""
    place = parent.path.with_name(f"{_named(f'pairs_{by}', parent.variant)}.jsonl")
    return PairsMember(by, parent.seed, place, parent.settings, parent)


def plan_arm(arm: Arm, seed: int, variant: Variant, sft: Member, pairs: PairsMember | None) -> Member:
    """Say what a run that continues SFT is given and where it writes."""
    stage = arm.stage.name
    varied = {key: value for key, value in variant.settings.items() if arm.is_decided_by(key)}
    name = name_of(variant.config.values, list(varied))
    place = sft.path.with_name(_named(f"{stage}_adapter" + (f"_{arm.by}" if arm.by else ""), name))
    settings = {**varied, "seed": seed, "sft.output_dir": str(sft.path), f"{stage}.output_dir": str(place)}
    if pairs:
        settings[arm.data_key] = str(pairs.path)
    parent = sft if getattr(variant.config.values, stage).init_from is not None else None
    if parent:
        settings[f"{stage}.init_from"] = str(sft.path)
    return Member(arm.stage, seed, arm.name, name, varied, place, sft.path, settings, parent, pairs)


def _named(what: str, variant: str) -> str:
    return "_".join(filter(None, (what, variant)))
