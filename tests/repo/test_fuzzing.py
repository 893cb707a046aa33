"""Random input for all that reads a user's files and requests: only UserError may come out, and what is taken is sound.

FUZZ_CASES says how many cases each reader gets (60; under the marker `drill` 100,000): FUZZ_CASES=5000 pytest tests/repo/test_fuzzing.py
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from scripts.common.artifacts import read_manifest, sha256_file
from scripts.common.config import load_config
from scripts.common.deid_report import check_deid_report
from scripts.common.errors import UserError
from scripts.common.schema import Config, Data
from scripts.dataset.records import (
    Preference,
    Record,
    count_duplicates,
    load_datasets,
    parse_preference,
    parse_record,
    write_rejects,
)
from scripts.dataset.split import cluster_of, split_records
from serve.fastapi_server import refuse_invalid
from serve.metrics import Metrics
from serve.openai_schemas import ChatRequest, CompletionRequest
from serve.schemas import CompareRequest, GenerateRequest, ScoreRequest, VoteRequest
from tests.conftest import ROOT

FEW = int(os.environ.get("FUZZ_CASES", "60"))
MANY = int(os.environ.get("FUZZ_CASES", "100000"))

# --- what is given ---

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([0, -1, 2**31, 2**63, 10**400, "", "auto", "\ud800", "\0", "..", "a/b", "user", "assistant", float("nan")])
)  # fmt: skip


def trees(keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Generate JSON values whose objects have these keys most of the time."""
    names = keys | keys | keys | st.text(max_size=5)
    return st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4))


def dotted(section: Any = Config, prefix: str = "") -> list[str]:
    """Name every key of the configuration."""
    found = []
    for name, field in section.model_fields.items():
        found.append(prefix + name)
        if hasattr(field.annotation, "model_fields"):
            found += dotted(field.annotation, f"{prefix}{name}.")
    return found


KEYS = dotted()
LAST_NAMES = sorted({key.rpartition(".")[2] for key in KEYS} | {"path", "weight", "max_steps", "name", "regex"})
FIELDS = ["instruction", "input", "output", "prompt", "chosen", "rejected", "completion", "messages", "role", "content"]
REQUEST_FIELDS = sorted({name for kind in (GenerateRequest, ChatRequest, CompareRequest, VoteRequest, ScoreRequest) for name in kind.model_fields} | {"role", "content"})  # fmt: skip
REQUESTS = TypeAdapter(GenerateRequest), TypeAdapter(ChatRequest), TypeAdapter(CompletionRequest), TypeAdapter(CompareRequest), TypeAdapter(ScoreRequest), TypeAdapter(VoteRequest)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, pieces: tuple[bytes, ...]) -> bytes:
    """Cut, overwrite, repeat or fill a few places of something valid."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 40))
        new = draw(st.sampled_from(pieces) | st.binary(max_size=8))
        content[at : at + length] = draw(st.sampled_from([b"", new, new * 3, bytes(content[at : at + length]) * 2]))
    return bytes(content)


def parquet() -> bytes:
    """Return a small valid Parquet file with several types of columns."""
    import pyarrow
    import pyarrow.parquet

    target = io.BytesIO()
    columns = {"instruction": ["say a", "say b"], "output": ["a", "b"], "n": [1, 2], "tags": [["x"], []]}
    pyarrow.parquet.write_table(pyarrow.table(columns), target)
    return target.getvalue()


YAML_PIECES = (b"&a ", b"*a", b"<<: ", b"- ", b": ", b"\t", b"!!int ", b"{", b"]", b'"', b"|\n", b"---\n", b"? ", b"%YAML 9\n", b"1e999", b"2026-99-99", b"\x00", b"\xff", b"\xe2\x80\xa8", b"\n")  # fmt: skip
JSON_PIECES = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\ud800", b"\\u0000", b"NaN", b"1e999", b"null", b"\n", b"\r", b"\xff", b"\x00", b"\xef\xbb\xbf")  # fmt: skip
ROWS = [{"instruction": "say a", "input": "", "output": "a"}, {"messages": [{"role": "user", "content": "say b"}, {"role": "assistant", "content": "b"}]}]  # fmt: skip
PAIR = {"prompt": "say a", "chosen": "a", "rejected": "b"}
MANIFEST: dict[str, Any] = {
    "schema": 1, "stage": "sft", "files": {"weights": "0" * 64}, "tokenizer_sha256": "a", "chat_template_sha256": "b",
    "base_model": {"id": "model", "revision": None, "fingerprint": "c"}, "datasets": [], "parent": None, "metrics": {},
    "split": {"seed": 0, "validation_ratio": 0.1, "test_ratio": 0.2}, "config": {}, "mlflow": {"run_id": None},
}  # fmt: skip
REPORT = {"schema": 1, "counts": {}, "output": {"sha256": "0" * 64}, "created": None}


def changed(valid: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Replace some values of a valid object, a nested one too."""
    names = sorted(valid) + sorted({name for value in valid.values() if isinstance(value, dict) for name in value})
    values = trees(st.sampled_from(names))
    inner = st.dictionaries(st.sampled_from(names), values, max_size=3)

    def put(changes: dict[str, Any], deeper: dict[str, Any]) -> bytes:
        tree = {**valid, **{name: value for name, value in changes.items() if name in valid}}
        for name, value in list(tree.items()):
            if isinstance(value, dict):
                tree[name] = {**value, **{inner: deeper[inner] for inner in deeper if inner in value}}
        return json.dumps(tree).encode()

    return st.builds(put, inner, inner)


# --- who reads it ---


def read_configuration(content: bytes, folder: Path) -> None:
    """Load a configuration; one that is taken can be written down and read again as the same."""
    path = folder / "config.yaml"
    path.write_bytes(content)
    loaded = load_config(path)
    path.write_text(loaded.to_yaml(), encoding="utf-8")
    assert load_config(path).values == loaded.values


def read_overrides(items: list[tuple[str, Any]], folder: Path) -> None:
    """Override keys of the demo's configuration."""
    given = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in items]
    loaded = load_config(ROOT / "configs/demo.yaml", given)
    assert set(loaded.origins.values()) >= {"--set"}


def read_records(ending: str) -> Callable[[bytes, Path], None]:
    """Read a data file as both stages do, refusing bad rows and setting them aside."""

    def read(content: bytes, folder: Path) -> None:
        path = folder / f"data.{ending}"
        path.write_bytes(content)
        refusals: list[UserError] = []
        for parse, kind in ((parse_record, Record), (parse_preference, Preference)):
            for choice in ("stop", "skip"):
                data = Data(on_bad_row=choice, validation_ratio=0.5)  # type: ignore[arg-type]
                try:
                    files = load_datasets(str(path), parse, data, "sft.dataset_path")
                    (file,) = files
                    assert all(isinstance(record, kind) and record.answer.strip() for record in file.records)
                    assert len({cluster_of(record) for record in file.records if kind is Record}) >= (kind is Record)
                    assert count_duplicates(file.records) < len(file.records)
                    assert write_rejects(folder / "rejects.jsonl", files) == len(file.bad_rows)
                    split_records(files, data, 0)
                except UserError as error:
                    refusals.append(error)
        if len(refusals) == 4:
            raise refusals[0]

    return read


def read_artifact(content: bytes, folder: Path) -> None:
    """Read the manifest of an adapter, with its files checked."""
    (folder / "weights").write_bytes(b"weights")
    digest = sha256_file(folder / "weights")
    (folder / "manifest.json").write_bytes(content.replace(b"0" * 64, digest.encode()))
    manifest = read_manifest(folder, stages=("sft", "dpo"))
    assert isinstance(manifest.base_model.fingerprint + manifest.base_model.id, str)
    assert manifest.mlflow.run_id is None or isinstance(manifest.mlflow.run_id, str)


def read_report(content: bytes, folder: Path) -> None:
    """Read a de-identification report."""
    path = folder / "report.json"
    path.write_bytes(content)
    assert check_deid_report("data.jsonl", "0" * 64, path)["output_sha256"] == "0" * 64


def read_request(content: bytes, folder: Path) -> None:
    """Check a body against every request model; a refusal becomes the answer that a client sees."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError("not JSON") from None
    refusals = 0
    for kind in REQUESTS:
        try:
            request = kind.validate_python(body)
        except ValidationError as error:
            refusals += 1
            shown = RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()])
            answer = asyncio.run(refuse_invalid(ASKED, shown))
            shown_error = json.loads(bytes(answer.body))["error"]
            assert answer.status_code in (400, 422)
            assert shown_error["message"]
        else:
            if isinstance(request, GenerateRequest | ChatRequest | CompletionRequest | CompareRequest):
                sampling = request.sampling()
                assert 0 <= sampling.temperature <= 2
                assert 0 < sampling.top_p <= 1
                assert all(request.stops())
    if refusals == len(REQUESTS):
        raise UserError("no request")


def _asked(path: str) -> Request:
    """Return a request as the refusing handler sees it."""
    app = FastAPI()
    app.state.service = SimpleNamespace(metrics=Metrics())
    server = {"scheme": "http", "server": ("localhost", 80), "path": path, "query_string": b"", "headers": []}
    return Request({"type": "http", "app": app, "state": {"notes": {}}, **server})


ASKED = _asked("/v1/generate")
DEMO = (ROOT / "configs/demo.yaml").read_bytes()
LINES = "".join(json.dumps(row) + "\n" for row in (*ROWS, PAIR)).encode()
TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any, Path], None]]] = {
    "configuration, random text": (st.text().map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(), read_configuration),
    "configuration, damaged": (damaged(DEMO, YAML_PIECES), read_configuration),
    "configuration, random tree": (trees(st.sampled_from(LAST_NAMES)).map(lambda tree: yaml.dump(tree).encode("utf-8", "replace")), read_configuration),
    "overrides": (st.lists(st.tuples(st.sampled_from(KEYS) | st.text(max_size=8), trees(st.sampled_from(LAST_NAMES))), min_size=1, max_size=3), read_overrides),
    "JSONL, damaged": (damaged(LINES, JSON_PIECES), read_records("jsonl")),
    "JSONL, random rows": (st.lists(trees(st.sampled_from(FIELDS)), max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()), read_records("jsonl")),
    "JSON, damaged": (damaged(json.dumps([*ROWS, PAIR]).encode(), JSON_PIECES), read_records("json")),
    "JSON, random rows": (trees(st.sampled_from(FIELDS)).map(lambda rows: json.dumps(rows).encode()), read_records("json")),
    "CSV, damaged": (damaged(b'instruction,input,output\r\nsay a,,a\r\n"say, b","x\ny",b\r\n', (b'"', b",", b";", b"\r", b"\n", b"\x00", b"\xff")), read_records("csv")),
    "CSV, random": (st.text(alphabet='ab",;\r\n\0').map(lambda text: b"prompt,chosen,rejected\n" + text.encode()), read_records("csv")),
    "Parquet, damaged": (damaged(parquet(), (b"PAR1", b"\x00\x00\x00\x00", b"\xff\xff\xff\xff")), read_records("parquet")),
    "manifest, random values": (changed(MANIFEST), read_artifact),
    "manifest, damaged": (damaged(json.dumps(MANIFEST).encode(), JSON_PIECES), read_artifact),
    "report of the de-identification": (changed(REPORT), read_report),
    "requests": (trees(st.sampled_from(REQUEST_FIELDS)).map(lambda body: json.dumps(body).encode()), read_request),
    "requests, damaged": (st.sampled_from([GenerateRequest(prompt="a"), ChatRequest(messages=[{"role": "user", "content": "a"}]), ScoreRequest(prompt="a", answer="b")]).flatmap(lambda request: damaged(request.model_dump_json(exclude_unset=True).encode(), JSON_PIECES)), read_request),
}  # fmt: skip


def search(target: str, cases: int, folder: Path) -> None:
    """Give a reader random input; anything but a UserError fails, with the smallest input that does it."""
    strategy, read = TARGETS[target]
    outcomes: Counter[str] = Counter()

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def attempt(given_input: Any) -> None:
        try:
            read(given_input, folder)
            outcomes["taken"] += 1
        except UserError as error:
            outcomes["refused" if str(error).strip() else "refused without a word"] += 1

    attempt()
    sys.stdout.write(f"{target}: {outcomes.total()} cases, {outcomes['taken']} taken, {outcomes['refused']} refused\n")
    assert outcomes["refused"], "nothing was wrong, so nothing was tried"
    assert not outcomes["refused without a word"]


@pytest.mark.parametrize("target", TARGETS)
def test_only_a_user_error_comes_out(target: str, tmp_path: Path) -> None:
    search(target, FEW, tmp_path)


@pytest.mark.drill
@pytest.mark.parametrize("target", TARGETS)
def test_only_a_user_error_comes_out_of_many_cases(target: str, tmp_path: Path) -> None:
    search(target, MANY, tmp_path)
