"""Load the one YAML file: strict keys, overrides from the command line, and the origin of every value."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from scripts.common.errors import UserError, listing
from scripts.common.schema import OWNED_TRAINER_ARGUMENTS, REMOVED_TRAINER_ARGUMENTS, Config

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_FILE = ROOT / "configs" / "schema.json"
DEFAULT_CONFIG = "configs/config.yaml"
TRAINER_SECTIONS = {"sft": "SFTConfig", "dpo": "DPOConfig"}

UNION_MEMBER = re.compile(r"[\[\]()]|^(str|bool|int|literal|constrained|function)")

Key = tuple[str, ...]


class _Yaml12Loader(yaml.SafeLoader):
    """Read `2e-4` as a number (YAML 1.1 sees text) and leave everything else to PyYAML."""


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
    """A valid configuration together with where each value came from."""

    values: Config
    origins: dict[str, str]

    def to_yaml(self) -> str:
        """Write the resolved configuration; loading it again gives the same values."""
        return "\n".join(self._yaml_lines(self.values, "", "")) + "\n"

    def _yaml_lines(self, section: BaseModel, prefix: str, indent: str) -> Iterator[str]:
        for name, value in section.model_dump().items():
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
        values = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(listing("the configuration is not valid", _schema_problems(error, origins))) from None
    problems = list(_trainer_problems(values, origins))
    if problems:
        raise UserError(listing("the configuration is not valid", problems))
    return LoadedConfig(values, origins)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = ", ".join(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*.yaml")))
        raise UserError(f"{path}: no such configuration file. Shipped ones: {known}") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path}: found {error.__class__.__name__}, wanted a YAML file in UTF-8.") from None
    try:
        loader = _Yaml12Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        lines = dict(_key_lines(node, (), str(path)))
        tree = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if mark is None:  # a character that no YAML file may hold
            raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from None
        raise UserError(f"{path}:{mark.line + 1}: not valid YAML: {getattr(error, 'problem', error)}.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: found {type(tree).__name__}, wanted `key: value` lines.")
    return _with_empty_sections(tree), lines


def _with_empty_sections(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Read a section whose keys are all commented out as an empty section."""
    filled = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if _is_section(key):
            value = {} if value is None else value
            value = _with_empty_sections(value, f"{key}.") if isinstance(value, dict) else value
        filled[name] = value
    return filled


def _key_lines(node: yaml.Node, prefix: Key, path: str) -> Iterator[tuple[Key, int]]:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
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
    if not equals or not name.strip():
        raise UserError(f"--set {item}: wanted KEY=VALUE, such as --set sft.learning_rate=1e-4")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return tuple(name.strip().split(".")), value


def _put(tree: dict[str, Any], key: Key, value: Any) -> None:
    for depth, part in enumerate(key[:-1], 1):
        inner = tree.get(part)
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


def _suggest(name: str, known: Sequence[str], prefix: str) -> str:
    near = difflib.get_close_matches(name, known)
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


def _schema_problems(error: ValidationError, origins: dict[str, str]) -> list[str]:
    """Turn pydantic's findings into one line per key; what each member of a union wanted is joined by `or`."""
    found: dict[str, list[str]] = {}
    for details in error.errors():
        # pydantic adds the names of union members to the location; they are no keys of ours, but a user's key may be
        # called like one.
        *outer, last = details["loc"]
        location = [p for p in outer if not UNION_MEMBER.search(str(p))]
        if details["type"] in ("extra_forbidden", "missing") or not UNION_MEMBER.search(str(last)):
            location.append(last)
        key = ".".join(str(part) for part in location)
        where = _origin(key, origins)
        if details["type"] == "extra_forbidden":
            model = _section_of(location[:-1])
            prefix = "".join(f"{part}." for part in location[:-1])
            known = [] if any(isinstance(part, int) for part in location) else list(model.model_fields)
            problem, wanted = "unknown key", _suggest(str(location[-1]), known, prefix)
        elif details["type"] == "missing":
            problem, wanted = "missing", "it has no default, so write it down"
        else:
            problem = f"found {json.dumps(details['input'], default=str, ensure_ascii=False)[:80]}"
            wanted = details["msg"].removeprefix("Input should be ")
            wanted = re.sub(r"^a valid dictionary or instance of .*", "lines of `key: value` under it", wanted)
            wanted = wanted.replace("a valid ", "a ").replace("a integer", "a whole number").replace("string", "text")
        found.setdefault(f"{where}: {key}: {problem}", []).append(wanted)
    return [
        f"{head}; {'' if head.endswith(('key', 'missing')) else 'wanted '}{' or '.join(wanted)}"
        for head, wanted in found.items()
    ]


def _parents(key: str) -> Iterator[str]:
    while key:
        yield key
        key = key.rpartition(".")[0]


def _origin(key: str, origins: dict[str, str]) -> str:
    """Say where a key or the block that holds it was written."""
    return next(origins[k] for k in _parents(key) if k in origins)


def _trainer_problems(values: Config, origins: dict[str, str]) -> Iterator[str]:
    """Check the pass-through blocks against TRL's field names without importing TRL."""
    definitions = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))["$defs"]
    for section, trl_class in TRAINER_SECTIONS.items():
        given = getattr(values, section).trainer
        known = set(definitions[trl_class]["properties"])
        own = _section_of([section]).model_fields
        for name in given:
            key = f"{section}.trainer.{name}"
            where = _origin(key, origins)
            if name in own:
                yield f"{where}: {key}: has a place of its own; write {section}.{name}"
            elif name in OWNED_TRAINER_ARGUMENTS:
                yield f"{where}: {key}: decided elsewhere; see {OWNED_TRAINER_ARGUMENTS[name].format(section=section)}"
            elif name in REMOVED_TRAINER_ARGUMENTS:
                yield f"{where}: {key}: no longer exists; use {REMOVED_TRAINER_ARGUMENTS[name].format(section=section)}"
            elif name not in known:
                yield f"{where}: {key}: TRL's {trl_class} has no such argument; {_suggest(name, sorted(known), f'{section}.trainer.')}"
