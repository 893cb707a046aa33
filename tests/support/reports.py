"""Made-up comparisons, one for each way that a report can look: to be read back, rendered and looked at.

Write their pages with: python -m tests.support.reports FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from eval.report import Report, render_report
from scripts.common.curves import Curves

RULES = (
    "starts with a status and a title",
    "one paragraph without bullets",
    "ends with the next step",
    "35 to 80 words",
)
CHAIN = ("base", "sft", "dpo")
ANSWERS = {
    "base": "The migration is going well so far and the team is very excited about it! Here are some key points to "
    "consider: \n- the tests are running\n- the vendor was contacted\n- more updates will follow soon",
    "sft": "AT RISK: Billing migration\n\nTwo of five tables are moved. The vendor has not confirmed the maintenance window, "
    "so the third table waits.\n\nNext: Ana calls the vendor on Tuesday.",
    "dpo": "AT RISK: Billing migration\n\nTwo of five tables are moved, and the third waits for the vendor, who has not "
    "confirmed the window.\n\nNext: Ana calls the vendor on Tuesday.",
}


def measure(
    name: str,
    title: str,
    phrase: str,
    group: str,
    by_seed: Mapping[str, Sequence[float]],
    half: float,
    outcomes: Mapping[tuple[str, str], str],
    *,
    unit: str = "share",
    better: str = "higher",
    n: int = 84,
    items: str = "prompts",
    primary: bool = False,
    margin: float | None = None,
) -> dict[str, Any]:
    """Describe a measure whose intervals are `half` wide on each side; what has no outcome is undecided."""
    values = {arm: mean(seeds) for arm, seeds in by_seed.items()}
    ends = (0.0, 1.0) if unit == "share" else (-np.inf, np.inf)
    models = {
        arm: {"value": value, "ci_low": max(ends[0], value - half), "ci_high": min(ends[1], value + half)}
        for arm, value in values.items()
    }
    differences = []
    last = list(by_seed)[-2:]
    for b, a in combinations(by_seed, 2):
        seeds = max(len(by_seed[a]), len(by_seed[b]))
        outcome = outcomes.get((a, b), "undecided")
        gap = values[a] - values[b]
        width = {"undecided": 1.2 * half, "no_worse": 0.03, "equivalent": 0.06}.get(outcome, 0.6 * abs(gap))
        differences.append(
            {
                "a": a, "b": b, "value": gap, "ci_low": gap - width, "ci_high": gap + width,
                "p_value": 0.2 if outcome == "undecided" else 0.0004, "p_adjusted": 0.4 if outcome == "undecided" else 0.0008,
                "test": "t, seeds × prompts", "shown": outcome in ("better", "worse"), "needed_n": 412, "seeds": seeds,
                "df": 4.6 if seeds > 1 else None, "sd_seeds": stdev(by_seed[a]) if seeds > 1 else None,
                "sd_items": 0.30 if seeds > 1 else None, "smallest_gap": 0.104 if unit == "share" else 0.03,
                "margin": margin if primary and [b, a] == last else None,
                "outcome": outcome if primary and [b, a] == last else None,
            }
        )  # fmt: skip
    baselines = {"longer answer wins": {"value": 0.53, "ci_low": 0.4, "ci_high": 0.65}} if group == "preference" else {}
    return {
        "name": name, "title": title, "phrase": phrase, "unit": unit, "better": better, "group": group, "n": n,
        "items": items, "models": models, "baselines": baselines, "differences": differences, "primary": primary,
        "by_seed": {arm: list(seeds) for arm, seeds in by_seed.items()},
    }  # fmt: skip


def scattered(values: Mapping[str, float], seeds: int, sd: float = 0.02) -> dict[str, list[float]]:
    """Return a value for each seed around the arm's own; the base has one."""
    steps = np.linspace(-1.3, 1.3, seeds) if seeds > 1 else np.zeros(1)
    return {
        arm: [value] if arm == "base" else [float(np.clip(value + sd * step, 0, 1)) for step in np.roll(steps, place)]
        for place, (arm, value) in enumerate(values.items())
    }


def curves(stage: str, seeds: int = 1) -> list[Curves]:
    """Return a run of each seed whose loss falls, with rewards for DPO."""
    made = []
    for seed in range(seeds):
        noise = np.random.default_rng(seed)
        history: list[dict[str, Any]] = [{"step": 0, "eval_loss": 2.23}]
        for step in range(5, 121, 5):
            history.append({"step": step, "loss": 1 + 1.2 * np.exp(-step / 30) + noise.normal(0, 0.04)})
            if stage == "dpo":
                history[-1] |= {"rewards/chosen": step / 200, "rewards/rejected": -step / 90 + noise.normal(0, 0.03)}
        for step in (40, 80, 120):
            history.append({"step": step, "eval_loss": 1.2 + np.exp(-step / 25)})
            if stage == "dpo":
                history[-1]["eval_rewards/margins"] = step / 70
        made.append(Curves.of(history, stage, seed))
    return made


def sample(
    place: int, answers: Mapping[str, str], kept: Mapping[str, int], prompt: str | None = None
) -> dict[str, Any]:
    """Return a prompt with answers that keep the first so many rules."""
    return {
        "source": "data/sft/sample_sft.jsonl",
        "prompt": prompt or f"Notes {place}: billing migration, 2 of 5 tables moved, vendor has not confirmed. Write the update.",
        "reference": ANSWERS["sft"], "answers": dict(answers), "changed": round(0.9 - place / 20, 3),
        "checks": {arm: {rule: number < kept[arm] for number, rule in enumerate(RULES)} for arm in answers},
    }  # fmt: skip


def lineage(stage: str, seed: int = 0) -> dict[str, Any]:
    """Return where an adapter comes from."""
    return {
        "path": f"outputs/{stage}_adapter", "sha256": "ab12" * 16, "created": "2026-01-02T03:04:05+00:00",
        "base_model": {"id": "models/smollm2-135m-instruct", "revision": None, "fingerprint": "cd34" * 16},
        "datasets": [{"path": f"data/{stage}/sample.jsonl", "sha256": "ef56" * 16, "train": 320, "validation": 80}],
        "split": {"seed": 0, "ratio": 0.2}, "seed": seed, "git": {"commit": "9f" * 20, "dirty": True},
        "packages": {"torch": "2.14.1", "trl": "1.16.0"}, "mlflow_run_id": "77" * 16,
    }  # fmt: skip


def compared(
    values: Mapping[str, float],
    outcome: str,
    text: str,
    *,
    seeds: int = 1,
    planned: bool = False,
    looks: int = 1,
    margins: Mapping[str, float] | None = None,
    steps: Mapping[tuple[str, str], str] | None = None,
    answers: Mapping[str, str] | None = None,
    count: int = 9,
    **facts: Any,
) -> Report:
    """Return a complete report of these arms, whose share of answers that keep all rules is given."""
    arms = list(values)
    a, b = arms[-1], arms[-2]
    found = {**{(arm, "base"): "better" for arm in arms[1:]}, **(steps or {}), (a, b): outcome}
    by_seed = scattered(values, seeds)
    margin = (margins or {}).get("all_rules")
    metrics = [
        measure("all_rules", "Answers that keep all rules", "the share of answers that keep all rules", "checks", by_seed,
                0.08, found, primary=True, margin=margin),
        measure("preference_accuracy", "Chosen answer likelier per token", "the share of pairs where the chosen answer is likelier",
                "preference", scattered({arm: 0.84 + 0.01 * i for i, arm in enumerate(arms)}, seeds), 0.12, {}, n=37,
                items="pairs", primary=True),
        measure("held_out_loss", "Loss of the target answers", "the loss of the target answers", "loss",
                {arm: [2.23] if arm == "base" else [1.21 + 0.03 * i] for i, arm in enumerate(arms)}, 0.07, {},
                unit="nats per token", better="lower"),
        measure("checks_passed", "Rules kept per answer", "the mean share of rules kept", "checks",
                scattered({arm: 0.4 + 0.55 * value for arm, value in values.items()}, seeds), 0.05, found),
        *(measure(f"check_{i}", rule, f"the share of answers that keep “{rule}”", "checks",
                  scattered({arm: min(1.0, value + 0.05 * i) for arm, value in values.items()}, seeds), 0.06, found)
          for i, rule in enumerate(RULES)),
    ]  # fmt: skip
    answers = answers or {arm: ANSWERS.get(arm, ANSWERS["dpo"]) for arm in arms}
    kept = {arm: round(len(RULES) * (0.4 + 0.55 * value)) for arm, value in values.items()}
    health = {
        "mean_tokens": 41.5,
        "repetition": 0.031,
        "eos_rate": 0.9875,
        "distinct_2": 0.74,
        "kl_to_base": 0.4,
        "kl_to_sft": 0.01,
    }
    cost = {"train_seconds": 312.4, "train_tokens": 182_400, "peak_memory_gib": 2.31, "steps": 120, "tokens_per_second": 584.0,
            "held_out_loss_before": 2.23, "held_out_loss": 1.21}  # fmt: skip
    report = {
        "schema": 1, "created": "2026-01-02T03:04:05+00:00", "title": f"{' · '.join(arms)} on smollm2-135m-instruct",
        "verdict": {"text": text, "outcome": outcome if outcome in ("better", "worse") else "no_difference",
                    "compared": [a, b], "winner": None, "needed_n": None},
        "models": arms,
        "arms": {arm: {"kind": "base" if arm == "base" else "adapter", "seeds": [] if arm == "base" else list(range(seeds))}
                 for arm in arms},
        "question": {"a": a, "b": b, "measures": ["all_rules", "preference_accuracy"], "margins": dict(margins or {}),
                     "planned": planned},
        "looks": looks, "metrics": metrics, "health": dict.fromkeys(arms, health), "training": dict.fromkeys(arms[1:], cost),
        "curves": {arm: curves("dpo" if arm == a else "sft", seeds) for arm in arms[1:]},
        "lineage": {"base": {"base_model": lineage("sft")["base_model"]}, **{arm: lineage(arm) for arm in arms[1:]}},
        "samples": [sample(place, answers, kept) for place in range(count)],
        "notes": ["Held-out prompts are those that no stage has trained on. Answers are greedy.",
                  "Answers were cut at 128 tokens: 3 of 84."],
    }  # fmt: skip
    made = Report.model_validate(report | facts)
    if made.verdict and not any(d.outcome == "undecided" for m in made.metrics[:1] for d in m.differences):
        made.verdict.outcome = outcome  # type: ignore[assignment]
    return made


def undecided() -> Report:
    """Return the demo's own case: SFT helps, and between SFT and DPO one seed shows nothing."""
    text = "Between these two adapters, DPO and SFT, no difference can be shown. A gap of 10.4 points could have been."
    return compared({"base": 0.0, "sft": 0.81, "dpo": 0.75}, "undecided", text, looks=3)


def better() -> Report:
    """Return five seeds of a planned question with an answer."""
    text = "DPO is better than SFT in the share of answers that keep all rules (72 % → 84 %), over five seeds."
    return compared({"base": 0.02, "sft": 0.72, "dpo": 0.84}, "better", text, seeds=5, planned=True)


def worse() -> Report:
    """Return three seeds of which DPO has lost what SFT won."""
    text = "DPO is worse than SFT in the share of answers that keep all rules (81 % → 62 %)."
    return compared({"base": 0.0, "sft": 0.81, "dpo": 0.62}, "worse", text, seeds=3)


def many_arms() -> Report:
    """Return eight arms under ten seeds."""
    arms = {"base": 0.02, "sft": 0.72} | {
        f"beta-{beta}": 0.7 + place / 40 for place, beta in enumerate((0.01, 0.05, 0.1, 0.2, 0.5, 1.0))
    }
    return compared(arms, "better", "beta-1.0 is better than beta-0.5.", seeds=10, planned=True)


def no_worse() -> Report:
    """Return an adapter against its quantised copy, with a margin."""
    return compared(
        {"base": 0.02, "dpo": 0.81, "dpo-merged-int8": 0.80}, "no_worse", "dpo-merged-int8 is no worse than DPO.",
        seeds=3, planned=True, margins={"all_rules": 0.05},
    )  # fmt: skip


def equivalent() -> Report:
    """Return two arms that keep within the margin, under two seeds."""
    return compared(
        {"base": 0.02, "sft": 0.81, "dpo": 0.812}, "equivalent", "DPO is equivalent to SFT.", seeds=2, margins={"all_rules": 0.1}
    )  # fmt: skip


def bare() -> Report:
    """Return a comparison without checks and pairs: only the loss was measured."""
    made = compared(
        {"base": 0.0, "sft": 0.8}, "better", "SFT is better than the base in the loss of the target answers."
    )
    metric = made.metrics[2].model_copy(update={"primary": True})
    metric.differences[0].shown = True
    samples = [each.model_copy(update={"checks": {}}) for each in made.samples[:3]]
    return made.model_copy(update={"metrics": [metric], "samples": samples, "question": None})


def hostile() -> Report:
    """Return long names, and answers that are long, foreign, written from right to left, or markup."""
    long = "an-arm-with-a-very-long-name-and-no-space-in-it-at-all"
    html = "<script>document.title = 'attacked'</script><b>bold</b> &amp; <img src=x onerror=alert(1)> " + "W" * 300
    texts = {
        "base": "مرحبا بالعالم، هذا جواب طويل. שלום עולם. " * 12,
        "sft": "这是一个很长的回答，没有空格也没有换行符，所以必须在任意位置换行。" * 12,
        long: html,
    }
    made = compared({"base": 0.1, "sft": 0.5, long: 0.52}, "undecided", "Nothing can be shown.", answers=texts)
    prompt = "Напиши ответ. " * 60
    return made.model_copy(update={"samples": [each.model_copy(update={"prompt": prompt}) for each in made.samples]})


REPORTS = {
    each.__name__: each for each in (undecided, better, worse, many_arms, no_worse, equivalent, bare, hostile)
}  # fmt: skip

if __name__ == "__main__":
    for name, make in REPORTS.items():
        Path(sys.argv[1], f"{name}.html").write_text(render_report(make()), encoding="utf-8")
