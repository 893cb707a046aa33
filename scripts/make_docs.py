"""Write what is derived from code: configs/schema.json, configs/config.yaml and the generated parts of the READMEs.

Reads scripts/common/schema.py, the first sentence of every module's docstring, eval/benchmarks/demo.json, what the
template test finds (tests/support/templates.py) and scripts/model/families.json.
Needs requirements.txt.

    python -m scripts.make_docs
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from scripts.common.errors import UserError, entry_point
from scripts.common.paths import ROOT
from scripts.common.schema import Config
from scripts.common.stages import TRAINING_STAGES
from scripts.common.trl_arguments import (
    OWNED_TRAINER_ARGUMENTS,
    REMOVED_TRAINER_ARGUMENTS,
    SCHEMA_FILE,
)

CONFIG_FILE = ROOT / "configs" / "config.yaml"
MEASURED_FILE = ROOT / "eval" / "benchmarks" / "demo.json"  # outputs/demo.json of a run of `make demo`
FAMILIES_FILE = ROOT / "scripts" / "model" / "families.json"  # held by tests/matrix
MAP_FOLDER = ROOT / "scripts"  # where the README with the tree stands
# The rows of the table of measured stages: title, module, flags, reads, writes.
MEASURED_STAGES = (
    ("demo model", "scripts.get_demo_model", "`models/smollm2-135m-instruct`"),
    ("SFT", "scripts.train_sft", "`outputs/sft_adapter`"),
    ("DPO", "scripts.train_dpo", "`outputs/dpo_adapter`"),
    ("comparison", "eval.compare", "`outputs/comparison`"),
)

# What configs/config.yaml states: the keys a reader looks for first.
STATED: dict[str, Any] = {
    "base_model_id": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "quantization.load_in_4bit": False,
    "lora.r": 16,
    "lora.alpha": 32,
    "lora.dropout": 0.0,
    "lora.target_modules": "auto",
    "sft.dataset_path": "data/sft/sample_sft.jsonl",
    "sft.num_train_epochs": 3,
    "sft.learning_rate": 2e-4,
    "dpo.dataset_path": "data/dpo/sample_dpo.jsonl",
    "dpo.init_from": "outputs/sft_adapter",
    "dpo.reference": "sft",
    "dpo.beta": 0.1,
    "dpo.loss_type": "sigmoid",
    "serve.adapter_path": "outputs/dpo_adapter",
    "serve.adapters": {"sft": "outputs/sft_adapter"},
    "tracking.mlflow_tracking_uri": "sqlite:///mlflow.db",
}


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line, which has no options."""
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Write the documents that are out of date, and name them."""
    build_parser().parse_args(argv)
    for path, text in documents().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8", newline="\n")
            sys.stdout.write(f"{path.relative_to(ROOT)}\n")
    return 0


def documents() -> dict[Path, str]:
    """Render every document that is generated as a whole or in part."""
    parts = {
        ROOT / "README.md": ("measured", measured_tables()),
        ROOT / "eval" / "README.md": ("measured", result_table()),
        ROOT / "configs" / "README.md": ("keys", key_table()),
        MAP_FOLDER / "README.md": ("tree", tree()),
        MAP_FOLDER / "dataset" / "README.md": ("templates", template_table()),
        FAMILIES_FILE.with_name("README.md"): ("families", family_table()),
        ROOT / "serve" / "README.md": ("fields", field_tables()),
    }
    whole = {SCHEMA_FILE: schema_json(), CONFIG_FILE: config_yaml(STATED)}
    return whole | {path: with_part(path, name, content) for path, (name, content) in parts.items()}


def with_part(path: Path, name: str, content: str) -> str:
    """Return a document with `content` between the markers of a part.

    Raises: UserError when a marker is missing.
    """
    start, end = f"<!-- {name}: generated -->", f"<!-- end of {name} -->"
    head, opened, rest = path.read_text(encoding="utf-8").partition(start)
    _, closed, tail = rest.partition(end)
    if not (opened and closed):
        raise UserError(f"{path}: the generated part stands between `{start}` and `{end}`, but a marker is missing.")
    return f"{head}{start}\n{content}\n{end}{tail}"


def template_table() -> str:
    """Render which chat templates are right: the code of the test decides, so that the table claims nothing else."""
    from tests.support.templates import table

    return str(table())


def field_tables() -> str:
    """Render what each route's body may say, from the models that check it."""
    from serve.openai_schemas import ChatRequest, CompletionRequest
    from serve.schemas import GenerateRequest

    bodies: dict[str, type[BaseModel]] = {
        "/v1/generate": GenerateRequest,
        "/v1/chat/completions": ChatRequest,
        "/v1/completions": CompletionRequest,
    }
    lines = ["| field | routes | default | meaning |", "|---|---|---|---|"]
    rows: dict[tuple[str, str, str], list[str]] = {}
    for route, body in bodies.items():
        for name, field in body.model_fields.items():
            default = "required" if field.is_required() else f"`{json.dumps(default_of(field))}`"
            rows.setdefault((name, default, field.description or ""), []).append(route.removeprefix("/v1/"))
    for (name, default, meaning), routes in sorted(rows.items()):
        where = "all" if len(routes) == len(bodies) else ", ".join(routes)
        lines.append(f"| `{name}` | {where} | {default} | {meaning} |")
    return "\n".join(lines)


def tree() -> str:
    """List every folder and module of the program with the first sentence of its docstring."""
    return "\n".join(line for room in ("scripts", "serve", "eval") for line in _folder_lines(ROOT / room, ""))


def _folder_lines(folder: Path, indent: str) -> Iterator[str]:
    readme = folder / "README.md"
    more = f" ([README]({_link(readme)}))" if readme.is_file() and folder != MAP_FOLDER else ""
    yield f"{indent}- **{folder.relative_to(ROOT).as_posix()}/**{more}: {purpose(folder / '__init__.py')}"
    for file in sorted(folder.glob("*.py")):
        if file.name != "__init__.py":
            yield f"{indent}  - [`{file.name}`]({_link(file)}): {purpose(file)}"
    for package in sorted(folder.glob("*/__init__.py")):
        yield from _folder_lines(package.parent, indent + "  ")


def _link(path: Path) -> str:
    return Path(os.path.relpath(path, MAP_FOLDER)).as_posix()


def purpose(file: Path) -> str:
    """Return the first sentence of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).partition(". ")[0].removesuffix(".")


def schema_json() -> str:
    """Render the JSON schema for editors, with the argument names that TRL's trainers take."""
    import trl

    schema = Config.model_json_schema()
    for section, stage in TRAINING_STAGES.items():
        class_name = stage.trl_config
        trl_class = getattr(trl, class_name)
        hints = get_type_hints(trl_class)
        names = {field.name for field in dataclasses.fields(trl_class) if field.init}
        names -= {*OWNED_TRAINER_ARGUMENTS, *REMOVED_TRAINER_ARGUMENTS}
        schema["$defs"][class_name] = {
            "type": "object",
            "properties": {name: json_type(hints[name]) for name in sorted(names)},
            "additionalProperties": False,
        }
        model = schema["$defs"].get(section.capitalize())
        if model:
            trainer = model["properties"]["trainer"]
            model["properties"]["trainer"] = {
                "$ref": f"#/$defs/{class_name}",
                "description": trainer["description"],
                "default": {},
            }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def json_type(hint: Any) -> dict[str, Any]:
    """Describe a Python type as JSON schema does, as far as JSON has it; {} allows everything."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for member in members:
        if isinstance(member, type) and issubclass(member, Enum):
            return {"enum": [choice.value for choice in member]}
    names = {
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "string",
        list: "array",
        dict: "object",
        type(None): "null",
    }
    kinds = [names.get(get_origin(member) or member) for member in members]
    return {} if None in kinds else {"type": kinds}


def default_of(field: FieldInfo) -> Any:
    """Return the default of a field, or PydanticUndefined where it must be stated."""
    return field.get_default(call_default_factory=True)


def config_yaml(stated: dict[str, Any]) -> str:
    """Render every key with its description; keys at their default are commented out."""
    lines = [
        "# One file describes the whole chain. Keys at their default are commented out; remove `# ` to change one.",
        "# Generated from scripts/common/schema.py by `python -m scripts.make_docs`.",
        "# yaml-language-server: $schema=schema.json",
    ]
    for name, field in Config.model_fields.items():
        lines += ["", *_key_lines(name, field, "", stated)]
    return "\n".join(lines) + "\n"


def _section_fields(key: str, field: FieldInfo) -> list[tuple[str, FieldInfo]]:
    """Return the keys in a section; a plain key has none."""
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        return [(f"{key}.{name}", inner) for name, inner in field.annotation.model_fields.items()]
    return []


def _key_lines(key: str, field: FieldInfo, indent: str, stated: dict[str, Any]) -> list[str]:
    inner = _section_fields(key, field)
    if inner:
        lines = [f"{indent}{key.rpartition('.')[2]}:"]
        return lines + [line for name, details in inner for line in _key_lines(name, details, indent + "  ", stated)]
    value = stated.get(key, default_of(field))
    mark = "" if key in stated else "# "
    shown = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    comment = textwrap.wrap(field.description or "", 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    return [*comment, f"{indent}{mark}{key.rpartition('.')[2]}: {shown}"]


def key_table() -> str:
    """Render the table of every key that stands in configs/README.md."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in Config.model_fields.items():
        rows += _rows(name, field)
    return "\n".join(rows)


def _rows(key: str, field: FieldInfo) -> list[str]:
    inner = _section_fields(key, field)
    if inner:
        return [row for name, details in inner for row in _rows(name, details)]
    value = default_of(field)
    default = "required" if value is PydanticUndefined else f"`{json.dumps(value, ensure_ascii=False)}`"
    return [f"| `{key}` | {default} | {field.description} |"]


def measured_tables() -> str:
    """Render time and memory of the stages, the verdict and one answer, as one run of `make demo` measured them."""
    run = json.loads(MEASURED_FILE.read_text(encoding="utf-8"))
    lines = ["| stage | time | peak memory | writes |", "|---|---|---|---|"]
    for title, module, writes in MEASURED_STAGES:
        seconds, gib = run["seconds"].get(module), run["peak_memory_gib"].get(module)
        time = "–" if seconds is None else f"{seconds} s" if seconds < 90 else f"{seconds / 60:.1f} min"
        lines.append(f"| {title} | {time} | {f'{gib:.1f} GiB' if gib else '–'} | {writes} |")
    total = sum(run["seconds"].values()) / 60
    lines += [
        "",
        f"Measured by `make demo` on {run['hardware']}: {total:.0f} minutes for these stages, set-up not counted.",
    ]
    if "verdict" in run:
        lines += ["The verdict of that run:", "", f"> {run['verdict']}"]
    if example := run.get("example"):
        lines += ["", "The shortest prompt of the test side, as the base answers it and as SFT does:"]
        for name in ("asked", "base", "sft"):
            lines += ["", f"> **{name}:**", *(f"> {line}".rstrip() for line in example[name].split("\n"))]
    return "\n".join(lines)


def result_table() -> str:
    """Render what the comparison of that run found, measure by measure."""
    run = json.loads(MEASURED_FILE.read_text(encoding="utf-8"))
    lines = ["| held out | n | base | SFT | DPO |", "|---|---|---|---|---|"]
    for result in run.get("results", []):
        cells = [_with_interval(result["models"].get(name), result["unit"]) for name in ("base", "sft", "dpo")]
        unit = "" if result["unit"] == "share" else f", {result['unit']}"
        lines.append(f"| {result['title']}{unit} | {result['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_interval(estimate: dict[str, float] | None, unit: str) -> str:
    if estimate is None:
        return "–"
    numbers = (estimate["value"], estimate["ci_low"], estimate["ci_high"])
    value, low, high = (f"{100 * x:.0f}" for x in numbers) if unit == "share" else (f"{x:.2f}" for x in numbers)
    return f"{value}{' %' if unit == 'share' else ''} ({low} to {high})"


def family_table() -> str:
    """Render what each stage does for each family of models, and in which words it refuses."""
    table: dict[str, dict[str, str]] = json.loads(FAMILIES_FILE.read_text(encoding="utf-8"))
    stages = list(next(iter(table.values())))
    lines = [f"| family | {' | '.join(stages)} |", f"|---|{'---|' * len(stages)}"]
    said: dict[str, list[str]] = {}
    for family, cells in table.items():
        lines.append(f"| {family} | {' | '.join(cell.partition(':')[0] for cell in cells.values())} |")
        for stage, cell in cells.items():
            if ":" in cell:
                said.setdefault(cell, []).append(f"{family}, {stage}")
    return "\n".join([*lines, "", *(f"- {cell} ({'; '.join(places)})" for cell, places in said.items())]).rstrip()


if __name__ == "__main__":
    sys.exit(main())
