"""Say honestly which is better: base, SFT and DPO on the same held-out prompts, with intervals and paired tests.

Reads the adapters of `sft.output_dir` and `dpo.output_dir` and the held-out side of both datasets; writes
report.html, report.json and samples.jsonl to `eval.output_dir`, and an MLflow run. Needs requirements.txt.

    python -m eval.compare --config configs/config.yaml
"""

from __future__ import annotations

import argparse
import base64
import logging
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.held_out import read_held_out
from eval.lmeval_results import find_benchmarks
from scripts.common.artifacts import (
    artifact_sha256,
    check_replaceable,
    locked_run_dir,
    parent_entry,
    portable_path,
    publish,
    read_manifest,
    write_manifest,
)
from scripts.common.config import LoadedConfig, add_config_arguments, load_config
from scripts.common.errors import UserError, entry_point
from scripts.common.records import sources_of
from scripts.common.runtime import (
    apply_machine,
    choose_machine,
    peak_memory_gib,
    prepare_environment,
    set_up_logging,
    trapped_signals,
)

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders with the adapter pairs of other seeds (DIR/sft_adapter, DIR/dpo_adapter)",
    )
    return parser


def find_adapters(config: LoadedConfig) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return folder and manifest of each adapter that is there.

    Raises: UserError when there is none, or when one was trained with another split and so may know these prompts.
    """
    data = config.values.data
    found = {}
    for name, section in (("sft", config.values.sft), ("dpo", config.values.dpo)):
        folder = section.output_dir
        if not Path(folder).is_dir():
            log.warning("%s: no adapter there, so %s is left out of the comparison", folder, name)
            continue
        manifest = read_manifest(folder, stages=(name,))
        if manifest["split"] != {"seed": data.split_seed, "ratio": data.validation_ratio}:
            raise UserError(
                f"{folder}: was trained with the split {manifest['split']}, but the configuration holds out by seed "
                f"{data.split_seed} and ratio {data.validation_ratio}, so it may have seen these prompts. Use its split."
            )
        trained_on = [entry["path"] for entry in manifest["datasets"]]
        if trained_on and set(trained_on) != {
            portable_path(source.path) for source in sources_of(section.dataset_path)
        }:
            log.warning(
                "%s: was trained on %s, but is compared on what %s.dataset_path names; mean its own data? --set %s.dataset_path=%s",
                folder, " and ".join(trained_on), name, name, trained_on[0],
            )  # fmt: skip
        found[name] = (Path(folder), manifest)
    if not found:
        raise UserError(
            "there is no adapter to compare. Run `python -m scripts.train_sft` with this configuration first."
        )
    return found


def load_models(config: LoadedConfig, adapters: dict[str, Path], base_folder: Path, tokenizer: Any) -> Any:
    """Load the base once with every adapter beside the others."""
    from scripts.common.fast_path import speed_up
    from scripts.common.modeling import check_adapter_fits, load_adapter, load_base

    machine = choose_machine(config.values)
    apply_machine(machine)
    for folder in adapters.values():
        check_adapter_fits(folder, base_folder, tokenizer)
    model = load_base(base_folder, config.values, machine)
    for name, folder in adapters.items():
        model = load_adapter(model, folder, name=name)
    if config.values.performance.fast_path:
        speed_up(model)
    return model.eval()


def describe_samples(prepared: Any, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Put the answers of all models side by side, the most changed first."""
    from difflib import SequenceMatcher

    compared = [name for name in ("sft", "dpo") if name in measured] if "dpo" in measured else ["base", "sft"]
    samples = []
    for index, (source, prompt, reference) in enumerate(prepared.questions):
        answers = {name: result.answers[index].text for name, result in measured.items()}
        first, second = (answers[name].split() for name in compared[-2:]) if len(compared) > 1 else ([], [])
        samples.append(
            {
                "source": portable_path(source),
                "prompt": "\n\n".join(message["content"] for message in prompt if message["role"] != "system"),
                "reference": reference,
                "answers": answers,
                "checks": {name: result.checks[index] for name, result in measured.items()},
                "changed": round(1 - SequenceMatcher(None, first, second, autojunk=False).ratio(), 4),
            }
        )
    return sorted(samples, key=lambda sample: -sample["changed"])


def describe_lineage(adapters: dict[str, tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """Say which data, configuration, seed and hashes made each column."""
    first = next(iter(adapters.values()))[1]
    lineage: dict[str, Any] = {"base": first["base_model"]}
    for name, (folder, manifest) in adapters.items():
        kept = ("created", "base_model", "parent", "datasets", "split", "git", "packages")
        lineage[name] = {
            "path": portable_path(folder),
            "sha256": artifact_sha256(manifest),
            "seed": manifest["config"]["seed"],
            "mlflow_run_id": manifest["mlflow"]["run_id"],
            **{key: manifest[key] for key in kept},
        }
    return lineage


def compare(config: LoadedConfig, runs: list[str], tracker: Any, adapters: dict[str, Any]) -> dict[str, Any]:
    """Measure, judge and describe."""
    from eval.measuring import Prepared, measure_models
    from eval.verdict import aggregate_runs, build_metrics, decide
    from scripts.common.modeling import find_model, load_tokenizer

    values = config.values
    held_out = read_held_out(config, adapters)
    base_folder = find_model(values.base_model_id, values.base_model_revision)
    tokenizer = load_tokenizer(base_folder)
    prepared = Prepared(tokenizer, held_out, values)
    log.info("%d held-out prompts and %d pairs", len(prepared.questions), len(prepared.chosen))

    def progress(what: str) -> None:
        log.info("measuring %s", what)

    folders = {name: folder for name, (folder, _) in adapters.items()}
    model = load_models(config, folders, base_folder, tokenizer)
    names: dict[str, str | None] = {"base": None, **{name: name for name in folders}}
    measured = measure_models(model, names, prepared, progress)
    del model
    metrics = build_metrics(measured, prepared, adapters)
    aggregated = None
    if runs:
        repeats = [measured]
        for run in runs:
            others = {name: Path(run) / f"{name}_adapter" for name in folders}
            model = load_models(config, others, base_folder, tokenizer)
            log.info("measuring the adapters of %s", run)
            repeats.append(measure_models(model, names, prepared, progress))
            del model
        seeds = [
            manifest_seed(folder)
            for folder in (next(iter(folders.values())), *(Path(run) / "sft_adapter" for run in runs))
        ]
        aggregated = aggregate_runs(repeats, seeds, prepared, adapters)
    verdict, notes = decide(metrics, list(measured), aggregated)
    benchmarks, left_out = find_benchmarks(Path(values.lmeval.output_dir), folders.values())
    notes += [left_out] if left_out else []
    for metric in metrics:
        for name, estimate in metric["models"].items():
            tracker.log_metrics({f"eval/{metric['name']}/{name}": estimate["value"]})
    return {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "title": f"{' · '.join(measured)} on {Path(base_folder).name}",
        "verdict": verdict,
        "models": list(measured),
        "metrics": metrics,
        "health": {
            name: {**vars(result.health), "kl_to_base": result.kl.get("base"), "kl_to_sft": result.kl.get("sft")}
            for name, result in measured.items()
        },
        "training": {name: manifest["metrics"] for name, (_, manifest) in adapters.items()},
        "curves": {
            name: "data:image/png;base64," + base64.b64encode((folder / "curves.png").read_bytes()).decode()
            for name, folder in folders.items()
        },
        "lineage": describe_lineage(adapters),
        "samples": describe_samples(prepared, measured),
        "benchmarks": benchmarks,
        "judge": None,
        "runs": aggregated,
        "notes": notes,
    }


def manifest_seed(folder: Path) -> int:
    """Return the seed an adapter was trained with."""
    return int(read_manifest(folder)["config"]["seed"])


def write_comparison(
    config: LoadedConfig, run_dir: Path, report: dict[str, Any], adapters: dict[str, Any], tracker: Any
) -> None:
    """Write the report folder and put it in place of the old one."""
    from eval.report import write_report

    part = run_dir / "finished"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write_report(part, report)
    folder, newest = list(adapters.values())[-1]
    kept = ("base_model", "tokenizer_sha256", "chat_template_sha256", "split", "datasets")
    write_manifest(
        part,
        "comparison",
        **{key: newest[key] for key in kept},
        parent=parent_entry(folder, newest),
        config=config.values.model_dump(mode="json"),
        mlflow={"run_id": tracker.run_id},
        metrics={"outcome": report["verdict"]["outcome"], "peak_memory_gib": round(peak_memory_gib(), 2)},
    )
    publish(part, config.values.eval.output_dir)
    tracker.log_artifact(Path(config.values.eval.output_dir))


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    from eval.checks import check_rules

    arguments = build_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    check_rules(config.values.eval.checks)
    prepare_environment(config.values)
    output_dir = config.values.eval.output_dir
    check_replaceable(output_dir, "comparison", "eval.output_dir")
    with trapped_signals(), locked_run_dir(output_dir) as run_dir:
        set_up_logging(run_dir / "log.txt")
        adapters = find_adapters(config)

        from scripts.common.tracking import tracked_run

        parent_run = list(adapters.values())[-1][1]["mlflow"]["run_id"]
        with tracked_run(config, "comparison", parent_run_id=parent_run) as tracker:
            report = compare(config, arguments.runs, tracker, adapters)
            write_comparison(config, run_dir, report, adapters, tracker)
    log.info("%s\n  report  %s", report["verdict"]["text"], Path(output_dir) / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
