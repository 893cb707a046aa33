"""Answer a file of requests with the models that the server would serve, without a server.

Each line is a body of /v1/generate or, with `messages`, of /v1/chat/completions; it may have an `id`, which comes back.
Answers are written in the order of the lines. Run again, the command answers what is still missing.
Needs requirements.txt.

    python -m serve.batch questions.jsonl --out answers.jsonl --config configs/demo.yaml
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import os
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pydantic import ValidationError

from scripts.common.config import add_config_arguments, load_config
from scripts.common.errors import UserError, did_you_mean, entry_point, listing
from scripts.common.run import set_up_logging
from serve.errors import ServingError
from serve.openai_schemas import ChatRequest
from serve.schemas import GenerateRequest
from serve.settings import settle_machine

if TYPE_CHECKING:
    from serve.jobs import Job
    from serve.service import Service

log = logging.getLogger(__name__)

EXIT_BAD_LINES = 3
CLIENT = "batch"
RETRY_SECONDS = 0.1


@dataclass(frozen=True)
class Line:
    """One request of the file."""

    number: int
    id: Any
    body: GenerateRequest | ChatRequest
    sha256: str  # of its text


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", metavar="IN.jsonl", help="requests, one JSON object a line")
    parser.add_argument("--out", required=True, metavar="OUT.jsonl", help="answers; those it has are kept")
    add_config_arguments(parser)
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Read and check the lines, load the models, and answer what is not answered yet."""
    arguments = build_parser().parse_args(argv)
    set_up_logging()
    config = load_config(arguments.config, arguments.overrides).values
    requests, out = Path(arguments.requests), Path(arguments.out)
    lines, bad = read_lines(requests)
    answered = read_answers(out, lines, requests)
    missing = [line for line in lines if line.number not in answered]
    log.info("%d requests, %d answered before, %d lines cannot be read", len(lines), len(answered), len(bad))
    if missing:
        machine = settle_machine(config)
        from serve.service import Service

        service = Service(config, machine, [])
        check_models(service, answered.values(), out)
        bad += asyncio.run(answer(service, missing, out, requests))
    if bad:
        log.error(listing(f"{len(bad)} lines have no answer:", bad, "Correct them and run the command again."))
    log.info("answers  %s", out)
    return EXIT_BAD_LINES if bad else 0


def read_lines(path: Path) -> tuple[list[Line], list[str]]:
    """Return the requests of a file, and what is wrong with the lines that are none.

    Raises: UserError when the file cannot be read.
    """
    try:
        texts = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.{did_you_mean(path)}") from None
    lines, bad = [], []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            lines.append(_parsed(number, text))
        except (ValueError, RecursionError) as error:
            bad.append(f"{path}:{number}: {_reason(error)}")
    return lines, bad


def _parsed(number: int, text: bytes) -> Line:
    row = json.loads(text)
    if not isinstance(row, dict):
        raise ValueError("found no JSON object")
    request_id = row.pop("id", None)
    body: GenerateRequest | ChatRequest
    body = ChatRequest.model_validate(row) if "messages" in row else GenerateRequest.model_validate(row)
    return Line(number, request_id, body, hashlib.sha256(text.strip()).hexdigest())


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        return f"{field}: {first['msg']}" if field else first["msg"]
    return "is not valid JSON" if isinstance(error, json.JSONDecodeError | RecursionError) else str(error)


def read_answers(out: Path, lines: Sequence[Line], requests: Path) -> dict[int, dict[str, Any]]:
    """Return the answers that are there, by their line, after cutting off one that was not written whole.

    Raises: UserError when the answers are to other requests.
    """
    if not out.exists():
        return {}
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    known = {line.number: line.sha256 for line in lines}
    answered = {}
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(text)
            same = known.get(record["line"]) == record["request_sha256"]
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(
                f"{out}:{number}: is no answer to a line of {requests}, which may have changed. "
                "Choose another --out, or remove that file."
            )
        answered[record["line"]] = record
    if len(whole) < len(content):
        os.truncate(out, len(whole))
    return answered


def check_models(service: Service, answered: Iterable[dict[str, Any]], out: Path) -> None:
    """Refuse to put the answers of two versions of an adapter into one file."""
    for record in answered:
        model = service.models.served.get(record["model"])
        if model and model.sha256 != record["adapter_sha256"]:
            raise UserError(
                f"{out}: was begun with another version of the adapter `{model.name}`. Choose another --out, or remove that file."
            )


async def answer(service: Service, lines: Sequence[Line], out: Path, requests: Path) -> list[str]:
    """Write an answer to each line, in their order; return what is wrong with those that have none."""
    await service.start()
    bad: list[str] = []
    waiting: deque[tuple[Line, asyncio.Task[dict[str, Any]]]] = deque()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8", newline="\n") as file:

            async def write_first() -> None:
                line, task = waiting.popleft()
                try:
                    record = await task
                except ServingError as error:
                    bad.append(f"{requests}:{line.number}: {error.message}")
                    return
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()

            for line in lines:
                waiting.append((line, asyncio.create_task(_answer_one(service, line))))
                if len(waiting) >= 2 * service.engine.slots:  # enough to keep every slot busy
                    await write_first()
            while waiting:
                await write_first()
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}. The answers before it are kept.") from None
    finally:
        for _, task in waiting:
            task.cancel()
        await service.stop()
    return bad


async def _answer_one(service: Service, line: Line) -> dict[str, Any]:
    while True:
        try:
            jobs = await _begin(service, line.body)
            texts = [await job.text() for job in jobs]
            break
        except ServingError as error:
            if error.code not in ("queue_full", "queue_timeout"):  # here nobody hurries
                raise
            await asyncio.sleep(RETRY_SECONDS)
    model = service.models.served[jobs[0].model]
    head = {"line": line.number, "id": line.id, "model": model.name, "adapter_sha256": model.sha256}
    answers = [
        {"text": text, "finish_reason": job.finish_reason, "completion_tokens": len(job.out)}
        for text, job in zip(texts, jobs, strict=True)
    ]
    usage = {"prompt_tokens": len(jobs[0].ids), "request_sha256": line.sha256}
    return {**head, **answers[0], **({"more_answers": answers[1:]} if answers[1:] else {}), **usage}


async def _begin(service: Service, body: GenerateRequest | ChatRequest) -> list[Job]:
    from serve.openai_api import begin_chat
    from serve.routes import begin_generation

    if isinstance(body, ChatRequest):
        return await begin_chat(service, CLIENT, body)
    return await begin_generation(service, CLIENT, body)


if __name__ == "__main__":
    sys.exit(main())
