"""Real but tiny parts: architectures with two layers, a tokenizer trained in process, an MLflow store in a folder."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.model.tiny import CHAT_TEMPLATE, save_tiny_model, tiny_tokenizer

__all__ = ["CHAT_TEMPLATE", "save_tiny_model", "tiny_tokenizer"]

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = Path(__file__).parent / "offline"
SHARED_DATA = ROOT.parent / "shared" / "data"

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true", TOKENIZERS_PARALLELISM="false"
)
os.environ["PYTHONPATH"] = os.pathsep.join([str(OFFLINE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
_spec = importlib.util.spec_from_file_location("offline_guard", OFFLINE / "sitecustomize.py")
assert _spec is not None
assert _spec.loader is not None
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a two-layer Llama."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a two-layer GPT-2 without a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-gpt2", "gpt2")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Return the demo model's folder, or skip where it was not brought."""
    folder = ROOT / "models" / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.skip("needs the demo model: python -m scripts.get_demo_model")
    return folder


@pytest.fixture
def no_unpickling(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse unpickling for the length of a test, here and in processes it starts; fail on what a library swallowed."""
    refusals = tmp_path_factory.mktemp("refusals") / "refused.txt"
    monkeypatch.setenv("REFUSALS", str(refusals))
    yield
    assert not refusals.exists(), refusals.read_text()


@pytest.fixture
def shared_data() -> Path:
    """Return the folder of public data beside the checkout, or skip where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs ../shared/data")
    return SHARED_DATA


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an MLflow database with its tables made, which takes seconds; tests work on copies."""
    import mlflow

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def write_config(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that writes a YAML config; outputs and MLflow store lie in the test's folder, the working folder."""
    import yaml

    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")

    def write(**sections: object) -> Path:
        tree: dict = {"offline": True, "tracking": {"mlflow_tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}}
        for name, value in sections.items():
            tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        return path

    return write


def write_jsonl(path: Path, rows: list) -> Path:
    """Write rows, one JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run_python(
    *arguments: str | Path, timeout: float = 300, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of the project as a user would, in its own process, offline."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
