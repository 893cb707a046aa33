"""Measure the base and every member of every arm on the same held-out prompts and pairs: one model in memory at a time."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.arms import Arm, Member, find_parent, find_references, members_of
from eval.checks import passes
from eval.held_out import HeldOut, Question
from scripts.common.artifacts import sha256_json
from scripts.common.machine import apply_machine, choose_machine
from scripts.common.schema import Check, Config
from scripts.common.stages import BASE, TRAINING_STAGES
from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.records import Preference, with_system_prompt
from scripts.dataset.rendering import Rendered, render_completion, render_pair, render_prompt
from scripts.model.adapter import load_adapter, switched_to
from scripts.model.base import load_base
from scripts.model.generation import Answer, Health, generate_and_score, health
from scripts.model.int8 import check_int8, keep_in_int8
from scripts.model.scoring import AnswerScore, mean_kl

log = logging.getLogger(__name__)

INT8 = "eval.int8"
KL_PROMPTS = 32  # their answers hold thousands of tokens, which fix a mean well enough
# What other models start from: how far a model has moved is measured from these.
ORIGINS = (BASE, *dict.fromkeys(stage.continues for stage in TRAINING_STAGES.values() if stage.continues))


@dataclass
class Measured:
    """Everything measured of one model, item by item."""

    targets: list[AnswerScore]
    chosen: list[AnswerScore]
    rejected: list[AnswerScore]
    answers: list[Answer]
    checks: list[dict[str, bool]]  # by the name of the check
    health: Health
    kl: dict[str, float] = field(default_factory=dict)

    def prefers_chosen(self) -> list[bool]:
        """Decide per pair whether the chosen answer is likelier per token."""
        return [a.logps / a.tokens > b.logps / b.tokens for a, b in zip(self.chosen, self.rejected, strict=True)]

    def chosen_is_longer(self) -> list[bool]:
        """Decide per pair whether the chosen answer has more tokens: the baseline `longer wins`."""
        return [a.tokens > b.tokens for a, b in zip(self.chosen, self.rejected, strict=True)]

    def rewards_chosen(self, reference: Measured) -> list[bool]:
        """Decide per pair whether this model raised the chosen answer more than the rejected one, against a reference."""
        gains = zip(self.chosen, self.rejected, reference.chosen, reference.rejected, strict=True)
        return [(a.logps - c.logps) > (b.logps - d.logps) for a, b, c, d in gains]


class Items:
    """The held-out items as the token ids that one model reads."""

    def __init__(self, chat: ChatFormat, questions: Sequence[Question], preferences: Sequence[Preference]) -> None:
        asked = [with_system_prompt(question.prompt, chat.system_prompt) for question in questions]
        self.prompts = [render_prompt(chat, prompt) for prompt in asked]
        self.targets = [
            Rendered.of(ids, render_completion(chat, prompt, ids, question.target))
            for ids, prompt, question in zip(self.prompts, asked, questions, strict=True)
        ]
        pairs = [
            render_pair(chat, replace(pair, prompt=tuple(with_system_prompt(pair.prompt, chat.system_prompt))))
            for pair in preferences
        ]
        self.chosen = [pair.side(pair.chosen_ids) for pair in pairs]
        self.rejected = [pair.side(pair.rejected_ids) for pair in pairs]

    def own_rows(self, answers: Sequence[Answer]) -> list[Rendered]:
        """Return a model's own answers, evenly spread over the prompts, as rows whose answer tokens are scored."""
        pairs = [pair for pair in zip(self.prompts, answers, strict=True) if pair[1].token_ids]
        step = max(1, len(pairs) // KL_PROMPTS)
        return [Rendered.of(prompt, answer.token_ids) for prompt, answer in pairs[::step]]


class Prepared:
    """The held-out questions and pairs, rendered once for all models that read them alike."""

    def __init__(self, tokenizer: Any, held_out: HeldOut, config: Config) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.questions, self.pairs = held_out.questions(config.eval.max_prompts, config.data.split_seed), held_out.pairs
        self._items: dict[str, Items] = {}

    def items(self, chat: ChatFormat) -> Items:
        """Return the items as a model of this format reads them."""
        key = sha256_json(chat.facts())
        if key not in self._items:
            self._items[key] = Items(chat, self.questions, self.pairs)
        return self._items[key]


@dataclass(frozen=True)
class Loaded:
    """Models that are in memory together: by label the adapter that makes each, None being the model without one."""

    model: Any
    adapters: Mapping[str, str | None]

    def switched_to(self, label: str) -> AbstractContextManager[None]:
        """Compute as one of them."""
        if not hasattr(self.model, "peft_config"):
            return nullcontext()
        return switched_to(self.model, self.adapters[label])


def measure_arms(arms: Sequence[Arm], base_folder: Path, prepared: Prepared) -> dict[str, list[Measured]]:
    """Measure the base, and each arm's members in their order.

    The adapters of one seed are loaded beside each other, with those they continue, so that memory does not grow with
    the number of seeds. Each merged model is loaded by itself, and arms in int8 without the full base, so how far those
    have moved from the base is not measured.
    """
    if any(member.int8 for member in members_of(arms)):
        check_int8(prepared.config, choose_machine(prepared.config), INT8)
    chats = {member.label: ChatFormat.of(prepared.tokenizer, member.manifest) for member in members_of(arms)}
    chats[BASE] = next(iter(chats.values()))
    measured: dict[str, Measured] = {}
    for group in _loaded_together(arms):
        measured |= _measure_group(group, arms, base_folder, prepared, chats, with_base=not measured)
        gc.collect()  # a model refers to itself, so it would stay in memory beside the next
    return {BASE: [measured[BASE]], **{arm.name: [measured[each.label] for each in arm.members] for arm in arms}}


def _measure_group(
    group: Sequence[Member],
    arms: Sequence[Arm],
    base_folder: Path,
    prepared: Prepared,
    chats: Mapping[str, ChatFormat],
    *,
    with_base: bool,
) -> dict[str, Measured]:
    """Measure models that are in memory together until this returns."""
    alone = {member.label: member.is_merged or member.int8 for member in group}
    parents = {member.label: None if alone[member.label] else find_parent(member, arms) for member in group}
    origins: dict[str, dict[str, str]] = {BASE: {}} if with_base else {}
    for member in group:
        parent = parents[member.label]
        origins[member.label] = {} if alone[member.label] else {BASE: BASE}
        origins[member.label] |= {str(parent.stage): parent.label} if parent else {}
    loaded = load_models(base_folder, [*group, *filter(None, parents.values())], prepared.config)
    return measure_models(loaded, origins, prepared, chats)


def measured_references(
    arms: Sequence[Arm], measured: Mapping[str, Sequence[Measured]]
) -> dict[str, tuple[str, list[Measured]]]:
    """Return by arm what each of its members was trained against, and the name of that arm; nothing where one is not here."""
    found, by_label = find_references(arms), {BASE: (BASE, measured[BASE][0])}
    for arm in arms:
        by_label |= {m.label: (arm.name, each) for m, each in zip(arm.members, measured[arm.name], strict=True)}
    references = {}
    for arm in arms:
        labels = [label for member in arm.members if (label := found[member.label])]
        if len(labels) == len(arm.members):
            name = " or ".join(dict.fromkeys(by_label[label][0] for label in labels))
            references[arm.name] = (name, [by_label[label][1] for label in labels])
    return references


def _loaded_together(arms: Sequence[Arm]) -> Iterator[list[Member]]:
    """Yield the adapters of each seed, the base among the first of them, those in int8, then each merged model."""
    adapters = [member for member in members_of(arms) if not member.is_merged]
    full = [member for member in adapters if not member.int8]
    for seed in dict.fromkeys(member.seed for member in full) or [None]:
        yield [member for member in full if member.seed == seed]
    for seed in dict.fromkeys(member.seed for member in adapters if member.int8):
        yield [member for member in adapters if member.int8 and member.seed == seed]
    yield from ([member] for member in members_of(arms) if member.is_merged)


def load_models(base_folder: Path, members: Sequence[Member], config: Config) -> Loaded:
    """Load the base with these adapters beside each other, or the one merged model. It was proven that they fit."""
    machine = choose_machine(config)
    apply_machine(machine)
    int8 = bool(members) and members[0].int8
    if members and members[0].is_merged:
        model = load_base(members[0].folder, config, machine).eval()
        if int8:
            keep_in_int8(model, INT8)
        return Loaded(model, {members[0].label: None})
    model = load_base(base_folder, config, machine)
    adapters: dict[str, str | None] = {BASE: None}
    for member in members:
        if member.label not in adapters:
            adapters[member.label] = f"adapter_{len(adapters)}"  # PEFT takes no name with a dot
            model = load_adapter(model, member.folder, name=str(adapters[member.label]))
    if int8:
        keep_in_int8(model.get_base_model(), INT8)
    elif len(adapters) > 1 and config.performance.fast_path:
        from scripts.speed.speed_up import speed_up

        speed_up(model)
    return Loaded(model.eval(), adapters)


def measure_models(
    loaded: Loaded,
    origins: Mapping[str, Mapping[str, str]],
    prepared: Prepared,
    chats: Mapping[str, ChatFormat],
) -> dict[str, Measured]:
    """Measure loaded models by label, each in its own format.

    `origins` names for each what it started from: the label of that model, by the name under which the KL to it stands.
    """
    measured: dict[str, Measured] = {}
    for number, label in enumerate(origins, 1):
        log.info("measuring %s (%d of %d)", label, number, len(origins))
        with loaded.switched_to(label):
            measured[label] = _measure(loaded.model, prepared.items(chats[label]), prepared)
    for label, started_from in origins.items():
        rows = prepared.items(chats[label]).own_rows(measured[label].answers)
        measured[label].kl = _kl_to_origins(loaded, label, started_from, rows, prepared)
    return measured


def _measure(model: Any, items: Items, prepared: Prepared) -> Measured:
    settings = prepared.config.eval
    # A pair's chosen answer is also the target answer of its prompt: score no row twice.
    rows = {tuple(row.input_ids): row for row in (*items.targets, *items.chosen, *items.rejected)}
    with tqdm(total=len(items.prompts), desc="answers", unit="answer", leave=False, disable=None) as bar:
        answers, found = generate_and_score(
            model,
            prepared.tokenizer,
            items.prompts,
            list(rows.values()),
            settings.max_new_tokens,
            settings.batch_size,
            bar.update,
        )
    scores = dict(zip(rows, found, strict=True))
    targets, chosen, rejected = (
        [scores[tuple(row.input_ids)] for row in side] for side in (items.targets, items.chosen, items.rejected)
    )
    checks = [
        apply_checks(settings.checks, answer.text, question)
        for answer, question in zip(answers, prepared.questions, strict=True)
    ]
    return Measured(targets, chosen, rejected, answers, checks, health(answers))


def _kl_to_origins(
    loaded: Loaded, label: str, origins: Mapping[str, str], rows: list[Rendered], prepared: Prepared
) -> dict[str, float]:
    if not rows or not origins:
        return {}
    log.info("measuring %s: KL to %s", label, " and ".join(origins.values()))
    with loaded.switched_to(label):
        switches = {name: partial(loaded.switched_to, other) for name, other in origins.items()}
        return mean_kl(loaded.model, rows, prepared.tokenizer.pad_token_id, switches)


def apply_checks(checks: Sequence[Check], text: str, question: Question) -> dict[str, bool]:
    """Hold one answer against every check."""
    return {check.name: passes(check, text, question.text, question.target) for check in checks}
