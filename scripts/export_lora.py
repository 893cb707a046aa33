"""Merge an adapter into its base and prove that the result on disk answers as base + adapter do.

Reads an adapter folder and its base model; writes the merged model, or with `--format adapter` the adapter itself as others
can use it, with tokenizer, model card and manifest. Over tolerance, nothing is written. Needs requirements.txt.

    python scripts/export_lora.py --base_model models/smollm2-135m-instruct --adapter outputs/dpo_adapter --out_dir outputs/merged_full_model
    python -m scripts.export_lora --config configs/demo.yaml
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.common.artifacts import MANIFEST, Manifest, RunFacts, read_manifest
from scripts.common.config import LoadedConfig, add_config_arguments, load_config
from scripts.common.errors import UserError, entry_point
from scripts.common.machine import choose_machine, give_freed_memory_back, peak_memory_gib
from scripts.common.run import Run, open_run
from scripts.common.stages import ADAPTER_STAGES

if TYPE_CHECKING:
    from scripts.common.tracking import Tracker
    from scripts.export.parts import Parts
    from scripts.export.proof import Proof

log = logging.getLogger(__name__)

CARD = "README.md"
TYPES = {"safetensors": ("fp32", "bf16", "fp16"), "gguf": ("f16", "q8_0"), "adapter": ()}  # of the saved weights


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--base_model", metavar="ID", help="base model (default: the one in the adapter's manifest)")
    parser.add_argument("--adapter", metavar="DIR", help="adapter to export (default: dpo.output_dir)")
    parser.add_argument(
        "--out_dir",
        metavar="DIR",
        help="result (default: export.output_dir, for gguf export.gguf_dir, for an adapter its folder with _export behind it)",
    )
    parser.add_argument(
        "--format",
        choices=tuple(TYPES),
        default="safetensors",
        help="gguf is for llama.cpp and Ollama and takes some architectures only; adapter merges nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *TYPES["safetensors"], *TYPES["gguf"]),
        help="type of the saved weights (default: export.dtype; auto is the base's own); gguf takes f16 or q8_0",
    )
    parser.add_argument("--push_to_hub", metavar="REPO", help="afterwards upload to this private repository on the Hub")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Merge, prove, publish."""
    arguments = build_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    check_arguments(arguments, config)
    if arguments.format == "gguf":
        check_architecture(arguments, config)
    stage, key, out_dir = choose_folder(arguments, config)
    with open_run(stage, config, key, folder=out_dir) as run:
        from scripts.common.tracking import tracked_run
        from scripts.export.merging import check_space
        from scripts.export.parts import find_parts
        from scripts.export.proof import check_saved, measure_quantised_base, write_result

        limit_resources(run)
        parts = find_parts(run, arguments)
        if parts.merges:
            check_space(parts.base_folder, run.run_dir, parts.dtype)
        with (
            work_folders(run) as (folder, logits),
            tracked_run(
                config,
                "merged" if parts.merges else "export",
                name=f"export of {Path(parts.adapter).name} · {parts.dtype if parts.merges else parts.form}",
                parent_run_id=parts.manifest.mlflow.run_id,
            ) as tracker,
        ):
            tracker.log_params({"adapter": parts.adapter, "base_model_id": parts.base_id, "dtype": parts.dtype})
            proof = write_result(parts, folder, logits)
            check_saved(parts, folder, proof)
            if parts.merges and parts.trained_in_bits:
                measure_quantised_base(parts, config, proof)
            metrics = collect_metrics(parts, proof)
            publish(run, parts, folder, metrics, tracker, arguments.push_to_hub)
    if arguments.push_to_hub:
        push(run.output_dir, arguments.push_to_hub)
    say_what_is_next(run, parts, metrics, arguments.push_to_hub)
    return 0


def check_arguments(arguments: argparse.Namespace, config: LoadedConfig) -> None:
    """Refuse what contradicts itself, before anything is read."""
    types = TYPES[arguments.format]
    if arguments.dtype not in (None, "auto", *types):
        wanted = f"{', '.join(types[:-1])} or {types[-1]}" if types else "none, as an adapter keeps its weights"
        raise UserError(f"--dtype {arguments.dtype}: is not a type of --format {arguments.format}; wanted {wanted}.")
    if arguments.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments.push_to_hub):
        raise UserError(f"--push_to_hub: found {arguments.push_to_hub}, wanted OWNER/NAME.")
    if arguments.push_to_hub and (config.values.offline or os.environ.get("HF_HUB_OFFLINE") == "1"):
        raise UserError("--push_to_hub: found offline: true or HF_HUB_OFFLINE=1. Set offline to false to upload.")


def choose_folder(arguments: argparse.Namespace, config: LoadedConfig) -> tuple[str, str, str | None]:
    """Return the stage of the result, the key that names its folder, and the folder where no configuration does."""
    if arguments.format != "adapter":
        key = f"export.{'gguf_dir' if arguments.format == 'gguf' else 'output_dir'}"
        return "merged", "--out_dir" if arguments.out_dir else key, arguments.out_dir
    adapter = Path(arguments.adapter or config.values.dpo.output_dir)
    folder = Path(arguments.out_dir or adapter.with_name(f"{adapter.name}_export"))
    there = (folder / "adapter_config.json").is_file()
    if there and read_manifest(folder, verify=False).metrics.get("format") != arguments.format:
        raise UserError(f"--out_dir: {folder} is a trained adapter and is not replaced by a copy. Choose another one.")
    return read_manifest(adapter, stages=ADAPTER_STAGES, verify=False).stage, "--out_dir", str(folder)


def check_architecture(arguments: argparse.Namespace, config: LoadedConfig) -> None:
    """Refuse a base that cannot become a GGUF before anything heavy is imported."""
    from scripts.export.gguf_architectures import check_model_type
    from scripts.model.find import find_local_model

    base = read_manifest(
        arguments.adapter or config.values.dpo.output_dir, stages=ADAPTER_STAGES, verify=False
    ).base_model
    model_id = arguments.base_model or base.id
    if folder := find_local_model(model_id, base.revision if model_id == base.id else None):
        check_model_type(folder)


def limit_resources(run: Run) -> None:
    """Use the configured number of threads, and give the memory of one model back before the next is loaded."""
    import torch

    give_freed_memory_back()
    torch.set_num_threads(choose_machine(run.values).threads)


@contextmanager
def work_folders(run: Run) -> Iterator[tuple[Path, Path]]:
    """Make empty folders for the result and for logits; what is still there in the end is removed."""
    folders = run.empty_folder(), run.empty_folder("logits")
    try:
        yield folders
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def collect_metrics(parts: Parts, proof: Proof) -> dict[str, Any]:
    """Collect what manifest and model card say about the proof."""
    from scripts.model.memory import parameter_count

    return {
        "dtype": parts.dtype,
        "format": parts.form,
        "prompts": len(proof.probes),
        **{name: figures.as_metrics() for name, figures in proof.figures.items()},
        "model_fp32_gib": round(parameter_count(parts.base_folder) * 4 / 2**30, 3),
        "peak_memory_gib": round(peak_memory_gib(), 2),
    }


def publish(
    run: Run, parts: Parts, folder: Path, metrics: dict[str, Any], tracker: Tracker, repository: str | None
) -> None:
    """Write card and manifest, put the folder in place of the old one, and record the figures in MLflow."""
    from scripts.export.model_card import render_card
    from scripts.export.sharing import manifest_for_others

    card = render_card(parts, metrics, run.values.eval.output_dir, repository or run.output_dir.name)
    (folder / CARD).write_text(card, encoding="utf-8", newline="\n")
    made = manifest_of_merged(run, parts, metrics, tracker) if parts.merges else manifest_for_others(parts)
    manifest = run.publish(folder, made)
    measured = {name: figures for name, figures in metrics.items() if isinstance(figures, dict)}
    tracker.summarise({f"{name}.{key}": value for name, figures in measured.items() for key, value in figures.items()})
    tracker.set_tag("artifact_sha256", manifest.sha256)
    tracker.log_artifact(run.output_dir / MANIFEST)
    tracker.log_artifact(run.output_dir / CARD)


def manifest_of_merged(run: Run, parts: Parts, metrics: dict[str, Any], tracker: Tracker) -> Manifest:
    """Say what the merged model was made of."""
    adapter = parts.manifest
    return Manifest(
        stage=run.stage,
        base_model=adapter.base_model.model_copy(update={"id": parts.base_id, "revision": parts.revision}),
        **parts.chat.facts(),
        parent=adapter.as_parent(parts.adapter),
        datasets=adapter.datasets,
        split=adapter.split,
        plan=adapter.plan,
        config=run.values.model_dump(mode="json"),
        mlflow=RunFacts(run_id=tracker.run_id),
        metrics=metrics,
    )


def push(out_dir: Path, repository: str) -> None:
    """Upload the finished folder to a repository, which is private unless it is there already and public."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        private = HfApi().model_info(repository).private
        HfApi().upload_folder(repo_id=repository, folder_path=out_dir)
    except (HfHubHTTPError, LocalTokenNotFoundError, ValueError, OSError) as error:  # ValueError: a name, or the card
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--push_to_hub {repository}: the Hub refused it: {reason}\nThe result is whole in {out_dir}; "
            f"`hf auth login`, then `hf upload {repository} {out_dir}`."
        ) from None
    log.info("uploaded to %s/%s (%s)", HfApi().endpoint, repository, "private" if private else "public")


def say_what_is_next(run: Run, parts: Parts, metrics: dict[str, Any], repository: str | None) -> None:
    """Say where the result is and how it is used."""
    from scripts.export.sharing import vllm_command

    out_dir = run.output_dir
    use = f"ollama create my-model -f {out_dir}/Modelfile" if parts.gguf else f"serve.adapter_path: {out_dir}"
    if not parts.merges:
        use = vllm_command(out_dir, parts.base_id, parts.manifest.stage, repository or str(out_dir)) or use
    what, memory = "merged model" if parts.merges else "adapter", metrics["peak_memory_gib"]
    log.info("the %s is in %s\n  peak memory %.1f GiB\n  next  %s", what, out_dir, memory, use)


if __name__ == "__main__":
    sys.exit(main())
