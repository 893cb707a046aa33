"""Say before anything is trained how small a difference the held-out items and seeds can show, and what a smaller one takes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from eval.held_out import HeldOut, read_held_out
from eval.question import ask
from eval.statistics import degrees_of_freedom, visible_gap
from eval.verdict import METHODS, Question, speaks_of
from scripts.common.config import LoadedConfig
from scripts.common.errors import UserError
from scripts.common.question import ALL_RULES, LOSS, PREFERENCE, REWARD, arm_names, planned_arms
from scripts.common.schema import Config
from scripts.common.stages import BASE, planned_stages
from scripts.dataset.files import find_file
from scripts.dataset.records import sources_of
from scripts.dataset.split import cluster_of

log = logging.getLogger(__name__)

PLAIN_NAMES = {
    ALL_RULES: "answers that keep all rules",
    PREFERENCE: "pairs whose better answer is likelier",
    LOSS: "loss on held-out answers",
}
MOST_SEEDS = 100
MOST_ITEMS = 1_000_000


@dataclass(frozen=True)
class Assumption:
    """How far a difference scatters, in the unit of its measure, before anything is known of it."""

    item_sd: float  # between single items, under one seed
    seed_sd: float
    unit: str


# A difference of shares whose items are 0 or 1: one in five differs between two models.
SHARE = Assumption(item_sd=0.45, seed_sd=0.02, unit="share")
ASSUMED = {LOSS: Assumption(item_sd=0.30, seed_sd=0.02, unit="nats per token")}
LASTING = 1 / 3  # of an item's variance, what every seed shows alike
WITHIN = 0.3  # correlation of the items of one prompt


@dataclass(frozen=True)
class Size:
    """How much there is to measure a difference on."""

    items: int
    clusters: int
    seeds: int

    def smallest_gap(self, assumed: Assumption, alpha: float) -> float:
        """Return the smallest true difference that would be shown in four of five such comparisons."""
        per = self.items / self.clusters
        of_one = assumed.item_sd**2 * (1 + (per - 1) * WITHIN) / per / self.clusters
        if self.seeds == 1:
            return visible_gap(math.sqrt(of_one), max(self.clusters - 1, 1), alpha)
        lasting, of_both = LASTING * of_one, (1 - LASTING) * of_one / self.seeds
        of_seeds = assumed.seed_sd**2 / self.seeds + of_both
        df = degrees_of_freedom(of_seeds, lasting, of_both, self.seeds, self.clusters)
        return visible_gap(math.sqrt(of_seeds + lasting), df, alpha)

    def with_items(self, items: int) -> Size:
        """Return a size with so many items, as many per prompt as before."""
        return replace(self, items=items, clusters=max(1, round(items * self.clusters / self.items)))


def plan_of(config: LoadedConfig, seeds: int | None = None) -> list[str]:
    """Say what a comparison of this configuration can show, over the data that are here already.

    `seeds` are those of a study; without, they are counted in `eval.plan` or in the folders of `eval.models`.
    Raises: UserError when the data cannot be read, or nothing of them is held out.
    """
    return describe_sizes(*sizes_of(config, seeds))


def sizes_of(config: LoadedConfig, seeds: int | None = None) -> tuple[dict[str, Size], Question]:
    """Return what there is to measure a comparison on, and what it asks.

    Raises: UserError as `plan_of`.
    """
    values = config.values
    held_out = read_held_out(config, stages_with_data(values))
    # A planned question may name an arm that comes from elsewhere; otherwise it is about what this configuration trains.
    question = ask(values, arm_names(values) if values.eval.plan.question else planned_arms(values), held_out)
    models = values.eval.models or {}
    counts = [len(given) for arm in (question.a, question.b) if isinstance(given := models.get(arm), list)]
    return _sizes(held_out, values, seeds or values.eval.plan.seeds or shared_seeds(counts), question), question


def shared_seeds(counts: Sequence[int]) -> int:
    """Return over how many seeds two arms of so many members are compared; one member stands beside all of the other's."""
    return min((count for count in counts if count > 1), default=1)


def show_smallest_gaps(config: LoadedConfig, seeds: int | None = None) -> None:
    """Print what a dry run can say about the comparison, or why that is nothing: it refuses no training."""
    try:
        lines = plan_of(config, seeds)
    except UserError as error:
        lines = [f"nothing yet: {error}"]
    log_smallest_gaps(lines)


def log_smallest_gaps(lines: Sequence[str]) -> None:
    """Print what a comparison can show."""
    log.info("%s", "\n  ".join(["what the comparison can show", *lines]))


def stages_with_data(values: Config) -> list[str]:
    """Return the stages whose datasets are here or on the Hub: pairs are often collected after SFT."""
    found = []
    for stage in planned_stages(values):
        key = f"{stage.name}.dataset_path"
        try:
            for source in sources_of(getattr(values, stage.name).dataset_path):
                find_file(source.path, key)
        except UserError:
            continue
        found.append(stage.name)
    return found


def needed_items(size: Size, gap: float, assumed: Assumption, alpha: float) -> int | None:
    """Return the fewest items, more than there are, that would show a gap; None where no number would."""
    few, enough = size.items, size.items * 2
    while size.with_items(enough).smallest_gap(assumed, alpha) > gap:
        few, enough = enough, enough * 2
        if enough > MOST_ITEMS:
            return None
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (middle, enough) if size.with_items(middle).smallest_gap(assumed, alpha) > gap else (few, middle)
    return enough


def needed_seeds(size: Size, gap: float, assumed: Assumption, alpha: float) -> int | None:
    """Return the fewest seeds, more than there are, that would show a gap; None where no number would."""
    more = range(max(size.seeds + 1, METHODS), MOST_SEEDS)
    return next((n for n in more if replace(size, seeds=n).smallest_gap(assumed, alpha) <= gap), None)


def plan_lines(held_out: HeldOut, values: Config, seeds: int, question: Question) -> list[str]:
    """Say for each measure in question what these items and seeds can show, and what half of it would take.

    The last line states what was assumed.
    """
    return describe_sizes(_sizes(held_out, values, seeds, question), question)


def _sizes(held_out: HeldOut, values: Config, seeds: int, question: Question) -> dict[str, Size]:
    prompts = held_out.questions(values.eval.max_prompts, values.data.split_seed)
    pairs = [cluster_of(pair) for pair in held_out.pairs]
    return {
        name: Size(len(pairs), len({*pairs}), seeds)
        if name in (PREFERENCE, REWARD)
        else Size(len(prompts), len({each.cluster for each in prompts}), seeds)
        for name in question.measures
    }


def describe_sizes(sizes: Mapping[str, Size], question: Question) -> list[str]:
    """Say for each measure what so much can show, what half of it would take, and what was assumed."""
    alpha = question.alpha / max(len(sizes), 1)
    lines: list[str] = []
    assumptions: dict[Assumption, list[str]] = {}
    for name, size in sizes.items():
        assumed, seeds = ASSUMED.get(name, SHARE), size.seeds
        whom = speaks_of(seeds, (question.a, question.b)) + (
            " and the base" if BASE in (question.a, question.b) else ""
        )
        gap = size.smallest_gap(assumed, alpha)
        of = f" of {size.clusters} prompts" if size.clusters < size.items else ""
        lines.append(
            f"{name}: {size.items} items{of}, {seeds} seed{'s' * (seeds > 1)}: shows a difference between {whom} of "
            f"{_amount(gap, assumed.unit)}; half of that takes {_needed(size, gap / 2, assumed, alpha)}"
        )
        assumptions.setdefault(assumed, []).append(name)
    scatter = "; ".join(
        f"{' and '.join(names)} {'scatters' if len(names) == 1 else 'scatter'} by {_amount(assumed.item_sd, assumed.unit)} between items and "
        f"{_amount(assumed.seed_sd, assumed.unit)} between seeds"
        for assumed, names in assumptions.items()
    )
    if lines:
        lines.append(
            f"assumed: {scatter} (standard deviations). In four of five comparisons, at {alpha:g} for each measure"
        )
    return lines


def describe_plainly(sizes: Mapping[str, Size], question: Question) -> list[str]:
    """Say the same to somebody who has not seen a comparison yet."""
    alpha = question.alpha / max(len(sizes), 1)
    lines = []
    for name, size in sizes.items():
        assumed, what = ASSUMED.get(name, SHARE), PLAIN_NAMES.get(name, name)
        gap = size.smallest_gap(assumed, alpha)
        items = needed_items(size, gap / 2, assumed, alpha)
        half = f"; half of that takes about {items:,}" if items else ""
        held = "pairs" if name in (PREFERENCE, REWARD) else "questions"
        lines.append(f"{what}: {size.items} test {held} can show a difference of {_amount(gap, assumed.unit)}{half}")
    return lines


def _needed(size: Size, gap: float, assumed: Assumption, alpha: float) -> str:
    ways = []
    if items := needed_items(size, gap, assumed, alpha):
        ways.append(f"about {items:,} items")
    if size.seeds > 1 and (seeds := needed_seeds(size, gap, assumed, alpha)):
        ways.append(f"{seeds} seeds")
    return " or ".join(ways) or "more items and more seeds"


def _amount(gap: float, unit: str) -> str:
    return f"{100 * gap:.0f} points" if unit == "share" else f"{gap:.2f} {unit}"
