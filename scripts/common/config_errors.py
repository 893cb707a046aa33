"""Say what is wrong with a configuration: key, file and line, found, wanted."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import combinations
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from scripts.common.question import question_problems
from scripts.common.schema import Config
from scripts.common.stages import TRAINING_STAGES


def section_of(key: Sequence[str | int]) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for part in key:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return model


def is_section(key: str) -> bool:
    return section_of(key.split(".")) is not section_of(key.split(".")[:-1])


def suggest(name: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean `{prefix}{near[0]}`?"
    for section, field in Config.model_fields.items():
        if (
            isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)
            and name in field.annotation.model_fields
        ):
            return f"did you mean `{section}.{name}`?"
    return "known keys: " + ", ".join(sorted(known)) if known else "remove it"


def schema_problems(error: ValidationError, tree: Any, origins: dict[str, str], path: str) -> list[str]:
    """Turn pydantic's findings into one line per key; what each member of a union wanted is joined by `or`."""
    found: dict[str, list[str]] = {}
    for details in error.errors():
        location = _location(details["loc"], tree, absent=details["type"] == "missing")
        key = ".".join(str(part) for part in location)
        below = [origin for known, origin in origins.items() if known.startswith(f"{key}.")]
        where = next((origins[k] for k in parents_of(key) if k in origins), below[0] if below else path)
        if details["type"] == "extra_forbidden":
            model = section_of(location[:-1])
            prefix = "".join(f"{part}." for part in location[:-1])
            known = [] if any(isinstance(part, int) for part in location) else list(model.model_fields)
            problem, wanted = "unknown key", suggest(str(location[-1]), known, prefix)
        elif details["type"] == "missing":
            problem, wanted = "missing", "it has no default, so write it down"
        else:
            problem = f"found {json.dumps(details['input'], default=str, ensure_ascii=False)[:80]}"
            wanted = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            wanted = re.sub(r"^a valid dictionary or instance of .*", "lines of `key: value` under it", wanted)
            wanted = re.sub(r"^List (should have at .* items?) after validation.*", r"a list, which \1", wanted)
            wanted = wanted.replace("String should match pattern", "a text of the pattern").replace(
                "Keys should be strings", "a text as key"
            )
            wanted = wanted.replace("a valid ", "a ").replace("a integer", "a whole number").replace("string", "text")
        found.setdefault(f"{where}: {key}: {problem}", []).append(wanted)
    return [
        f"{head}; {'' if head.endswith(('key', 'missing')) else 'wanted '}{' or '.join(wanted)}"
        for head, wanted in found.items()
    ]


def _location(parts: Sequence[str | int], tree: Any, *, absent: bool) -> list[str | int]:
    """Keep what leads through the values given; pydantic adds the names of union members, which are not keys of ours."""
    location: list[str | int] = []
    for place, part in enumerate(parts, 1):
        if part in (tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()):
            tree = tree[part]
            location.append(part)
        elif absent and place == len(parts):
            location.append(part)
    return location


def parents_of(key: str) -> Iterator[str]:
    while key:
        yield key
        key = key.rpartition(".")[0]


OUTPUTS = (
    *(f"{name}.output_dir" for name in TRAINING_STAGES),
    "eval.output_dir",
    "lmeval.output_dir",
    "export.output_dir",
    "export.gguf_dir",
)


def contradictions(values: Config, origins: dict[str, str], path: str) -> Iterator[str]:
    """Find keys that are right alone and wrong together."""
    if values.quantization.load_in_4bit and values.quantization.load_in_8bit:
        where = origins.get("quantization.load_in_8bit", path)
        yield f"{where}: quantization.load_in_8bit: found true beside load_in_4bit: true; wanted only one of them"
    data = values.data
    if data.validation_ratio + data.test_ratio >= 1:
        where = origins.get("data.test_ratio") or origins.get("data.validation_ratio") or path
        found = f"found {data.test_ratio:g} beside validation_ratio: {data.validation_ratio:g}"
        yield f"{where}: data.test_ratio: {found}; wanted less than 1 together, so that something is left to train on"
    folders = {key: os.path.abspath(attrgetter(key)(values)) for key in OUTPUTS}
    for (first, one), (second, other) in combinations(folders.items(), 2):
        if Path(one).is_relative_to(other) or Path(other).is_relative_to(one):
            where = origins.get(second) or origins.get(first) or path
            found = attrgetter(second)(values)
            yield f"{where}: {second}: found {found}, wanted a folder apart from that of {first}: one would replace the other"
    files = {key: getattr(values.serve, key) for key in ("votes_path", "thumbs_path", "queue_votes_path")}
    for (first, one), (second, other) in combinations(files.items(), 2):
        if one and other and os.path.abspath(one) == os.path.abspath(other):
            where = origins.get(f"serve.{second}") or origins.get(f"serve.{first}") or path
            yield f"{where}: serve.{second}: found {other}, wanted another file than serve.{first}: their records differ"
    for key, problem in question_problems(values):
        yield f"{next((origins[k] for k in parents_of(key) if k in origins), path)}: {key}: {problem}"


def undecided(values: Config, stage: str) -> Iterator[str]:
    """Find what a section leaves open that its stage needs to know, or asks of it in vain; other stages do not care."""
    fresh = getattr(values, stage).init_from is None if TRAINING_STAGES[stage].continues else True
    if fresh and values.lora.init in ("pissa", "olora"):
        moves = f"lora.init: found {values.lora.init}, which moves a part of the base's weights into the adapter"
        if values.lora.use_dora:
            yield f"{moves}. The saved adapter would lose the magnitudes of lora.use_dora: true. Set one of them to its default."
        if values.quantization.load_in_4bit or values.quantization.load_in_8bit:
            yield f"{moves}. A quantised base cannot be moved exactly. Set lora.init: default, or quantization to false."
    if stage != "dpo":
        return
    if values.dpo.beta is None:
        yield "dpo.beta: missing; it has no default because it decides the result. 0.1 is the usual start."
    if values.dpo.init_from is None and values.dpo.reference == "sft":
        yield "dpo.reference: found sft, but dpo.init_from is null, so there is no SFT adapter. Set reference: base."


def password_problems(value: Any, origins: dict[str, str], path: str, key: str = "") -> Iterator[str]:
    """Find URLs that carry a password, without showing it: a configuration is copied into manifests and MLflow."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        yield from password_problems(item, origins, path, f"{key}.{name}".removeprefix("."))
    if isinstance(value, str) and re.search(r"://[^/\s@]*:[^/\s@]*@", value):
        where = next((origins[k] for k in parents_of(key) if k in origins), path)
        fix = "MLflow takes MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD from the environment"
        yield f"{where}: {key}: found a password in the URL, which would be copied into manifests and MLflow. Take it out; {fix}"
