"""Measure whether preference pairs teach what their labels say, and nothing where the labels say nothing.

On a tiny model, each small study makes pairs by a rule and trains DPO on them under three seeds. Two arms whose labels are
shuffled must not differ, and one whose labels are reversed must be worse than one whose labels are right. Needs requirements.txt.

    python -m eval.benchmarks.pairs
    python -m eval.benchmarks.pairs --studies 3
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import yaml

from scripts.common.errors import UserError, entry_point
from scripts.common.machine import hardware

SEEDS = (0, 1, 2)
WORDS = ("the", "team", "is", "it", "on", "to", "next", "week", "done")
RULE = {"name": "names the team", "must_contain": ["team"]}
PROMPTS = 80
LIMIT = 0.2  # of studies in which shuffled labels may seem to matter; by chance it is 0.01
Row = dict[str, str]


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--studies", type=int, default=10, metavar="N", help="small studies with shuffled labels (default: %(default)s)"
    )
    add("--steps", type=int, default=12, metavar="N", help="steps of each DPO run (default: %(default)s)")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the studies, print each verdict; end with 1 where they see what is not there, or miss what is."""
    arguments = build_parser().parse_args(argv)
    started, outcomes = time.monotonic(), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_project(folder, arguments.steps)
        run("scripts.train_sft", config)
        run("scripts.make_pairs", config, "--by", "checks", "--out", str(folder / "pairs.jsonl"))
        rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
        right = compare(folder, config, {"reversed": [flipped(rows, lambda _: True)] * 3, "right": [rows] * 3})
        say(f"labels reversed against right ({len(rows)} pairs): right is {right['outcome']}; {right['text']}")
        for study in range(arguments.studies):
            arms = {arm: [shuffled(rows, f"{study} {arm} {seed}") for seed in SEEDS] for arm in ("one", "other")}
            verdict = compare(folder, config, arms)
            outcomes[verdict["outcome"]] += 1
            say(f"shuffled labels, study {study + 1}: {verdict['outcome']}; {verdict['text']}")
    seen = outcomes["better"] + outcomes["worse"]
    say(
        f"{seen} of {arguments.studies} studies of shuffled labels show a difference, on {hardware()}, "
        f"{(time.monotonic() - started) / 60:.0f} minutes"
    )
    return int(seen > LIMIT * arguments.studies or right["outcome"] != "better")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def write_project(folder: Path, steps: int) -> Path:
    """Save model, data and configuration."""
    from scripts.model.tiny import save_tiny_talker

    save_tiny_talker(folder / "model", WORDS, ends=0.08, variety=30)
    drawn = random.Random(0)
    rows = [
        {"instruction": f"{' '.join(drawn.sample(WORDS, 4))} {n}", "output": " ".join(drawn.sample(WORDS, 4))}
        for n in range(PROMPTS)
    ]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = {"max_length": 200, "per_device_train_batch_size": 8, "learning_rate": 5e-3}
    tree: dict[str, Any] = {
        "base_model_id": str(folder / "model"), "offline": True,
        "data": {"validation_ratio": 0.0, "test_ratio": 0.5},
        "sft": {**common, "dataset_path": str(folder / "sft.jsonl"), "output_dir": str(folder / "sft"), "trainer": {"max_steps": 8}},
        "dpo": {**common, "init_from": str(folder / "sft"), "beta": 0.1, "trainer": {"max_steps": steps, "save_strategy": "no"}},
        "pairs": {"samples_per_prompt": 8, "temperature": 1.0, "max_new_tokens": 48, "batch_size": 64, "balance_length": False},
        "eval": {"output_dir": str(folder / "comparison"), "max_new_tokens": 16, "batch_size": 64, "checks": [RULE]},
        "performance": {"dtype": "fp32"},
        "tracking": {"mlflow_tracking_uri": f"sqlite:///{folder}/mlflow.db", "log_adapter": False},
    }  # fmt: skip
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return config


def run(module: str, config: Path, *arguments: str) -> None:
    """Run a stage in this process: to start one for each would take longer than all the training."""
    if importlib.import_module(module).main(["--config", str(config), *arguments]):
        raise UserError(f"{module} failed; see its message above.")


def flipped(rows: Sequence[Row], flips: Callable[[Row], bool]) -> list[Row]:
    """Return the pairs, some of them with chosen and rejected exchanged."""
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} if flips(row) else row for row in rows]


def shuffled(rows: Sequence[Row], seed: str) -> list[Row]:
    """Return the pairs with labels that a coin has drawn."""
    coin = random.Random(seed)
    return flipped(rows, lambda _: coin.random() < 0.5)


def compare(folder: Path, config: Path, arms: dict[str, list[list[Row]]]) -> dict[str, Any]:
    """Train each arm on its pairs, a seed each, and return the verdict on the last against the first."""
    for arm, of_seeds in arms.items():
        for seed, rows in zip(SEEDS, of_seeds, strict=True):
            data = folder / "labelled.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            changes = {"seed": seed, "dpo.dataset_path": data, "dpo.output_dir": folder / f"{arm}_{seed}"}
            run(
                "scripts.train_dpo",
                config,
                *(part for key, value in changes.items() for part in ("--set", f"{key}={value}")),
            )
    models = [f"{arm}={','.join(str(folder / f'{arm}_{seed}') for seed in SEEDS)}" for arm in arms]
    run("eval.compare", config, "--set", f"dpo.dataset_path={folder / 'pairs.jsonl'}", "--models", *models)
    verdict: dict[str, Any] = json.loads((folder / "comparison" / "report.json").read_text(encoding="utf-8"))["verdict"]
    return verdict


if __name__ == "__main__":
    sys.exit(main())
