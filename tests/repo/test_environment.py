"""The environment is the pinned one, and MLflow and FastAPI work in it."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.conftest import ROOT, run_python


class Question(BaseModel):
    prompt: str


PINS = [
    line.split("#")[0].strip().split("==")
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line.split("#")[0]
]


@pytest.mark.parametrize(("name", "pinned"), PINS, ids=[name for name, _ in PINS])
def test_package_has_the_pinned_version(name: str, pinned: str) -> None:
    assert version(name).split("+")[0] == pinned


def test_main_path_is_pinned() -> None:
    assert {"torch", "transformers", "trl", "peft", "mlflow", "fastapi", "pydantic"} <= {name for name, _ in PINS}


def test_mlflow_keeps_a_run_in_a_database(empty_store: Path, tmp_path: Path) -> None:
    import mlflow

    store = shutil.copy(empty_store, tmp_path / "mlflow.db")
    client = mlflow.MlflowClient(f"sqlite:///{store}")
    run = client.create_run(client.create_experiment("env", artifact_location=str(tmp_path)))
    client.log_metric(run.info.run_id, "train/loss", 0.5, step=2)
    client.set_terminated(run.info.run_id)

    found = client.get_run(run.info.run_id)
    assert (found.data.metrics, found.info.status) == ({"train/loss": 0.5}, "FINISHED")


def test_fastapi_answers_and_checks_its_input() -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app = FastAPI()

    @app.post("/echo")
    def echo(question: Question) -> dict[str, str]:
        return {"text": question.prompt}

    with TestClient(app) as client:
        assert client.post("/echo", json={"prompt": "hi"}).json() == {"text": "hi"}
        assert client.post("/echo", json={"prompt": 5}).status_code == 422


@pytest.mark.parametrize(
    "reach", ["urllib.request.urlopen('http://example.com')", "socket.create_connection(('192.0.2.1', 80), 2)"]
)
def test_suite_and_its_processes_reach_nothing_but_this_machine(reach: str) -> None:
    done = run_python("-c", f"import socket, urllib.request; {reach}")

    assert done.returncode == 1
    assert "the test suite is offline" in done.stderr
