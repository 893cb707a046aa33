"""Measure whether votes teach: a simulated user with a hidden taste votes through the server over three rounds.

Trains SFT. Each round starts the server, votes on its queue over HTTP, makes pairs of the votes and trains DPO from the last
adapter. No check of the configuration states the taste. The comparison on the test side says whether the last adapter keeps
it more often than SFT, and the other checks no less. Started again, it continues. Needs requirements.txt.

    python -m eval.benchmarks.simulated_user
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import itertools

import httpx
import numpy as np
import yaml

from eval.benchmarks.running_server import started
from scripts.common.artifacts import MANIFEST
from scripts.common.config import load_config
from scripts.common.errors import UserError, entry_point
from scripts.common.machine import hardware
from scripts.common.question import check_names
from scripts.common.run import set_up_logging
from scripts.studies.runs import last_lines, run_stage

log = logging.getLogger(__name__)

ROUNDS = 3
PROMPTS = 48  # that are voted on in each round
MARGIN = 0.05  # a loss that does not matter, in the rate of the taste and in the share of other checks passed
# About four in ten answers of the sample data begin their paragraph so; no rule of configs/demo.yaml asks for it.
TASTE = {"name": "begins with The", "regex": r"\A[^\n]+\n\nThe "}
MEASURE = "check_begins_with_the"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="configs/demo.yaml", metavar="FILE", help="the run's configuration (default: %(default)s)")
    add("--out", type=Path, default=Path("outputs/simulated_user"), metavar="FOLDER", help="default: %(default)s")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Train, vote round by round, compare, and print what came out; end with 1 where the votes taught nothing."""
    arguments = build_parser().parse_args(argv)
    set_up_logging()
    begun, out = time.monotonic(), arguments.out
    settings = yaml.safe_load(Path(arguments.config).read_text(encoding="utf-8"))
    config = write_config(settings, out / "config.yaml")
    adapters = {"sft": out / "sft_adapter"}
    run("scripts.train_sft", config, adapters["sft"])
    last = adapters["sft"]
    for number in range(1, ROUNDS + 1):
        last = adapters[f"round_{number}"] = play_round(settings, config, out, number, last)
    comparison = write_comparison(settings, out, adapters)
    run("eval.compare", comparison, out / "comparison")
    log.info("this run took %.0f minutes, on %s", (time.monotonic() - begun) / 60, hardware())
    return judge(out / "comparison", load_config(comparison).values.eval.checks)


def write_config(settings: dict[str, Any], path: Path, **more: Any) -> Path:
    """Write the configuration with some sections extended."""
    out = path.parent
    own: dict[str, Any] = {
        "sft": {"output_dir": str(out / "sft_adapter")},
        "pairs": {"max_prompts": PROMPTS, "max_per_prompt": 1, "max_new_tokens": 128, "temperature": 1.0},
        "tracking": {"mlflow_tracking_uri": f"sqlite:///{out / 'mlflow.db'}"},
        "eval": {"output_dir": str(out / "comparison")},
    }
    tree = dict(settings)
    for part in (own, more):
        for name, section in part.items():
            tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def run(script: str, config: Path, made: Path, *arguments: str) -> None:
    """Run a command with its output in a log beside what it makes, unless that is there."""
    if (made / MANIFEST).is_file():
        return
    log.info("%s, %s", script, made)
    file = made.with_name(f"{made.name}.log")
    if code := run_stage(script, ["--config", str(config), *arguments], file, lambda: None):
        raise UserError(f"{script} ended with exit code {code}:\n{last_lines(file)}")


def play_round(settings: dict[str, Any], config: Path, out: Path, number: int, last: Path) -> Path:
    """Vote on samples of the last adapter, make pairs, and train the next one from it."""
    name = f"round_{number}"
    votes, pairs, adapter = out / f"{name}_votes.jsonl", out / f"{name}_pairs.jsonl", out / name
    if (adapter / MANIFEST).is_file():
        return adapter
    queue = {
        "adapter_path": str(last), "adapters": {}, "queue_path": settings["sft"]["dataset_path"], "queue_votes_path": str(votes),
    }  # fmt: skip
    # Another seed draws other prompts of the training side.
    server = write_config(settings, out / f"{name}_server.yaml", serve=queue, seed=number)
    with started("serve.fastapi_server:app", server) as (url, *_):
        try:
            counts = vote_on_all(url)
        except httpx.HTTPError as error:
            raise UserError(
                f"{name}: the server did not take a vote: {error}. Votes are kept; run this again."
            ) from None
    log.info("%s: %s", name, ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    by_votes = ["--by", "votes", "--votes", str(votes), "--from", str(last), "--out", str(pairs)]
    log_file = out / f"{name}_pairs.log"
    if code := run_stage("scripts.make_pairs", ["--config", str(config), *by_votes], log_file, lambda: None):
        raise UserError(f"scripts.make_pairs ended with exit code {code}:\n{last_lines(log_file)}")
    paths = {"init_from": last, "dataset_path": pairs, "output_dir": adapter}
    run("scripts.train_dpo", config, adapter, *(f"--set=dpo.{key}={path}" for key, path in paths.items()))
    return adapter


def vote_on_all(url: str) -> Counter[str]:
    """Say of each prompt of the server's queue what the user thinks, until none is left."""
    counts: Counter[str] = Counter()
    with httpx.Client(base_url=url, timeout=60) as client:
        while True:
            answer = client.get("/v1/queue").raise_for_status().json()
            item = answer["item"]
            if item is None and not answer["drawing"]:
                counts.update({f"skipped ({reason})": count for reason, count in answer["skipped"].items()})
                return counts
            if item is None:
                time.sleep(0.5)
                continue
            said = opinion(item["samples"])
            vote = {"key": item["key"], "adapter": answer["adapter"], "samples": item["samples"], **said}
            client.post("/v1/queue/votes", json=vote).raise_for_status()
            counts[said["outcome"]] += 1


def opinion(samples: Sequence[str]) -> dict[str, Any]:
    """Prefer a sample to the user's taste to one that is not."""
    liked = [re.search(TASTE["regex"], sample) is not None for sample in samples]
    if any(liked) and not all(liked):
        return {"outcome": "best", "best": liked.index(True), "worst": liked.index(False)}
    return {"outcome": "tie" if any(liked) else "all_bad"}


def write_comparison(settings: dict[str, Any], out: Path, adapters: dict[str, Path]) -> Path:
    """Write the configuration of the comparison, in which the taste is a check and the question is about it."""
    checks = [*settings["eval"]["checks"], TASTE]
    plan = {"question": [f"round_{ROUNDS}", "sft"], "measures": [MEASURE]}
    models = {name: str(path) for name, path in adapters.items()}
    return write_config(
        settings, out / "comparison.yaml",
        eval={"output_dir": str(out / "comparison"), "checks": checks, "plan": plan, "models": models},
    )  # fmt: skip


def judge(comparison: Path, checks: Sequence[Any]) -> int:
    """Print what the votes have taught, and return 1 unless all three conditions hold."""
    from eval.metrics import adjust_p_values, decide_outcome, describe
    from eval.report import read_report
    from eval.tables import read_tables

    report = read_report(comparison)
    tables = {table.name: table for table in read_tables(comparison, report)}
    others = [name for name in check_names(checks) if name != MEASURE]
    asked = f"round_{ROUNDS}", "sft"
    values = {
        arm: np.mean([tables[name].values[arm] for name in others], axis=0) for arm in tables[MEASURE].values
    }  # fmt: skip
    rest = replace(tables[MEASURE], name="other checks passed", binary=False, values=values)
    shown: dict[str, Any] = {}
    rates: dict[str, dict[str, float]] = {}
    for table in (tables[MEASURE], rest):
        metric, findings = describe(table, asked)
        [finding] = [each for each in findings if (each.difference.a, each.difference.b) == asked]
        adjust_p_values([finding])
        difference = finding.difference
        shown[table.name] = decide_outcome(finding, "higher", MARGIN, 0.05)
        rates[table.name] = {arm: estimate.value or 0.0 for arm, estimate in metric.models.items()}
        log.info(
            "%s: %s; %s minus %s is %+.1f points (%s to %s), p = %.3g, n = %d: %s", table.name,
            ", ".join(f"{arm} {value:.1%}" for arm, value in rates[table.name].items()), *asked, 100 * difference.value,
            *("–" if each is None else f"{100 * each:+.1f}" for each in (difference.ci_low, difference.ci_high)),
            difference.p_value, metric.n, shown[table.name],
        )  # fmt: skip
    steps = [rates[MEASURE][arm] for arm in ("sft", *(f"round_{number}" for number in range(1, ROUNDS + 1)))]
    lower = [number for number, (one, other) in enumerate(itertools.pairwise(steps), 1) if other < one - MARGIN]
    held = {
        "the taste is kept more often": shown[MEASURE] == "better",
        "no round is lower by more than the margin": not lower,
        "other checks are no worse by more than the margin": shown[rest.name] in ("better", "no_worse", "equivalent"),
    }
    for condition, holds in held.items():
        log.info("%s: %s", condition, "yes" if holds else "no")
    (comparison.parent / "outcome.json").write_text(json.dumps({"rates": rates, "held": held}), encoding="utf-8")
    return int(not all(held.values()))


if __name__ == "__main__":
    sys.exit(main())
