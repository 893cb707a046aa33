"""Which arguments `sft.trainer` and `dpo.trainer` take, checked without importing TRL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from scripts.common.config_errors import parents_of, section_of, suggest
from scripts.common.paths import ROOT
from scripts.common.schema import Config
from scripts.common.stages import TRAINING_STAGES

# Names that `sft.trainer` and `dpo.trainer` refuse because the project decides them, with the place to say it.
OWNED_TRAINER_ARGUMENTS = {
    "output_dir": "{section}.output_dir",
    "seed": "seed",
    "data_seed": "seed",
    "bf16": "performance.dtype",
    "fp16": "performance.dtype",
    "bf16_full_eval": "performance.dtype",
    "fp16_full_eval": "performance.dtype",
    "use_cpu": "performance.device",
    "gradient_checkpointing": "performance.gradient_checkpointing",
    "activation_checkpointing": "performance.gradient_checkpointing",
    "train_sampling_strategy": "performance.group_by_length",
    "report_to": "tracking.mlflow_tracking_uri",
    "run_name": "tracking.experiment",
    "resume_from_checkpoint": "the flag --resume",
    "disable_tqdm": "nothing: progress goes to the terminal only",
    "load_best_model_at_end": "nothing: on by itself when evaluation and saving go together",
    "metric_for_best_model": "nothing: the held-out loss decides",
    "greater_is_better": "nothing: the held-out loss decides",
    "save_only_model": "nothing: a checkpoint must be resumable",
    "remove_unused_columns": "nothing: the project hands in token ids",
    "dataset_text_field": "nothing: the project hands in token ids",
    "dataset_kwargs": "nothing: the project hands in token ids",
    "completion_only_loss": "data.train_on",
    "assistant_only_loss": "data.train_on",
    "truncation_mode": "{section}.max_length (nothing is cut silently)",
    "chat_template_path": "nothing: the template is the base model's",
    "model_init_kwargs": "performance and quantization",
    "pad_token": "nothing: the tokenizer's own",
    "eos_token": "nothing: the tokenizer's own",
    "packing": "performance.group_by_length (as little padding, no dense mask)",
    "padding_free": "performance.group_by_length",
    "push_to_hub": "export_lora --push_to_hub",
    "hub_token": "the environment variable HF_TOKEN; a configuration is copied into manifests and MLflow",
    "hub_model_id": "export_lora --push_to_hub",
    "hub_strategy": "export_lora --push_to_hub",
    "hub_private_repo": "export_lora --push_to_hub",
    "hub_always_push": "export_lora --push_to_hub",
    "hub_revision": "export_lora --push_to_hub",
    "trust_remote_code": "nothing: never switched on",
    "loss_weights": "dpo.sft_weight",
}

# Names for which TRL takes 0 and less, too, with which a run never saves, logs or evaluates, or fails half-way.
POSITIVE_TRAINER_ARGUMENTS = ("eval_steps", "logging_steps", "save_steps", "per_device_eval_batch_size")

# Names that transformers or TRL once had, with what replaced them.
REMOVED_TRAINER_ARGUMENTS = {
    "warmup_ratio": "warmup_steps (a number below 1 is a ratio)",
    "max_seq_length": "{section}.max_length",
    "max_prompt_length": "{section}.max_length",
    "max_completion_length": "{section}.max_length",
    "evaluation_strategy": "eval_strategy",
    "overwrite_output_dir": "nothing: an output folder is replaced only when the new one is complete",
    "logging_dir": "tracking.mlflow_tracking_uri",
    "group_by_length": "performance.group_by_length",
    "no_cuda": "performance.device",
    "save_safetensors": "nothing: always safetensors",
    "include_tokens_per_second": "nothing: always reported",
    "reference_free": "dpo.reference",
    "rpo_alpha": "dpo.sft_weight",
    "label_pad_token_id": "nothing: always -100",
    "ref_adapter_name": "dpo.reference",
    "model_adapter_name": "dpo.init_from",
    "force_use_ref_model": "dpo.reference",
    "tokenizer": "base_model_id",
    "ref_model_init_kwargs": "dpo.reference",
}

SCHEMA_FILE = ROOT / "configs" / "schema.json"


def trainer_problems(values: Config, origins: dict[str, str], path: str) -> Iterator[str]:
    """Check the pass-through blocks against TRL's field names without importing TRL."""
    definitions = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))["$defs"]
    for section, stage in TRAINING_STAGES.items():
        trl_class = stage.trl_config
        given = getattr(values, section).trainer
        known = definitions[trl_class]["properties"]
        own = set(section_of([section]).model_fields) - {"trainer"}
        for name, value in given.items():
            key = f"{section}.trainer.{name}"
            where = next((origins[k] for k in parents_of(key) if k in origins), path)
            if name in own:
                yield f"{where}: {key}: has a place of its own; write {section}.{name}"
            elif name in OWNED_TRAINER_ARGUMENTS:
                yield f"{where}: {key}: decided elsewhere; see {OWNED_TRAINER_ARGUMENTS[name].format(section=section)}"
            elif name in REMOVED_TRAINER_ARGUMENTS:
                yield f"{where}: {key}: no longer exists; use {REMOVED_TRAINER_ARGUMENTS[name].format(section=section)}"
            elif name not in known:
                yield f"{where}: {key}: TRL's {trl_class} has no such argument; {suggest(name, sorted(known), f'{section}.trainer.')}"
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
