"""Measure how much faster many sampled answers are drawn together than by one `generate` call each.

Prompts come from --sft-data, the adapter is random: the speed is the same. Both sides draw at temperature 0.8 with top-p 0.95;
only tokens that are drawn count. Needs requirements.txt.

    python -m eval.benchmarks.sampling --model models/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.common.errors import UserError, entry_point
from scripts.common.machine import apply_machine, choose_machine, hardware, seed_everything
from scripts.common.schema import Config, Data, Lora, Performance

TEMPERATURE, TOP_P = 0.8, 0.95


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="models/smollm2-135m-instruct", help="base model (default: %(default)s)")
    add("--sft-data", default="data/sft/sample_sft.jsonl", metavar="FILE", help="default: %(default)s")
    add("--prompts", type=int, default=200, help="default: %(default)s")
    add("--samples", type=int, default=4, help="answers to each prompt (default: %(default)s)")
    add("--tokens", type=int, default=80, help="longest answer (default: %(default)s)")
    add("--batch", type=int, default=64, help="answers drawn together (default: %(default)s)")
    add("--single", type=int, default=20, help="answers drawn one by one (default: %(default)s)")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of the base weights (default: %(default)s)")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Draw both ways and print how long a token took."""
    arguments = build_parser().parse_args(argv)
    performance = Performance(dtype=arguments.dtype)
    config = Config(base_model_id=arguments.model, offline=True, performance=performance)

    from scripts.dataset.chat_format import ChatFormat
    from scripts.dataset.records import load_datasets, parse_record
    from scripts.dataset.rendering import render_prompt
    from scripts.model.adapter import add_lora
    from scripts.model.base import load_base, load_tokenizer
    from scripts.model.find import find_model

    machine, folder = choose_machine(config), find_model(arguments.model)
    apply_machine(machine)
    seed_everything(0)
    tokenizer = load_tokenizer(folder)
    files = load_datasets(arguments.sft_data, parse_record, Data(), "--sft-data")
    records = [record for file in files for record in file.records][: arguments.prompts]
    if len(records) < arguments.prompts:
        raise UserError(
            f"--sft-data: found {len(records)} records, wanted {arguments.prompts}. Give more, or lower --prompts."
        )
    chat = ChatFormat(tokenizer)
    prompts = [render_prompt(chat, record.prompt) for record in records]
    model = add_lora(load_base(folder, config, machine), Lora(init="gaussian"), arguments.model).eval()
    one_by_one = single_seconds(model, tokenizer, prompts[: arguments.single], arguments.tokens)
    together, tokens = joint_seconds(model, tokenizer, prompts, arguments)
    sys.stdout.write(
        f"{hardware()}, {machine.threads} threads, {str(machine.dtype).removeprefix('torch.')}\n"
        f"{len(prompts)} prompts x {arguments.samples}, {tokens} tokens in {together:.0f} s: {1000 * together / tokens:.2f} ms a token\n"
        f"one generate call per answer: {1000 * one_by_one:.1f} ms a token, over {arguments.single} answers\n"
        f"{one_by_one * tokens / together:.1f} times as fast\n"
    )
    return 0


def single_seconds(model: Any, tokenizer: Any, prompts: Sequence[list[int]], tokens: int) -> float:
    """Return the seconds a token takes where each answer is a call of the library's `generate`."""
    import torch

    drawn, started = 0, time.monotonic()
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=TEMPERATURE, top_p=TOP_P,
            top_k=0, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        drawn += output.shape[1] - len(prompt)
    return (time.monotonic() - started) / drawn


def joint_seconds(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], arguments: argparse.Namespace
) -> tuple[float, int]:
    """Return the seconds in which all answers are drawn by our sampler, and how many tokens they have."""
    from scripts.model.generation import Sampling, sample_answers
    from scripts.speed.speed_up import speed_up

    speed_up(model)
    sampling = Sampling(arguments.tokens, temperature=TEMPERATURE, top_p=TOP_P, n=arguments.samples)
    started = time.monotonic()
    answers = sample_answers(model, tokenizer, prompts, sampling, range(len(prompts)), batch_size=arguments.batch)
    seconds = time.monotonic() - started
    return seconds, sum(len(answer.token_ids) + answer.ended for each in answers for answer in each)


if __name__ == "__main__":
    sys.exit(main())
