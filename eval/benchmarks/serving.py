"""Measure the server under load, and the plain server beside it: serial `generate` behind a lock.

Starts both as a user would, one after the other, and drives them over loopback with the same requests to all models. With
--llama-cpp, llama.cpp comes beside them, on our GGUF of the default adapter alone. Reads the configuration's `serve`
section; writes a table to the terminal and, with --out, JSON. Needs requirements.txt.

    python -m eval.benchmarks.serving --config configs/demo.yaml
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import httpx
import psutil

from eval.benchmarks.llama_server import check_installed
from eval.benchmarks.running_server import listening, started
from scripts.common.artifacts import (
    SPLIT_KEY_VERSION,
    BaseModelFacts,
    Manifest,
    Parent,
    RunFacts,
    SplitFacts,
    write_manifest,
)
from scripts.common.config import add_config_arguments, load_config
from scripts.common.errors import UserError, entry_point
from scripts.common.machine import available_cores
from scripts.common.paths import ROOT
from scripts.common.run import set_up_logging
from scripts.common.schema import Config, Dpo, Lora

log = logging.getLogger(__name__)

MODELS = ("base", "sft", "dpo")
SERVERS = {"engine": "serve.fastapi_server:app", "plain": "eval.benchmarks.plain_server:app"}


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--requests", type=int, default=16, help="requests that arrive at once (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length of the answers (default: %(default)s)")
    parser.add_argument(
        "--random-adapters", action="store_true",
        help="use two adapters with random weights instead of trained ones; the speed is the same",
    )  # fmt: skip
    parser.add_argument(
        "--arrivals", type=int, metavar="N",
        help="measure instead how far N prompts of 256 tokens that arrive hold up as many running requests",
    )  # fmt: skip
    parser.add_argument(
        "--llama-cpp", choices=("f16", "q8_0"), metavar="TYPE",
        help="measure llama.cpp beside them, on our export as f16 or q8_0; needs `pip install xllamacpp`",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="also write the figures as JSON")
    return parser


@dataclass
class Answer:
    """What the client saw of one request, in seconds since it was sent."""

    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""

    @property
    def first(self) -> float:
        return self.arrivals[0] if self.arrivals else float("nan")


@dataclass
class Load:
    """One round of requests."""

    seconds: float
    answers: list[Answer]
    health: list[float]

    @property
    def tokens_per_second(self) -> float:
        return sum(answer.tokens for answer in self.answers) / self.seconds


def save_random_adapter(
    folder: Path, base: Path, stage: str, lora: Lora, seed: int, scale: float, parent: Parent | None = None
) -> Path:
    """Save an adapter whose weights are random and not zero, with everything a trained one brings."""
    import torch
    from transformers import AutoModelForCausalLM

    from scripts.dataset.chat_format import template_sha256, tokenizer_sha256
    from scripts.model.adapter import add_lora
    from scripts.model.base import load_tokenizer
    from scripts.model.fingerprint import base_fingerprint

    torch.manual_seed(seed)
    wrapped = add_lora(AutoModelForCausalLM.from_pretrained(base), lora, str(base))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, scale)
    wrapped.save_pretrained(folder)
    tokenizer = load_tokenizer(base)
    tokenizer.save_pretrained(folder)
    manifest = Manifest(
        stage=stage,
        base_model=BaseModelFacts(id=str(base), revision=None, fingerprint=base_fingerprint(base)),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        chat_template_sha256=template_sha256(tokenizer),
        parent=parent,
        datasets=[],
        split=SplitFacts(
            seed=0, validation_ratio=0.49, test_ratio=0.5, key_version=SPLIT_KEY_VERSION
        ),  # trained on nothing
        config=Config(lora=lora, dpo=Dpo(beta=0.2)).model_dump(mode="json"),
        mlflow=RunFacts(run_id=None),
        metrics={},
    )
    write_manifest(folder, manifest)
    return folder


def server_config(config: Config, folder: Path, random_adapters: bool) -> Path:
    """Write the configuration of both servers: base, sft and dpo under these names."""
    from scripts.model.find import find_model

    if random_adapters:
        base = find_model(config.base_model_id, config.base_model_revision)
        sft = save_random_adapter(folder / "sft", base, "sft", config.lora, 1, 0.01)
        dpo = save_random_adapter(folder / "dpo", base, "dpo", config.lora, 2, 0.01)
        adapters = {"sft": str(sft), "dpo": str(dpo)}
    else:
        adapters = {
            "sft": config.serve.adapters.get("sft", config.sft.output_dir),
            "dpo": config.serve.adapter_path or "",
        }
        for name, path in adapters.items():
            if not Path(path).is_dir():
                raise UserError(f"{path}: no {name} adapter is there. Train it, or measure with --random-adapters.")
    tree = config.model_dump(mode="json")
    tree["serve"] |= {"adapter_path": adapters["dpo"], "adapters": adapters}
    tree["tracking"]["mlflow_tracking_uri"] = f"sqlite:///{folder}/mlflow.db"
    written = folder / "config.yaml"
    written.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return written


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Send one streaming request and note when each event came; one with messages goes to OpenAI's route."""
    answer, begin = Answer(), time.monotonic()
    route = "/v1/chat/completions" if "messages" in body else "/v1/generate"
    try:
        async with client.stream("POST", route, json=body) as response:
            if response.status_code != 200:
                answer.error = f"status {response.status_code}"
                return answer
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                said = json.loads(line.removeprefix("data: "))
                if "text" in said or any(choice["delta"].get("content") for choice in said.get("choices", ())):
                    answer.arrivals.append(time.monotonic() - begin)
                answer.error = answer.error or str(said.get("error", ""))
                answer.tokens = (said.get("usage") or {}).get("completion_tokens", answer.tokens)
    except httpx.HTTPError as error:
        answer.error = type(error).__name__
    return answer


async def drive(url: str, bodies: Sequence[dict[str, Any]], watch_health: bool) -> Load:
    """Send all requests at once; ask for /health twenty times a second meanwhile."""
    limits, health = httpx.Limits(max_connections=None), []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def watch() -> None:
            while True:
                begin = time.monotonic()
                await client.get("/health")
                health.append(time.monotonic() - begin)
                await asyncio.sleep(0.05)

        watcher = asyncio.create_task(watch()) if watch_health else None
        begin = time.monotonic()
        answers = await asyncio.gather(*(ask(client, body) for body in bodies))
        seconds = time.monotonic() - begin
        if watcher:
            watcher.cancel()
    return Load(seconds, list(answers), health)


async def time_refusals(url: str, body: dict[str, Any]) -> list[float]:
    """Fill every place of the server and time a hundred refusals, one after the other."""
    limits = httpx.Limits(max_connections=None)
    seconds: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        occupying: list[asyncio.Task[Answer]] = []
        while (await client.get("/health/ready")).status_code == 200:
            occupying.append(asyncio.create_task(ask(client, body)))
            await asyncio.sleep(0)
        while len(seconds) < 100:
            begin = time.monotonic()
            if (await client.post("/v1/generate", json={**body, "stream": False})).status_code == 429:
                seconds.append(time.monotonic() - begin)
        for task in occupying:
            task.cancel()
    return seconds


def bodies_of(count: int, max_new_tokens: int) -> list[dict[str, Any]]:
    """Take real prompts from the sample data, the models in turn."""
    lines = (ROOT / "data/sft/sample_sft.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:count]]
    prompts = [
        f"{row.get('instruction', '')}\n{row.get('input', '') or ''}".strip() or "Tell me a story." for row in rows
    ]
    return [
        {
            "prompt": prompts[n % len(prompts)],
            "adapter": MODELS[n % len(MODELS)],
            "max_new_tokens": max_new_tokens,
            "stream": True,
        }
        for n in range(count)
    ]


def chats_of(bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ask the same in OpenAI's shape, of a server that has one model."""
    return [
        {
            "messages": [{"role": "user", "content": body["prompt"]}], "max_tokens": body["max_new_tokens"],
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }
        for body in bodies
    ]  # fmt: skip


@contextmanager
def llama_cpp(config: Path, kind: str) -> Iterator[tuple[str, psutil.Process, float]]:
    """Export the default adapter as GGUF and start llama.cpp on it, with as many threads, slots and tokens as our server."""
    values = load_config(str(config)).values
    folder = config.parent / "gguf"
    command = [sys.executable, "-m", "scripts.export_lora", "--config", str(config), "--out_dir", str(folder)]
    command += ["--adapter", str(values.serve.adapter_path), "--format", "gguf", "--dtype", kind]
    log.info("llama.cpp: exporting as %s", kind)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise UserError("--llama-cpp: the export failed, as it says above.")
    [file] = folder.glob("*.gguf")
    threads, serve = values.performance.threads, values.serve
    limits = (available_cores() if threads == "auto" else threads, serve.max_concurrent, serve.max_context_tokens)
    run = "import sys; from eval.benchmarks.llama_server import serve; serve(sys.argv[1], *map(int, sys.argv[2:]))"
    with listening("llama.cpp", ["-c", run, str(file), *map(str, limits)], "/health") as server:
        yield server


def measure(
    name: str, server: AbstractContextManager[tuple[str, psutil.Process, float]], bodies: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Start one server, warm it up, and measure it alone and under load."""
    count = len(bodies)
    with server as (url, process, ready_seconds):
        log.info("%s: ready after %.1f s; measuring single requests", name, ready_seconds)
        asyncio.run(drive(url, bodies[:3], False))
        alone = [asyncio.run(drive(url, [body], False)) for body in bodies[:6]]
        log.info("%s: %d requests at once", name, count)
        load = asyncio.run(drive(url, bodies, name == "engine"))
        log.info("%s: %.1f tokens/s", name, load.tokens_per_second)
        memory = process.memory_info().rss
        lag = event_loop_lag(url) if name == "engine" else None
        refusals = asyncio.run(time_refusals(url, {**bodies[0], "max_new_tokens": 256})) if name == "engine" else []
    gaps = [b - a for answer in load.answers for a, b in zip(answer.arrivals, answer.arrivals[1:], strict=False)]
    firsts = [answer.first for answer in load.answers if answer.arrivals]
    return {
        "ready_seconds": ready_seconds,
        "tokens_per_second": load.tokens_per_second,
        "tokens": sum(answer.tokens for answer in load.answers),
        "alone_tokens_per_second": sum(a.tokens for r in alone for a in r.answers) / sum(r.seconds for r in alone),
        "ttft_seconds": {f"p{p}": quantile(firsts, p) for p in (50, 95, 99)},
        "inter_token_seconds": {f"p{p}": quantile(gaps, p) for p in (50, 95, 99)},
        "errors": sum(bool(answer.error) for answer in load.answers),
        "memory_gb": memory / 1e9,
        "health_p99_seconds": quantile(load.health, 99) if load.health else None,
        "event_loop_lag_p99_at_most_seconds": lag,
        "refusal_p99_seconds": quantile(refusals, 99) if refusals else None,
    }


def measure_arrivals(config: Path, count: int) -> dict[str, float]:
    """Return the pauses between two tokens of running requests, before and while prompts of 256 tokens arrive.

    Half of the server's slots run, so that what arrives is read at once. A pause ends with a later event of its stream.
    """
    slots = json.loads(config.read_text(encoding="utf-8"))["serve"]["max_concurrent"]
    with started(SERVERS["engine"], config) as (url, _, _):
        return asyncio.run(_drive_arrivals(url, min(count, slots // 2), count))


async def _drive_arrivals(url: str, running: int, arriving: int) -> dict[str, float]:
    common: dict[str, Any] = {"raw": True, "stream": True, "temperature": 1.0}
    moments: list[list[float]] = []  # of the tokens of each answer
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:

        async def run(number: int) -> None:
            body = {**common, "prompt": f"{number} words", "max_new_tokens": 700, "adapter": MODELS[number % 3]}
            while True:  # an answer may end by itself; another then takes its place
                times: list[float] = []
                moments.append(times)
                async with client.stream("POST", "/v1/generate", json={**body, "seed": len(moments)}) as response:
                    response.raise_for_status()
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            times.append(time.monotonic())

        tasks = [asyncio.create_task(run(number)) for number in range(running)]
        while sum(map(len, moments)) < 60 * running:  # tokens without arrivals
            await asyncio.sleep(0.05)
            for task in tasks:
                if task.done():  # only by an error
                    task.result()
        begin = time.monotonic()
        bodies = [
            {**common, "prompt": f"{number}" + " word" * 254, "max_new_tokens": 1, "adapter": MODELS[number % 3]}
            for number in range(arriving)
        ]
        await asyncio.gather(*(ask(client, body) for body in bodies))
        end = time.monotonic()
        await asyncio.sleep(1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    pairs = [pair for one in moments for pair in pairwise(one[5:])]
    alone = [after - before for before, after in pairs if after < begin]
    among = [after - before for before, after in pairs if after > begin and before < end]
    return {
        "running": running, "arriving": arriving, "arrivals_read_in_seconds": end - begin,
        "alone_p50": quantile(alone, 50), "alone_p99": quantile(alone, 99),
        "arrivals_p50": quantile(among, 50), "arrivals_p99": quantile(among, 99),
        "p99_over_p50": quantile(among, 99) / quantile(alone, 50),
    }  # fmt: skip


def quantile(values: Sequence[float], percent: int) -> float:
    """Return a percentile."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def event_loop_lag(url: str) -> float:
    """Read the bucket that holds the 99th percentile of the event loop's lag since the start."""
    pattern = re.compile(r'serve_event_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)')
    buckets = [(float(le), float(count)) for le, count in pattern.findall(httpx.get(f"{url}/metrics").text)]
    return next(le for le, count in buckets if count >= 0.99 * buckets[-1][1])


def table(results: dict[str, dict[str, Any]]) -> str:
    """Write the figures of all servers beside each other, and how many times another's each of ours is."""
    others = [name for name in results if name != "engine"]
    rows = [f"| | engine | {' | '.join(f'{name} | ratio' for name in others)} |", "|---" * (2 + 2 * len(others)) + "|"]
    for key, value in results["engine"].items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, ours in parts:
            cells = [_shown(ours)]
            for name in others:
                theirs = results[name][key][part] if part else results[name][key]
                cells += [_shown(theirs), f"{ours / theirs:.2f}" if ours and theirs else ""]
            rows.append(f"| {key} {part} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _shown(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure the servers and show the table."""
    arguments = build_parser().parse_args(argv)
    if arguments.llama_cpp:
        check_installed()
    config = load_config(arguments.config, arguments.overrides).values
    set_up_logging()
    with tempfile.TemporaryDirectory() as folder:
        path = server_config(config, Path(folder), arguments.random_adapters)
        if arguments.arrivals:
            found = measure_arrivals(path, arguments.arrivals)
            sys.stdout.write("".join(f"{name}: {value:.3g}\n" for name, value in found.items()))
            return 0
        bodies = bodies_of(arguments.requests, arguments.max_new_tokens)
        results = {name: measure(name, started(application, path), bodies) for name, application in SERVERS.items()}
        if arguments.llama_cpp:
            results["llama.cpp"] = measure("llama.cpp", llama_cpp(path, arguments.llama_cpp), chats_of(bodies))
    sys.stdout.write(table(results) + "\n")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
