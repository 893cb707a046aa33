"""Hostile and damaged adapters, manifests, base models, servers and stores, given to the commands as a user gives them.

Each line of the tables is a case: what is spoilt, and the part of the one message that makes it helpful. Whoever made a
hostile adapter can make its manifest vouch for it, so here it does.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.common.artifacts import sha256_file
from tests.support.exporting import save_adapter
from tests.support.projects import Project, replace, write_project

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, empty_store: Path) -> Path:
    folder = write_project(tmp_path_factory.mktemp("project"))
    shutil.copytree(tiny_llama, folder / "model")
    shutil.copy(empty_store, folder / "mlflow.db")
    save_adapter(folder / "model", folder / "sft_adapter")
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Project:
    folder = tmp_path / "project"
    shutil.copytree(template, folder, copy_function=os.link)  # files are replaced, never written into
    (folder / "mlflow.db").unlink()
    shutil.copy(template / "mlflow.db", folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLM_CONFIG", "")
    return Project(folder, capsys)


def test_the_project_is_right_before_it_is_spoilt(project: Project) -> None:
    for stage in ("sft", "dpo"):
        code, message = project.run(stage, "--config", "config.yaml", "--dry-run")
        assert code == 0, message
    code, message = project.run("serve", "--config", "config.yaml")
    assert code == 0, message


# --- the command line ---

CLI: list[tuple[str, list[str], str]] = [
    ("export", ["--config", "config.yaml", "--adapter", ""], ".: no valid manifest.json"),
    ("export", ["--config", "config.yaml", "--adapter", "sft.jsonl"], "sft.jsonl"),
    ("export", ["--config", "config.yaml", "--adapter", "nowhere"], "nowhere: no such folder"),
    ("export", ["--config", "config.yaml", "--adapter", "model"], "model: no valid manifest.json"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--base_model", "../../../etc"], "../../../etc"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--base_model", "a/b/c/d"], "a/b/c/d: no such model folder"),
    ("export", ["--config", "config.yaml", "--adapter", "sft_adapter", "--base_model", "sft_adapter"], "is an adapter"),
    ("lmeval", ["--config", "config.yaml", "--model_path", "base", "--task", ""], "--task: found an empty name"),
    ("lmeval", ["--config", "config.yaml", "--model_path", "base", "--task", "multiple_choice=sft.jsonl"], "sft.jsonl:1: found instruction, output"),
    ("compare", ["--config", "config.yaml", "--models", "sft=sft_adapter,nowhere"], "eval.models.sft: nowhere: no such folder"),
    ("deid", ["--in", "sft.jsonl", "--out", "o.jsonl", "--fields", ""], "deid.fields"),
    ("deid", ["--in", "sft.jsonl", "--out", "o.jsonl", "--set", "deid.recognizers=sft.jsonl"], "sft.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "arguments", "said"), CLI, ids=[f"{n}-{stage}" for n, (stage, *_) in enumerate(CLI)])
def test_command_line(stage: str, arguments: list[str], said: str, project: Project) -> None:
    project.refused(said, stage, *arguments)


TRAINER = {
    "save_steps=0": "sft.trainer.save_steps: found 0; wanted a number above 0",
    "logging_steps=-1": "sft.trainer.logging_steps: found -1; wanted a number above 0",
    "eval_steps=0": "sft.trainer.eval_steps: found 0; wanted a number above 0",
    "eval_steps=null": "sft.trainer.eval_steps: found null; wanted a number above 0",
    "per_device_eval_batch_size=0": "sft.trainer.per_device_eval_batch_size: found 0",
    "deepspeed=nowhere.json": "sft.trainer: TRL refuses these settings",
}


@pytest.mark.parametrize("argument", TRAINER)
def test_argument_of_the_trainer(argument: str, project: Project) -> None:
    project.refused(TRAINER[argument], "sft", "--config", "config.yaml", "--set", f"sft.trainer.{argument}")


# --- adapters ---


def edit_json(name: str, **changes: object) -> Change:
    """Change keys of a JSON file; `...` removes one."""

    def change(folder: Path) -> None:
        tree = json.loads((folder / name).read_text(encoding="utf-8"))
        tree.update(changes)
        replace(folder / name, json.dumps({key: value for key, value in tree.items() if value is not ...}))

    return change


def write(name: str, content: str | bytes) -> Change:
    """Replace a file."""
    return lambda folder: replace(folder / name, content)


def edit_tensors(change: Callable[[dict], dict], name: str = "adapter_model.safetensors") -> Change:
    """Change the tensors of a file."""

    def edit(folder: Path) -> None:
        from safetensors.torch import load, save

        replace(folder / name, save(change(load((folder / name).read_bytes())), {"format": "pt"}))

    return edit


def swap_a_and_b(tensors: dict) -> dict:
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {name.replace(part, other[part]): value for name, value in tensors.items() for part in other if part in name}


def header(text: str, length: int | None = None) -> bytes:
    """Write a safetensors file of a header only."""
    return struct.pack("<Q", len(text) if length is None else length) + text.encode()


def seal(folder: Path) -> None:
    """Make the manifest vouch for the files as they are, as whoever made a hostile adapter would."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"] = {name: sha256_file(folder / name) for name in manifest["files"] if (folder / name).is_file()}
    replace(folder / "manifest.json", json.dumps(manifest))


SLOW = "(.*a){40}$|" * 40 + "(x+x+)+y"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTERS: dict[str, tuple[Change, str]] = {
    "config is nothing": (write(CONFIG, ""), CONFIG),
    "config is a list": (write(CONFIG, "[]"), CONFIG),
    "config is empty": (write(CONFIG, "{}"), CONFIG),
    "config is nested": (write(CONFIG, "[" * 100_000), CONFIG),
    "config is not text": (write(CONFIG, b"\xff\xfe\x00"), CONFIG),
    "config is gone": (lambda folder: (folder / CONFIG).unlink(), CONFIG),
    "regex bomb for modules": (edit_json(CONFIG, target_modules=SLOW), f"{CONFIG}: target_modules"),
    "regex for modules": (edit_json(CONFIG, target_modules=".*proj"), f"{CONFIG}: target_modules"),
    "modules are numbers": (edit_json(CONFIG, target_modules=[1, 2]), f"{CONFIG}: target_modules"),
    "modules are none": (edit_json(CONFIG, target_modules=None), f"{CONFIG}: target_modules"),
    "regex bomb for excluded modules": (edit_json(CONFIG, exclude_modules=SLOW), f"{CONFIG}: exclude_modules"),
    "regex bomb for ranks": (edit_json(CONFIG, rank_pattern={SLOW: 4}), f"{CONFIG}: rank_pattern"),
    "regex bomb for alphas": (edit_json(CONFIG, alpha_pattern={SLOW: 4}), f"{CONFIG}: alpha_pattern"),
    "regex bomb for layers": (edit_json(CONFIG, layers_pattern=SLOW, layers_to_transform=[0]), f"{CONFIG}: layers_"),
    "rank of a universe": (edit_json(CONFIG, r=10**9), f"{CONFIG}: r"),
    "another rank": (edit_json(CONFIG, r=8), f"{CONFIG}: r"),
    "negative rank": (edit_json(CONFIG, r=-4), f"{CONFIG}: r"),
    "rank as text": (edit_json(CONFIG, r="4"), f"{CONFIG}: r"),
    "no rank": (edit_json(CONFIG, r=...), f"{CONFIG}: r"),
    "alpha as text": (edit_json(CONFIG, lora_alpha="8"), f"{CONFIG}: lora_alpha"),
    "alpha is no number": (edit_json(CONFIG, lora_alpha=float("nan")), f"{CONFIG}: lora_alpha"),
    "alpha without end": (edit_json(CONFIG, lora_alpha=1e308), f"{CONFIG}: lora_alpha"),
    "alpha of 400 digits": (edit_json(CONFIG, lora_alpha=10**400), f"{CONFIG}: lora_alpha"),
    "prompt tuning": (edit_json(CONFIG, peft_type="PROMPT_TUNING"), f"{CONFIG}: peft_type"),
    "unknown kind": (edit_json(CONFIG, peft_type="MAGIC"), f"{CONFIG}: peft_type"),
    "kind is a list": (edit_json(CONFIG, peft_type=["LORA"]), f"{CONFIG}: peft_type"),
    "classification": (edit_json(CONFIG, task_type="SEQ_CLS"), f"{CONFIG}: task_type"),
    "module of Python": (edit_json(CONFIG, megatron_config={"a": 1}, megatron_core="antigravity"), f"{CONFIG}: megatron_config"),
    "class of Python": (edit_json(CONFIG, auto_mapping={"base_model_class": "Popen", "parent_library": "subprocess"}), f"{CONFIG}: auto_mapping"),
    "whole modules": (edit_json(CONFIG, modules_to_save=["lm_head"]), f"{CONFIG}: modules_to_save"),
    "copied layers": (edit_json(CONFIG, layer_replication=[[0, 2], [0, 2]]), f"{CONFIG}: layer_replication"),
    "moves base weights": (edit_json(CONFIG, init_lora_weights="pissa"), f"{CONFIG}: init_lora_weights"),
    "key from the future": (edit_json(CONFIG, quantum=True), f"{CONFIG}: quantum"),
    "weights are nothing": (write(WEIGHTS, b""), f"{WEIGHTS}: cannot be read"),
    "weights are cut off": (lambda folder: replace(folder / WEIGHTS, (folder / WEIGHTS).read_bytes()[:-100]), "sft_adapter"),
    "weights are an archive": (write(WEIGHTS, b"PK\x03\x04" + bytes(500)), "sft_adapter"),
    "header without end": (write(WEIGHTS, header("{}", 2**63)), "sft_adapter"),
    "header is no JSON": (write(WEIGHTS, header("{{{{{{{{")), "sft_adapter"),
    "header beyond the file": (write(WEIGHTS, header('{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}')), "sft_adapter"),
    "header of a negative shape": (write(WEIGHTS, header('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}')), "sft_adapter"),
    "no tensor": (edit_tensors(lambda tensors: {}), "does not fit the base model"),
    "a tensor too many": (edit_tensors(lambda tensors: {**tensors, "more": next(iter(tensors.values())).clone()}), "more has no place in the base"),
    "a tensor too few": (edit_tensors(lambda tensors: dict(list(tensors.items())[1:])), "is missing from the file"),
    "A and B swapped": (edit_tensors(swap_a_and_b), "sft_adapter"),
    "whole numbers": (edit_tensors(lambda tensors: {name: value.long() for name, value in tensors.items()}), "sft_adapter"),
    "NaN": (edit_tensors(lambda tensors: {name: value * float("nan") for name, value in tensors.items()}), "NaN or infinite"),
    "infinite": (edit_tensors(lambda tensors: {name: value * float("inf") for name, value in tensors.items()}), "NaN or infinite"),
    "huge": (edit_tensors(lambda tensors: {name: value * 1e30 for name, value in tensors.items()}), "NaN or infinite"),
    "zeros": (edit_tensors(lambda tensors: {name: value * 0 for name, value in tensors.items()}), "zero"),
    "flat": (edit_tensors(lambda tensors: {name: value.reshape(-1) for name, value in tensors.items()}), "sft_adapter"),
    "pickle only": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "holds no adapter_model.safetensors"),
    "weights are a folder": (lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()), f"{WEIGHTS}: was added"),
    "weights link to themselves": (lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to(WEIGHTS)), f"{WEIGHTS}: was added"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter(case: str, project: Project) -> None:
    change, said = ADAPTERS[case]
    change(project.folder / "sft_adapter")
    seal(project.folder / "sft_adapter")

    project.refused(said, "serve", "--config", "config.yaml")


FOR_DPO = {"regex bomb for modules": "", "a tensor too few": "", "NaN": "", "zeros": "", "huge": "step 0: policy or reference gives no finite"}  # fmt: skip


@pytest.mark.parametrize("case", FOR_DPO)
def test_adapter_to_train_on(case: str, project: Project) -> None:
    change, said = ADAPTERS[case]
    change(project.folder / "sft_adapter")
    seal(project.folder / "sft_adapter")

    project.refused(FOR_DPO[case] or said, "dpo", "--config", "config.yaml")


MANIFESTS: dict[str, tuple[Change, str]] = {
    "nested": (write("manifest.json", "[" * 100_000), "no valid manifest.json"),
    "UTF-16": (write("manifest.json", "{}".encode("utf-16")), "no valid manifest.json"),
    "a folder": (lambda folder: ((folder / "manifest.json").unlink(), (folder / "manifest.json").mkdir()), "no valid manifest.json"),
    "links to itself": (lambda folder: ((folder / "manifest.json").unlink(), (folder / "manifest.json").symlink_to("manifest.json")), "no valid manifest.json"),
    "files are a list": (edit_json("manifest.json", files=["a"]), "no valid manifest.json"),
    "files are none": (edit_json("manifest.json", files={}), "manifest.json"),
    "hashes are numbers": (edit_json("manifest.json", files={"adapter_config.json": 5}), "manifest.json"),
    "file above the folder": (edit_json("manifest.json", files={"../sft.jsonl": "0" * 64}), "manifest.json"),
    "file from the root": (edit_json("manifest.json", files={"/etc/hostname": "0" * 64}), "manifest.json"),
    "file with NUL": (edit_json("manifest.json", files={"a\0b": "0" * 64}), "manifest.json"),
    "stage is a list": (edit_json("manifest.json", stage=["sft"]), "found a folder of stage"),
    "stage of another kind": (edit_json("manifest.json", stage="merged"), "found a folder of stage `merged`, wanted sft or dpo"),
    "schema of the future": (edit_json("manifest.json", schema=99), "found schema 99, wanted 1"),
    "no base": (edit_json("manifest.json", base_model=...), "manifest.json"),
    "base is text": (edit_json("manifest.json", base_model="model"), "manifest.json"),
    "base without a fingerprint": (edit_json("manifest.json", base_model={"id": "model", "revision": None}), "manifest.json"),
    "fingerprint is a number": (edit_json("manifest.json", base_model={"id": "model", "revision": None, "fingerprint": 5}), "manifest.json"),
    "base is a list": (edit_json("manifest.json", base_model={"id": ["model"], "revision": None, "fingerprint": "0"}), "manifest.json"),
    "no tokenizer": (edit_json("manifest.json", tokenizer_sha256=...), "manifest.json"),
    "template is null": (edit_json("manifest.json", chat_template_sha256=None), "manifest.json"),
    "no run": (edit_json("manifest.json", mlflow=None), "manifest.json"),
    "no split": (edit_json("manifest.json", split=...), "manifest.json"),
    "configuration is text": (edit_json("manifest.json", config="r: 8"), "manifest.json"),
    "another base": (edit_json("manifest.json", base_model={"id": "other", "revision": None, "fingerprint": "0" * 64}), "another base model"),
}  # fmt: skip


@pytest.mark.parametrize("stage", ["dpo", "export"])
@pytest.mark.parametrize("case", MANIFESTS)
def test_manifest(case: str, stage: str, project: Project) -> None:
    change, said = MANIFESTS[case]
    change(project.folder / "sft_adapter")
    more = {"dpo": ["--dry-run"], "export": ["--adapter", "sft_adapter"]}

    if case == "another base" and stage == "export":
        said = "base_model_id: other is not in the local cache"
    project.refused(said, stage, "--config", "config.yaml", *more[stage])


# --- base models ---

TEMPLATE = "chat_template.jinja"
ONLY_TRAINING = "template that shouts"
MODELS: dict[str, tuple[Change, str]] = {
    "config is nothing": (write("config.json", ""), "model"),
    "config is a list": (write("config.json", "[]"), "model"),
    "config is nested": (write("config.json", "[" * 100_000), "model"),
    "unknown architecture": (edit_json("config.json", model_type="magic"), "model"),
    "no architecture": (edit_json("config.json", model_type=...), "model"),
    "code of its own": (edit_json("config.json", model_type="magic", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}), "model"),
    "an encoder": (edit_json("config.json", model_type="vit"), "model"),
    "sizes are text": (edit_json("config.json", hidden_size="large"), "model"),
    "other sizes": (edit_json("config.json", hidden_size=128, intermediate_size=77), "model"),
    "layers without weights": (edit_json("config.json", num_hidden_layers=3), "model"),
    "heads that do not divide": (edit_json("config.json", num_attention_heads=7), "model"),
    "weights are nothing": (write("model.safetensors", b""), "model"),
    "weights are cut off": (lambda folder: replace(folder / "model.safetensors", (folder / "model.safetensors").read_bytes()[:-100]), "model"),
    "header without end": (write("model.safetensors", header("{}", 2**62)), "model"),
    "header is no JSON": (write("model.safetensors", header("{{{{{{{{")), "model"),
    "a tensor too few": (edit_tensors(lambda tensors: dict(list(tensors.items())[1:]), "model.safetensors"), "model"),
    "tokenizer is nothing": (write("tokenizer.json", ""), "model"),
    "tokenizer is a list": (write("tokenizer.json", "[]"), "model"),
    "tokenizer is gone": (lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], "model"),
    "tokenizer settings are a list": (write("tokenizer_config.json", "[]"), "model"),
    "template that does not parse": (write(TEMPLATE, "{% for message in messages %}{{ message"), "chat template"),
    "template that refuses": (write(TEMPLATE, "{{ raise_exception('only pirates may speak') }}"), "only pirates may speak"),
    "template without end": (write(TEMPLATE, "{% for a in range(10**9) %}{{ a }}{% endfor %}"), "chat template"),
    "template that looks around": (write(TEMPLATE, "{{ messages.__class__.__mro__ }}"), "chat template"),
    "template that writes nothing": (write(TEMPLATE, "{# nothing #}"), "chat template"),
    "template that shouts": (write(TEMPLATE, "{% for m in messages %}{{ m['content'] | upper }}{{ eos_token }}{% endfor %}"), "chat template"),
}  # fmt: skip


@pytest.mark.parametrize("stage", ["sft", "serve"])
@pytest.mark.parametrize("case", [case for case in MODELS if case != ONLY_TRAINING])
def test_base_model(case: str, stage: str, project: Project) -> None:
    change, said = MODELS[case]
    change(project.folder / "model")
    project.configure(serve__adapter_path=None)

    project.refused(said, stage, "--config", "config.yaml")


def test_base_model_that_can_answer_but_not_be_trained(project: Project) -> None:
    change, said = MODELS[ONLY_TRAINING]
    change(project.folder / "model")

    project.refused(said, "sft", "--config", "config.yaml")


# --- servers and stores ---

SERVERS = {
    "base as a name": ({"serve__adapters": {"base": "sft_adapter"}}, "serve.adapters.base: wanted a name"),
    "path as a name": ({"serve__adapters": {"../x": "sft_adapter"}}, "serve.adapters.../x: wanted a name"),
    "file as an adapter": ({"serve__adapter_path": "sft.jsonl"}, "sft.jsonl"),
    "data folder as an adapter": ({"serve__adapter_path": "."}, "no valid manifest.json"),
    "empty name of an adapter": ({"serve__adapter_path": ""}, "serve.adapter_path"),
    "name with NUL": ({"serve__adapter_path": "a\0b"}, "serve.adapter_path"),
    "keys in no file": ({"serve__api_keys_file": "nowhere"}, "serve.api_keys_file"),
    "keys in a folder": ({"serve__api_keys_file": "model"}, "serve.api_keys_file"),
    "base that is no model": ({"base_model_id": "sft_adapter"}, "sft_adapter: is an adapter"),
    "base that is a file": ({"base_model_id": "sft.jsonl"}, "sft.jsonl"),
    "base with NUL": ({"base_model_id": "a\0b"}, "base_model_id"),
    "base that is nothing": ({"base_model_id": ""}, "base_model_id"),
    "base above": ({"base_model_id": "../../.."}, "../../.."),
    "context without end": ({"serve__max_context_tokens": 10**12}, "serve.max_context_tokens"),
}


@pytest.mark.parametrize("case", SERVERS)
def test_server(case: str, project: Project) -> None:
    changes, said = SERVERS[case]
    project.configure(**changes)

    project.refused(said, "serve", "--config", "config.yaml")


STORES = ["", "magic://host", "sqlite:///", "sqlite:///:memory:", "sft.jsonl", "sqlite:///sft.jsonl", "http://127.0.0.1:9", "a\0b"]  # fmt: skip


@pytest.mark.parametrize("uri", STORES)
def test_store(uri: str, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    project.configure(tracking__mlflow_tracking_uri=uri)

    project.refused("tracking.mlflow_tracking_uri", "sft", "--config", "config.yaml")
