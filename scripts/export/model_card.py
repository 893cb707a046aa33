"""The model card of an export: what it was made of, what was measured, and what it must not be taken for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from scripts.common.artifacts import DatasetFacts, Manifest, SplitFacts
from scripts.common.deid_report import check_deid_report
from scripts.common.errors import UserError
from scripts.common.paths import resolve
from scripts.common.stages import TRAINING_STAGES
from scripts.export.parts import Parts
from scripts.export.sharing import known_as, vllm_command

TRAINING_SETTINGS = (  # those that a stage has
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "beta",
    "loss_type",
    "reference",
)
LIMITS = """\
- The comparison above holds for prompts like those it was measured on, and checks see only what rules can say.
- A fine-tuned model keeps the base's errors and biases and can state falsehoods fluently.
- It can repeat parts of its training text. De-identification lowers what can leak; it is no guarantee."""
OF_MERGED = "- Merging changed the weights for good. To continue training, or to switch it off, use the adapter."
TITLES = {
    "adapter_effect": "what the adapter changes (base against base + adapter)",
    "merge": "merged in fp32 against base + adapter",
    "reloaded": "read again from disk against base + adapter",
    "quantized_base": "base as quantised in training + adapter against full precision + adapter",
}


def render_card(parts: Parts, metrics: dict[str, Any], comparison_dir: str, place: str) -> str:
    """Write the card of an adapter, or of the model that it became; `place` is where others find it."""
    manifest, base_folder, base = parts.manifest, parts.base_folder, known_as(parts.base_id)
    stage = TRAINING_STAGES[manifest.stage].title
    made = f"the adapter `{parts.adapter.name}` (sha256 `{manifest.sha256[:16]}…`)"
    sections = [
        front_matter(parts),
        f"# {Path(base).name}, fine-tuned with {stage}" + (" and merged" if parts.merges else ""),
        f"`{base}` with {made} folded into its weights, saved in {metrics['dtype']} as {metrics['format']}. "
        "`manifest.json` holds every hash and setting."
        if parts.merges
        else f"A LoRA adapter for `{base}`: {made}, with its weights unchanged. `manifest.json` holds hashes and settings.",
        *([] if parts.merges else ["## Use", describe_use(parts, base, place)]),
        "## Data",
        *(describe_dataset(entry) for entry in manifest.datasets),
        describe_split(manifest.split),
        "## Training",
        describe_training(manifest),
        "## Is it better than the base?",
        describe_comparison(manifest, comparison_dir),
        "## Does it answer as base + adapter do?",
        describe_parity(metrics),
        "## Limits",
        f"{LIMITS}\n{OF_MERGED}" if parts.merges else LIMITS,
        "## Licence",
        describe_licence(base, base_folder),
    ]
    return "\n\n".join(sections) + "\n"


def front_matter(parts: Parts) -> str:
    """Write the block that model hubs read."""
    fields: dict[str, Any] = {"library_name": "transformers" if parts.merges else "peft"}
    fields["pipeline_tag"] = "text-generation"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base := known_as(parts.base_id)):
        fields["base_model"] = base
    if licence := licence_of(parts.base_folder):
        fields["license"] = licence
    fields["tags"] = [parts.manifest.stage, "lora", *(["merged"] if parts.merges else [])]
    return "---\n" + yaml.safe_dump(fields, sort_keys=False) + "---"


def describe_use(parts: Parts, base: str, place: str) -> str:
    """Say how an adapter is loaded, with which system prompt where it was trained with one, and how vLLM serves it."""
    stage = parts.manifest.stage
    lines = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [
        f'base = AutoModelForCausalLM.from_pretrained("{base}"{f", revision={parts.revision!r}" if parts.revision else ""})'
    ]
    lines += [
        f'model = PeftModel.from_pretrained(base, "{place}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
    ]
    use = "```python\n" + "\n".join(lines) + "\n```"
    if command := vllm_command(parts.adapter, base, stage, place):
        use += f"\n\nWith vLLM: `{command}`"
    if prompt := parts.manifest.system_prompt:
        use += f"\n\nIt was trained with this system prompt:\n\n> {' '.join(prompt.split())}"
    return use


def describe_dataset(entry: DatasetFacts) -> str:
    """Say which data, how much of it, and whether a de-identification report vouches for it."""
    try:
        counts = check_deid_report(resolve(entry.path), entry.sha256)["counts"]
        deid = "De-identified; the report counts " + ", ".join(
            f"{value} {name.replace('_', ' ')}" for name, value in counts.items() if isinstance(value, int)
        )
    except UserError:
        deid = "No de-identification report vouches for it"
    return (
        f"- `{Path(entry.path).name}` (sha256 `{entry.sha256[:16]}…`): {entry.train} records trained on, "
        f"{(entry.validation or 0) + (entry.test or 0)} held out. {deid}."
    )


def describe_split(split: SplitFacts) -> str:
    """Say how the held-out prompts were chosen, and for what."""
    how = f"Held out by the hash of {split.group_field or 'the prompt'}, seed {split.seed}"
    if split.key_version == 0:
        return f"{how}: ratio {split.validation_ratio:g}."
    return f"{how}: {split.validation_ratio:g} for validation, {split.test_ratio:g} for the test."


def describe_training(manifest: Manifest) -> str:
    """Give the settings that decide the result and the held-out loss they led to."""
    config, section, metrics = manifest.config, manifest.section, manifest.metrics
    settings = [f"{name} {section[name]}" for name in TRAINING_SETTINGS if name in section]
    settings += [f"LoRA {name} {config['lora'][name]}" for name in ("r", "alpha", "dropout")]
    settings += [f"{key}: true" for key, value in {**config["lora"], **config["quantization"]}.items() if value is True]
    before, after = metrics.get("held_out_loss_before"), metrics.get("held_out_loss")
    loss = "" if before is None or after is None else f" Held-out loss {before:.4f} → {after:.4f}."
    parent = f" It continued `{Path(manifest.parent.path).name}`." if manifest.parent else ""
    stage = TRAINING_STAGES[manifest.stage].title
    return f"{stage} with TRL and PEFT, seed {config['seed']}: {', '.join(settings)}.{parent}{loss}"


def describe_comparison(manifest: Manifest, comparison_dir: str) -> str:
    """Quote the comparison report if it measured this very adapter."""
    try:
        report = json.loads((Path(comparison_dir) / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "Not measured: there is no comparison report. `python -m eval.compare` writes one."
    if all(made.get("sha256") != manifest.sha256 for made in report["lineage"].values()):
        return "Not measured: the comparison report that is there is about another adapter."
    models = report["models"]
    rows = [f"| held out | n | {' | '.join(models)} |", "|---|---" + "|---" * len(models) + "|"]
    for metric in report["metrics"]:
        cells = []
        for name in models:
            cells.append(describe_estimate(metric["models"].get(name)))
        rows.append(f"| {metric['title']}, {metric['unit']} | {metric['n']} | {' | '.join(cells)} |")
    return f"> {report['verdict']['text']}\n\n" + "\n".join(rows) + "\n\nIn brackets: 95 % intervals."


def describe_estimate(estimate: dict[str, float | None] | None) -> str:
    """Write a value with its interval, as far as they are known."""
    if estimate is None or estimate["value"] is None:
        return "–"
    value = f"{estimate['value']:.3g}"
    if estimate["ci_low"] is None or estimate["ci_high"] is None:
        return value
    return f"{value} ({estimate['ci_low']:.3g} to {estimate['ci_high']:.3g})"


def describe_parity(metrics: dict[str, Any]) -> str:
    """Give the figures of the gate that this export passed."""
    rows = ["| compared | max abs. logit difference | mean KL, nats | greedy agreement |", "|---|---|---|---|"]
    for name, title in TITLES.items():
        if figures := metrics.get(name):
            rows.append(
                f"| {title} | {figures['max_abs_logit_diff']:.2g} | {figures['mean_kl_nats']:.2g} "
                f"| {100 * figures['greedy_agreement']:.1f} % |"
            )
    positions = metrics["reloaded"]["positions"]
    return (
        "\n".join(rows)
        + f"\n\nOver {positions} positions of {metrics['prompts']} prompts and answers, computed in fp32."
    )


def describe_licence(base: str, base_folder: Path) -> str:
    """Name the base's licence, or say that it has to be looked up."""
    licence = licence_of(base_folder)
    if licence is None:
        return f"No licence was found beside `{base}`. Its terms hold for this model too: look them up before passing it on."
    return (
        f"The base `{base}` is under `{licence}`, whose terms hold for this model too. The training data has its own."
    )


def licence_of(base_folder: Path) -> str | None:
    """Read the licence from the base's card or recognise its licence file."""
    card = base_folder / "README.md"
    if card.is_file() and (found := re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE)):
        return found[1]
    for file in sorted(base_folder.glob("LICEN[SC]E*")):
        head = file.read_text(encoding="utf-8", errors="replace")[:400]
        for words, name in (("Apache License", "apache-2.0"), ("MIT License", "mit")):
            if words in head:
                return name
    return None
