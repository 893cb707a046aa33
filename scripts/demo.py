"""Run the whole chain on the sample data: demo model, SFT, DPO, comparison.

Reads configs/demo.yaml; writes outputs/ and what it measured, outputs/demo.json (with --smoke: a tiny random model, outputs/smoke, under two minutes).
Needs requirements.txt.

    python -m scripts.demo
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.common.artifacts import read_manifest
from scripts.common.errors import Interrupted, UserError, entry_point
from scripts.common.machine import hardware
from scripts.common.paths import ROOT
from scripts.common.run import set_up_logging
from scripts.common.signals import trapped_signals
from scripts.common.stages import DPO, SFT, TRAINING_STAGES
from scripts.starting.minutes import in_words, measure_speed
from scripts.studies.runs import run_stage

log = logging.getLogger(__name__)

CONFIG = "configs/demo.yaml"
MODEL = "scripts.get_demo_model"
MEASURED_BEFORE = (ROOT / "outputs" / "demo.json", ROOT / "eval" / "benchmarks" / "demo.json")  # the nearest first
SMOKE = "outputs/smoke"
FOLDERS = {
    SFT.script: "sft_adapter",
    DPO.script: "dpo_adapter",
    "eval.compare": "comparison",
}  # in the order of the runs
SMOKE_SETTINGS = {
    "base_model_id": f"{SMOKE}/model",
    "sft.output_dir": f"{SMOKE}/sft_adapter",
    "sft.trainer.max_steps": "4",
    "sft.trainer.warmup_steps": "0",
    "dpo.output_dir": f"{SMOKE}/dpo_adapter",
    "dpo.init_from": f"{SMOKE}/sft_adapter",
    "dpo.trainer.max_steps": "4",
    "dpo.trainer.warmup_steps": "0",
    "dpo.learning_rate": "0.001",
    "eval.output_dir": f"{SMOKE}/comparison",
    "eval.max_new_tokens": "24",
    "eval.max_prompts": "16",
    "tracking.mlflow_tracking_uri": f"sqlite:///{SMOKE}/mlflow.db",
}


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--smoke", action="store_true", help="use a tiny random model: proves the chain, teaches nothing"
    )
    return parser


def make_smoke_model() -> None:
    """Save the tiny model that the smoke run trains."""
    from scripts.model.tiny import save_tiny_model

    (ROOT / SMOKE).mkdir(parents=True, exist_ok=True)
    save_tiny_model(ROOT / SMOKE / "model")


def run_module(name: str, arguments: Sequence[str], position: str) -> float:
    """Run one stage as a user would, with its progress on the terminal; return the seconds it took."""
    command = f"python -m {shlex.join([name, *arguments])}"
    log.info("[%s] %s", position, command)
    started = time.monotonic()
    try:
        code = run_stage(name, arguments, cwd=ROOT)
    except Interrupted:
        trains = name in {stage.script for stage in TRAINING_STAGES.values()}
        log.warning(
            "interrupted in step %s after %.0f s: %s\n  the steps before it are finished and kept%s",
            position, time.monotonic() - started, command, f"; to continue this one: {command} --resume" if trains else "",
        )  # fmt: skip
        raise
    if code:
        raise UserError(f"step {position}, {name}, ended with exit code {code}; see its message above.")
    return time.monotonic() - started


def expected_duration(flops: float) -> str:
    """Say how long the demo will take on a machine of this speed, judged by the last run here, or else by README's."""
    before = json.loads(next(file for file in MEASURED_BEFORE if file.is_file()).read_text(encoding="utf-8"))
    seconds = sum(before["seconds"].values())
    if not flops or not before.get("flops"):
        return f"{in_words(seconds)} on {before['hardware']}"
    return f"{in_words(seconds * before['flops'] / flops)} on this machine, judged by a short matrix product"


def measured(outputs: Path, seconds: dict[str, float], flops: float) -> dict[str, Any]:
    """Collect what the run measured, for README's table and for comparing machines."""
    from eval.report import shortest_sample

    manifests = {name: read_manifest(outputs / folder, verify=False) for name, folder in FOLDERS.items()}
    report = json.loads((outputs / "comparison" / "report.json").read_text(encoding="utf-8"))
    shortest = shortest_sample(outputs / "comparison")
    return {
        "hardware": hardware(),
        "flops": round(flops),
        "seconds": {name: round(value) for name, value in seconds.items()},
        "peak_memory_gib": {name: manifest.metrics["peak_memory_gib"] for name, manifest in manifests.items()},
        "verdict": report["verdict"]["text"],
        "example": {"asked": shortest["prompt"], **shortest["answers"]},
        "results": [
            {key: metric[key] for key in ("title", "unit", "n", "models")}
            for metric in report["metrics"]
            if metric["name"]
            in ("all_rules", "held_out_loss", "checks_passed", "preference_accuracy", "reward_accuracy")
        ],
    }


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages one after the other and say where to look."""
    arguments = build_parser().parse_args(argv)
    set_up_logging()
    seconds: dict[str, float] = {}
    flops = measure_speed().flops
    log.info("4 steps, %s", "under 2 minutes" if arguments.smoke else expected_duration(flops))
    settings = [part for key, value in SMOKE_SETTINGS.items() for part in ("--set", f"{key}={value}")]
    common = ["--config", CONFIG, *(settings if arguments.smoke else [])]
    with trapped_signals():
        if arguments.smoke:
            make_smoke_model()
        else:
            seconds[MODEL] = run_module(MODEL, [], "1/4")
        for number, name in enumerate(FOLDERS, 2):
            seconds[name] = run_module(name, common, f"{number}/4")
    outputs = ROOT / (SMOKE if arguments.smoke else "outputs")
    (outputs / "demo.json").write_text(
        json.dumps(measured(outputs, seconds, flops), indent=1) + "\n", encoding="utf-8", newline="\n"
    )
    store = f' --backend-store-uri "{SMOKE_SETTINGS["tracking.mlflow_tracking_uri"]}"' if arguments.smoke else ""
    log.info(
        "done in %.0f minutes\n  look at   %s (open it in a browser)\n  ask       %s\n  runs      %s\n  serve     %s",
        sum(seconds.values()) / 60,
        outputs.relative_to(ROOT) / "comparison" / "report.html",
        f'python -m serve.ask "…" {shlex.join(common)}',
        f"mlflow ui --port 5000{store}",
        f"LLM_CONFIG={CONFIG} uvicorn serve.fastapi_server:app --port 8000",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
