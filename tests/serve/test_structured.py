"""Answers that fit a schema, in a batch with others that are free; and schemas that are refused by name."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.rendering import render_prompt
from serve.engine import Engine
from serve.errors import ServingError
from serve.jobs import Job
from serve.sampling import Sampling
from serve.structured import MAX_SCHEMA_BYTES, Constraint, SchemaCompiler
from tests.serve.test_engine import generate_with_peft, models_of, new_engine, run_jobs
from tests.support.serving import save_adapter

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Grace"]}, "born": {"enum": [1815, 1906]}, "alive": {"type": "boolean"}},
    "required": ["name", "born", "alive"],
    "additionalProperties": False,
}
LIST: dict[str, Any] = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "sft", tiny_llama)


@pytest.fixture
def engine(tiny_llama: Path, adapter: Path, write_config) -> Engine:
    return new_engine(models_of(tiny_llama, {"sft": adapter}, write_config), slots=6)


def compile_schema(engine: Engine, schema: Any) -> Constraint:
    return asyncio.run(SchemaCompiler(engine.models.tokenizer, engine.stop_ids).compile(schema, "response_format"))


def greedy_by_the_libraries(
    base: Path, adapter: Path, ids: list[int], constraint: Constraint, stops: set[int]
) -> list[int]:
    """Return the greedy tokens of PEFT among those that the schema allows."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    out: list[int] = []
    with torch.inference_mode():
        while not out or out[-1] not in stops:
            logits = network(torch.tensor([ids + out])).logits[0, -1]
            allowed = constraint.allowed(len(logits), logits.device)
            out.append(int(logits.masked_fill(~allowed, -torch.inf).argmax()))
            constraint.take(out[-1])
    return out


def test_each_row_of_a_mixed_batch_follows_its_own_schema_or_none(engine, tiny_llama, adapter):
    chat = ChatFormat(engine.models.tokenizer)
    ids = render_prompt(chat, user_turn("Who was the first programmer?"))
    schemas = [PERSON, None, LIST, PERSON]
    constraints = [schema and compile_schema(engine, schema) for schema in schemas]
    jobs = [
        Job(ids, model, 64, Sampling(temperature, seed=1), constraint=constraint and constraint.copy())
        for model, temperature, constraint in zip(
            ("sft", "base", "sft", "base"), (0, 0, 0, 1.0), constraints, strict=True
        )
    ]
    texts = asyncio.run(run_jobs(engine, jobs))
    for text in (texts[0], texts[3]):
        assert json.loads(str(text)).keys() == PERSON["properties"].keys()
    assert [part in ("a", "b") for part in json.loads(str(texts[2]))] == [True, True]
    assert [job.finish_reason for job in jobs if job.constraint] == ["stop"] * 3
    assert jobs[1].out == generate_with_peft(tiny_llama, None, ids, 64), "a free row beside them is not disturbed"
    for job, constraint in ((jobs[0], constraints[0]), (jobs[2], constraints[2])):
        assert job.out == greedy_by_the_libraries(tiny_llama, adapter, ids, constraint, engine.stop_ids)


def test_any_json_object_can_be_asked_for(engine):
    job = Job([5, 6], "sft", 40, Sampling(1.0, seed=2), constraint=compile_schema(engine, None))
    [text] = asyncio.run(run_jobs(engine, [job]))
    assert str(text).startswith("{")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string", "pattern": "(a+)+$"}, "`pattern`"),
        ({"type": "object", "properties": {"x": {"anyOf": [{"type": "string", "pattern": "a"}]}}}, "`pattern`"),
        ({"type": "object", "patternProperties": {"^a": {}}}, "`patternProperties`"),
        ({"type": "string", "description": "x" * MAX_SCHEMA_BYTES}, f"at most {MAX_SCHEMA_BYTES}"),
        (nested(17), "16 levels"),
        (nested(400), "16 levels"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "no-such-format"}, "no-such-format"),
        ({"$ref": "https://schemas.example/person.json"}, "schemas.example"),
        ({"type": "text"}, "text"),
        ({"const": json.loads("[" * 300 + "]" * 300)}, ""),
        ({"allOf": [{"anyOf": [{"properties": {str(i): {"enum": list(range(9))}}} for i in range(20)]}] * 20}, "large"),
    ],
    ids=["pattern", "hidden pattern", "pattern properties", "size", "depth", "great depth", "not", "unique", "format",
         "elsewhere", "type", "deep constant", "explosion"],
)  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_refused_by_name(engine, schema, said):
    with pytest.raises(ServingError, match="schema") as refused:
        compile_schema(engine, schema)
    assert (refused.value.status, refused.value.param) == (422, "response_format")
    assert said in refused.value.message


@pytest.mark.parametrize(
    "schema",
    [
        nested(16),
        {"type": "object", "properties": {"pattern": {"type": "string"}}},
        {"enum": ["pattern", {"pattern": "a"}]},
        {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}},
        {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    ],
    ids=["deep", "a property's name", "data", "recursive", "long"],
)
def test_a_schema_that_can_be_followed_is_taken(engine, schema):
    assert compile_schema(engine, schema)
