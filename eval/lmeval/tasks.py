"""Build lm-eval's tasks: held-out records, multiple-choice files and task YAMLs of one's own, or its own by name."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from eval.checks import passes
from eval.held_out import HeldOut, leave_out_unfit
from scripts.common.artifacts import DatasetFacts, sha256_file, sha256_json
from scripts.common.config import LoadedConfig
from scripts.common.errors import UserError, listing
from scripts.common.paths import ROOT, portable_path
from scripts.common.schema import Check
from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.files import BadRow, read_rows
from scripts.dataset.records import with_system_prompt
from scripts.dataset.rendering import render_completion, render_prompt

log = logging.getLogger(__name__)

TEMPLATES = ROOT / "eval" / "tasks"
DOMAIN = "domain"
WITH_FILE = ("multiple_choice", "continuation")
OFFLINE = (
    "Without a network work: domain (your held-out records), multiple_choice=FILE and continuation=FILE "
    "(JSONL with query, choices and gold), and a task YAML whose data files are local."
)
FIELDS = "wanted query (text), choices (a list of at least two texts) and gold (index of the right one)"

Ids = dict[Any, list[int]]


@dataclass(frozen=True)
class Plan:
    """A task that can be run: what lm-eval builds it from, and what we know beyond that."""

    name: str
    spec: str | dict[str, Any]
    ids: Ids | None = None  # our own token ids, where a rendered prompt must not be tokenised again
    data: DatasetFacts | None = None
    titles: dict[str, str] = field(default_factory=dict)


def check_names(names: Sequence[str]) -> None:
    """Refuse at once what can be seen without loading lm-eval."""
    seen: set[str] = set()
    for name in names:
        if not name.strip():
            raise UserError("--task: found an empty name, wanted a task.")
        template, given, file = name.partition("=")
        if name in WITH_FILE or (given and not file):
            raise UserError(f"--task {name}: which file? Give it as --task {template}=FILE.jsonl.")
        if given and template not in WITH_FILE:
            raise UserError(f"--task {name}: found the template `{template}`, wanted {' or '.join(WITH_FILE)}.")
        path = Path(file or name)
        if (given or path.suffix in (".yaml", ".yml")) and not path.is_file():
            raise UserError(f"--task {name}: {path}: no such file. Correct the path.")
        title = _task_name(path) if given else name
        if title in seen:
            raise UserError(f"--task {name}: two tasks would be called `{title}`. Rename one file, or run them apart.")
        seen.add(title)


def _task_name(path: Path) -> str:
    return re.sub(r"\W+", "_", path.stem)


def build_plans(
    names: Sequence[str], config: LoadedConfig, held_out: HeldOut | None, chat: ChatFormat
) -> tuple[list[Plan], Any]:
    """Return every task asked for with the manager that loads them, and prove that their data are there.

    Raises: UserError naming the task, what is wrong with it or its data, and what works without a network.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)  # it explains custom_dataset at every task
    plans: list[Plan] = []
    for name in names:
        template, given, file = name.partition("=")
        if given:
            plans.append(_plan_file(template, Path(file)))
        elif name == DOMAIN and held_out:
            plans += _plan_domain(config, held_out, chat)
        else:
            plans.append(Plan(_task_name(Path(name)) if name.endswith((".yaml", ".yml")) else name, name))
    named = [plan.spec for plan in plans if isinstance(plan.spec, str)]
    by_name = [name for name in named if not name.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_defaults=bool(by_name))  # its index of thousands of tasks takes seconds
    for name in by_name:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [DOMAIN, *WITH_FILE, *manager.all_tasks], 3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"--task {name}: lm-eval knows no such task.{hint}\n{OFFLINE}")
    for name in named:
        _prove_loadable(manager, name)
    return plans, manager


def _prove_loadable(manager: Any, name: str) -> None:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each of five tries twice
    log.info("looking for the data of %s", name)
    try:
        manager.load([name])
    except Exception as error:  # data sets, hubs and YAMLs fail in dozens of ways
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if name.endswith((".yaml", ".yml")):
            raise UserError(
                f"--task {name}: lm-eval cannot build this task ({reason}).\nIts own examples of the format stand in "
                f"{TEMPLATES.name}/ beside eval/run_lmeval.py; data files are found from the working folder."
            ) from None
        raise UserError(
            f"--task {name}: its data are neither in the local cache nor could the Hub be reached ({reason}).\n{OFFLINE}"
        ) from None


def _template(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((TEMPLATES / f"{name}.yaml").read_text(encoding="utf-8")))


def _with_rows(spec: dict[str, Any], name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Give a task its rows in memory, so that nobody's data is copied into a dataset cache."""
    import datasets

    return {**spec, "task": name, "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)}}


def _plan_file(template: str, path: Path) -> Plan:
    rows, problems = [], []
    for where, row in read_rows(path):
        if isinstance(row, BadRow):
            problems.append(str(row))
        elif problem := _problem_of(row):
            problems.append(f"{where}: {problem}")
        else:
            rows.append({"query": row["query"].strip(), "choices": row["choices"], "gold": row["gold"]})
    if problems:
        raise UserError(listing(f"{path}: {len(problems)} rows cannot be used", problems, f"Fix them: {FIELDS}."))
    if not rows:
        raise UserError(f"{path}: the file holds no record; {FIELDS}.")
    name = _task_name(path)
    data = DatasetFacts(path=portable_path(path), sha256=sha256_file(path), items=len(rows))
    return Plan(name, _with_rows(_template(template), name, rows), data=data)


def _problem_of(row: Any) -> str | None:
    if not isinstance(row, dict) or not {"query", "choices", "gold"} <= row.keys():
        return f"found {', '.join(row) if isinstance(row, dict) else type(row).__name__}; {FIELDS}"
    query, choices, gold = row["query"], row["choices"], row["gold"]
    if not isinstance(query, str) or not query.strip():
        return "query: wanted a text that is not empty"
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        return "choices: wanted a list of at least two texts, none of them empty"
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        return f"gold: found {gold!r}, wanted the index of the right choice, 0 to {len(choices) - 1}"
    return None


def _plan_domain(config: LoadedConfig, held_out: HeldOut, chat: ChatFormat) -> list[Plan]:
    """Make two tasks of the held-out records, rendered once by the function that training and serving use."""
    values = config.values
    rows: list[dict[str, Any]] = []
    ids: Ids = {}
    held_out = leave_out_unfit(held_out, chat, None, values.data)
    for question in held_out.questions(values.eval.max_prompts, values.data.split_seed):
        prompt = with_system_prompt(question.prompt, chat.system_prompt)
        prompt_ids = render_prompt(chat, prompt)
        answer_ids = render_completion(chat, prompt, prompt_ids, question.target)
        text = chat.tokenizer.decode(prompt_ids)
        ids[text], ids[text, question.target] = prompt_ids, answer_ids
        rows.append(
            {
                "source": question.source,
                "prompt": text,
                "asked": question.text,
                "reference": question.target,  # named so in eval/tasks
                "tokens": len(answer_ids),
            }
        )
    data = DatasetFacts(path=f"held out of {' and '.join(held_out.files)}", sha256=sha256_json(rows), items=len(rows))
    checks = {f"check_{number}": check for number, check in enumerate(values.eval.checks, 1)}
    target_task = _template("domain_reference") | {"process_results": score_target}
    answers_task = _template("domain_answers") | {"process_results": partial(score_answer, checks)}
    answers_task["metric_list"] += [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in (["checks_passed", *checks] if checks else [])
    ]
    # Each answer ends by itself, at a stop: lm-eval's stop texts end a batch only as a whole.
    answers_task["generation_kwargs"] = {
        "until": [],
        "do_sample": False,
        "max_gen_toks": values.eval.max_new_tokens,
    }
    titles = {"checks_passed": "checks passed per answer", **{name: check.name for name, check in checks.items()}}
    return [
        Plan("domain_reference", _with_rows(target_task, "domain_reference", rows), ids, data),
        Plan("domain_answers", _with_rows(answers_task, "domain_answers", rows), ids, data, titles),
    ]


def score_target(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """Return the log-probability of a target answer with its number of tokens."""
    ((logps, _),) = results
    return {"perplexity": (logps, doc["tokens"])}


def score_answer(checks: dict[str, Check], doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Hold a generated answer against the target answer and the rules of `eval.checks`."""
    text, target = results[0].strip(), doc["reference"]
    passed = {name: float(passes(check, text, doc["asked"], target)) for name, check in checks.items()}
    overall = {"checks_passed": mean(passed.values())} if passed else {}
    return {"exact_match": float(text == target.strip()), **overall, **passed}
