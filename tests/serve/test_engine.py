"""The engine gives the tokens that plain PEFT gives, no matter what else is in the batch."""

from __future__ import annotations

import asyncio
import random
import shutil
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.common.config import load_config
from scripts.common.machine import choose_machine
from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.model.base import load_tokenizer
from scripts.model.products import keep_ends_in_16_bits
from serve import engine as engine_module
from serve.adapters import Models, load_models
from serve.cache import CachedForward, LibraryForward, choose_forward
from serve.engine import Engine
from serve.errors import ServingError
from serve.jobs import Job
from serve.metrics import Metrics
from serve.prefixes import Prefixes
from serve.schemas import GenerateRequest
from serve.service import Prompt, Service
from serve.stacking import members
from tests.support.serving import save_adapter, save_merged_model
from tests.support.stops import FAMILIES, save_family_model

NEW = 24

Fault = Callable[[list[list[int]], Any, Any], Any]  # what is read of each row, the logits, and the forward pass


@pytest.fixture(params=[True, False], ids=["lean", "library"])
def lean(request: pytest.FixtureRequest) -> bool:
    return request.param


def generate_with_peft(base: Path, adapter: Path | None, ids: list[int], new: int) -> list[int]:
    """Return the greedy continuation by the libraries alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    x = torch.tensor([ids])
    with torch.inference_mode():
        out = model.eval().generate(
            input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=new, do_sample=False, num_beams=1,
            eos_token_id=load_tokenizer(base).eos_token_id,
        )  # fmt: skip
    return out[0, len(ids) :].tolist()


def models_of(base: Path, adapters: dict[str, Path], write_config, adapter_path: Path | None = None) -> Models:
    config = load_config(
        write_config(
            base_model_id=str(base),
            performance={"dtype": "fp32", "device": "cpu"},
            serve={
                "adapter_path": adapter_path and str(adapter_path),
                "adapters": {name: str(path) for name, path in adapters.items()},
            },
        )
    ).values
    return load_models(config, choose_machine(config))


def new_engine(models: Models, *, lean: bool = True, fault: Fault | None = None, **changes) -> Engine:
    settings: dict[str, Any] = {
        "slots": 3, "context": 128, "queue": 50, "queue_per_client": 50, "deadline_seconds": 60.0,
        "queue_timeout_seconds": 60.0, "memory_tokens": 10_000, "kept_tokens": 0,
    }  # fmt: skip
    settings |= changes
    forward = choose_forward(models, settings["slots"], settings["context"], lean)
    return Engine(models, Metrics(), Failing(forward, fault) if fault else forward, **settings)


class Failing:
    """Stand between engine and forward pass and fail where a fault of the machine would."""

    def __init__(self, forward: CachedForward, fault: Fault) -> None:
        self.forward, self.fault = forward, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self.forward, name)

    def read(self, slot: int, names: Any, tokens: Any, start: int, places: Any) -> Any:
        return self.fault(list(tokens), self.forward.read(slot, names, tokens, start, places), self.forward)

    def step(self, names: Any, tokens: Any, lengths: Any) -> Any:
        return self.fault([[token] for token in tokens], self.forward.step(names, tokens, lengths), self.forward)


async def run_jobs(engine: Engine, jobs: list[Job]) -> list[str | ServingError]:
    """Run jobs to their end and return their texts or errors; the engine sees all of them before it reads the first."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # its thread does not interrupt this one
    engine.start()
    try:
        for job in jobs:
            engine.submit(job, engine.reserve(job.client)[0])
        sys.setswitchinterval(interval)
        texts = asyncio.gather(*(job.text() for job in jobs), return_exceptions=True)
        return await asyncio.wait_for(texts, 300)  # an engine that hangs fails the test, not the whole run
    finally:
        sys.setswitchinterval(interval)
        await asyncio.to_thread(engine.stop)


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return two adapters with different ranks and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "sft": save_adapter(folder / "sft", tiny_llama, "sft", seed=1),
        "dpo": save_adapter(
            folder / "dpo", tiny_llama, "dpo", seed=2, r=7, alpha=3, target_modules=["q_proj", "down_proj"]
        ),
    }


@pytest.fixture
def models(tiny_llama: Path, adapters: dict[str, Path], write_config) -> Models:
    return models_of(tiny_llama, adapters, write_config)


@pytest.fixture(params=[8, 100])
def short_prefill(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read prompts in pieces of 8 tokens, so that short prompts are cut, too; or several prompts at once."""
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS_PER_STEP", request.param)


def random_prompts(names: list[str], vocabulary: int) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(5, vocabulary) for _ in range(draw.randrange(1, 40))] for _ in names]


def test_mixed_batches_give_the_tokens_of_plain_peft(tiny_llama, adapters, models, short_prefill, lean):
    names = ["base", "sft", "dpo", "sft", "dpo", "base", "sft", "dpo", "dpo"]
    prompts = random_prompts(names, len(models.tokenizer))
    jobs = [
        Job(ids, name, NEW - 3 * (n % 3)) for n, (ids, name) in enumerate(zip(prompts, names, strict=True))
    ]  # different lengths make rows leave and move while others run
    asyncio.run(run_jobs(new_engine(models, lean=lean), jobs))
    expected = [generate_with_peft(tiny_llama, adapters.get(job.model), job.ids, job.max_new_tokens) for job in jobs]
    assert [job.out for job in jobs] == expected
    same_prompt = [
        generate_with_peft(tiny_llama, adapters.get(name), prompts[0], NEW) for name in ("base", "sft", "dpo")
    ]
    assert len({tuple(out) for out in same_prompt}) == 3, "adapters that agree would hide a mix-up"


@pytest.mark.skipif(torch.backends.quantized.engine != "x86", reason="torch has no such kernel here")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"]], ids=str)
def test_a_base_published_in_16_bits_is_read_in_16_bits_and_says_the_same(tiny_llama, tmp_path, write_config, targets):
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(tiny_llama, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapters = {
        "sft": save_adapter(tmp_path / "sft", base, "sft", seed=1, target_modules=targets),
        "dpo": save_adapter(tmp_path / "dpo", base, "dpo", seed=2, r=7),
    }
    models = models_of(base, adapters, write_config)
    names = ["sft", "base", "dpo", "sft"]
    keep_ends_in_16_bits(models.network)
    jobs = [Job(ids, name, NEW) for ids, name in zip(random_prompts(names, 500), names, strict=True)]

    asyncio.run(run_jobs(new_engine(models), jobs))

    assert not [name for name, weight in models.network.named_parameters() if weight.ndim > 1]
    stacks = [member.stack for member in members(models.network).values()]
    assert len(stacks) == 2 * 7, "layers without an adapter are stacked, too"
    assert all(stack.packed is not None and stack.weight is None for stack in stacks)
    expected = [generate_with_peft(base, adapters.get(job.model), job.ids, job.max_new_tokens) for job in jobs]
    assert [job.out for job in jobs] == expected


def test_memory_of_rows_goes_with_the_last_of_them(models):
    forward = choose_forward(models, 3, 128, True)
    with torch.inference_mode():
        forward.read(0, ["sft"], [[5, 6, 7]], 0, [[2]])
        forward.step(["sft"], [8], [3])
    (bank,) = forward.cache.banks.values()
    kept = weakref.ref(bank)
    del bank

    forward.release(0)

    assert kept() is None
    assert forward.nbytes == 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("merged", [False, True], ids=["with adapter", "merged"])
def test_model_that_always_says_a_stop_ends_after_one_token(name, merged, tmp_path, write_config):
    family = FAMILIES[name]
    for stop in sorted(family.stops):
        folder = tmp_path / stop.strip("<|>")
        base = save_family_model(folder / "base", family, stop)
        adapter = save_adapter(folder / "sft", base, scale=0.01)
        if merged:
            models = models_of(base, {}, write_config, adapter_path=save_merged_model(folder / "merged", base, adapter))
        else:
            models = models_of(base, {"sft": adapter}, write_config)
        ids = render_prompt(ChatFormat(models.tokenizer), user_turn("hello"))
        jobs = [Job(ids, served, 8) for served in models.served]
        assert asyncio.run(run_jobs(new_engine(models), jobs)) == [""] * len(jobs)
        assert [job.out for job in jobs] == [[models.tokenizer.convert_tokens_to_ids(stop)]] * len(jobs)


def test_gpt2_is_served_too(tiny_gpt2, tmp_path, write_config, short_prefill):
    adapter = save_adapter(tmp_path / "sft", tiny_gpt2)
    models = models_of(tiny_gpt2, {"sft": adapter}, write_config)
    names = ["sft", "base", "sft", "base"]
    jobs = [Job(ids, name, 12) for ids, name in zip(random_prompts(names, len(models.tokenizer)), names, strict=True)]
    asyncio.run(run_jobs(new_engine(models), jobs))
    assert [job.out for job in jobs] == [
        generate_with_peft(tiny_gpt2, adapter if job.model == "sft" else None, job.ids, 12) for job in jobs
    ]


def test_a_score_equals_the_libraries_log_probability(tiny_llama, models, short_prefill):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    jobs = [
        Job(list(range(10, 40)), "base", 1, scored=9),
        Job([7, 8, 9], "base", 6),
        Job(list(range(50, 62)), "base", 1, scored=4),
    ]
    asyncio.run(run_jobs(new_engine(models), jobs))
    for job in jobs:
        if job.scored:
            with torch.inference_mode():
                logits = model(torch.tensor([job.ids])).logits[0].log_softmax(-1)
            places = range(len(job.ids) - job.scored, len(job.ids))
            assert job.logprob == pytest.approx(sum(float(logits[p - 1, job.ids[p]]) for p in places), abs=1e-3)
    assert jobs[1].out == generate_with_peft(tiny_llama, None, jobs[1].ids, 6), (
        "a row beside scored ones is not disturbed"
    )


def test_short_prompts_are_read_together(models):
    passes = []

    def count(tokens, logits, forward):
        passes.append(list(map(len, tokens)))
        return logits

    jobs = [Job(list(range(10, 10 + length)), "sft", 1) for length in (5, 7, 3)]
    asyncio.run(run_jobs(new_engine(models, fault=count), jobs))
    assert passes == [[5, 7, 3]]


def test_clients_take_turns(models):
    """One client's pile of requests does not keep another client waiting behind all of it."""
    jobs = [Job([10 + n], "base", 8, client="greedy") for n in range(8)] + [Job([9], "base", 8, client="modest")]
    asyncio.run(run_jobs(new_engine(models, slots=1), jobs))
    order = [job.client for job in sorted(jobs, key=lambda job: job.scheduled)]
    assert order.index("modest") <= 2


def test_seats_are_bounded_and_come_back(models):
    async def scenario() -> None:
        engine = new_engine(models, slots=1, queue=1, queue_per_client=1)
        engine.start()
        seats = engine.reserve("a", 2)
        with pytest.raises(ServingError) as refused:
            engine.reserve("b")
        assert (refused.value.status, refused.value.code) == (429, "queue_full")
        seats[0].release()
        seats[0].release()  # a second time changes nothing
        engine.reserve("b")
        assert engine.seats_taken == 2
        await asyncio.to_thread(engine.stop)

    asyncio.run(scenario())


def test_one_client_cannot_take_all_seats(models):
    async def scenario() -> None:
        engine = new_engine(models, slots=1, queue=10, queue_per_client=1)
        engine.start()
        engine.reserve("a", 2)
        with pytest.raises(ServingError, match="too many of your requests"):
            engine.reserve("a")
        assert len(engine.reserve("b", 2)) == 2
        await asyncio.to_thread(engine.stop)

    asyncio.run(scenario())


def test_limits_of_the_configuration_reach_the_engine(tiny_llama: Path, write_config):
    limits = {"max_concurrent": 3, "max_queue": 7, "max_queue_per_client": 5, "deadline_seconds": 11.0,
              "queue_timeout_seconds": 13.0, "max_context_tokens": 64, "default_max_new_tokens": 9,
              "prefix_cache_tokens": 17}  # fmt: skip
    config = load_config(write_config(base_model_id=str(tiny_llama), serve={"adapter_path": None, **limits})).values
    service = Service(config, choose_machine(config), [])
    engine = service.engine
    assert (engine.slots, engine.queue, engine.queue_per_client, engine.prefixes.limit) == (3, 7, 5, 17)
    assert (engine.deadline_seconds, engine.queue_timeout_seconds, service.context) == (11.0, 13.0, 64)

    async def ask() -> Job:
        prompt = Prompt(service.models.served["base"], lambda chat: [1, 2], 2)
        engine.start()
        try:
            [job] = await service.begin("a", [prompt], GenerateRequest(prompt="x"))
            await job.text()
        finally:
            await asyncio.to_thread(engine.stop)
        return job

    assert asyncio.run(ask()).max_new_tokens == 9


def test_presence_and_frequency_penalties_see_the_answer_and_not_the_prompt(models):
    """A token that the prompt has may come; each further time it costs more."""
    from serve.sampling import Sampling

    ids = [20, 21, 22]
    plain, once = Job(ids, "base", 12), Job(ids, "base", 12, Sampling(presence_penalty=2.0))
    often = Job(ids, "base", 12, Sampling(frequency_penalty=2.0))
    asyncio.run(run_jobs(new_engine(models), [plain, once, often]))
    assert once.out[0] == often.out[0] == plain.out[0]
    assert len(set(often.out)) >= len(set(once.out)) >= len(set(plain.out))


def test_what_one_row_measures_disturbs_no_other(tiny_llama, models):
    free, measured = Job([9, 8, 7], "sft", 12), Job([9, 8, 7], "sft", 12, top_logprobs=3, scored=2)
    asyncio.run(run_jobs(new_engine(models), [free, measured]))
    assert free.out == measured.out
    assert [token.token for token in measured.logprobs] == measured.out
    assert [token.token for token in measured.measured] == [8, 7]
    assert all(token.top[0] == (token.token, token.logprob) for token in measured.logprobs), "greedy takes the first"


def test_prompts_that_arrive_hold_a_running_row_up_for_a_few_steps_at_most(models, monkeypatch):
    """However slow reading is beside decoding, what is read between two tokens is bounded by time, not by tokens."""
    engine = new_engine(models, slots=8, context=128)
    engine._decode_seconds, engine._prefill_token_seconds = 0.02, 0.001
    engine.rows = [Job([1], "base", 1)]
    assert engine._prefill_tokens([Job([1] * 100, "base", 1)]) <= 0.02 * 3 / 0.001
    engine._prefill_token_seconds = 0.1
    assert 0 < engine._prefill_tokens([Job([1] * 100, "base", 1)]) <= engine_module.LEAST_PREFILL_TOKENS
    engine.rows = []
    assert engine._prefill_tokens([Job([1] * 100, "base", 1)]) >= 256, "nobody waits"


def test_a_burst_is_read_in_pieces_between_tokens(models, monkeypatch):
    """A row that runs gets a token after every piece, and never has to wait for a whole burst."""
    monkeypatch.setattr(engine_module, "PREFILL_DECODE_STEPS", 0.0)
    passes = []

    def count(tokens, logits, forward):
        passes.append(list(map(len, tokens)))
        return logits

    running = Job([5, 6], "base", 90)
    burst = [Job([30 + n] * 60, "sft", 1) for n in range(4)]

    async def scenario() -> None:
        engine = new_engine(models, fault=count, slots=8)
        engine.start()
        engine.submit(running, engine.reserve("a")[0])
        while len(running.out) < 3:
            await asyncio.sleep(0.001)
        for job in burst:
            engine.submit(job, engine.reserve("b")[0])
        await asyncio.gather(*(job.text() for job in [running, *burst]))
        await asyncio.to_thread(engine.stop)

    asyncio.run(scenario())
    pieces = [index for index, rows in enumerate(passes) if max(rows) > 1][1:]
    assert all(sum(passes[index]) <= engine_module.LEAST_PREFILL_TOKENS for index in pieces)
    assert all(passes[index + 1] == [1] for index in pieces[:-1]), "after each piece the running row gets its token"


def healthy(models: Models, job: Job) -> list[int]:
    """Return the tokens the job gets when nothing fails."""
    again = Job(job.ids, job.model, job.max_new_tokens)
    asyncio.run(run_jobs(new_engine(models), [again]))
    return again.out


def three_jobs() -> list[Job]:
    return [Job([20 + n] * (8 - 3 * n), name, 10) for n, name in enumerate(("base", "sft", "dpo"))]


@pytest.mark.parametrize("width", [8, 1], ids=["prefill", "decode"])
def test_nan_in_one_row_ends_that_row_alone(models, width, lean):
    def fault(tokens, logits, forward):
        if len(tokens) == 3 and len(tokens[0]) == width:
            logits[1][:] = float("nan")
            # The next request in this slot must not see it.
            library = isinstance(forward, LibraryForward)
            states = forward.cache.values[0][1] if library else forward.cache.save(1, 5 if width > 1 else 6)
            states[:] = float("nan")
        return logits

    jobs = three_jobs()
    results = asyncio.run(run_jobs(new_engine(models, lean=lean, fault=fault), jobs))
    failed = [result for result in results if isinstance(result, ServingError)]
    assert [(error.status, error.code) for error in failed] == [(500, "generation_failed")]
    for job, result in zip(jobs, results, strict=True):
        if not isinstance(result, ServingError):
            assert job.out == healthy(models, job)


def test_an_exception_in_a_prefill_ends_that_request_alone(models, lean):
    def fault(tokens, logits, forward):
        if any(len(row) > 1 and 21 in row for row in tokens):
            raise RuntimeError("a kernel failed")
        return logits

    jobs = three_jobs()
    results = asyncio.run(run_jobs(new_engine(models, lean=lean, fault=fault), jobs))
    assert [isinstance(result, ServingError) for result in results] == [False, True, False]
    assert [job.out == healthy(models, job) for job in jobs] == [True, False, True]


def test_out_of_memory_in_decode_puts_the_newest_row_back(models, lean):
    happened = []

    def fault(tokens, logits, forward):
        if len(tokens) == 3 and len(tokens[0]) == 1 and not happened:
            happened.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits

    jobs = three_jobs()
    asyncio.run(run_jobs(new_engine(models, lean=lean, fault=fault), jobs))
    assert happened
    assert [job.retries for job in jobs].count(1) == 1
    assert all(job.out == healthy(models, job) for job in jobs), "a row that was put back continues where it stopped"


def test_lasting_lack_of_memory_is_reported_and_the_engine_lives(models):
    def fault(tokens, logits, forward):
        if len(tokens[0]) > 4:
            raise MemoryError
        return logits

    long, short = Job(list(range(10, 20)), "base", 4), Job([11, 12], "base", 4)
    results = asyncio.run(run_jobs(new_engine(models, fault=fault), [long, short]))
    assert (results[0].status, results[0].code) == (503, "insufficient_memory")
    assert short.out == healthy(models, short)


def test_a_dead_engine_fails_everybody_and_says_so(models, monkeypatch):
    deaths: list[bool] = []
    engine = new_engine(models, on_death=lambda: deaths.append(True))
    monkeypatch.setattr(engine, "_decode", lambda: (_ for _ in ()).throw(SystemError("no way on")))
    results = asyncio.run(run_jobs(engine, three_jobs()))
    assert [result.code for result in results] == ["engine_stopped"] * 3
    assert deaths == [True]
    assert not engine.alive
    with pytest.raises(ServingError):
        engine.reserve("a")


def test_health_answers_while_a_step_is_held_up(models):
    """The event loop keeps running while the engine computes."""

    def fault(tokens, logits, forward):
        time.sleep(0.5)
        return logits

    async def scenario() -> list[float]:
        job = Job([5, 6], "base", 3)
        running = asyncio.create_task(run_jobs(new_engine(models, fault=fault), [job]))
        lags = []
        while not running.done():
            before = time.monotonic()
            await asyncio.sleep(0.01)
            lags.append(time.monotonic() - before)
        assert len(job.out) == 3
        return lags

    lags = asyncio.run(scenario())
    assert len(lags) > 50
    assert max(lags) < 0.25


def turns(models: Models, name: str, *, kept_tokens: int, lean: bool) -> tuple[list[Job], list[int]]:
    """Run a chat of three turns, and beside it one of another adapter; return its jobs and what was read for each."""
    read: list[int] = []

    def count(tokens, logits, forward):
        read.extend(len(row) for row in tokens if len(row) > 1)
        return logits

    async def scenario() -> list[Job]:
        engine = new_engine(models, lean=lean, fault=count, kept_tokens=kept_tokens)
        engine.start()
        jobs, said = [], list(range(10, 60))
        for turn in range(3):
            job = Job(said, name, 8)
            engine.submit(job, engine.reserve("a")[0])
            await job.text()
            jobs.append(job)
            said = said + job.out + [70 + turn] * 5
        await asyncio.to_thread(engine.stop)
        return jobs

    return asyncio.run(scenario()), read


def test_the_next_turn_of_a_chat_reads_only_what_is_new(tiny_llama, adapters, models, lean):
    alone, read_alone = turns(models, "sft", kept_tokens=0, lean=lean)
    kept, read = turns(models, "sft", kept_tokens=1000, lean=lean)
    assert [job.out for job in kept] == [job.out for job in alone], "a beginning that was kept changes no answer"
    assert [job.out for job in kept] == [generate_with_peft(tiny_llama, adapters["sft"], j.ids, 8) for j in kept]
    assert sum(read_alone) == sum(len(job.ids) for job in alone)
    assert read[0] == 50
    assert all(new <= 8 + 5 for new in read[1:])


def test_a_beginning_that_another_adapter_read_is_read_again(tiny_llama, adapters, models, lean):
    ids = list(range(10, 60))

    async def scenario() -> list[Job]:
        engine = new_engine(models, lean=lean, kept_tokens=1000)
        engine.start()
        jobs = [Job(ids, name, 12) for name in ("sft", "dpo", "base", "sft")]
        for job in jobs:
            engine.submit(job, engine.reserve("a")[0])
            await job.text()
        hits = engine.metrics.registry.get_sample_value("serve_prefix_cache_hits_total")
        assert hits == len(ids) - 1, "the last one knew all but the token whose logits are needed"
        await asyncio.to_thread(engine.stop)
        return jobs

    for job in asyncio.run(scenario()):
        assert job.out == generate_with_peft(tiny_llama, adapters.get(job.model), ids, 12)


def test_what_is_kept_is_bounded_and_an_adapter_that_leaves_takes_its_own_along():
    prefixes = Prefixes(limit=100)
    for name, first in (("a", 0), ("b", 1000), ("a", 2000)):
        prefixes.keep(name, list(range(first, first + 45)), name + str(first))
    assert prefixes.size <= 100
    assert prefixes.find("a", list(range(45)), 44) == (None, 0), "the oldest one had to go"
    assert prefixes.find("b", [*range(1000, 1040), 5], 40) == ("b1000", 40)
    assert prefixes.find("a", [*range(1000, 1040), 5], 40) == (None, 0), "of another adapter"
    prefixes.forget("b")
    assert prefixes.find("b", list(range(1000, 1040)), 39) == (None, 0)
    assert not prefixes.worth_keeping("a", list(range(2000, 2040))), "it says nothing more than what is kept"
    assert not prefixes.worth_keeping("a", list(range(200))), "larger than all that may be kept"


def test_memory_is_taken_by_need(models, lean):
    engine = new_engine(models, lean=lean, slots=16, context=128)
    jobs = [Job([10 + n] * 8, "sft", 4) for n in range(16)]
    most = []
    forward, step = engine.forward, engine.forward.step
    engine.forward.step = lambda *given: (most.append(forward.nbytes), step(*given))[1]
    asyncio.run(run_jobs(engine, jobs))
    assert 0 < max(most) < 16 * 128 * engine.forward.bytes_per_token
    assert forward.nbytes == 0, "with the last row all of it goes"


def test_a_pause_gives_memory_back_and_the_next_request_is_answered(models, monkeypatch):
    given_back: list[float] = []
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(engine_module, "empty_heap", lambda: given_back.append(time.monotonic()))

    async def scenario() -> None:
        engine = new_engine(models)
        engine.start()
        for count in (1, 2):
            job = Job([5, 6, 7], "sft", 4)
            engine.submit(job, engine.reserve("a")[0])
            await job.text()
            await asyncio.sleep(0.5)
            assert len(given_back) == count, "once in each pause"
        await asyncio.to_thread(engine.stop)

    asyncio.run(scenario())


def test_rows_that_would_not_fit_into_memory_wait(models):
    engine = new_engine(models, slots=3, memory_tokens=100)
    jobs = [Job([10 + n] * 30, "sft", 30) for n in range(3)]
    together = []
    step = engine.forward.step
    engine.forward.step = lambda names, *given: (together.append(len(names)), step(names, *given))[1]
    assert all(isinstance(text, str) for text in asyncio.run(run_jobs(engine, jobs)))
    assert max(together) == 1
