"""Ask base and adapters one question, and read their answers side by side in the terminal, without a server.

Every adapter answers that this configuration has trained so far. Without a question on the command line it asks for one,
again and again; a question may also come through a pipe. Needs requirements.txt.

    python -m serve.ask "Write the weekly update: tests are late, nobody is blocked." --config configs/demo.yaml
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.common.artifacts import read_manifest
from scripts.common.config import add_config_arguments, load_config
from scripts.common.errors import UserError, entry_point
from scripts.common.paths import portable_path, resolve
from scripts.common.run import set_up_logging
from scripts.common.schema import Config
from scripts.common.stages import BASE, SFT, TRAINING_STAGES
from serve.errors import ServingError
from serve.settings import settle_machine

if TYPE_CHECKING:
    from rich.console import Console

    from serve.jobs import Job
    from serve.service import Service

log = logging.getLogger(__name__)

CLIENT = "ask"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="*", help="what to ask; without it you are asked for it")
    add_config_arguments(parser)
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Load the models once, then answer one question after the other."""
    arguments = build_parser().parse_args(argv)
    set_up_logging()
    config = load_config(arguments.config, arguments.overrides).values
    question = " ".join(arguments.question).strip()
    if not question and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            raise UserError('found no question; wanted one: python -m serve.ask "…"')

    from rich.console import Console

    console = Console(highlight=False)
    with Console(stderr=True).status("loading base and adapters"):
        service = load_service(config)
    asyncio.run(answer_all(service, [question] if question else questions(), console))
    return 0


def questions() -> Iterator[str]:
    """Yield what is typed, line by line, until the end of input."""
    while True:
        try:
            typed = input("\nask> ").strip()
        except EOFError:
            return
        if typed:
            yield typed


def load_service(config: Config) -> Service:
    """Load what the server would load, and every adapter that is trained, with room for one question.

    Raises: UserError with what to correct.
    """
    machine = settle_machine(config)
    from serve.service import Service

    for name in ("serve", "scripts"):  # a server's operator needs to know more than who asks one question
        logging.getLogger(name).setLevel(logging.WARNING)
    config = choose_adapters(config)
    serve = config.serve
    room = 1 + len(serve.adapters) + bool(serve.adapter_path)
    service = Service(
        config.model_copy(update={"serve": serve.model_copy(update={"max_concurrent": room})}), machine, []
    )
    if list(service.models.served) == [BASE]:
        log.warning("no adapter is trained yet, so the base answers alone; first run python -m %s", SFT.script)
    return service


def choose_adapters(config: Config) -> Config:
    """Let all adapters answer that this configuration has trained, unless serve.adapter_path names another one."""
    serve = config.serve
    own = {name: resolve(getattr(config, name).output_dir).absolute() for name in TRAINING_STAGES}
    if serve.adapter_path and resolve(serve.adapter_path).absolute() not in own.values():
        return config
    named = {resolve(path).absolute() for path in serve.adapters.values()}
    found = {
        name: str(folder)
        for name, folder in own.items()
        if folder.is_dir() and folder not in named and name not in serve.adapters and is_of_base(config, folder)
    }
    adapters = {**serve.adapters, **found}
    return config.model_copy(
        update={"serve": serve.model_copy(update={"adapter_path": None, "adapters": adapters, "votes_path": None})}
    )


def is_of_base(config: Config, folder: Path) -> bool:
    """Tell whether an adapter is finished and made on the configured base; say where it is not."""
    from scripts.model.find import find_model
    from scripts.model.fingerprint import base_fingerprint

    try:
        made_on = read_manifest(folder, verify=False).base_model
    except UserError as error:
        log.warning("left out: %s", error)
        return False
    if made_on.fingerprint == base_fingerprint(find_model(config.base_model_id, config.base_model_revision)):
        return True
    log.warning("left out: %s is made on another base (%s)", portable_path(folder), made_on.id)
    return False


async def answer_all(service: Service, asked: Sequence[str] | Iterator[str], console: Console) -> None:
    """Answer one question after the other."""
    await service.start()
    try:
        answering = (
            f"{m.name} ({portable_path(m.path)})" if m.path else m.name for m in service.models.served.values()
        )
        console.print(f"answering: {', '.join(answering)}\n", soft_wrap=True, markup=False)
        for question in asked:
            await answer(service, question, console)
    finally:
        await service.stop()


async def answer(service: Service, question: str, console: Console) -> None:
    """Let all models answer in one batch, and show the answers while they grow.

    Raises: UserError when the question does not fit.
    """
    from rich.live import Live

    from scripts.common.terminal import Answers
    from serve.routes import begin_comparison
    from serve.schemas import CompareRequest
    from serve.streaming import merged

    try:
        jobs = await begin_comparison(service, CLIENT, CompareRequest(prompt=question))
        names = [job.model for job in jobs]
        texts = dict.fromkeys(names, "")
        with Live(Answers(texts), console=console, refresh_per_second=8, vertical_overflow="ellipsis") as live:
            async for number, piece in merged(jobs):
                if piece is not None:
                    texts[names[number]] += piece
            live.refresh()
        if not console.is_terminal:  # where rich ends its last line by itself
            console.line()
    except ServingError as error:
        raise UserError(f"{error.message}.") from None
    if said := describe_cut(jobs):
        log.warning("%s", said)


def describe_cut(jobs: Sequence[Job]) -> str | None:
    """Say which answers were cut, where, and what allows more; None where all ended by themselves."""
    cut = [job for job in jobs if job.finish_reason == "length"]
    if not cut:
        return None
    limit, models = max(len(job.out) for job in cut), ", ".join(job.model for job in cut)
    return f"{models}: cut at {limit} tokens; --set serve.default_max_new_tokens=… allows more"


if __name__ == "__main__":
    sys.exit(main())
