"""Make preference pairs of a model's own answers, for DPO.

Samples answers to the prompts of `sft.dataset_path` from the adapter `--from`, those of the training side only, and prefers
your own answers to them (demonstrations), those that keep more of `eval.checks` (checks), or what the endpoint of
`eval.judge` says (judge); or reads what people said of samples (votes). Writes the pairs and <out>.manifest.json. A killed
run continues where it stood when the same command is given again. Needs requirements.txt.

    python -m scripts.make_pairs --config configs/demo.yaml --by demonstrations
    python -m scripts.make_pairs --config configs/demo.yaml --by checks --from outputs/dpo_adapter --out outputs/pairs_2.jsonl
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.common.artifacts import Manifest, SplitFacts, locked_run_dir, read_manifest, sha256_file
from scripts.common.config import LoadedConfig, add_config_arguments, load_config
from scripts.common.errors import Interrupted, UserError, entry_point, listing
from scripts.common.lineage import check_split
from scripts.common.machine import prepare_environment
from scripts.common.pairs_manifest import PairsManifest, SourceFacts
from scripts.common.run import set_up_logging
from scripts.common.schema import Config
from scripts.common.signals import trapped_signals
from scripts.common.stages import ADAPTER_STAGES

if TYPE_CHECKING:
    from scripts.dataset.chat_format import ChatFormat
    from scripts.pairs.choosing import Labelled, Pair
    from scripts.pairs.prompts import Prompt
    from scripts.pairs.sampling import Sample

log = logging.getLogger(__name__)

LABELLERS = ("demonstrations", "checks", "judge", "votes")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    add = parser.add_argument
    add("--by", required=True, choices=LABELLERS, help="who says which of two answers is preferred")
    add("--from", metavar="FOLDER", dest="adapter", help="adapter that answers (default: sft.output_dir)")
    add("--votes", type=Path, metavar="FILE", help="what people said of that adapter's samples, for --by votes")
    add(
        "--out", type=Path, default=Path("outputs/pairs.jsonl"), metavar="FILE", help="the pairs (default: %(default)s)"
    )
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Sample, label, filter and write."""
    arguments = build_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    values, by, out = config.values, arguments.by, arguments.out
    if (by == "votes") != (arguments.votes is not None):
        raise UserError(f"--by {by}: --votes FILE belongs to --by votes, and to no other.")
    adapter = arguments.adapter or values.sft.output_dir
    manifest = read_manifest(adapter, stages=ADAPTER_STAGES)
    check_split(adapter, manifest, values.data, sides=("validation", "test"))
    prepare_environment(values)
    out.parent.mkdir(parents=True, exist_ok=True)
    with trapped_signals(), locked_run_dir(out) as run_dir:
        set_up_logging(run_dir / "log.txt")

        from eval.labelling import check_labeller
        from scripts.pairs.choosing import choose_pairs
        from scripts.pairs.prompts import read_prompts
        from scripts.pairs.publishing import check_deidentified, check_out, find_descent, write_pairs
        from scripts.pairs.votes import label_by_votes, read_votes

        check_out(out, run_dir, adapter, manifest)
        check_labeller(values, by)
        counts: Counter[str] = Counter()
        if by == "votes":
            votes = read_votes(arguments.votes, manifest.sha256, adapter)
            sources = [(str(arguments.votes), sha256_file(arguments.votes))]
        else:
            files, prompts = read_prompts(values)
            sources = [(file.path, file.sha256) for file in files]
        descent = find_descent(sources, adapter, manifest)
        if values.deid.required:
            check_deidentified(descent)
        base_folder, chat = find_base(values, adapter, manifest)
        if by == "votes":
            labelled = label_by_votes(votes, values, counts)
        else:
            samples = sample(values, base_folder, adapter, manifest, chat, prompts, run_dir)
            labelled = label(values, by, prompts, samples, counts, run_dir)
        pairs = choose_pairs(labelled, values.pairs, chat, values.dpo.max_length, counts)
        check_any(pairs, counts)
        write_pairs(
            out, run_dir, pairs, describe(values, by, adapter, manifest, descent, counts | {"pairs": len(pairs)})
        )
    summarise(config, out, pairs, counts)
    return 0


def find_base(config: Config, adapter: str, manifest: Manifest) -> tuple[Path, ChatFormat]:
    """Return the base that the adapter was proven to fit on, and the format in which it answers."""
    from scripts.dataset.chat_format import ChatFormat
    from scripts.model.adapter import check_adapter_fits
    from scripts.model.base import load_tokenizer
    from scripts.model.find import find_model

    base_folder = find_model(config.base_model_id, config.base_model_revision)
    tokenizer = load_tokenizer(base_folder)
    check_adapter_fits(adapter, base_folder, tokenizer)
    return base_folder, ChatFormat.of(tokenizer, manifest)


def sample(
    config: Config, base_folder: Path, adapter: str, manifest: Manifest, chat: ChatFormat, prompts: Sequence[Prompt], run_dir: Path
) -> list[list[Sample]]:  # fmt: skip
    """Return the answers to each prompt; what an earlier run of the same plan has sampled is taken from its file."""
    from scripts.common.machine import choose_machine
    from scripts.pairs.sampling import SamplesFile, plan_of, sample_prompts

    machine = choose_machine(config)
    file = SamplesFile(run_dir, plan_of(config, machine, manifest, prompts))
    log.info("%d prompts, %d answers to each", len(prompts), config.pairs.samples_per_prompt)
    try:
        return sample_prompts(config, machine, base_folder, adapter, chat, prompts, file)
    except Interrupted:
        log.warning("stopped; whole batches are kept, and the same command continues")
        raise


def label(
    config: Config, by: str, prompts: Sequence[Prompt], samples: list[list[Sample]], counts: Counter[str], run_dir: Path
) -> list[Labelled]:
    """Say for each prompt what is preferred to what."""
    from eval.labelling import label_by_checks, label_by_judge
    from scripts.pairs.labelling import label_by_demonstrations

    counts["prompts"], counts["samples"] = len(prompts), sum(map(len, samples))
    if by == "judge":
        return label_by_judge(config, prompts, samples, counts, run_dir / "judge.jsonl")
    if by == "checks":
        return label_by_checks(config, prompts, samples, counts)
    return label_by_demonstrations(prompts, samples, counts)


def check_any(pairs: Sequence[Pair], counts: Counter[str]) -> None:
    """Refuse to write an empty file.

    Raises: UserError with what each filter has left out.
    """
    if not pairs:
        fix = (
            "What was sampled and judged is kept. Where answers are alike, raise pairs.temperature or pairs.samples_per_prompt; "
            "where they are cut, pairs.max_new_tokens."
        )
        raise UserError(listing("no pair is left, so nothing was written", in_words(counts), fix))


def in_words(counts: Counter[str]) -> list[str]:
    """Write what was counted, line by line."""
    return [f"{count} {what}" for what, count in counts.items() if count]


def describe(
    config: Config, by: str, adapter: str, manifest: Manifest, descent: list[SourceFacts], counts: dict[str, int]
) -> PairsManifest:
    """Put the facts of the manifest together, but for what is known of the file once it is written."""
    return PairsManifest(
        sha256="",
        by=by,
        base_model=manifest.base_model,
        parent=manifest.as_parent(adapter),
        seed=config.seed,
        split=SplitFacts.of(config.data),
        descends_from=descent,
        counts=counts,
        pairs=[],
        config=config.model_dump(mode="json"),
    )


def summarise(config: LoadedConfig, out: Path, pairs: Sequence[Pair], counts: Counter[str]) -> None:
    """Say in a few lines what came out and what to do next."""
    from scripts.pairs.choosing import describe_lengths

    lines = [
        f"{len(pairs)} pairs; {describe_lengths(pairs)}",
        *in_words(counts),
        f"pairs  {out}",
        f"next   python -m scripts.train_dpo {config.flags} --set dpo.dataset_path={out}",
    ]
    log.info("%s", "\n  ".join(lines))


if __name__ == "__main__":
    sys.exit(main())
