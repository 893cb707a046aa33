"""What is probably a mistake in data or settings, each with the key to change; nothing where all is well."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from scripts.common.schema import Config, Training
from scripts.dataset.records import Preference, Record, count_duplicates
from scripts.dataset.split import Split

FEWEST_STEPS = 20  # with fewer, a learning rate is still warming up, and one odd batch decides
FEWEST_TESTED = 30  # 30 records show gaps of about 30 points at best
MOST_TESTED = 0.25  # of the records: what is held out more is missed in training
FEWEST_COMPARED = 20  # answers, below which a minority is no more than two or three
SMALLEST_MINORITY = 0.05
WIDEST_SPREAD = 10  # of lengths: a tenth of the answers is that much longer than another tenth
ENDS = ".!?…。！？؟।:;)]}\"'”’»`*|>"
# The commonest words of a language, which hardly occur in another.
WORDS = {
    "English": "the and is of to that with for you this are was it",
    "German": "der und ist nicht das ein eine mit für auf den dem sie",
    "French": "le les est une des et pour dans vous que pas du",
    "Spanish": "el los una es por para con las del que y usted",
    "Italian": "il che è per una di non con gli della sono",
    "Portuguese": "o não uma para com os que é do da em você",
    "Dutch": "de het een en van niet zijn voor dat met op",
}
_COMMON = {language: frozenset(words.split()) for language, words in WORDS.items()}


def advise_on_records(
    stage: str, split: Split, records: Sequence[Record | Preference], *, tested: bool = True
) -> list[str]:
    """Say what in the records of a stage will make training or the report worse than it could be.

    Without `tested` nothing is said of a missing test side, as where another stage's prompts are the test.
    """
    advice = []
    if duplicates := count_duplicates(records):
        advice.append(
            f"{duplicates} records repeat an earlier one word for word and weigh that much more; remove them from {stage}.dataset_path"
        )
    if not split.test and tested:
        advice.append("no record is for the test, so nothing will tell whether training helped; see data.test_ratio")
    elif 0 < len(split.test) < FEWEST_TESTED:
        # Near-duplicates are left out of a side that they belong to, so the ratio has to make up for them.
        total = sum(map(len, (split.train, split.validation, split.test, split.near_duplicates)))
        chosen = len(split.test) + sum(each.side == "test" for each in split.near_duplicates)
        ratio = min(MOST_TESTED, math.ceil(100 * FEWEST_TESTED / len(split.test) * chosen / total) / 100)
        larger = f", or data.test_ratio: {ratio:g}" if chosen < MOST_TESTED * total * 0.8 else ""
        advice.append(
            f"only {len(split.test)} records are for the test, so the report can show only large differences; "
            f"more records help most{larger}"
        )
    return advice + describe_styles([record.answer for record in split.train], f"{stage}.dataset_path")


def advise_on_run(config: Config, stage: str, rows: Sequence[Any], processes: int = 1) -> list[str]:
    """Say what in the settings does not fit the rendered rows of the training side."""
    return [*advise_on_steps(getattr(config, stage), stage, len(rows), processes), *_describe_cut(config, rows)]


def advise_on_steps(section: Training, stage: str, rows: int, processes: int = 1) -> list[str]:
    """Say that so few optimizer steps hardly change a model."""
    from scripts.training.plan import total_steps

    steps = total_steps(section, rows, processes)
    if steps >= FEWEST_STEPS:
        return []
    few, one = f"only {steps} optimizer step{'s' * (steps > 1)}", "s" * (steps == 1)
    if (section.trainer.get("max_steps") or -1) > 0:  # type: ignore[operator]
        return [f"{few}, which hardly change{one} a model: {stage}.trainer.max_steps says so"]
    epochs = math.ceil(section.num_train_epochs * FEWEST_STEPS / steps)
    return [
        f"{few}, which hardly change{one} a model; raise {stage}.num_train_epochs (to {epochs}, say) or lower "
        f"{stage}.per_device_train_batch_size"
    ]


def _describe_cut(config: Config, rows: Sequence[Any]) -> list[str]:
    """Say that the report will cut answers as long as those that were trained."""
    limit = config.eval.max_new_tokens
    lengths = [row.trained_tokens // row.sequences for row in rows]
    cut = sum(length > limit for length in lengths)
    if cut < SMALLEST_MINORITY * len(lengths):
        return []
    return [
        f"{cut} of {len(lengths)} answers are longer than eval.max_new_tokens ({limit}), so the comparison would cut such answers; "
        f"raise it to {max(lengths)}"
    ]


def describe_styles(answers: Sequence[str], key: str) -> list[str]:
    """Say that a part of the answers is written otherwise than the rest, which teaches both styles at once."""
    if len(answers) < FEWEST_COMPARED:
        return []
    advice = []
    for what, kinds in (("end", map(_ending, answers)), ("are in", map(language_of, answers))):
        counts = Counter(kind for kind in kinds if kind)
        for kind, count in counts.most_common()[1:]:
            if count >= SMALLEST_MINORITY * counts.total():
                most = counts.most_common(1)[0][0]
                advice.append(
                    f"{count} of {counts.total()} answers {what} {kind}, most {what} {most}: the model learns both; make them alike in {key}"
                )
    lengths = sorted(len(answer.split()) for answer in answers)
    short, long = lengths[len(lengths) // 10], lengths[-1 - len(lengths) // 10]
    if long > WIDEST_SPREAD * max(short, 3):
        advice.append(
            f"answers differ much in length, a tenth has {short} words or fewer and a tenth {long} or more: the model learns no "
            f"length; make them alike in {key}, or say in the prompts which length is wanted"
        )
    return advice


def _ending(answer: str) -> str:
    last = answer.rstrip()[-1:]
    return "with punctuation" if last in ENDS or unicodedata.category(last) == "So" else "without punctuation"


def language_of(answer: str) -> str | None:
    """Name the language of an answer, or its script where that is not Latin; None where it is too short to tell."""
    letters = [character for character in answer if character.isalpha()]
    scripts = Counter(unicodedata.name(letter, "?").split()[0] for letter in letters[:500])
    if not scripts:
        return None
    script = scripts.most_common(1)[0][0]
    if script != "LATIN":
        return {"CJK": "Chinese characters", "HIRAGANA": "Japanese"}.get(script, f"{script.capitalize()} letters")
    words = Counter(re.findall(r"[^\W\d_]+", answer.casefold()))
    scores = {language: sum(words[word] for word in common) for language, common in _COMMON.items()}
    best, second = sorted(scores.values(), reverse=True)[:2]
    clear = best >= 3 and best >= 2 * second
    return max(scores, key=lambda language: scores[language]) if clear else None
