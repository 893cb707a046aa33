"""An adapter handed over as it is: what others get answers as before, and says nothing of this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from scripts.common.artifacts import read_manifest
from scripts.common.config import load_config
from scripts.common.schema import Lora
from scripts.export.sharing import VLLM_RANKS, vllm_command, without_folders
from scripts.export_lora import main
from scripts.model.adapter import add_lora, merge_initialisation, save_initialisation
from scripts.model.base import load_full_precision
from tests.conftest import ROOT, run_python, write_jsonl
from tests.support.exporting import save_adapter
from tests.support.hub import TOKEN, Hub, running_hub

# Run far from this repository, with plain transformers and PEFT only, on what the hub has.
ELSEWHERE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, uploaded, trained = sys.argv[1:]
ids = torch.arange(5, 45).reshape(2, 20)
def logits(adapter):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        return PeftModel.from_pretrained(plain, adapter).eval()(ids).logits
assert AutoTokenizer.from_pretrained(uploaded).chat_template
assert torch.equal(logits(uploaded), logits(trained))
print("alike")
"""


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter of the tiny Llama, with data of its own; tests do not change it."""
    folder = tmp_path_factory.mktemp("adapters")
    data = write_jsonl(folder / "letters.jsonl", [{"instruction": "a", "input": "", "output": "b"}] * 4)
    return save_adapter(tiny_llama, folder / "sft_adapter", data=data)


@pytest.fixture
def hub(tiny_llama: Path):
    """Return a hub that has the base."""
    with running_hub() as running:
        running.hold("them/base", tiny_llama)
        yield running


def online(hub: Hub, folder: Path, token: str = TOKEN) -> dict[str, str]:
    """Return the environment of somebody who is logged in."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


@pytest.mark.slow
def test_an_uploaded_adapter_is_private_and_answers_as_the_trained_one(
    adapter: Path, hub: Hub, write_config, tmp_path: Path
) -> None:
    done = run_python(
        ROOT / "scripts/export_lora.py", "--config", write_config(), "--adapter", adapter, "--base_model", "them/base",
        "--format", "adapter", "--out_dir", "mine", "--push_to_hub", "me/mine", "--set", "offline=false",
        cwd=tmp_path, **online(hub, tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = hub.repositories["me/mine"]
    assert made.private
    assert "(private)" in done.stderr
    assert hub.unknown == []
    assert {name: (tmp_path / "mine" / name).read_bytes() for name in made.files} == made.files
    command = "vllm serve them/base --enable-lora --lora-modules sft=me/mine --max-lora-rank 8"
    card = made.files["README.md"].decode()
    facts = yaml.safe_load(card.split("---")[1])
    assert (facts["base_model"], facts["library_name"]) == ("them/base", "peft")
    assert facts["tags"] == ["sft", "lora"]
    assert command in card
    assert command in done.stderr
    assert "read again from disk against base + adapter" in card, "the proof came first"
    assert "`letters.jsonl`" in card
    for name, content in made.files.items():
        assert not re.search(rb"(/[\w.-]+){2,}/(letters|sft_adapter|tiny-llama)|" + str(tmp_path).encode(), content), (
            name
        )

    alike = run_python(
        "-c", ELSEWHERE, "them/base", "me/mine", adapter, cwd=tmp_path, **online(hub, tmp_path / "other")
    )
    assert alike.stdout.split() == ["alike"], alike.stderr


PUSH = "from pathlib import Path; from scripts.export_lora import push; from scripts.common.errors import entry_point; import sys\n@entry_point\ndef main(argv=None):\n    logging.basicConfig(level='INFO'); push(Path('mine'), 'me/mine'); return 0\nimport logging; sys.exit(main())"


def test_what_is_public_already_is_called_public_and_a_wrong_token_loses_nothing(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "there").mkdir()
    hub.hold("me/mine", tmp_path / "there")
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/offline'}"}

    done = run_python("-c", PUSH, cwd=tmp_path, **online(hub, tmp_path), **paths)
    refused = run_python("-c", PUSH, cwd=tmp_path, **online(hub, tmp_path, "hf_wrong"), **paths)

    assert (done.returncode, list(hub.repositories["me/mine"].files)) == (0, ["README.md"]), done.stderr
    assert "me/mine (public)" in done.stderr
    assert refused.returncode == 2
    assert "the Hub refused it" in refused.stderr
    assert "The result is whole in mine" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_folder_to_hand_over_is_read_like_the_trained_one_and_replaced_by_the_next(
    adapter: Path, write_config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = ["--config", str(write_config()), "--adapter", str(adapter), "--format", "adapter"]
    for _ in range(2):
        assert main([*config, "--out_dir", "mine"]) == 0

    mine, trained = read_manifest("mine", stages=("sft",)), read_manifest(adapter)
    same = {"tokenizer_sha256", "split", "created", "parent", "packages"}
    assert mine.model_dump(include=same) == trained.model_dump(include=same)
    assert mine.metrics == trained.metrics | {"format": "adapter"}
    assert mine.base_model.fingerprint == trained.base_model.fingerprint
    assert [entry.path for entry in mine.datasets] == ["letters.jsonl"]
    assert (mine.config["lora"], "tracking" in mine.config) == (trained.config["lora"], False)
    said = capsys.readouterr().err
    assert "with --base_model ID others find the base by its id" in said
    assert str(tmp_path) not in Path("mine/README.md").read_text()
    base = trained.base_model.id
    assert (
        main([*config[:2], "--adapter", "mine", "--base_model", base, "--format", "adapter", "--out_dir", "again"]) == 0
    )


def test_a_trained_adapter_is_never_replaced_by_a_copy_and_keeps_its_weights(
    tiny_llama: Path, write_config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    adapter = save_adapter(tiny_llama, tmp_path / "a")
    config = ["--config", str(write_config()), "--adapter", str(adapter), "--format", "adapter"]
    before = read_manifest(adapter)

    assert main([*config, "--out_dir", str(adapter)]) == 2
    assert read_manifest(adapter) == before
    assert "is a trained adapter and is not replaced by a copy" in capsys.readouterr().err
    assert main([*config, "--dtype", "bf16"]) == 2
    assert "wanted none, as an adapter keeps its weights" in capsys.readouterr().err


def test_paths_are_cut_and_texts_that_look_like_paths_are_not() -> None:
    facts = {"datasets": [{"path": "/home/anna/a.jsonl"}], "data": {"system_prompt": "/home is where you live"}}
    facts |= {
        "sft": {
            "dataset_path": [{"path": "/x/b.jsonl"}, "data/c.jsonl", "../d.jsonl"],
            "trainer": {"deepspeed": "/x/zero.json"},
        }
    }

    assert without_folders(facts) == {
        "datasets": [{"path": "a.jsonl"}],
        "data": {"system_prompt": "/home is where you live"},
        "sft": {
            "dataset_path": [{"path": "b.jsonl"}, "data/c.jsonl", "d.jsonl"],
            "trainer": {"deepspeed": "zero.json"},
        },
    }


# --- vLLM, which refuses an adapter of a larger rank than it was started for


def rank_of(folder: Path) -> str | None:
    """Return the rank for which vLLM would be started."""
    command = vllm_command(folder, "BASE", "sft", "DIR")
    return command and command.rpartition(" ")[2]


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        ({"r": 1}, "1"), ({"r": 4}, "8"), ({"r": 16}, "16"), ({"r": 17}, "32"), ({"r": 300, "rank_pattern": {}}, "320"),
        ({"r": 8, "rank_pattern": {"q_proj": 40, "v_proj": 4}}, "64"), ({"r": 513}, None), ({"r": 8, "use_dora": True}, None),
    ],
)  # fmt: skip
def test_vllm_is_started_for_the_rank_that_was_saved(tmp_path: Path, config: dict, rank: str | None) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    assert rank_of(tmp_path) == rank


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_is_saved_with_its_start_behind_it_has_twice_the_rank(tiny_llama: Path, tmp_path: Path, init: str) -> None:
    model = add_lora(load_full_precision(tiny_llama), Lora(r=16, alpha=32, init=init), str(tiny_llama))
    save_initialisation(model, tmp_path)
    more = merge_initialisation(model, tmp_path)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False, **more)

    assert rank_of(tmp_path / "adapter") == "32"


def test_the_line_in_the_readme_has_the_rank_of_the_demo_and_says_where_others_find_theirs() -> None:
    text = (ROOT / "serve/README.md").read_text(encoding="utf-8")
    lora = load_config(ROOT / "configs/demo.yaml").values.lora

    assert lora.init == "default"
    assert re.findall(r"--max-lora-rank (\d+)", text) == [str(min(rank for rank in VLLM_RANKS if rank >= lora.r))]
    assert f"{', '.join(map(str, VLLM_RANKS[1:-1]))} or {VLLM_RANKS[-1]}" in text
