"""Try a study on a tiny model: the same one under other seeds, and one in which half of the training answers are broken.

Two studies that differ in their seeds only are reported as they come out. A planted effect, adapters of broken answers
beside adapters of whole ones, has to be found. Writes to --out; takes minutes. Needs requirements.txt.

    python -m eval.benchmarks.studies
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.common.artifacts import MANIFEST
from scripts.common.config import load_config
from scripts.common.errors import UserError, entry_point
from scripts.common.run import set_up_logging
from scripts.studies.plan import as_flags
from scripts.studies.runs import last_lines, run_stage

log = logging.getLogger(__name__)

COLOURS = ("red", "blue", "green", "gold", "grey")
MEASURE = "held_out_loss"  # of a model so small the answers keep no rule
BROKEN = "nobody knows"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, default=3, metavar="N", help="seeds of each study (default: %(default)s)")
    add("--steps", type=int, default=40, metavar="N", help="steps of each training run (default: %(default)s)")
    add("--out", type=Path, default=Path("outputs/benchmarks/studies"), metavar="FOLDER", help="default: %(default)s")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run both studies and the planted effect, and print what each report says; 1 where the effect is not found."""
    arguments = build_parser().parse_args(argv)
    set_up_logging()
    folder = arguments.out
    config = write_project(folder, arguments.steps)
    several = [list(range(first, first + arguments.seeds)) for first in (0, arguments.seeds)]
    lines = ["| run | seeds | what the report says | seed sd |", "|---|---|---|---|"]
    for number, seeds in enumerate(several, 1):
        study = folder / f"study-{number}"
        run("scripts.study", config, {"study.output_dir": str(study), "study.seeds": seeds}, study)
        lines.append(row_of(f"study {number}", seeds, study / "comparison"))
    arms = planted_arms(folder, config, several[0])
    run("eval.compare", config, {"eval.models": arms, "eval.output_dir": str(folder / "planted")}, folder / "planted")
    lines.append(row_of("half of the training answers broken", several[0], folder / "planted"))
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if outcome_of(folder / "planted") == "worse" else 1


def write_project(folder: Path, steps: int) -> Path:
    """Write a tiny model, its data whole and broken, and a configuration; return the path of that."""
    from scripts.model.tiny import save_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    save_tiny_model(folder / "model")
    words = [f"{colour} {number}" for colour in COLOURS for number in range(24)]
    write_rows(folder / "sft.jsonl", [{"instruction": f"say {each}", "output": f"{each} it is"} for each in words])
    pairs = [{"prompt": f"tell {each}", "chosen": f"{each} it is", "rejected": f"not {each}"} for each in words]
    write_rows(folder / "dpo.jsonl", pairs)
    common = {"max_length": 200, "per_device_train_batch_size": 8, "trainer": {"max_steps": steps}}
    tree = {
        "base_model_id": str(folder / "model"),
        "offline": True,
        "data": {"test_ratio": 0.3},
        "sft": {**common, "dataset_path": str(folder / "sft.jsonl"), "learning_rate": 5e-3},
        "dpo": {**common, "dataset_path": str(folder / "dpo.jsonl"), "learning_rate": 1e-3, "beta": 0.1},
        "eval": {"max_new_tokens": 8, "plan": {"measures": [MEASURE]}},
        "performance": {"dtype": "fp32", "threads": 1},
        "tracking": {"mlflow_tracking_uri": f"sqlite:///{folder}/mlflow.db", "log_adapter": False},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")  # JSON is YAML
    write_rows(folder / "broken.jsonl", broken_rows(folder, path))
    return path


def broken_rows(folder: Path, config: Path) -> list[dict[str, Any]]:
    """Return the SFT records with every second answer on the training side broken."""
    from scripts.dataset.records import load_datasets, parse_record
    from scripts.dataset.split import side_of

    values = load_config(config).values
    (file,) = load_datasets(values.sft.dataset_path, parse_record, values.data, "sft.dataset_path")
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [row for row, record in zip(rows, file.records, strict=True) if side_of(record, values.data) == "train"]
    for row in trained[::2]:
        row["output"] = BROKEN
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write records, a line each."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def planted_arms(folder: Path, config: Path, seeds: Sequence[int]) -> dict[str, list[str]]:
    """Train on the broken answers under the seeds of the first study; return its SFT adapters and these."""
    arms: dict[str, list[str]] = {"whole": [], "broken": []}
    for seed in seeds:
        made = folder / f"broken-{seed}"
        data = str(folder / "broken.jsonl")
        run("scripts.train_sft", config, {"seed": seed, "sft.dataset_path": data, "sft.output_dir": str(made)}, made)
        arms["whole"].append(str(folder / f"study-1/seed-{seed}/sft_adapter"))
        arms["broken"].append(str(made))
    return arms


def run(script: str, config: Path, settings: dict[str, Any], made: Path) -> None:
    """Run a command with its output in a log beside what it makes, unless that is there."""
    if (made / MANIFEST).is_file():
        return
    log.info("%s, %s", script, made)
    file = made.with_name(f"{made.name}.log")
    if code := run_stage(script, ["--config", str(config), *as_flags(settings)], file, lambda: None):
        raise UserError(f"{script} ended with exit code {code}:\n{last_lines(file)}")


def row_of(name: str, seeds: Sequence[int], comparison: Path) -> str:
    """Return what a report found as a row of the table."""
    report = json.loads((comparison / "report.json").read_text(encoding="utf-8"))
    metric = next(metric for metric in report["metrics"] if metric["name"] == MEASURE)
    asked = report["question"]["a"], report["question"]["b"]
    each = next(each for each in metric["differences"] if (each["a"], each["b"]) == asked)
    scatter = "–" if each["sd_seeds"] is None else f"{each['sd_seeds']:.3f}"
    return f"| {name} | {', '.join(map(str, seeds))} | {report['verdict']['text']} | {scatter} |"


def outcome_of(comparison: Path) -> str:
    """Return the outcome of a report's primary question."""
    report = json.loads((comparison / "report.json").read_text(encoding="utf-8"))
    return str(report["verdict"]["outcome"])


if __name__ == "__main__":
    sys.exit(main())
