"""Load the one YAML file: strict keys, overrides from the command line, and the origin of every value."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from scripts.common.errors import UserError, did_you_mean, listing, not_utf8
from scripts.common.schema import (
    OWNED_TRAINER_ARGUMENTS,
    POSITIVE_TRAINER_ARGUMENTS,
    REMOVED_TRAINER_ARGUMENTS,
    Config,
)

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_FILE = ROOT / "configs" / "schema.json"
DEFAULT_CONFIG = "configs/config.yaml"
TRAINER_SECTIONS = {"sft": "SFTConfig", "dpo": "DPOConfig"}

# What PyYAML says, with what to do about it.
YAML_MENDS = {
    "'\\t'": "indent with spaces, not with tabs",
    "escape": 'in "double quotes" \\ has a meaning; write paths with /, or without quotes',
    "mapping values": "a space follows each key's colon, keys of a section stand below each other, text that holds `: ` stands in quotes",
}
MAX_KEYS = 100_000  # aliases can make a few lines expand without end

Key = tuple[str, ...]


class _Yaml12Loader(yaml.SafeLoader):
    """Read `2e-4` as a number (YAML 1.1 sees text) and leave everything else to PyYAML."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build a value; PyYAML lets what Python says of an impossible one (2026-99-99) pass as it is."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            problem = f"found {str(node.value)[:40]!r}, which is no {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


_Yaml12Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class LoadedConfig:
    """A valid configuration together with where each value came from, and the flags that give it to another stage."""

    values: Config
    origins: dict[str, str]
    flags: str = ""

    def to_yaml(self) -> str:
        """Write the resolved configuration; loading it again gives the same values."""
        return "\n".join(self._yaml_lines(self.values, "", "")) + "\n"

    def _yaml_lines(self, section: BaseModel, prefix: str, indent: str) -> Iterator[str]:
        for name, value in section.model_dump(mode="json").items():
            inner, key = getattr(section, name), f"{prefix}{name}"
            if isinstance(inner, BaseModel):
                yield f"{indent}{name}:"
                yield from self._yaml_lines(inner, f"{key}.", indent + "  ")
            else:
                yield f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}  # {self.origin(key)}"

    def origin(self, key: str) -> str:
        """Say where a value came from; an inner key inherits from the block that was given."""
        given = (self.origins[parent] for parent in _parents(key) if parent in self.origins and not _is_section(parent))
        return next(given, "default")

    def digest(self) -> str:
        """Hash the values alone, so that moving a line in the YAML changes nothing."""
        return hashlib.sha256(self.values.model_dump_json().encode()).hexdigest()


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two flags every stage has."""
    parser.add_argument(
        "--config", default=DEFAULT_CONFIG, metavar="FILE", help="YAML configuration (default: %(default)s)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override one key, such as sft.learning_rate=1e-4; may be repeated; values are JSON, else plain text",
    )  # fmt: skip


def load_config(path: str | Path, overrides: Sequence[str] = (), origin: str = "--set") -> LoadedConfig:
    """Read, override and validate a configuration file; `origin` says where the overrides come from.

    Raises: UserError listing every mistake with file, line, what was found and what was wanted.
    """
    tree, lines = _read_yaml(Path(path))
    origins = {".".join(key): f"{path}:{line}" for key, line in lines.items()}
    for item in overrides:
        key, value = _parse_override(item)
        _put(tree, key, value)
        origins = {known: origin for known, origin in origins.items() if not known.startswith(".".join(key) + ".")}
        origins[".".join(key)] = origin
    try:
        json.dumps(tree, ensure_ascii=False, default=str).encode()
        values = Config.model_validate(tree)
    except UnicodeEncodeError as error:
        around = ascii(error.object[max(0, error.start - 40) : error.end])
        raise UserError(
            f"{path} or {origin}: a text holds what is no character (not UTF-8): {around}. Retype it."
        ) from None
    except ValidationError as error:
        raise UserError(
            listing("the configuration is not valid", _schema_problems(error, tree, origins, str(path)))
        ) from None
    problems = [
        *_trainer_problems(values, origins, str(path)), *_contradictions(values, origins, str(path)),
        *_password_problems(values.model_dump(), origins, str(path)),
    ]  # fmt: skip
    if problems:
        raise UserError(listing("the configuration is not valid", problems))
    flags = ["--config", str(path), *(part for item in overrides for part in ("--set", item))]
    return LoadedConfig(values, origins, shlex.join(flags))


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_absolute() and (ROOT / path).is_file():  # as for data: from any working folder
            return _read_yaml(ROOT / path)
        known = ", ".join(sorted(os.path.relpath(p) for p in (ROOT / "configs").glob("*.yaml")))
        raise UserError(f"{path}: no such configuration file.{did_you_mean(path)} There are: {known}") from None
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{path}: found {reason}, wanted a YAML file in UTF-8.") from None
    try:
        loader = _Yaml12Loader(text)
        node = loader.get_single_node()
        lines = dict(islice(_key_lines(node, (), str(path)), MAX_KEYS)) if node else {}
        if len(lines) == MAX_KEYS:
            raise UserError(f"{path}: holds more than {MAX_KEYS} keys and list entries. Do its aliases (*name) expand?")
        tree = loader.construct_document(node) if node else {}
    except yaml.reader.ReaderError as error:
        line_number = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{path}:{line_number}: not valid YAML: found the control character {error.character:#04x}."
        ) from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        line = f":{mark.line + 1}" if mark else ""
        mend = next((f"; {mend}" for sign, mend in YAML_MENDS.items() if sign in str(problem)), "")
        raise UserError(f"{path}{line}: not valid YAML: {problem}{mend}.") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply, or an alias (*name) holds itself.") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: found {type(tree).__name__}, wanted `key: value` lines, with a space after the colon."
        )
    return _with_empty_sections(tree), lines


def _with_empty_sections(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Read a section whose keys are all commented out as an empty section."""
    filled = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if _is_section(key):
            value = {} if value is None else value
            value = _with_empty_sections(value, f"{key}.") if isinstance(value, dict) else value
        filled[str(name)] = value
    return filled


def _key_lines(node: yaml.Node, prefix: Key, path: str) -> Iterator[tuple[Key, int]]:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*prefix, str(index)), item.start_mark.line + 1
            yield from _key_lines(item, (*prefix, str(index)), path)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        name, line = str(key_node.value), key_node.start_mark.line + 1
        if name in seen:
            raise UserError(
                f"{path}:{line}: {'.'.join((*prefix, name))}: written twice, first in line {seen[name]}. Keep one."
            )
        seen[name] = line
        yield (*prefix, name), line
        yield from _key_lines(value_node, (*prefix, name), path)


def _parse_override(item: str) -> tuple[Key, Any]:
    name, equals, text = item.partition("=")
    if not equals or not all(part.strip() for part in name.split(".")):
        raise UserError(f"--set {item}: wanted KEY=VALUE, such as --set sft.learning_rate=1e-4")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    return tuple(name.strip().split(".")), value


def _put(tree: dict[str, Any], key: Key, value: Any) -> None:
    for depth, part in enumerate(key[:-1], 1):
        inner = tree.setdefault(part, {})
        if inner is None:
            inner = tree[part] = {}
        if not isinstance(inner, dict):
            raise UserError(f"--set {'.'.join(key)}: {'.'.join(key[:depth])} is a value, not a section.")
        tree = inner
    tree[key[-1]] = value


def _section_of(key: Sequence[str | int]) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for part in key:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return model


def _is_section(key: str) -> bool:
    return _section_of(key.split(".")) is not _section_of(key.split(".")[:-1])


def _suggest(name: str, known: Sequence[str], prefix: str = "") -> str:
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


def _schema_problems(error: ValidationError, tree: Any, origins: dict[str, str], path: str) -> list[str]:
    """Turn pydantic's findings into one line per key; what each member of a union wanted is joined by `or`."""
    found: dict[str, list[str]] = {}
    for details in error.errors():
        location = _location(details["loc"], tree, absent=details["type"] == "missing")
        key = ".".join(str(part) for part in location)
        below = [origin for known, origin in origins.items() if known.startswith(f"{key}.")]
        where = next((origins[k] for k in _parents(key) if k in origins), below[0] if below else path)
        if details["type"] == "extra_forbidden":
            model = _section_of(location[:-1])
            prefix = "".join(f"{part}." for part in location[:-1])
            known = [] if any(isinstance(part, int) for part in location) else list(model.model_fields)
            problem, wanted = "unknown key", _suggest(str(location[-1]), known, prefix)
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
    """Keep what leads through the values given; pydantic adds the names of union members, which are no keys of ours."""
    location: list[str | int] = []
    for place, part in enumerate(parts, 1):
        if part in (tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()):
            tree = tree[part]
            location.append(part)
        elif absent and place == len(parts):
            location.append(part)
    return location


def _parents(key: str) -> Iterator[str]:
    while key:
        yield key
        key = key.rpartition(".")[0]


OUTPUTS = (
    "sft.output_dir",
    "dpo.output_dir",
    "eval.output_dir",
    "lmeval.output_dir",
    "export.output_dir",
    "export.gguf_dir",
)


def _contradictions(values: Config, origins: dict[str, str], path: str) -> Iterator[str]:
    """Find keys that are right alone and wrong together."""
    if values.quantization.load_in_4bit and values.quantization.load_in_8bit:
        where = origins.get("quantization.load_in_8bit", path)
        yield f"{where}: quantization.load_in_8bit: found true beside load_in_4bit: true; wanted only one of them"
    folders = {key: os.path.abspath(attrgetter(key)(values)) for key in OUTPUTS}
    for (first, one), (second, other) in combinations(folders.items(), 2):
        if Path(one).is_relative_to(other) or Path(other).is_relative_to(one):
            where = origins.get(second) or origins.get(first) or path
            found = attrgetter(second)(values)
            yield f"{where}: {second}: found {found}, wanted a folder apart from that of {first}: one would replace the other"


def _trainer_problems(values: Config, origins: dict[str, str], path: str) -> Iterator[str]:
    """Check the pass-through blocks against TRL's field names without importing TRL."""
    definitions = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))["$defs"]
    for section, trl_class in TRAINER_SECTIONS.items():
        if section not in Config.model_fields:
            continue
        given = getattr(values, section).trainer
        known = definitions[trl_class]["properties"]
        own = set(_section_of([section]).model_fields) - {"trainer"}
        for name, value in given.items():
            key = f"{section}.trainer.{name}"
            where = next((origins[k] for k in _parents(key) if k in origins), path)
            if name in own:
                yield f"{where}: {key}: has a place of its own; write {section}.{name}"
            elif name in OWNED_TRAINER_ARGUMENTS:
                yield f"{where}: {key}: decided elsewhere; see {OWNED_TRAINER_ARGUMENTS[name].format(section=section)}"
            elif name in REMOVED_TRAINER_ARGUMENTS:
                yield f"{where}: {key}: no longer exists; use {REMOVED_TRAINER_ARGUMENTS[name].format(section=section)}"
            elif name not in known:
                yield f"{where}: {key}: TRL's {trl_class} has no such argument; {_suggest(name, sorted(known), f'{section}.trainer.')}"
            elif not _is_of_type(value, known[name]):
                wanted = " or ".join(json.dumps(choice) for choice in known[name].get("enum", []))
                wanted = wanted or " or ".join(IN_WORDS[kind] for kind in known[name]["type"])
                yield f"{where}: {key}: found {json.dumps(value, ensure_ascii=False)[:80]}; wanted {wanted}"
            elif name in POSITIVE_TRAINER_ARGUMENTS and not (value and value > 0):
                yield f"{where}: {key}: found {json.dumps(value)}; wanted a number above 0"


IN_WORDS = {
    "boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "text", "array": "a list",
    "object": "lines of `key: value`", "null": "null",
}  # fmt: skip
JSON_TYPES: dict[str, Any] = {"boolean": bool, "integer": int, "number": (int, float), "string": str, "array": list, "object": dict, "null": type(None)}  # fmt: skip


def _is_of_type(value: Any, wanted: dict[str, Any]) -> bool:
    if "enum" in wanted:
        return value in wanted["enum"]
    kinds = wanted.get("type", JSON_TYPES)
    return any(
        isinstance(value, JSON_TYPES[kind]) and not (type(value) is bool and kind in ("integer", "number"))
        for kind in kinds
    )


def _password_problems(value: Any, origins: dict[str, str], path: str, key: str = "") -> Iterator[str]:
    """Find URLs that carry a password, without showing it: a configuration is copied into manifests and MLflow."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        yield from _password_problems(item, origins, path, f"{key}.{name}".removeprefix("."))
    if isinstance(value, str) and re.search(r"://[^/\s@]*:[^/\s@]*@", value):
        where = next((origins[k] for k in _parents(key) if k in origins), path)
        mend = "MLflow takes MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD from the environment"
        yield f"{where}: {key}: found a password in the URL, which would be copied into manifests and MLflow. Take it out; {mend}"
