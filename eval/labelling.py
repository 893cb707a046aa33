"""Say which of a model's samples is preferred: by the rules of `eval.checks`, or by the endpoint of `eval.judge`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, islice
from pathlib import Path

from eval.checks import check_rules, passes
from eval.judging.endpoint import Endpoint, ask_endpoint
from eval.judging.votes import Contest, Question, VotesFile
from scripts.common.artifacts import sha256_json
from scripts.common.errors import UserError
from scripts.common.schema import Config
from scripts.pairs.choosing import Candidate, Labelled, Option, by_closeness, near_identical, usable
from scripts.pairs.prompts import Prompt, text_of
from scripts.pairs.sampling import Sample

SIDES = ("one", "other")  # what a judge is asked about has no better names


def check_labeller(config: Config, by: str) -> None:
    """Refuse what could not label anything, before hours are spent on samples.

    Raises: UserError naming the keys that are missing.
    """
    if by == "judge":
        with Endpoint(config):
            return
    if by == "checks" and not config.eval.checks:
        raise UserError(
            "eval.checks: there is no rule, so no sample keeps more of them than another. Write some (configs/demo.yaml has "
            "six), or prefer your own answers: --by demonstrations"
        )
    check_rules(config.eval.checks)


def label_by_checks(
    config: Config, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]], counts: Counter[str]
) -> list[Labelled]:
    """Prefer samples that keep more rules to those that keep fewer; the widest gaps first, then those of like length."""
    labelled = []
    for prompt, of_prompt in zip(prompts, samples, strict=True):
        asked = "\n".join(message["content"] for message in prompt.messages if message["role"] != "assistant")
        options = usable(of_prompt, counts)
        kept = {
            option: sum(passes(check, option.text, asked, prompt.answer) for check in config.eval.checks)
            for option in options
        }
        candidates = [
            Candidate(a, b, f"checks, {kept[a]} kept against {kept[b]}", kept[a] - kept[b])
            for a, b in by_closeness(options, options)
            if kept[a] > kept[b]
        ]
        candidates.sort(key=lambda candidate: -candidate.worth)
        labelled.append(Labelled(prompt.source, prompt.messages, prompt.group, prompt.seed, candidates))
    return labelled


def label_by_judge(
    config: Config,
    prompts: Sequence[Prompt],
    samples: Sequence[Sequence[Sample]],
    counts: Counter[str],
    votes: Path,
) -> list[Labelled]:
    """Ask the endpoint about some pairs of each prompt, in both orders; it prefers what it names in both.

    Each reply goes to the file of votes at once, so that the same command continues after an interruption.
    """
    asked: list[tuple[Prompt, list[tuple[Option, Option]]]] = []
    for prompt, of_prompt in zip(prompts, samples, strict=True):
        asked.append((prompt, _apart(usable(of_prompt, counts), config.pairs.max_per_prompt)))
    contest = _contest_of(asked, config.eval.judge.criteria)
    if not contest.questions:
        return [Labelled(prompt.source, prompt.messages, prompt.group, prompt.seed, []) for prompt, _ in asked]
    file = VotesFile(votes)
    ask_endpoint(config, contest, file)
    with Endpoint(config) as endpoint:
        judge = endpoint.name
    given: dict[int, list[str | None]] = {}
    for vote in file.votes.values():
        if (vote.comparison, vote.judge) == (contest.comparison, judge):
            given.setdefault(vote.sample, []).append(vote.winner)
    labelled, number = [], 0
    for prompt, pairs in asked:
        candidates = []
        for pair in pairs:
            number += 1
            winners = given.get(number, [])
            counts["pairs that the judge was asked about"] += 1
            if len(winners) == len(SIDES) and winners[0] and winners[0] == winners[1]:
                chosen, rejected = pair if winners[0] == SIDES[0] else pair[::-1]
                candidates.append(Candidate(chosen, rejected, f"judge, {judge}"))
            elif len(winners) == len(SIDES):
                counts["pairs that the judge finds equal or judges by their order"] += 1
            else:
                counts["pairs to which the judge gave no readable answer"] += 1
        labelled.append(Labelled(prompt.source, prompt.messages, prompt.group, prompt.seed, candidates))
    return labelled


def _apart(options: Sequence[Option], most: int) -> list[tuple[Option, Option]]:
    """Return pairs to ask about, those that share no sample first."""
    pairs = [pair for pair in combinations(options, 2) if not near_identical(pair[0].text, pair[1].text)]
    chosen: list[tuple[Option, Option]] = []
    used: set[Option] = set()
    for pair in pairs:
        if not used & set(pair):
            chosen.append(pair)
            used |= set(pair)
    return list(islice([*chosen, *(pair for pair in pairs if pair not in chosen)], most))


def _contest_of(asked: Sequence[tuple[Prompt, Sequence[tuple[Option, Option]]]], criteria: str) -> Contest:
    """Number the pairs from 1 through all prompts."""
    texts = [[text_of(prompt.messages), one.text, other.text] for prompt, pairs in asked for one, other in pairs]
    questions = tuple(
        Question(number, prompt, {SIDES[0]: one, SIDES[1]: other}, SIDES[0])
        for number, (prompt, one, other) in enumerate(texts, 1)
    )
    comparison = sha256_json({"models": SIDES, "criteria": criteria, "texts": texts})
    return Contest(SIDES, criteria, comparison, questions, 0)
