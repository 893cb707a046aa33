"""Load the one YAML file: strict keys, overrides from the command line, and the origin of every value."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from scripts.common.config_errors import (
    contradictions,
    is_section,
    parents_of,
    password_problems,
    schema_problems,
    section_of,
    undecided,
)
from scripts.common.errors import UserError, did_you_mean, listing, not_utf8
from scripts.common.paths import ROOT, resolve
from scripts.common.schema import Config
from scripts.common.trl_arguments import trainer_problems

DEFAULT_CONFIG = "configs/config.yaml"

# What PyYAML says, with what to do about it.
YAML_FIXES = {
    "'\\t'": "indent with spaces, not with tabs",
    "escape": 'in "double quotes" \\ has a meaning; write paths with /, or without quotes',
    "mapping values": "a space follows each key's colon, keys of a section stand below each other, text that holds `: ` stands in quotes",
}

BARE_WORD = r"""[^\[\]{}"',]*[^\[\]{}"',\s][^\[\]{}"',]*"""  # as in YAML's [a, b]; quotes and brackets need JSON
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
            problem = f"found {str(node.value)[:40]!r}, which is not a valid {kind}"
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
        given = (
            self.origins[parent] for parent in parents_of(key) if parent in self.origins and not is_section(parent)
        )
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
        help="override one key, such as sft.learning_rate=1e-4; may be repeated; values are JSON, [a,b], else plain text",
    )  # fmt: skip


def load_config(path: str | Path, overrides: Sequence[str] = (), origin: str = "--set") -> LoadedConfig:
    """Read, override and validate a configuration file; `origin` says where the overrides come from.

    Raises: UserError listing every mistake with file, line, what was found and what was wanted.
    """
    tree, lines = _read_yaml(Path(path))
    origins = {".".join(key): f"{path}:{line}" for key, line in lines.items()}
    for item in overrides:
        key, value = parse_override(item, origin)
        _put(tree, key, value)
        origins = {known: origin for known, origin in origins.items() if not known.startswith(".".join(key) + ".")}
        origins[".".join(key)] = origin
    try:
        json.dumps(tree, ensure_ascii=False, default=str).encode()
        values = Config.model_validate(tree)
    except UnicodeEncodeError as error:
        around = ascii(error.object[max(0, error.start - 40) : error.end])
        raise UserError(
            f"{path} or {origin}: a text holds something that is not a character (not UTF-8): {around}. Retype it."
        ) from None
    except ValidationError as error:
        raise UserError(
            listing("the configuration is not valid", schema_problems(error, tree, origins, str(path)))
        ) from None
    problems = [
        *trainer_problems(values, origins, str(path)), *contradictions(values, origins, str(path)),
        *password_problems(values.model_dump(), origins, str(path)),
    ]  # fmt: skip
    if problems:
        raise UserError(listing("the configuration is not valid", problems))
    flags = ["--config", str(path), *(part for item in overrides for part in ("--set", item))]
    return LoadedConfig(values, origins, shlex.join(flags))


def check_decided(config: LoadedConfig, stage: str) -> None:
    """Refuse a configuration that leaves open what a stage needs to know.

    Raises: UserError with the first key that is missing.
    """
    for problem in undecided(config.values, stage):
        raise UserError(problem)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    try:
        text = resolve(path).read_text(encoding="utf-8")  # as for data: from any working folder
    except (FileNotFoundError, NotADirectoryError):
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
        fix = next((f"; {fix}" for sign, fix in YAML_FIXES.items() if sign in str(problem)), "")
        raise UserError(f"{path}{line}: not valid YAML: {problem}{fix}.") from None
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
        if is_section(key):
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


def parse_override(item: str, origin: str = "--set") -> tuple[Key, Any]:
    """Read KEY=VALUE as a key and a value: JSON, a list of bare words, otherwise plain text.

    Raises: UserError naming `origin`, the flag that it comes from.
    """
    name, equals, text = item.partition("=")
    if not equals or not all(part.strip() for part in name.split(".")):
        raise UserError(f"{origin} {item}: wanted KEY=VALUE, such as {origin} sft.learning_rate=1e-4")
    key = tuple(name.strip().split("."))
    try:
        return key, json.loads(text)
    except (ValueError, RecursionError):
        return key, _words(key, text) or text


def _words(key: Key, text: str) -> list[str]:
    """Read `[a,b]` as a list of words, but for a key that takes any text; empty where it is not one."""
    if not re.fullmatch(rf"\s*\[{BARE_WORD}(,{BARE_WORD})*\]\s*", text):
        return []
    field = section_of(key[:-1]).model_fields.get(key[-1])
    kind: Any = field and field.annotation
    try:
        TypeAdapter(kind).validate_python(text)
    except ValidationError:
        return [word.strip() for word in text.strip()[1:-1].split(",")]
    return []


def _put(tree: dict[str, Any], key: Key, value: Any) -> None:
    for depth, part in enumerate(key[:-1], 1):
        inner = tree.setdefault(part, {})
        if inner is None:
            inner = tree[part] = {}
        if not isinstance(inner, dict):
            raise UserError(f"--set {'.'.join(key)}: {'.'.join(key[:depth])} is a value, not a section.")
        tree = inner
    tree[key[-1]] = value
