"""A working folder with everything right in it, of which a test spoils one thing."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.common.errors import entry_point
from tests.conftest import write_jsonl

ROWS = [{"instruction": f"name colour {n}", "output": f"colour number {n}"} for n in range(12)]
PAIRS = [{"prompt": f"name colour {n}", "chosen": f"number {n}", "rejected": f"letter {n}"} for n in range(12)]
STAGES = {
    "sft": "scripts.train_sft", "dpo": "scripts.train_dpo", "compare": "eval.compare", "judge": "eval.judge",
    "lmeval": "eval.run_lmeval", "export": "scripts.export_lora", "deid": "scripts.deid_presidio",
    "get_model": "scripts.get_demo_model", "demo": "scripts.demo",
}  # fmt: skip


@entry_point
def serve(argv: Sequence[str] | None = None) -> int:
    """Start the server up to the point where it would listen, with the configuration that --config names."""
    from serve.fastapi_server import load_service, set_up_logging

    assert argv is not None
    set_up_logging()  # as the application does; the last test's handlers write to its closed stream
    os.environ["LLM_CONFIG"] = argv[argv.index("--config") + 1]
    load_service()
    return 0


class Project:
    """A working folder with everything right in it: model, data, adapter, configuration. Cases spoil one thing."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture) -> None:
        self.folder, self.capsys = folder, capsys
        self.tree: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))

    def configure(self, **changes: object) -> None:
        """Write the configuration with other values, given by dotted keys with __ for the dot."""
        for key, value in changes.items():
            *sections, name = key.split("__")
            tree = self.tree
            for section in sections:
                tree = tree.setdefault(section, {})
            tree[name] = value
        replace(self.folder / "config.yaml", yaml.safe_dump(self.tree))

    def run(self, stage: str, *arguments: str) -> tuple[int | str | None, str]:
        """Run a command in this process; return its exit code and what it said."""
        self.capsys.readouterr()
        main = serve if stage == "serve" else importlib.import_module(STAGES[stage]).main
        try:
            code = main(list(arguments))
        except SystemExit as leaving:  # argparse
            code = leaving.code
        return code, self.capsys.readouterr().err

    def refused(self, said: str, stage: str, *arguments: str) -> None:
        """Run a command that must be refused with this text."""
        before = sorted(self.folder.rglob("*"))
        code, message = self.run(stage, *arguments)
        assert said in message, message[-2000:]
        assert code == 2, message
        assert "Traceback" not in message
        assert len(message) < 6000, "nobody reads that"
        new = [path for path in sorted(self.folder.rglob("*")) if path not in before and path.is_file()]
        assert not [path for path in new if not re.search(r"\.run/|/mlruns/", path.as_posix())], new


def replace(path: Path, content: str | bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_project(folder: Path) -> Path:
    """Write data and configuration; the model and an adapter are the caller's to bring."""
    write_jsonl(folder / "sft.jsonl", ROWS)
    write_jsonl(folder / "dpo.jsonl", PAIRS)
    tree = {
        "base_model_id": "model",
        "offline": True,
        "data": {"validation_ratio": 0.2, "test_ratio": 0.3},
        "sft": {"dataset_path": "sft.jsonl", "output_dir": "out/sft", "max_length": 200, "trainer": {"max_steps": 2}},
        "dpo": {"dataset_path": "dpo.jsonl", "output_dir": "out/dpo", "init_from": "sft_adapter", "beta": 0.1,
                "max_length": 200, "trainer": {"max_steps": 2}},
        "eval": {"output_dir": "out/comparison"},
        "lmeval": {"output_dir": "out/lmeval"},
        "export": {"output_dir": "out/merged", "gguf_dir": "out/gguf"},
        "serve": {"adapter_path": "sft_adapter", "max_context_tokens": 64, "max_concurrent": 2},
        "performance": {"dtype": "fp32", "threads": 1},
        "tracking": {"mlflow_tracking_uri": "sqlite:///mlflow.db"},
    }  # fmt: skip
    replace(folder / "config.yaml", yaml.safe_dump(tree))
    return folder
