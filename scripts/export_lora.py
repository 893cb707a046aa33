"""Merge an adapter into its base and prove that the result on disk answers as base + adapter do.

Reads an adapter folder and its base model; writes the merged model with tokenizer, model card and manifest.
Over tolerance, nothing is written. Needs requirements.txt.

    python scripts/export_lora.py --base_model models/smollm2-135m-instruct --adapter outputs/dpo_adapter --out_dir outputs/merged_full_model
    python -m scripts.export_lora --config configs/demo.yaml
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.common.artifacts import (
    MANIFEST,
    artifact_sha256,
    check_replaceable,
    locked_run_dir,
    parent_entry,
    publish,
    read_manifest,
    write_manifest,
)
from scripts.common.config import LoadedConfig, add_config_arguments, load_config
from scripts.common.errors import UserError, entry_point
from scripts.common.runtime import (
    choose_machine,
    give_freed_memory_back,
    peak_memory_gib,
    prepare_environment,
    set_up_logging,
    trapped_signals,
)

log = logging.getLogger(__name__)

GGUF_TYPES = ("f16", "q8_0")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--base_model", metavar="ID", help="base model (default: the one in the adapter's manifest)")
    parser.add_argument("--adapter", metavar="DIR", help="adapter to merge (default: dpo.output_dir)")
    parser.add_argument(
        "--out_dir", metavar="DIR", help="result (default: export.output_dir, for gguf export.gguf_dir)"
    )
    parser.add_argument("--format", choices=("safetensors", "gguf"), default="safetensors", help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16", "fp16", *GGUF_TYPES),
        help="type of the saved weights (default: export.dtype; auto is the base's own); gguf takes f16 or q8_0",
    )  # fmt: skip
    parser.add_argument("--push_to_hub", metavar="REPO", help="afterwards upload to this private repository on the Hub")
    return parser


def check_arguments(arguments: argparse.Namespace, config: LoadedConfig) -> None:
    """Refuse what cannot be meant, before anything is read."""
    gguf = arguments.format == "gguf"
    if arguments.dtype and arguments.dtype != "auto" and (arguments.dtype in GGUF_TYPES) != gguf:
        wanted = "f16 or q8_0" if gguf else "fp32, bf16 or fp16"
        raise UserError(f"--dtype {arguments.dtype}: is no type of --format {arguments.format}; wanted {wanted}.")
    if arguments.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments.push_to_hub):
        raise UserError(f"--push_to_hub: found {arguments.push_to_hub}, wanted OWNER/NAME.")
    if arguments.push_to_hub and (config.values.offline or os.environ.get("HF_HUB_OFFLINE") == "1"):
        raise UserError("--push_to_hub: found offline: true or HF_HUB_OFFLINE=1. Set offline to false to upload.")


class Export:
    """What is merged into what, and in which form it is saved."""

    def __init__(self, arguments: argparse.Namespace, config: LoadedConfig) -> None:
        from scripts.common.modeling import check_adapter_fits, find_model, load_tokenizer
        from scripts.common.schema import Quantization
        from scripts.export.merging import check_vocabulary, stored_dtype

        self.config = config
        self.adapter = Path(config.values.dpo.output_dir if arguments.adapter is None else arguments.adapter)
        made_on = read_manifest(self.adapter, stages=("sft", "dpo"))["base_model"]
        self.base_id = arguments.base_model or made_on["id"]
        self.revision = made_on["revision"] if self.base_id == made_on["id"] else None
        self.base_folder = find_model(self.base_id, self.revision)
        self.tokenizer = load_tokenizer(self.base_folder)
        self.manifest = check_adapter_fits(self.adapter, self.base_folder, self.tokenizer)
        check_vocabulary(self.base_folder, self.tokenizer)
        self.quantization = Quantization(**self.manifest["config"]["quantization"])
        self.trained_in_bits = 4 if self.quantization.load_in_4bit else 8 if self.quantization.load_in_8bit else 0
        self.gguf = arguments.format == "gguf"
        dtype = arguments.dtype or ("auto" if self.gguf else config.values.export.dtype)
        self.dtype = dtype if dtype != "auto" else "f16" if self.gguf else stored_dtype(self.base_folder)


def merge_and_prove(export: Export, part: Path, logits: Path) -> dict[str, Any]:
    """Merge, save to `part`, load that again, and return the figures that prove it; one model in memory at a time."""
    from scripts.common.memory import parameter_count
    from scripts.common.modeling import load_adapter, load_full_precision, switched_to
    from scripts.export import gguf_file, merging, parity

    log.info("loading %s in fp32 with %s", export.base_id, export.adapter)
    model = load_adapter(load_full_precision(export.base_folder), export.adapter)
    if export.gguf:
        gguf_file.check_supported(model.get_base_model().config, export.tokenizer)
    probes = parity.build_probes(model, export.tokenizer, parity.held_out_prompts(export.manifest))
    reference = parity.Stored(parity.scored_logits(model, probes), logits)
    with switched_to(model, None):
        effect = parity.compare(parity.scored_logits(model, probes), reference)
    log.info("the adapter changes the base: %s", effect)
    parity.check_effect(effect, export.adapter)

    model = merging.merge(model)
    exact = parity.compare(reference, parity.scored_logits(model, probes))
    log.info("merged, in fp32: %s", exact)
    parity.check_exact(exact, effect, "the merged model")
    save(export, model, part)
    del model
    gc.collect()  # PEFT's wrappers refer to each other

    model = load_again(export, part, probes)
    reloaded = parity.compare(reference, parity.scored_logits(model, probes))
    del model
    log.info("read again from disk in %s: %s", export.dtype, reloaded)
    what = f"the merged model, read again from disk in {export.dtype},"
    if export.dtype == "fp32":
        parity.check_exact(reloaded, effect, what)
    else:
        parity.check_rounded(reloaded, export.dtype, what)

    figures = {"adapter_effect": effect, "merge": exact, "reloaded": reloaded}
    if export.trained_in_bits:
        model = merging.load_as_trained(export.base_folder, export.adapter, export.config, export.quantization)
        figures["quantized_base"] = parity.compare(reference, parity.scored_logits(model, probes))
        log.warning(
            "the adapter was trained on the base in %d bits and is merged into the full-precision base, which moves its answers: %s",
            export.trained_in_bits,
            figures["quantized_base"],
        )
    return {
        "dtype": export.dtype,
        "format": "gguf" if export.gguf else "safetensors",
        "prompts": len(probes),
        **{name: found.as_metrics() for name, found in figures.items()},
        "model_fp32_gib": round(parameter_count(export.base_folder) * 4 / 2**30, 3),
        "peak_memory_gib": round(peak_memory_gib(), 2),
    }


def save(export: Export, model: Any, part: Path) -> None:
    """Write the merged model in the form that was asked for, and the licence of its base."""
    from scripts.export import gguf_file, merging, ollama

    if export.gguf:
        file = gguf_file.write_gguf(model, export.tokenizer, part, export.dtype, Path(export.base_id).name)
        ollama.write_modelfile(export.tokenizer, part, file.name, adds_bos=gguf_file.adds_bos(export.tokenizer))
    else:
        merging.save_merged(model, export.tokenizer, export.dtype, part)
    merging.copy_licence(export.base_folder, part)


def load_again(export: Export, part: Path, probes: Sequence[Sequence[int]]) -> Any:
    """Load what was written, weights widened to fp32, so that only their own rounding shows."""
    from scripts.common.modeling import load_full_precision
    from scripts.export import gguf_file

    if not export.gguf:
        return load_full_precision(part)
    (file,) = part.glob("*.gguf")
    gguf_file.check_tokenizer(file, export.tokenizer, probes)
    return gguf_file.load_gguf(file)


def finish(export: Export, part: Path, out_dir: Path, metrics: dict[str, Any], tracker: Any) -> None:
    """Write card and manifest, put the folder in place of the old one, and tell the tracker."""
    from scripts.export.model_card import render_card

    card = render_card(
        export.manifest, export.adapter, export.base_folder, metrics, export.config.values.eval.output_dir
    )
    (part / "README.md").write_text(card, encoding="utf-8")
    kept = ("tokenizer_sha256", "chat_template_sha256", "datasets", "split")
    manifest = write_manifest(
        part,
        "merged",
        base_model={**export.manifest["base_model"], "id": export.base_id, "revision": export.revision},
        parent=parent_entry(export.adapter, export.manifest),
        **{key: export.manifest[key] for key in kept},
        config=export.config.values.model_dump(mode="json"),
        mlflow={"run_id": tracker.run_id},
        metrics=metrics,
    )
    publish(part, out_dir)
    for name, figures in metrics.items():
        if isinstance(figures, dict):
            tracker.log_metrics({f"eval/parity/{name}/{key}": value for key, value in figures.items()})
    tracker.set_tag("artifact_sha256", artifact_sha256(manifest))
    tracker.log_artifact(out_dir / MANIFEST)
    tracker.log_artifact(out_dir / "README.md")


def push(out_dir: Path, repository: str) -> None:
    """Upload the finished folder to a private repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=out_dir)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--push_to_hub {repository}: the Hub refused it: {reason}\nThe model is whole in {out_dir}; "
            f"`hf auth login`, then `hf upload {repository} {out_dir}`."
        ) from None
    log.info("uploaded to https://huggingface.co/%s (private)", repository)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Merge, prove, publish."""
    arguments = build_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    check_arguments(arguments, config)
    section = config.values.export
    out_dir = Path(arguments.out_dir or (section.gguf_dir if arguments.format == "gguf" else section.output_dir))
    check_replaceable(out_dir, "merged", "--out_dir")
    prepare_environment(config.values)
    with trapped_signals(), locked_run_dir(out_dir) as run_dir:
        set_up_logging(run_dir / "log.txt")
        import torch

        from scripts.common.tracking import tracked_run
        from scripts.export.merging import check_space

        give_freed_memory_back()
        torch.set_num_threads(choose_machine(config.values).threads)
        export = Export(arguments, config)
        check_space(export.base_folder, run_dir, export.dtype)
        part = run_dir / "finished"
        logits = run_dir / "reference_logits"
        for left_over in (part, logits):
            shutil.rmtree(left_over, ignore_errors=True)
        part.mkdir()
        try:
            with tracked_run(config, "merged", parent_run_id=export.manifest["mlflow"]["run_id"]) as tracker:
                tracker.log_params({"adapter": export.adapter, "base_model_id": export.base_id, "dtype": export.dtype})
                metrics = merge_and_prove(export, part, logits)
                finish(export, part, out_dir, metrics, tracker)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(logits, ignore_errors=True)
    if arguments.push_to_hub:
        push(out_dir, arguments.push_to_hub)
    use = f"ollama create my-model -f {out_dir}/Modelfile" if export.gguf else f"serve.adapter_path: {out_dir}"
    log.info("the merged model is in %s\n  peak memory %.1f GiB\n  next  %s", out_dir, metrics["peak_memory_gib"], use)
    return 0


if __name__ == "__main__":
    sys.exit(main())
