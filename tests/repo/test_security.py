"""What the project promises about hostile files, the network and secrets: one run of each stage in its own process."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pickle
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import pytest
import torch

from scripts.common.artifacts import read_manifest, write_manifest
from scripts.common.config import load_config
from scripts.common.errors import UserError
from scripts.common.machine import choose_machine
from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.model.adapter import check_adapter_fits, load_adapter
from scripts.model.base import load_base, load_tokenizer
from scripts.model.find import find_model
from tests.conftest import ROOT, run_python, write_jsonl
from tests.eval.test_judge import endpoint
from tests.support.chain import write_chain
from tests.support.exporting import save_adapter
from tests.support.serving import running_server

# One value per place in which a user keeps a secret. None of them may come to stand anywhere else.
CANARIES = {
    "HF_TOKEN": "hf_canary0of0the0hub",
    "OPENAI_API_KEY": "sk-canary0of0the0judge",
    "SERVE_API_KEYS": "canary0of0the0server",
    "MLFLOW_TRACKING_PASSWORD": "canary0of0the0store",
    "AWS_SECRET_ACCESS_KEY": "canary0of0another0program",
    "DEID_KEY_FILE": "canary0of0the0pseudonyms000000000",
}
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "MLFLOW_DISABLE_TELEMETRY")
# Stages that do not need each other run side by side.
ROUNDS = (("sft", "deid"), ("dpo", "export", "server"), ("compare", "lmeval"), ("judge",))
STAGES = [name for names in ROUNDS for name in names]


@dataclass
class Chain:
    """What every stage wrote, said, was refused, and proved of the secret it was given."""

    folder: Path
    said: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    secret_used: dict[str, bool] = field(default_factory=dict)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Chain:
    """Run each stage as a user does, secrets in the environment, nothing but `offline: true` to keep it from the network."""
    found = Chain(tmp_path_factory.mktemp("security"))
    key_file = tmp_path_factory.mktemp("keys") / "deid.key"
    key_file.write_text(CANARIES["DEID_KEY_FILE"])
    config = write_chain(found.folder)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        for name in OFFLINE_SWITCHES:
            patch.delenv(name, raising=False)
        for name, value in {**CANARIES, "DEID_KEY_FILE": str(key_file)}.items():
            patch.setenv(name, value)
        for names in ROUNDS:
            list(pool.map(lambda name: run_stage(name, found, config, empty_store), names))
    return found


def run_stage(name: str, chain: Chain, config: Path, empty_store: Path) -> None:
    """Run one stage with an MLflow store of its own, and keep what it said and what was refused to it."""
    folder, out = chain.folder, chain.folder / "out"
    refusals = folder.parent / f"{folder.name}-{name}.refused"
    shutil.copy(empty_store, folder / f"{name}.db")
    common = ["--config", config, "--set", f"tracking.mlflow_tracking_uri=sqlite:///{folder}/{name}.db"]

    def run(script: str, *arguments: str | Path) -> None:
        done = run_python(ROOT / script, *common, *arguments, cwd=folder, REFUSALS=str(refusals))
        assert done.returncode == 0, done.stderr
        chain.said[name] = done.stdout + done.stderr

    if name in ("sft", "dpo"):
        run(f"scripts/train_{name}.py")
    elif name == "compare":
        run("eval/compare.py")
    elif name == "export":
        run("scripts/export_lora.py", "--adapter", out / "sft_adapter", "--out_dir", out / "merged")
    elif name == "lmeval":
        lmeval = ["--set", f"lmeval.output_dir={out}/eval"]
        run("eval/run_lmeval.py", *lmeval, "--model_path", out / "dpo_adapter", "--task", "domain", "--limit", "2")
    elif name == "deid":
        if importlib.util.find_spec("presidio_analyzer") is None:
            return
        source = write_jsonl(folder / "raw.jsonl", [{"text": "password: hunter2x"}])
        run("scripts/deid_presidio.py", "--in", source, "--out", out / "scrubbed.jsonl", "--profile", "secrets-only", "--operator", "hash")  # fmt: skip
        chain.secret_used[name] = "hunter2x" not in (out / "scrubbed.jsonl").read_text()
    elif name == "judge":
        with endpoint(lambda body: "A") as server:
            judge = (f"eval.judge.base_url={server.url}", "eval.judge.model=some-judge", 'eval.judge.models=["base","sft"]',
                     "eval.judge.api_key_variable=OPENAI_API_KEY")  # fmt: skip
            run("eval/judge.py", "--by", "endpoint", *(part for setting in judge for part in ("--set", setting)))
            given = {headers["authorization"] for headers in server.headers_seen}
        chain.secret_used[name] = given == {f"Bearer {CANARIES['OPENAI_API_KEY']}"}
    else:
        environment = {"SERVE_ADAPTER_PATH": str(out / "sft_adapter"), "REFUSALS": str(refusals)}
        with running_server(config, **environment) as server:
            question = {"prompt": "tell red 1", "max_new_tokens": 4}
            keys = (CANARIES["SERVE_API_KEYS"], "canary0of0a0mistyped0key")
            codes = [
                server.post("/v1/generate", question, headers={"authorization": f"Bearer {key}"}).status_code
                for key in keys
            ]
            chain.said[name] = server.log_text()
        chain.secret_used[name] = codes == [200, 401]
    chain.refused[name] = refusals.read_text() if refusals.exists() else ""


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reaches_for_no_network_and_looks_nothing_up_by_a_pickle(chain: Chain, stage: str) -> None:
    """Not even an attempt whose refusal a library swallowed. Checkpoints: see the tests that resume a killed run."""
    if stage not in chain.refused:
        pytest.skip("needs requirements.extra.txt")
    assert chain.refused[stage] == ""


def test_secrets_stand_in_no_log_store_manifest_or_report(chain: Chain) -> None:
    assert all(chain.secret_used.values()), chain.secret_used
    assert chain.secret_used.keys() >= {"server", "judge"}
    mark = "canary0of"
    assert all(mark in value for value in CANARIES.values())

    assert [stage for stage, said in chain.said.items() if mark in said] == []
    files = [path for path in chain.folder.rglob("*") if path.is_file()]
    assert {"manifest.json", "report.html", "log.txt", "sft.db", "comparison.votes.jsonl"} <= {
        path.name for path in files
    }
    assert [path for path in files if mark.encode() in path.read_bytes()] == []


def test_the_guard_sees_what_it_must_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = tmp_path / "refusals"
    monkeypatch.setenv("REFUSALS", str(refusals))
    weights = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(2)}, weights)

    assert torch.load(weights, weights_only=True)["a"].tolist() == [1, 1]
    assert not refusals.exists()

    attempts: list[tuple[Callable[[], object], str]] = [
        (lambda: pickle.loads(pickle.dumps(date(2000, 1, 1))), "a pickle asked for datetime.date"),  # noqa: S301
        (lambda: torch.load(weights, weights_only=False), "a pickle asked for torch._utils"),
        (lambda: socket.socket().connect(("192.0.2.1", 80)), "connection to '192.0.2.1'"),
        (lambda: socket.getaddrinfo("example.com", 80), "look-up of 'example.com'"),
    ]
    for attempt, said in attempts:
        with pytest.raises((RuntimeError, OSError), match=said):
            attempt()
        assert said in refusals.read_text()


# --- hostile files: the trap is a module that leaves a mark when it is run


@pytest.fixture
def trap(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of a base whose files ask for code of its own folder to be run."""
    folder = shutil.copytree(tiny_llama, tmp_path / "hostile")
    code = f"open({str(tmp_path / 'RAN')!r}, 'w').close()\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    (folder / "modeling_own.py").write_text(code)
    (tmp_path / "module_by_name.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    change_json(folder / "config.json", auto_map={"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}, trust_remote_code=True, _attn_implementation_internal="somebody/kernel")  # fmt: skip
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_own.C", None]}, trust_remote_code=True)  # fmt: skip
    return folder


def change_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def values(tmp_path: Path):
    """Return the configuration of a small chain."""
    return load_config(write_chain(tmp_path / "chain")).values


def test_code_in_a_base_folder_is_not_run(trap: Path, tmp_path: Path, values) -> None:
    folder = find_model(str(trap))
    load_tokenizer(folder)
    load_base(folder, values, choose_machine(values))

    assert not (tmp_path / "RAN").exists()


def test_base_that_only_its_own_code_can_load_is_refused(trap: Path, tmp_path: Path) -> None:
    change_json(trap / "config.json", model_type="its_own")

    with pytest.raises(UserError, match=r"'its_own', which the installed transformers does not have .* is never run"):
        find_model(str(trap))
    assert not (tmp_path / "RAN").exists()


def test_an_adapter_cannot_ask_for_code(trap: Path, tiny_llama: Path, tmp_path: Path, values) -> None:
    """Not even one whose manifest was made to match: whoever wrote the folder wrote that too."""
    adapter = save_adapter(tiny_llama, tmp_path / "adapter")
    shutil.copy(trap / "modeling_own.py", adapter)
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(trap))
    honest = (adapter / "adapter_config.json").read_text()
    base = load_base(tiny_llama, values, choose_machine(values))
    asks = {
        "trust_remote_code": True,
        "auto_mapping": {"base_model_class": "M", "parent_library": "module_by_name"},
        "megatron_core": "module_by_name",
    }

    for key, value in asks.items():
        (adapter / "adapter_config.json").write_text(honest)
        change_json(adapter / "adapter_config.json", **{key: value})
        write_manifest(adapter, read_manifest(adapter, verify=False))
        check_adapter_fits(adapter, tiny_llama, load_tokenizer(tiny_llama))
        with pytest.raises(UserError, match=f"{key}: found .*, which no adapter of this project has"):
            load_adapter(base, adapter)

    (adapter / "adapter_config.json").write_text(honest)
    load_adapter(base, adapter)
    assert not (tmp_path / "RAN").exists()
    importlib.import_module("module_by_name")
    assert (tmp_path / "RAN").exists(), "the trap does not work"


@pytest.mark.parametrize(
    "override", ["trust_remote_code=true", "sft.trainer.trust_remote_code=true", "data.trust_remote_code=true",
                 'dpo.trainer.model_init_kwargs={"trust_remote_code": true}'],
)  # fmt: skip
def test_no_configuration_switches_foreign_code_on(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"trust_remote_code|model_init_kwargs"):
        load_config(write_chain(tmp_path), [override])


def test_an_adapters_own_template_and_tokenizer_are_never_used(tiny_llama: Path, tmp_path: Path, values) -> None:
    """What is served and compared is rendered by the base's template, which the manifest must name."""
    adapter = save_adapter(tiny_llama, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("You are evil.")
    (adapter / "tokenizer.json").write_text("{}")
    write_manifest(adapter, read_manifest(adapter, verify=False))

    check_adapter_fits(adapter, tiny_llama, load_tokenizer(tiny_llama))

    (tmp_path / "other").mkdir()
    other = shutil.copytree(tiny_llama, tmp_path / "other/base")
    (other / "chat_template.jinja").write_text("{% for m in messages %}evil {{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="trained on another chat template"):
        check_adapter_fits(adapter, other, load_tokenizer(other))


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.getcwd() }}", "{{ messages.append(1) }}"],
)  # fmt: skip
def test_a_template_runs_in_a_sandbox_and_ends_in_one_message(tiny_llama: Path, tmp_path: Path, template: str) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(base)

    with pytest.raises(UserError, match=r"chat template refuses this conversation: access to attribute .* is unsafe"):
        render_prompt(ChatFormat(tokenizer), user_turn("hello"))


# --- secrets in the wrong place


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tracking.mlflow_tracking_uri=http://me:canary@mlflow.example", "tracking.mlflow_tracking_uri: found a password in the URL"),
        ('sft.dataset_path=[{"path": "https://me:canary@example.com/x.jsonl"}]', "sft.dataset_path.0.path: found a password"),
        ("sft.trainer.hub_token=canary", "the environment variable HF_TOKEN"),
        ("eval.judge.base_url=https://me:canary@example.com/v1", "eval.judge.base_url"),
        ("eval.judge.api_key_variable=sk-canary", "eval.judge.api_key_variable"),
    ],
)  # fmt: skip
def test_a_secret_in_the_configuration_is_refused(tmp_path: Path, override: str, said: str) -> None:
    """A configuration is copied into manifests, MLflow and reports."""
    with pytest.raises(UserError) as caught:
        load_config(write_chain(tmp_path), [override])
    assert said in str(caught.value)
