"""The demo says how long it will take, and where it was when it was interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.report import shortest_sample
from scripts import demo
from tests.conftest import ROOT

RUN = """
import sys
from scripts.common.errors import entry_point
from scripts.common.run import set_up_logging
from scripts.common.signals import trapped_signals
from scripts.demo import run_module

@entry_point
def main(argv=None):
    set_up_logging()
    with trapped_signals():
        run_module("scripts.train_sft", ["--config", "configs/demo.yaml"], "2/4")
    return 0

sys.exit(main())
"""


def measured(path: Path, **facts: object) -> Path:
    path.write_text(json.dumps({"hardware": "2 cores of a CPU", "seconds": {"a": 200, "b": 400}, **facts}))
    return path


@pytest.mark.parametrize(
    ("here", "said"),
    [(1e11, "about 10 minutes on this machine"), (2e11, "about 5 minutes"), (5e10, "about 20 minutes")],
)
def test_the_duration_follows_the_speed_of_this_machine(tmp_path, monkeypatch, here: float, said: str) -> None:
    monkeypatch.setattr(demo, "MEASURED_BEFORE", (tmp_path / "none.json", measured(tmp_path / "demo.json", flops=1e11)))
    assert demo.expected_duration(here).startswith(said)


def test_where_a_speed_is_unknown_the_measured_machine_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "MEASURED_BEFORE", (measured(tmp_path / "demo.json"),))
    assert demo.expected_duration(1e11) == "about 10 minutes on 2 cores of a CPU"
    monkeypatch.setattr(demo, "MEASURED_BEFORE", (measured(tmp_path / "demo.json", flops=1e11),))
    assert demo.expected_duration(0) == "about 10 minutes on 2 cores of a CPU"


def test_the_example_is_the_shortest_prompt_however_it_was_answered(tmp_path) -> None:
    rows = [{"source": f"x:{n}", "prompt": "p" * n, "answers": {"base": f"b{n}", "sft": f"s{n}"}} for n in (9, 3, 5)]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = shortest_sample(tmp_path)
    assert {"asked": found["prompt"], **found["answers"]} == {"asked": "ppp", "base": "b3", "sft": "s3"}


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_says_what_it_was_doing_and_how_to_continue(tmp_path, number: signal.Signals) -> None:
    waits = "import sys, time\nif 'train_sft.py' in ' '.join(sys.orig_argv):\n    time.sleep(60)\n"
    (tmp_path / "sitecustomize.py").write_text(waits)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert process.stderr
    assert "[2/4] python -m scripts.train_sft" in process.stderr.readline()
    time.sleep(0.2)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]

    assert process.returncode == 128 + number
    assert "interrupted in step 2/4 after " in said
    assert "to continue this one: python -m scripts.train_sft --config configs/demo.yaml --resume" in said
    assert "Traceback" not in said


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_names_a_python_that_is_too_old(tmp_path) -> None:
    old = tmp_path / "python3.9"
    old.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])" "$2"\n'
    )
    old.chmod(0o755)
    for name in ("Makefile", "requirements.txt", "requirements.gpu.txt", "requirements.extra.txt"):
        shutil.copy(ROOT / name, tmp_path / name)

    done = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "is Python 3.9, wanted 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()
