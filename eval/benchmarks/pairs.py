"""Measure whether preference pairs teach what their labels say, and nothing where the labels say nothing.

On a tiny model, pairs are made by a rule, and each small study trains two arms of DPO on them under three seeds. Arms whose
labels are shuffled must not differ, and one whose labels are reversed must be worse than one whose labels are right. Asked is
how often the answer that keeps the rule is the likelier one, in held-out pairs. What is finished in --out is not made again,
so a stopped run continues. Needs requirements.txt.

    python -m eval.benchmarks.pairs
    python -m eval.benchmarks.pairs --studies 3 --out outputs/benchmarks/pairs_3
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import yaml

from scripts.common.artifacts import MANIFEST
from scripts.common.errors import UserError, entry_point
from scripts.common.machine import hardware
from scripts.studies.plan import as_flags

SEEDS = (0, 1, 2)
WORDS = ("the", "team", "is", "it", "on", "to", "next", "week", "done")
RULE = {"name": "names the team", "must_contain": ["team"]}
MEASURE = "preference_accuracy"  # the likeliest answer of a model so small is the same to every prompt
PROMPTS = 80
HELD_OUT = 3  # pairs of each prompt
LIMIT = 0.2  # of studies in which shuffled labels may seem to matter; by chance it is 0.01
Row = dict[str, str]


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--studies", type=int, default=10, metavar="N", help="small studies with shuffled labels (default: %(default)s)"
    )
    add("--steps", type=int, default=20, metavar="N", help="steps of each DPO run (default: %(default)s)")
    add("--out", type=Path, default=Path("outputs/benchmarks/pairs"), metavar="FOLDER", help="default: %(default)s")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the studies, print each verdict; end with 1 where they see what is not there, or miss what is."""
    arguments = build_parser().parse_args(argv)
    folder, outcomes = arguments.out, Counter[str]()
    config = write_project(folder, arguments.steps)
    if not (folder / "pairs.jsonl").exists():
        run("scripts.train_sft", config)
        run("scripts.make_pairs", config, "--by", "checks", "--out", str(folder / "pairs.jsonl"))
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    reverse = {"right": [rows] * len(SEEDS), "reversed": [flipped(rows, lambda _: True)] * len(SEEDS)}
    planted = compare(folder / "reversed", config, reverse)
    say(f"labels reversed against right ({len(rows)} pairs): {planted['outcome']}; {planted['text']}")
    for study in range(1, arguments.studies + 1):
        arms = {arm: [shuffled(rows, f"{study} {arm} {seed}") for seed in SEEDS] for arm in ("one", "other")}
        verdict = compare(folder / f"shuffled-{study}", config, arms)
        outcomes[verdict["outcome"]] += 1
        say(f"shuffled labels, study {study}: {verdict['outcome']}; {verdict['text']}")
    seen = outcomes["better"] + outcomes["worse"]
    say(f"{seen} of {arguments.studies} studies of shuffled labels show a difference, on {hardware()}")
    return int(seen > LIMIT * arguments.studies or planted["outcome"] != "worse")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def write_project(folder: Path, steps: int) -> Path:
    """Save model, data and configuration."""
    from scripts.model.tiny import save_tiny_talker

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        save_tiny_talker(folder / "model", WORDS, ends=0.08, variety=30)
    drawn = random.Random(0)
    prompts = [f"{' '.join(drawn.sample(WORDS, 4))} {number}" for number in range(PROMPTS)]
    rows = [{"instruction": prompt, "output": " ".join(drawn.sample(WORDS, 4))} for prompt in prompts]
    write_rows(folder / "sft.jsonl", rows)
    others = [word for word in WORDS if word != "team"]
    held_out = []
    for prompt in prompts * HELD_OUT:
        names_it, does_not = drawn.sample(others, 3), drawn.sample(others, 4)
        names_it.insert(drawn.randrange(4), "team")
        held_out.append({"prompt": prompt, "chosen": " ".join(names_it), "rejected": " ".join(does_not)})
    write_rows(folder / "held_out.jsonl", held_out)
    common = {"max_length": 200, "per_device_train_batch_size": 8, "learning_rate": 5e-3}
    tree: dict[str, Any] = {
        "base_model_id": str(folder / "model"), "offline": True,
        "data": {"validation_ratio": 0.0, "test_ratio": 0.5},
        "sft": {**common, "dataset_path": str(folder / "sft.jsonl"), "output_dir": str(folder / "sft"), "trainer": {"max_steps": 8}},
        "dpo": {
            **common, "dataset_path": str(folder / "held_out.jsonl"), "init_from": str(folder / "sft"), "beta": 0.1,
            "learning_rate": 1e-3, "trainer": {"max_steps": steps, "save_strategy": "no"},
        },
        "pairs": {"samples_per_prompt": 8, "temperature": 1.0, "max_new_tokens": 48, "batch_size": 64, "balance_length": False},
        "eval": {"max_new_tokens": 16, "batch_size": 64, "checks": [RULE], "plan": {"measures": [MEASURE]}},
        "performance": {"dtype": "fp32", "threads": 1},
        "tracking": {"mlflow_tracking_uri": f"sqlite:///{folder}/mlflow.db", "log_adapter": False},
    }  # fmt: skip
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return config


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows, a line each."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


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
    if not (folder / "comparison" / MANIFEST).exists():
        for arm, of_seeds in arms.items():
            for seed, rows in zip(SEEDS, of_seeds, strict=True):
                data, made = folder / f"{arm}_{seed}.jsonl", folder / f"{arm}_{seed}"
                if not made.exists():
                    folder.mkdir(exist_ok=True)
                    write_rows(data, rows)
                    settings = {"seed": seed, "dpo.dataset_path": str(data), "dpo.output_dir": str(made)}
                    run("scripts.train_dpo", config, *as_flags(settings))
        models = {arm: [str(folder / f"{arm}_{seed}") for seed in SEEDS] for arm in arms}
        settings = {"eval.models": models, "eval.output_dir": str(folder / "comparison")}
        run("eval.compare", config, *as_flags(settings))
    report = json.loads((folder / "comparison" / "report.json").read_text(encoding="utf-8"))
    verdict: dict[str, Any] = report["verdict"]
    return verdict


if __name__ == "__main__":
    sys.exit(main())
