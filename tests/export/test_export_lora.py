"""Export: what lies on disk answers as base + adapter do, in every library, and nothing else is ever published."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from scripts.common.artifacts import read_manifest, sha256_file
from scripts.common.errors import UserError
from scripts.common.schema import Config, Lora
from scripts.export import merging
from scripts.export_lora import main, push
from scripts.model.base import load_tokenizer
from tests.conftest import run_python, save_tiny_model, write_jsonl
from tests.support.exporting import figures, save_adapter, save_tiny_qwen2
from tests.support.nested import save_tiny_gemma3
from tests.support.stops import FAMILIES, change_generation_config, save_family_model, stop_ids

OUT = Path("outputs/merged_full_model")

# Run far from this repository, with plain transformers and PEFT only.
ELSEWHERE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, merged, dtype = sys.argv[1:]
assert not any(name.split(".")[0] in ("scripts", "eval", "serve") for name in sys.modules)
ids = torch.arange(5, 45).reshape(2, 20)
with torch.no_grad():
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    bare = plain(ids).logits
    ours = PeftModel.from_pretrained(plain, adapter).eval()(ids).logits
    found = AutoModelForCausalLM.from_pretrained(merged)
    assert str(found.dtype) == "torch." + dtype, found.dtype
    theirs = found.float().eval()(ids).logits
tokenizer = AutoTokenizer.from_pretrained(merged)
assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
print(float((ours - theirs).abs().max()), float((ours - bare).abs().max()), found.config.get_text_config().use_cache, found.generation_config.eos_token_id)
"""


@pytest.fixture(scope="module")
def tiny_qwen2(tmp_path_factory) -> Path:
    """Return the folder of a two-layer Qwen2."""
    return save_tiny_qwen2(tmp_path_factory.mktemp("models") / "tiny-qwen2")


@pytest.fixture(scope="module")
def tiny_gemma3(tmp_path_factory) -> Path:
    """Return the folder of a two-layer Gemma 3 with a vision tower, whose configuration is nested."""
    return save_tiny_gemma3(tmp_path_factory.mktemp("models") / "tiny-gemma3")


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory) -> Path:
    """Return an adapter of the tiny Llama; tests do not change it."""
    return save_adapter(tiny_llama, tmp_path_factory.mktemp("adapters") / "sft_adapter")


@pytest.fixture
def export(write_config, tmp_path):
    """Return a function that exports an adapter as a user would; the working folder is the test's own."""
    path = write_config()

    def run(adapter: Path, *arguments: str) -> int:
        return main(["--config", str(path), "--adapter", str(adapter), *arguments])

    return run


def copy_of(folder: Path, name: str = "copy") -> Path:
    """Copy a folder into the working folder, to be spoilt."""
    return Path(shutil.copytree(folder, Path.cwd() / name))


def nothing_left() -> bool:
    """Return whether there is neither a result nor half of one."""
    return not OUT.exists() and not list(Path("outputs").rglob("*.safetensors"))


# --- what is merged answers alike


@pytest.mark.parametrize("architecture", ["tiny_llama", "tiny_gpt2", "tiny_qwen2", "tiny_gemma3"])
def test_merged_model_on_disk_equals_base_and_adapter_in_plain_libraries(
    architecture, request, export, tmp_path
) -> None:
    base = request.getfixturevalue(architecture)
    made = save_adapter(base, tmp_path / "sft_adapter")
    weights = sha256_file(base / "model.safetensors")

    assert export(made, "--dtype", "fp32") == 0

    found = figures(OUT)
    assert found["merge"]["max_abs_logit_diff"] <= 1e-5
    assert found["reloaded"]["max_abs_logit_diff"] <= 1e-5
    assert found["reloaded"]["greedy_agreement"] == 1
    assert found["adapter_effect"]["max_abs_logit_diff"] > 1e-2
    (tmp_path / "elsewhere").mkdir()
    done = run_python("-c", ELSEWHERE, base, made, OUT.resolve(), "float32", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    difference, effect, use_cache, eos = done.stdout.split()
    assert float(difference) <= 1e-5 < 1e-2 < float(effect)
    assert (use_cache, eos) == ("True", "[1]")
    assert sha256_file(base / "model.safetensors") == weights, "the base on disk must stay as it was"


@pytest.mark.parametrize(
    "lora",
    [
        Lora(r=4, alpha=8, use_rslora=True),
        Lora(r=4, alpha=8, use_dora=True),
        Lora(r=4, alpha=8, target_modules=["q_proj"]),
    ],
    ids=["rslora", "dora", "one kind of layer"],
)
def test_scaling_of_other_kinds_of_lora_survives_the_merge(lora: Lora, tiny_llama: Path, export, tmp_path) -> None:
    assert export(save_adapter(tiny_llama, tmp_path / "a", lora), "--dtype", "fp32") == 0

    assert figures(OUT)["reloaded"]["max_abs_logit_diff"] <= 1e-5


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_narrower_type_is_held_to_the_tokens_it_chooses(dtype: str, stored: str, adapter: Path, export) -> None:
    assert export(adapter, "--dtype", dtype) == 0

    found = figures(OUT)
    assert found["dtype"] == dtype
    assert json.loads((OUT / "config.json").read_text())["dtype"] == stored
    assert found["merge"]["max_abs_logit_diff"] <= 1e-5 < found["reloaded"]["max_abs_logit_diff"]
    assert found["reloaded"]["greedy_agreement"] >= 0.98


def test_default_type_is_the_one_the_base_is_stored_in(tiny_llama: Path, export, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    base = copy_of(tiny_llama, "base")
    AutoModelForCausalLM.from_pretrained(tiny_llama).to(torch.bfloat16).save_pretrained(base)

    assert export(save_adapter(base, tmp_path / "a")) == 0

    assert figures(OUT)["dtype"] == "bf16"


def test_large_model_is_saved_in_shards(adapter: Path, export, monkeypatch) -> None:
    monkeypatch.setattr(merging, "SHARD_SIZE", "100KB")

    assert export(adapter) == 0

    assert len(list(OUT.glob("model-*.safetensors"))) > 1
    assert (OUT / "model.safetensors.index.json").is_file()


def test_prompts_of_the_user_are_compared_too(tiny_llama: Path, export, tmp_path, caplog) -> None:
    rows = [{"instruction": f"say {word}", "input": "", "output": word} for word in ("red", "blue", "green")]
    data = write_jsonl(tmp_path / "mine.jsonl", rows)
    made = save_adapter(tiny_llama, tmp_path / "a", data=data)

    assert export(made) == 0
    assert figures(OUT)["prompts"] == 8 + len(rows)

    write_jsonl(data, rows[:2])
    assert export(made) == 0
    assert figures(OUT)["prompts"] == 8
    assert (
        f"{data}: changed, so its prompts are not compared"
        in (OUT.with_name(OUT.name + ".run") / "log.txt").read_text()
    )


# --- the gate


def spoil_layer(model):
    """Merge, and lose one layer."""
    merged = model.merge_and_unload()
    merged.model.layers[1].mlp.down_proj.weight.data.mul_(1.05)
    return merged


def wrong_alpha(model):
    """Merge with a scale that is a tenth too large."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 1.1
    return model.merge_and_unload()


def without_adapter(model):
    """Forget the adapter."""
    return model.unload()


@pytest.mark.parametrize("fault", [spoil_layer, wrong_alpha, without_adapter])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_wrong_merge_is_caught_and_not_written(fault, dtype, adapter: Path, export, monkeypatch, capsys) -> None:
    monkeypatch.setattr(merging, "merge", fault)

    assert export(adapter, "--dtype", dtype) == 2

    assert "does not compute what base + adapter compute" in capsys.readouterr().err
    assert nothing_left()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_file_spoilt_on_its_way_to_disk_is_caught(dtype, adapter: Path, export, monkeypatch, capsys) -> None:
    from safetensors.torch import load_file, save_file

    save = merging.save_merged

    def save_and_spoil(model, tokenizer, dtype, folder) -> None:
        save(model, tokenizer, dtype, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.self_attn.o_proj.weight"] *= -1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(merging, "save_merged", save_and_spoil)

    assert export(adapter, "--dtype", dtype) == 2

    assert "read again from disk" in capsys.readouterr().err
    assert nothing_left()


def test_weak_adapter_that_is_lost_is_caught(tiny_llama: Path, export, tmp_path, monkeypatch) -> None:
    """Its whole effect may be near the fixed bound, so the bound follows the effect."""
    made = save_adapter(tiny_llama, tmp_path / "a", strength=5e-4)
    assert export(made, "--dtype", "fp32") == 0
    assert 1e-3 < figures(OUT)["adapter_effect"]["max_abs_logit_diff"] < 1e-2

    shutil.rmtree(OUT)
    monkeypatch.setattr(merging, "merge", wrong_alpha)
    assert export(made, "--dtype", "fp32") == 2
    assert nothing_left()


def test_adapter_trained_on_a_quantised_base_is_merged_into_the_full_one_and_the_effect_is_said(
    tiny_llama: Path, export, tmp_path, caplog
) -> None:
    pytest.importorskip("bitsandbytes")
    made = save_adapter(tiny_llama, tmp_path / "a", load_in_4bit=True)

    assert export(made, "--dtype", "fp32") == 0

    found = figures(OUT)
    assert found["reloaded"]["max_abs_logit_diff"] <= 1e-5 < found["quantized_base"]["max_abs_logit_diff"]
    assert "quantization_config" not in json.loads((OUT / "config.json").read_text())
    assert "trained on the base in 4 bits" in (OUT.with_name(OUT.name + ".run") / "log.txt").read_text()
    assert "base as quantised in training + adapter" in (OUT / "README.md").read_text()


# --- what is handed on


def test_manifest_names_the_adapter_and_the_run_hangs_below_its_run(
    tiny_llama: Path, export, tmp_path, empty_store
) -> None:
    import mlflow

    made = save_adapter(tiny_llama, tmp_path / "a")
    assert export(made) == 0

    manifest = read_manifest(OUT, stages=("merged",))
    parent = read_manifest(made)
    assert manifest.parent.sha256 == parent.sha256
    assert manifest.base_model == parent.base_model
    assert manifest.tokenizer_sha256 == parent.tokenizer_sha256
    (run,) = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(
        [mlflow.get_experiment_by_name("llm-finetune-sft-dpo").experiment_id]
    )
    assert run.info.run_id == manifest.mlflow.run_id
    agreed = figures(OUT)["reloaded"]["greedy_agreement"]
    assert float(run.data.tags["summary.reloaded.greedy_agreement"]) == pytest.approx(agreed)
    assert not [name for name in run.data.metrics if not name.startswith("system/")]
    assert run.data.tags["artifact_sha256"] == manifest.sha256


def test_merged_model_is_served(adapter: Path, export) -> None:
    from scripts.common.machine import Machine
    from serve.adapters import load_models

    assert export(adapter) == 0
    config = Config.model_validate({"serve": {"adapter_path": str(OUT.resolve())}})
    models = load_models(config, Machine("cpu", torch.float32, 1, 1, ()))

    assert models.default == "merged"


def test_folders_keep_the_contract_of_vllm(adapter: Path, export) -> None:
    """What vLLM reads: of an adapter plain LoRA keys of known modules, of a model safetensors, config and tokenizer."""
    from safetensors import safe_open

    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["bias"] == "none"
    assert config["r"] <= 64
    assert not any(
        config.get(key)
        for key in ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern", "trainable_token_indices")
    )
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
    kinds = {(name.split(".")[-3], name.split(".")[-2]) for name in names}
    assert {kind for _, kind in kinds} == {"lora_A", "lora_B"}
    assert {module for module, _ in kinds} == set(config["target_modules"])
    assert all(name.startswith("base_model.model.model.layers.") for name in names)

    assert export(adapter) == 0
    described = json.loads((OUT / "config.json").read_text())
    assert described["architectures"] == ["LlamaForCausalLM"]
    assert {"auto_map", "quantization_config"}.isdisjoint(described)
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        path.name for path in OUT.iterdir()
    }
    with safe_open(OUT / "model.safetensors", framework="pt") as tensors:
        assert not [name for name in tensors.keys() if "lora" in name or "base_layer" in name]  # noqa: SIM118


def test_no_path_of_this_machine_is_handed_on(tiny_llama: Path, adapter: Path, export) -> None:
    assert export(adapter) == 0

    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert str(tiny_llama) not in (OUT / name).read_text()


# --- where its answers end


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_model_stops_where_its_base_stops(name: str, export, tmp_path) -> None:
    """By plain transformers, which know nothing of the template's closing token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    family = FAMILIES[name]
    base = save_family_model(tmp_path / "base", family)
    listed = json.loads((base / "generation_config.json").read_text())["eos_token_id"]

    assert export(save_adapter(base, tmp_path / "sft_adapter"), "--dtype", "fp32") == 0

    written = json.loads((OUT / "generation_config.json").read_text())["eos_token_id"]
    assert set(written) == stop_ids(base, family) == stop_ids(OUT, family)
    assert set(written) >= set(listed if isinstance(listed, list) else [listed])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(OUT), AutoTokenizer.from_pretrained(OUT)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    ids = torch.tensor([ids["input_ids"]])
    assert tokenizer.decode(model.generate(ids, max_new_tokens=8)[0, ids.shape[1] :]) == family.closing


def test_stops_of_the_base_are_not_narrowed_and_its_recommendation_stays(tiny_llama: Path, export, tmp_path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    change_generation_config(base, eos_token_id=[0, 4], repetition_penalty=1.5)

    assert export(save_adapter(base, tmp_path / "sft_adapter")) == 0

    written = json.loads((OUT / "generation_config.json").read_text())
    assert written["eos_token_id"] == [0, 1, 4], "1 closes an answer of the tiny template"
    assert written["repetition_penalty"] == 1.5


# --- the model card


def comparison(adapter: Path, sha256: str) -> None:
    """Write a comparison report about an adapter."""
    folder = Path("outputs/comparison")
    folder.mkdir(parents=True)
    estimate = {"value": 0.5, "ci_low": 0.25, "ci_high": 0.75}
    report = {
        "verdict": {"text": "SFT is better than the base."},
        "models": ["base", "sft"],
        "lineage": {"base": {}, "sft": {"sha256": sha256}},
        "metrics": [{"title": "Rules kept", "unit": "share", "n": 40, "models": {"base": estimate, "sft": estimate}}],
    }
    (folder / "report.json").write_text(json.dumps(report))


def test_card_tells_data_training_figures_limits_and_licence(tiny_llama: Path, export, tmp_path) -> None:
    import yaml

    base = copy_of(tiny_llama, "base")
    (base / "LICENSE").write_text("Apache License\nVersion 2.0")
    data = write_jsonl(tmp_path / "mine.jsonl", [{"instruction": "a", "input": "", "output": "b"}] * 4)
    made = save_adapter(base, tmp_path / "a", data=data)
    report = {"schema": 1, "output": {"sha256": sha256_file(data)}, "counts": {"read": 4, "quarantined": 0}}
    (tmp_path / "mine.jsonl.deid_report.json").write_text(json.dumps(report))
    comparison(made, read_manifest(made).sha256)

    assert export(made) == 0

    card = (OUT / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "3 records trained on, 1 held out. De-identified; the report counts 4 read, 0 quarantined" in card
    assert "LoRA r 4, LoRA alpha 8" in card
    assert "Held-out loss 2.0000 → 1.5000" in card
    assert "> SFT is better than the base." in card
    assert "| Rules kept, share | 40 | 0.5 (0.25 to 0.75) | 0.5 (0.25 to 0.75) |" in card
    assert "## Limits" in card
    assert (OUT / "LICENSE").read_text() == (base / "LICENSE").read_text()


def test_card_quotes_no_figures_of_another_adapter_and_claims_no_unknown_licence(adapter: Path, export) -> None:
    comparison(adapter, "0" * 64)

    assert export(adapter) == 0

    card = (OUT / "README.md").read_text()
    assert "about another adapter" in card
    assert "Rules kept" not in card
    assert "No licence was found beside" in card
    assert "license:" not in card


# --- bad input


def refused(export, capsys, adapter: Path, *arguments: str) -> str:
    """Return the error message; nothing may have been written."""
    capsys.readouterr()  # what was logged while the adapter was made
    assert export(adapter, *arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert nothing_left()
    return message


def test_folders_of_the_configuration_are_used(adapter: Path, export) -> None:
    chosen = ["export.output_dir=here", "export.gguf_dir=there", "export.dtype=bf16"]
    settings = [part for item in chosen for part in ("--set", item)]
    assert export(adapter, *settings) == 0
    assert json.loads(Path("here/config.json").read_text())["dtype"] == "bfloat16"
    assert export(adapter, *settings, "--format", "gguf") == 0
    assert list(Path("there").glob("*.gguf"))


def test_missing_adapter(export, capsys) -> None:
    assert "no_adapter: no such folder. Run the stage that writes it first" in refused(
        export, capsys, Path("no_adapter")
    )


def test_adapter_of_another_base(adapter: Path, export, capsys, tmp_path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=5)

    message = refused(export, capsys, adapter, "--base_model", str(other))

    assert "was trained on another base model" in message


def test_tampered_adapter(adapter: Path, export, capsys) -> None:
    spoilt = copy_of(adapter)
    with (spoilt / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x01\x02\x03\x04")

    assert "adapter_model.safetensors: changed since manifest.json was written" in refused(export, capsys, spoilt)


def test_changed_alpha(adapter: Path, export, capsys) -> None:
    spoilt = copy_of(adapter)
    config = json.loads((spoilt / "adapter_config.json").read_text())
    (spoilt / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))

    assert "adapter_config.json: changed since" in refused(export, capsys, spoilt)


def test_half_written_adapter(adapter: Path, export, capsys) -> None:
    spoilt = copy_of(adapter)
    (spoilt / "manifest.json").unlink()

    assert "no valid manifest.json, so it was not finished" in refused(export, capsys, spoilt)


def test_adapter_without_effect(tiny_llama: Path, export, capsys, tmp_path) -> None:
    made = save_adapter(tiny_llama, tmp_path / "a", strength=0)

    assert "has no effect" in refused(export, capsys, made)


def test_vocabulary_larger_than_the_embedding(tiny_llama: Path, export, capsys, tmp_path) -> None:
    base = copy_of(tiny_llama, "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    last = max(tokenizer["model"]["vocab"].values())
    tokenizer["added_tokens"].append(
        {"id": last + 1, "content": "<|more|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    )  # fmt: skip
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    made = save_adapter(base, tmp_path / "a")

    assert "tokens and its config.json says vocab_size" in refused(export, capsys, made)


@pytest.mark.parametrize("missing", [0, 1])
def test_vocabulary_of_a_nested_configuration_is_that_of_its_language_model(
    tiny_llama: Path, tmp_path, missing: int
) -> None:
    from transformers import AutoConfig

    tokenizer = load_tokenizer(tiny_llama)
    text = {"vocab_size": len(tokenizer) - missing, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoConfig.for_model("gemma3", text_config=text).save_pretrained(tmp_path)

    with pytest.raises(UserError, match=f"vocab_size {text['vocab_size']}") if missing else nullcontext():
        merging.check_vocabulary(tmp_path, tokenizer)


def test_tokenizer_of_another_vocabulary(tiny_llama: Path, adapter: Path, export, capsys) -> None:
    base = copy_of(tiny_llama, "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))

    assert "was trained on another tokenizer" in refused(export, capsys, adapter, "--base_model", str(base))


def test_merged_model_given_as_adapter(adapter: Path, export, capsys) -> None:
    assert export(adapter, "--out_dir", "merged") == 0

    assert "found a folder of stage `merged`, wanted sft or dpo" in refused(export, capsys, Path("merged"))


@pytest.mark.parametrize(("form", "dtype"), [("safetensors", "q8_0"), ("gguf", "bf16")])
def test_type_of_the_other_format(form: str, dtype: str, adapter: Path, export, capsys) -> None:
    assert f"--dtype {dtype}: is not a type of --format {form}" in refused(
        export, capsys, adapter, "--format", form, "--dtype", dtype
    )


def test_upload_while_offline(adapter: Path, export, capsys) -> None:
    assert "--push_to_hub: found offline: true" in refused(export, capsys, adapter, "--push_to_hub", "me/mine")


def test_upload_to_something_that_is_no_repository(adapter: Path, export, capsys) -> None:
    assert "wanted OWNER/NAME" in refused(
        export, capsys, adapter, "--push_to_hub", "not a name", "--set", "offline=false"
    )


def test_failed_upload_says_that_the_model_is_whole(tmp_path) -> None:
    with pytest.raises(UserError, match=r"the Hub refused it[^\0]*The result is whole in"):
        push(tmp_path, "me/mine")  # the tests have no network


def test_folder_of_something_else_is_never_replaced(adapter: Path, export, capsys) -> None:
    mine = Path("thesis")
    mine.mkdir()
    (mine / "chapter1.txt").write_text("years of work")

    assert "--out_dir: thesis is there already and is not a folder of stage `merged`" in refused(
        export, capsys, adapter, "--out_dir", "thesis"
    )
    assert "export.output_dir: thesis is there already" in refused(
        export, capsys, adapter, "--set", "export.output_dir=thesis"
    )
    assert "is not a folder of stage `merged`" in refused(export, capsys, adapter, "--out_dir", str(adapter))
    assert (mine / "chapter1.txt").read_text() == "years of work"
    assert read_manifest(adapter).stage == "sft"


def test_too_little_space_is_said_before_the_work(adapter: Path, export, capsys, monkeypatch) -> None:
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))

    assert "GiB are free. Free some space" in refused(export, capsys, adapter)


def test_disk_that_fills_up_leaves_nothing(adapter: Path, export, tmp_path) -> None:
    program = (
        "import resource, sys; from scripts.export_lora import main, push; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)); sys.exit(main(sys.argv[1:]))"
    )
    done = run_python(
        "-c", program, "--config", tmp_path / "config.yaml", "--adapter", adapter, "--out_dir", tmp_path / OUT,
        "--set", f"tracking.mlflow_tracking_uri={tmp_path}/mlruns",
    )  # fmt: skip

    assert done.returncode == 2, done.stderr
    assert "Free some space or choose another" in done.stderr
    assert "Traceback" not in done.stderr
    assert nothing_left()


# --- interrupted


def test_interrupted_save_keeps_the_previous_export(adapter: Path, export, monkeypatch) -> None:
    assert export(adapter) == 0
    before = read_manifest(OUT)
    save = merging.save_merged

    def save_and_stop(*arguments) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "save_merged", save_and_stop)

    assert export(adapter, "--dtype", "bf16") == 130

    assert read_manifest(OUT) == before
    assert not (OUT.with_name(OUT.name + ".run") / "finished").exists()


def test_export_that_was_changed_by_hand_may_be_replaced(adapter: Path, export) -> None:
    assert export(adapter) == 0
    (OUT / "config.json").write_text("{}")

    assert export(adapter) == 0

    assert read_manifest(OUT).stage == "merged"


# --- the demo model


MEMORY = """
import sys, threading
from scripts.export_lora import main, push
from scripts.model.base import load_tokenizer
def held(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) / 2**10
at = sys.argv.index("--")
main(sys.argv[1:at])  # a tiny model first, which brings all libraries and the store into memory
before = held("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
code = main(sys.argv[at + 1 :])
print(before, held("VmHWM"), flush=True)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc to measure memory")
def test_demo_model_is_merged_exactly_and_in_little_memory(
    demo_model: Path, tiny_llama: Path, export, tmp_path
) -> None:
    """Beside what the libraries take: one fp32 model, never two."""
    made = save_adapter(demo_model, tmp_path / "a", Lora(r=16, alpha=32), strength=0.01)
    tiny = save_adapter(tiny_llama, tmp_path / "tiny_adapter")
    config = ("--config", tmp_path / "config.yaml")
    first = (*config, "--adapter", tiny, "--base_model", tiny_llama, "--out_dir", tmp_path / "tiny")
    done = run_python(
        "-c", MEMORY, *first, "--", *config, "--adapter", made, "--base_model", demo_model, "--out_dir", tmp_path / OUT,
        timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    found = figures(OUT)
    assert found["dtype"] == "bf16"
    assert found["merge"]["max_abs_logit_diff"] <= 1e-3
    assert found["reloaded"]["greedy_agreement"] >= 0.98
    before, peak = map(float, done.stdout.split())
    assert (peak - before) / 2**10 <= 1.3 * found["model_fp32_gib"]
