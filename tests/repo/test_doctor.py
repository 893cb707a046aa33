"""The doctor: each condition of a machine or configuration gives its line, what to type, and the exit code."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scripts import doctor, train_dpo
from scripts.common import paths
from scripts.common.config import add_config_arguments, load_config
from scripts.common.schema import Data
from scripts.common.stages import DPO, SFT
from scripts.dataset.records import parse_record
from scripts.dataset.split import side_of
from scripts.model.fingerprint import base_fingerprint
from tests.conftest import ROOT, run_python, write_jsonl
from tests.support.chain import dpo_rows, sft_rows
from tests.support.manifests import change_manifest, finish_folder, split_facts

UNTRAINED = {  # adapters that are not there, in the project's folder neither
    "sft": {"output_dir": "untrained/sft"},
    "dpo": {"beta": 0.1, "output_dir": "untrained/dpo", "init_from": "untrained/sft"},
    "serve": {"adapter_path": "untrained/dpo"},
}

Screen = Callable[..., tuple[int, dict[str, list[str]]]]


@pytest.fixture
def screen(
    write_config: Callable[..., Path], tiny_llama: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> Screen:
    """Return a function that runs the doctor on a good configuration and what a test changes in it.

    It returns the exit code and the lines of each check, each with its fix.
    """
    write_jsonl(tmp_path / "sft.jsonl", sft_rows())
    write_jsonl(tmp_path / "dpo.jsonl", dpo_rows())
    path = write_config(
        base_model_id=str(tiny_llama),
        sft={"dataset_path": "sft.jsonl", "max_length": 64},
        dpo={"dataset_path": "dpo.jsonl", "max_length": 64, "beta": 0.1},
    )
    monkeypatch.setattr(doctor, "PORTS", {})
    # The project's folder may hold adapters of its own.
    monkeypatch.setattr(paths, "ROOT", tmp_path)

    def run(*overrides: str) -> tuple[int, dict[str, list[str]]]:
        code = doctor.main(["--config", str(path), *(part for item in overrides for part in ("--set", item))])
        name = ""
        found: dict[str, list[str]] = {}
        for line in capsys.readouterr().out.splitlines()[:-1]:
            if line.startswith(" "):
                found[name][-1] += " | " + line.strip()  # of the line before
            else:
                status, name, text = line.split(None, 2)
                found.setdefault(name, []).append(f"{status} {text}")
        return code, found

    return run


def test_everything_in_order_is_one_screen_of_ok_and_the_next_command(screen: Screen, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sft.jsonl", sft_rows(140)[-200:])  # other numbers than the pairs have
    write_jsonl(tmp_path / "dpo.jsonl", dpo_rows(50))
    code, found = screen()

    assert code == 0
    assert {line.split()[0] for name, lines in found.items() if name != "packages" for line in lines} == {"ok"}
    assert list(found) == ["python", "packages", "config", "hardware", "model", "memory", "disk", "data", "plan", "adapters", "ports", "store"]  # fmt: skip
    assert sum(len(lines) for lines in found.values()) <= 22
    assert found["adapters"] == ["ok not there yet: outputs/sft_adapter, outputs/dpo_adapter"]
    assert list(tmp_path.glob("outputs*")) == [], "it writes nothing"


def test_plan_lines_say_how_small_a_difference_can_be_shown(screen: Screen) -> None:
    """At the number of seeds that is planned; nothing where the data cannot be read, which their own lines say."""
    _, found = screen()
    assert re.match(
        r"ok preference_accuracy: \d+ items.*, 1 seed: shows a difference between these two adapters", found["plan"][0]
    )
    assert found["plan"][-1].startswith("ok assumed: preference_accuracy scatters by ")
    _, found = screen("eval.plan.seeds=5", 'eval.plan.measures=["held_out_loss"]')
    assert re.match(r"ok held_out_loss: \d+ items.*, 5 seeds: shows a difference between the methods", found["plan"][0])
    _, found = screen("sft.dataset_path=nowhere.jsonl", "dpo.dataset_path=nowhere.jsonl")
    assert "plan" not in found


def test_data_lines_say_how_the_records_are_split(screen: Screen) -> None:
    sides = Counter(side_of(parse_record(row, "", Data()), Data()) for row in sft_rows())

    _, found = screen()

    assert found["data"][0] == (
        f"ok sft.dataset_path: {sides['train']} records to train on, {sides['validation']} for validation, "
        f"{sides['test']} for the test"
    )


def test_slow_libraries_are_not_loaded(write_config: Callable[..., Path], tiny_llama: Path, tmp_path: Path) -> None:
    """Answering in a few seconds depends on it: MLflow alone takes as long as all checks together."""
    path = write_config(base_model_id=str(tiny_llama), **UNTRAINED)
    (tmp_path / "mlflow.db").unlink()
    program = (
        "import sys; from scripts import doctor; "
        f"code = doctor.main(['--config', {str(path)!r}]); "
        "slow = {'mlflow', 'trl', 'peft', 'datasets'} & set(sys.modules); "
        "sys.exit(f'loaded {sorted(slow)}' if slow else code)"
    )
    done = run_python("-c", program)

    assert (done.returncode, done.stderr) == (0, "")


def test_only_the_last_check_loads_mlflow(write_config: Callable[..., Path], tiny_llama: Path) -> None:
    path = write_config(base_model_id=str(tiny_llama), **UNTRAINED)
    program = (
        "import sys; from scripts import doctor; show = doctor.show\n"
        "def shown(name, *arguments):\n"
        "    assert 'mlflow' not in sys.modules, f'loaded before {name}'\n"
        "    return show(name, *arguments)\n"
        "doctor.show = shown\n"
        f"sys.exit(doctor.main(['--config', {str(path)!r}]))"
    )
    done = run_python("-c", program)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2].startswith("ok   store")


def test_bare_python_reports_what_to_install_and_no_traceback(tmp_path: Path) -> None:
    done = run_python("-I", "-S", ROOT / "scripts/doctor.py", cwd=tmp_path)

    assert done.returncode == 1
    assert "bad  packages  requirements.txt (for everything): without torch, transformers, peft and" in done.stdout
    assert "fix: " in done.stdout
    assert "warn config    not checked without the package" in done.stdout
    assert done.stderr == ""


def test_flags_are_those_of_every_stage() -> None:
    stage = argparse.ArgumentParser()
    add_config_arguments(stage)

    def flags(parser: argparse.ArgumentParser) -> list[tuple]:
        return [(action.option_strings, action.dest, action.default, action.metavar) for action in parser._actions]

    assert flags(doctor.build_parser()) == flags(stage)


# --- the machine


@pytest.mark.parametrize("entered", [True, False])
def test_packages_are_compared_with_their_pins(tmp_path: Path, monkeypatch, entered: bool) -> None:
    (tmp_path / "requirements.txt").write_text("# pins\nno-such-package==1  # why\npytest==0.1\nruff==0.17.6\n")
    for name in ("requirements.gpu.txt", "requirements.extra.txt"):
        (tmp_path / name).write_text("neither-this==2\n")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    if not entered:
        (tmp_path / ".venv").mkdir()

    main, gpu, _ = doctor.check_packages()

    assert main.status == "bad"
    assert "without no-such-package; pytest " in main.text
    assert main.text.endswith(" instead of 0.1")
    assert main.fix == ("pip install -r requirements.txt" if entered else f'source "{tmp_path}/.venv/bin/activate"')
    assert (gpu.status, "4- and 8-bit" in gpu.text) == ("warn", True)


def test_interpreter_that_is_too_old_is_bad(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99, 1))

    (found,) = doctor.check_python()

    assert found.status == "bad"
    assert "wanted 99.1 or newer" in found.text


def test_gpu_that_is_asked_for_but_absent_is_bad(screen: Screen) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, found = screen("performance.device=cuda")

    assert code == 1
    assert found["hardware"] == ["bad performance.device: found cuda, but torch sees no GPU. Use auto or cpu."]


def test_dtype_and_threads_are_those_of_a_run(screen: Screen) -> None:
    _, found = screen("performance.dtype=fp32", "performance.threads=3")

    assert "base weights in float32: asked for; 3 threads" in found["hardware"][0]


def test_run_that_may_not_fit_is_a_warning_with_the_exact_question(screen: Screen) -> None:
    code, found = screen("sft.per_device_train_batch_size=10000000")

    assert code == 0
    assert found["memory"][0].startswith("warn ")
    assert "(sft, batches full" in found["memory"][0]
    assert "python -m scripts.train_sft --dry-run" in found["memory"][0]


def save_gemma3(folder: Path, weights: Path, *, nested: bool) -> Path:
    """Describe a small Gemma 3, nested as its multimodal configuration is or flat, over the weights of another model."""
    from transformers import AutoConfig

    shape = {
        "vocab_size": 4000, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12,
    }  # fmt: skip
    config = (
        AutoConfig.for_model("gemma3", text_config=shape) if nested else AutoConfig.for_model("gemma3_text", **shape)
    )
    config.save_pretrained(folder)
    assert ("text_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))) == nested
    shutil.copy(weights / "model.safetensors", folder)
    return folder


def test_memory_of_a_nested_configuration_is_that_of_the_same_numbers_flat(
    screen: Screen, tiny_llama: Path, tmp_path: Path
) -> None:
    large = ("sft.max_length=2048", "sft.per_device_train_batch_size=64")
    takes = []
    for nested in (True, False):
        folder = save_gemma3(tmp_path / f"gemma3-{nested}", tiny_llama, nested=nested)
        _, found = screen(
            f"base_model_id={folder}", "performance.fast_path=false", *large
        )  # the lean decoder takes the flat one
        takes.append(re.search(r"training takes ([\d.]+) at most \(sft", found["memory"][0])[1])

    assert takes[0] == takes[1]
    assert float(takes[0]) > 2, "of which the libraries take 1.05"


@pytest.mark.parametrize("scarce", [True, False])
@pytest.mark.parametrize("stage", [SFT, DPO])
@pytest.mark.parametrize("nested", [True, False])
def test_memory_is_what_training_plans_for_the_longest_records(
    write_config: Callable[..., Path], tiny_llama: Path, tmp_path: Path, monkeypatch, nested: bool, stage, scarce: bool
) -> None:
    """Also where pairs share a row, and where too little memory switches gradient checkpointing on."""
    import scripts.training.plan
    from scripts.common.machine import choose_machine
    from scripts.dataset.rendering import Rendered, RenderedPair

    sizes = {"max_length": 64, "per_device_train_batch_size": 4}
    config = load_config(write_config(sft=sizes, dpo=sizes, performance={"compile": False}))
    folder, section = save_gemma3(tmp_path / "gemma3", tiny_llama, nested=nested), getattr(config.values, stage.name)
    record = Rendered([1] * 64, [1] * 64) if stage is SFT else RenderedPair([1], [1] * 63, [1] * 63)
    if scarce:
        monkeypatch.setattr(scripts.training.plan, "available_memory_gib", lambda device: 0.1)

    planned = scripts.training.plan.plan_training(
        config.values, section, folder, choose_machine(config.values), [record] * 8
    )

    assert doctor.largest_estimate(config, stage, folder) == planned.estimate.total
    assert planned.checkpointing is scarce


@pytest.mark.parametrize(("scarce", "status"), [(0, "warn"), (10**9, "bad")])
def test_full_disk_is_reported(screen: Screen, monkeypatch, scarce: int, status: str) -> None:
    monkeypatch.setattr(doctor, "ENOUGH_DISK_GIB", 10**9)
    monkeypatch.setattr(doctor, "SCARCE_DISK_GIB", scarce)

    code, found = screen()

    assert found["disk"][0].startswith(f"{status} ")
    assert code == (status == "bad")


def test_taken_port_is_reported_with_another_one(screen: Screen, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {port: f"mlflow ui --port {port + 1}"})
        code, found = screen()

    assert code == 0
    assert found["ports"] == [f"warn something already listens on {port} | fix: mlflow ui --port {port + 1}"]


# --- the model and the Hub


class Answering(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200 if self.path == "/" else 404)
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch) -> Iterator[str]:
    """Return the address of a server that answers as the Hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.delenv("HF_HUB_OFFLINE")
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


HUB_MODEL = ("offline=false", "base_model_id=nobody/no-such-model")


def test_model_that_the_hub_can_give_is_fine(screen: Screen, hub: str) -> None:
    code, found = screen(*HUB_MODEL)

    assert code == 0
    assert "not here yet; the Hub answers" in found["model"][0]
    assert "once the base model is here" in found["memory"][0]


@pytest.mark.parametrize("silent", [True, False])
def test_model_that_nobody_can_give_is_bad_and_the_demo_model_is_named(
    screen: Screen, monkeypatch, silent: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE")
        if not silent:
            listening.close()
        started = time.monotonic()
        code, found = screen(*HUB_MODEL)

    assert code == 1
    assert "the Hub does not answer | fix: python -m scripts.get_demo_model" in found["model"][0]
    assert time.monotonic() - started < 60, "a silent Hub is not waited for"


def test_misspelt_model_is_reported_once(screen: Screen, tmp_path: Path) -> None:
    finished(tmp_path / "outputs/sft_adapter", "f" * 64)

    code, found = screen("base_model_id=models/smollm")

    assert code == 1
    assert [name for name, lines in found.items() for line in lines if line.startswith("bad")] == ["model"]
    assert "models/smollm: no such model folder." in found["model"][0]


def test_offline_does_not_ask_the_hub(screen: Screen, hub: str, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "hub_answers", lambda: pytest.fail("asked"))

    code, found = screen("base_model_id=nobody/no-such-model")

    assert code == 1
    assert "the Hub is not asked (offline)" in found["model"][0]


def test_local_model_without_a_hub_is_a_warning(screen: Screen, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE")

    code, found = screen("offline=false")

    assert code == 0
    assert found["model"][0].endswith("the Hub does not answer | fix: --set offline=true")


# --- data, adapters, store


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sft.dataset_path=stf.jsonl", "bad sft.dataset_path: stf.jsonl: no such file. Did you mean sft.jsonl?"),
        ("sft.dataset_path=dpo.jsonl", "bad sft.dataset_path: none of the 40 rows can be used"),
        ("data.test_ratio=0", "warn sft.dataset_path: 38 records to train on, 2 for validation, 0 for the test | fix: --set data.test"),
        ("data.validation_ratio=0", "warn sft.dataset_path: 30 records to train on, 0 for validation, 10 for the test | fix: --set data.valid"),
        ("sft.dataset_path=owner/name", "ok sft.dataset_path: owner/name: not read here; python -m scripts.train_sft --dry"),
    ],
)  # fmt: skip
def test_data_is_read_as_training_reads_it(screen: Screen, override: str, line: str) -> None:
    code, found = screen(override)

    assert found["data"][0].startswith(line)
    assert code == line.startswith("bad")
    read = [line for line in found["data"] if line.split()[1].endswith(".dataset_path:")]
    assert len(read) == 2, "the other stage's data are read all the same"


def test_data_that_will_make_a_poor_run_are_named_with_the_key_to_change(screen: Screen, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sft.jsonl", [{**row, "id": n} for n, row in enumerate([*sft_rows(), *sft_rows(1)])])

    code, found = screen()

    assert code == 0
    said = " || ".join(line for line in found["data"] if "sft" in line)
    assert "ok sft.jsonl: not used: id." in said
    assert "warn sft: 5 records repeat an earlier one word for word" in said
    assert "can show only large differences | fix: more records help most" in said
    assert "optimizer steps, which hardly change a model | fix: raise sft.num_train_epochs" in said


def finished(folder: Path, fingerprint: str, stage: str = "sft") -> Path:
    """Make a folder as a stage leaves it."""
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    finish_folder(folder, stage, base_model={"id": "some/base", "revision": None, "fingerprint": fingerprint})
    return folder


def test_adapters_are_proved_whole_and_of_the_configured_base(screen: Screen, tmp_path: Path, tiny_llama: Path) -> None:
    finished(tmp_path / "outputs/sft_adapter", base_fingerprint(tiny_llama))
    finished(tmp_path / "outputs/dpo_adapter", "f" * 64, "dpo")
    changed = finished(tmp_path / "changed", base_fingerprint(tiny_llama))
    (changed / "adapter_model.safetensors").write_bytes(b"other weights")
    (tmp_path / "cut_off").mkdir()

    code, found = screen(
        "dpo.init_from=cut_off", "serve.adapter_path=changed", 'serve.adapters={"mine": "outputs/sft_adaptor"}'
    )

    assert code == 1
    lines = dict(zip(("sft", "dpo", "cut", "changed", "misspelt"), found["adapters"], strict=True))
    assert lines["sft"] == "ok outputs/sft_adapter: whole, sft on some/base"
    assert lines["dpo"].startswith("bad outputs/dpo_adapter: whole, but made on another base")
    assert "fix: --set base_model_id=some/base" in lines["dpo"]
    assert lines["cut"].startswith("bad cut_off: no valid manifest.json")
    assert "adapter_model.safetensors: changed since manifest.json" in lines["changed"]
    assert lines["misspelt"].startswith("bad serve.adapters.mine: outputs/sft_adaptor: no such folder")
    assert lines["misspelt"].endswith("fix: Did you mean outputs/sft_adapter?")


@pytest.mark.parametrize(
    ("key", "split", "status", "said"),
    [
        ("dpo.init_from", {"seed": 0, "ratio": 0.5}, "bad", "dpo.init_from: old: was trained by an earlier version"),
        ("dpo.init_from", split_facts(seed=4), "bad", "dpo.init_from: old: was trained with another split (seed 4"),
        ("dpo.init_from", split_facts(validation_ratio=0.05), "bad", "Set data.validation_ratio: 0.05, or train again"),
        ("dpo.init_from", split_facts(), "ok", "old: whole, sft on some/base"),
        ("serve.adapter_path", {"seed": 0, "ratio": 0.5}, "warn", "old: whole, sft on some/base, but it cannot be compared"),
    ],
)  # fmt: skip
def test_the_split_of_an_adapter_is_checked_before_it_is_continued(
    screen: Screen, tmp_path: Path, tiny_llama: Path, key: str, split: dict, status: str, said: str
) -> None:
    """Serving takes any; only what will be refused later is bad."""
    change_manifest(finished(tmp_path / "old", base_fingerprint(tiny_llama)), split=split)

    code, found = screen(f"{key}=old")

    (line,) = (line for line in found["adapters"] if "not there yet" not in line)
    assert line.startswith(f"{status} ")
    assert said in line
    assert code == (status == "bad")


def older_schema(path: Path) -> None:
    """Mark a store as written by an older MLflow."""
    current, known = doctor.mlflow_schemas()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (min(known - {current}),))
    connection.close()


def first_schema(path: Path) -> None:
    """Put the tables of the first MLflow in its place, which MLflow's client would migrate when it opens them."""
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE alembic_version (version_num VARCHAR(32)); INSERT INTO alembic_version VALUES ('451aebb31d03');"
            "CREATE TABLE runs (run_uuid VARCHAR(32)); CREATE TABLE experiments (experiment_id INTEGER);"
        )
    connection.close()


def future_schema(path: Path) -> None:
    """Mark a store as written by an MLflow yet to come."""
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    connection.close()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: None, "ok .*: 0 runs, its tables are current"),
        (Path.unlink, "ok .*: made by the first run"),
        (lambda path: path.write_bytes(b"no database" * 100), "bad .*: is not a usable MLflow database .*fix: mv "),
        (older_schema, "bad .*: its tables are of an older MLflow .*fix: cp .* && mlflow db upgrade "),
        (first_schema, "bad .*: its tables are of an older MLflow .*fix: cp .* && mlflow db upgrade "),
        (future_schema, "bad .*: its tables are of another, perhaps newer MLflow .*fix: mv "),
    ],
    ids=["current", "absent", "garbage", "older", "oldest", "newer"],
)
def test_store_is_looked_into(screen: Screen, tmp_path: Path, harm: Callable[[Path], None], said: str) -> None:
    harm(tmp_path / "mlflow.db")
    before = (tmp_path / "mlflow.db").read_bytes() if (tmp_path / "mlflow.db").exists() else b""

    code, found = screen()

    assert re.match(said, found["store"][0]), found["store"][0]
    assert code == said.startswith("bad")
    assert before == ((tmp_path / "mlflow.db").read_bytes() if before else b"")


@pytest.mark.parametrize(
    ("uri", "status"), [("http://127.0.0.1:9", "bad"), ("sqlite:///no/folder/mlflow.db", "bad"), ("mlruns", "ok")]
)
def test_store_elsewhere(screen: Screen, uri: str, status: str) -> None:
    code, found = screen(f"tracking.mlflow_tracking_uri={uri}")

    assert found["store"][0].startswith(f"{status} ")
    assert code == (status == "bad")
    assert "fix: " in found["store"][0] or status == "ok"


def test_misspelt_key_is_reported_and_stops_what_depends_on_it(screen: Screen) -> None:
    code, found = screen("sft.datset_path=mine.csv")

    assert code == 1
    assert "did you mean `sft.dataset_path`?" in found["config"][0]
    assert list(found) == ["python", "packages", "config"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("dpo.beta=null", "bad dpo.beta: missing; it has no default because it decides the result | fix: 0.1 is the usual start."),
        ("dpo.init_from=null", "bad dpo.reference: found sft, but dpo.init_from is null, so there is no SFT adapter | fix: Set reference: base."),
    ],
)  # fmt: skip
def test_what_a_stage_would_refuse_is_bad_and_everything_else_is_checked(
    screen: Screen, override: str, line: str, tmp_path: Path, capsys
) -> None:
    code, found = screen(override)

    assert code == 1
    assert found["config"] == [line]
    assert list(found)[-1] == "store"
    assert train_dpo.main(["--config", str(tmp_path / "config.yaml"), "--set", override]) == 2
    assert capsys.readouterr().err == f"error: {line.removeprefix('bad ').replace(' | fix: ', '. ')}\n"


def test_commands_of_a_configuration_with_spaces_can_be_copied(
    tmp_path: Path, write_config, tiny_llama, capsys
) -> None:
    path = shutil.copy(write_config(base_model_id=str(tiny_llama), **UNTRAINED), tmp_path / "my own.yaml")

    assert doctor.main(["--config", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"ready: python -m scripts.train_sft --config '{path}' --dry-run"
