"""Models: found or refused with a mend, told apart by content, adapted on the right layers, saved as plain LoRA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from scripts.common.artifacts import write_manifest
from scripts.common.errors import UserError
from scripts.common.modeling import (
    DEMO_MODEL,
    add_lora,
    base_fingerprint,
    check_adapter_fits,
    find_model,
    linear_layers,
    load_adapter,
    load_base,
    load_tokenizer,
    merge_initialisation,
    save_initialisation,
)
from scripts.common.rendering import template_sha256, tokenizer_sha256
from scripts.common.runtime import Machine
from scripts.common.schema import Config, Lora, Quantization
from tests.conftest import save_tiny_model

CPU = Machine("cpu", torch.float32, 1, 1, ())
IDS = torch.arange(3, 43).reshape(2, 20)


def load(folder: Path):
    """Load a tiny base in fp32."""
    return load_base(folder, Config(), CPU).eval()


def logits(model) -> torch.Tensor:
    """Return what the model says about fixed ids."""
    with torch.no_grad():
        return model.eval()(IDS).logits


def take_steps(model, steps: int = 3) -> list[torch.Tensor]:
    """Train the adapter a little on fixed ids; return the last gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return [parameter.grad.clone() for parameter in parameters]


@pytest.fixture(scope="module")
def trained_adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter that changes the tiny Llama's answers, with a valid manifest."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapters") / "trained"
    model, tokenizer = add_lora(load(tiny_llama), Lora(r=4), str(tiny_llama)), load_tokenizer(tiny_llama)
    take_steps(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    write_manifest(
        folder, "sft", tokenizer_sha256=tokenizer_sha256(tokenizer), chat_template_sha256=template_sha256(tokenizer),
        base_model={"id": str(tiny_llama), "revision": None, "fingerprint": base_fingerprint(tiny_llama)},
        parent=None, datasets=[], split={}, config={}, mlflow={"run_id": None}, metrics={},
    )  # fmt: skip
    return folder


@pytest.fixture
def copy_of(tmp_path: Path):
    """Return a function that copies a folder, to be spoilt."""

    def copy(folder: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return copy


# --- finding a model


def test_local_folder_is_found(tiny_llama: Path) -> None:
    assert find_model(str(tiny_llama)) == tiny_llama


def test_hub_id_without_a_hub_names_the_demo_model_and_the_switch() -> None:
    with pytest.raises(UserError) as caught:
        find_model("nobody-at-all/no-such-model")

    told = str(caught.value)
    assert told.startswith("base_model_id: nobody-at-all/no-such-model is not in the local cache")
    assert DEMO_MODEL in told
    assert "python -m scripts.get_demo_model" in told
    assert "HF_HUB_OFFLINE=1" in told


@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/folder", "models/no-such-model"])
def test_missing_folder_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=r"no such model folder. Correct base_model_id"):
        find_model(name)


def test_folder_without_safetensors_is_refused(copy_of, tiny_llama: Path) -> None:
    folder = copy_of(tiny_llama)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        find_model(str(folder))


def test_folder_without_config_is_refused(copy_of, tiny_llama: Path) -> None:
    folder = copy_of(tiny_llama)
    (folder / "config.json").unlink()

    with pytest.raises(UserError, match=r"holds no config\.json"):
        find_model(str(folder))


def test_adapter_given_as_base_is_refused(trained_adapter: Path) -> None:
    """transformers would load it as a base with something on top, and training would go wrong in silence."""
    with pytest.raises(UserError, match="is an adapter, wanted a base or merged model"):
        find_model(str(trained_adapter))


def test_tokenizer_without_eos_is_refused(copy_of, tiny_llama: Path) -> None:
    folder = copy_of(tiny_llama)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))

    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(folder)


# --- the fingerprint


def test_fingerprint_ignores_folder_and_float_type(copy_of, tiny_llama: Path, tmp_path: Path) -> None:
    model = load(tiny_llama)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")

    assert base_fingerprint(copy_of(tiny_llama)) == base_fingerprint(tiny_llama)
    assert base_fingerprint(tmp_path / "bf16") == base_fingerprint(tiny_llama)


def test_fingerprint_ignores_how_weights_are_cut_into_files(tiny_llama: Path, tmp_path: Path) -> None:
    load(tiny_llama).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")

    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert base_fingerprint(tmp_path / "sharded") == base_fingerprint(tiny_llama)


def test_fingerprint_tells_other_weights_of_the_same_shape(tiny_llama: Path, tmp_path: Path) -> None:
    """An instruct variant has the configuration of its base and other weights."""
    model = load(tiny_llama)
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            parameter.mul_(1.05)
    model.save_pretrained(tmp_path / "tuned")

    assert base_fingerprint(tmp_path / "tuned") != base_fingerprint(tiny_llama)


def test_fingerprint_tells_another_configuration(copy_of, tiny_llama: Path) -> None:
    folder = copy_of(tiny_llama)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.5}))

    assert base_fingerprint(folder) != base_fingerprint(tiny_llama)


# --- what gets an adapter

LLAMA_LIKE = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("llama", LLAMA_LIKE),
        ("qwen2", LLAMA_LIKE),
        ("mistral", LLAMA_LIKE),
        ("gemma", LLAMA_LIKE),
        ("phi", ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]),
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
    ],
)
def test_auto_adapts_every_linear_layer_of_the_blocks_and_no_other(tmp_path: Path, architecture, layers) -> None:
    model = load(save_tiny_model(tmp_path / architecture, architecture))
    before = logits(model)

    assert linear_layers(model) == layers
    wrapped = add_lora(model, Lora(r=2), "base")

    adapted = [name.rpartition(".")[2] for name, module in wrapped.named_modules() if hasattr(module, "lora_A")]
    trainable = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert set(adapted) == set(layers)
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 2 * len(adapted)
    assert torch.equal(logits(wrapped), before), "a fresh adapter must not change the model"
    gradients = take_steps(wrapped, steps=2)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_named_modules_are_the_only_ones_adapted(tiny_llama: Path) -> None:
    wrapped = add_lora(load(tiny_llama), Lora(target_modules=["q_proj", "v_proj"]), "base")

    assert {n.rpartition(".")[2] for n, m in wrapped.named_modules() if hasattr(m, "lora_A")} == {"q_proj", "v_proj"}


def test_module_that_does_not_exist_is_refused_with_those_that_do(tiny_llama: Path) -> None:
    with pytest.raises(UserError, match=r"c_attn(.|\n)*Linear layers of this model: down_proj, gate_proj, k_proj"):
        add_lora(load(tiny_llama), Lora(target_modules=["c_attn"]), "base")


def test_lora_flags_reach_the_saved_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    lora = Lora(r=3, alpha=5, dropout=0.25, use_rslora=True, use_dora=True)

    add_lora(load(tiny_llama), lora, "my/base").save_pretrained(tmp_path / "a", save_embedding_layers=False)

    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    wanted = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.25, "use_rslora": True, "use_dora": True}
    assert {key: saved[key] for key in wanted} == wanted
    assert saved["base_model_name_or_path"] == "my/base"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
def test_saved_adapter_reproduces_the_trained_model_on_the_plain_base(tiny_llama, tmp_path, init, rslora) -> None:
    """PiSSA and OLoRA change the base in memory; whoever loads the adapter has only the plain base."""
    from peft import PeftModel

    torch.manual_seed(0)
    model = add_lora(load(tiny_llama), Lora(r=4, alpha=8, init=init, use_rslora=rslora), "base")
    save_initialisation(model, tmp_path)
    take_steps(model)
    trained = logits(model)
    model.save_pretrained(
        tmp_path / "a",
        selected_adapters=["default"],
        save_embedding_layers=False,
        **merge_initialisation(model, tmp_path),
    )

    loaded = PeftModel.from_pretrained(load(tiny_llama), tmp_path / "a")

    assert not torch.allclose(trained, logits(load(tiny_llama)), atol=1e-2), "training must have changed something"
    assert torch.allclose(logits(loaded), trained, atol=1e-4)


# --- loading an adapter


def test_adapter_loads_trainable_only_when_asked(trained_adapter: Path, tiny_llama: Path) -> None:
    frozen = load_adapter(load(tiny_llama), trained_adapter)
    trainable = load_adapter(load(tiny_llama), trained_adapter, trainable=True)

    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, _ in trainable.named_parameters() if "lora_" in n
    }


def test_adapter_with_nan_is_refused(copy_of, trained_adapter: Path, tiny_llama: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(trained_adapter)
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    with pytest.raises(UserError, match="1 tensors hold NaN or infinite values"):
        load_adapter(load(tiny_llama), folder)


def test_adapter_for_other_shapes_is_refused(copy_of, trained_adapter: Path, tiny_gpt2: Path) -> None:
    with pytest.raises(UserError, match="does not fit the base model"):
        load_adapter(load(tiny_gpt2), trained_adapter)


def test_adapter_with_a_missing_tensor_is_refused(copy_of, trained_adapter: Path, tiny_llama: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(trained_adapter)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    with pytest.raises(UserError, match="is missing from the file"):
        load_adapter(load(tiny_llama), folder)


def test_adapter_weights_other_than_safetensors_are_never_read(
    copy_of, trained_adapter: Path, tiny_llama: Path
) -> None:
    folder = copy_of(trained_adapter)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")

    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        load_adapter(load(tiny_llama), folder)


def test_adapter_fits_the_base_it_was_made_on(trained_adapter: Path, tiny_llama: Path) -> None:
    assert check_adapter_fits(trained_adapter, tiny_llama, load_tokenizer(tiny_llama))["stage"] == "sft"


@pytest.mark.parametrize("other", ["base model", "tokenizer", "chat template"])
def test_adapter_on_another_base_tokenizer_or_template_is_refused(other, trained_adapter, tiny_llama, tmp_path) -> None:
    folder, tokenizer = tiny_llama, load_tokenizer(tiny_llama)
    if other == "base model":
        folder = save_tiny_model(tmp_path / "other", seed=1)
    elif other == "tokenizer":
        tokenizer.add_tokens(["extra"])
    else:
        tokenizer.chat_template += " "

    with pytest.raises(UserError, match=f"was trained on another {other}"):
        check_adapter_fits(trained_adapter, folder, tokenizer)


# --- 4-bit


def load_4bit(folder: Path):
    """Load a tiny base in NF4 with an adapter."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = Config(quantization=Quantization(load_in_4bit=True))
    return add_lora(load_base(folder, config, Machine("cpu", torch.bfloat16, 1, 1, ())), Lora(r=4), "base")


def test_scoring_some_positions_does_not_copy_the_head_for_every_row(tiny_llama: Path) -> None:
    """What torch multiplies in batches (bmm) it first spreads out, as it does under a frozen base."""
    model = load(tiny_llama).requires_grad_(False)
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        some = model(IDS, logits_to_keep=3).logits
    products = [shape for event in profile.events() if event.name == "aten::bmm" for shape in event.input_shapes]
    assert not [shape for shape in products if model.config.vocab_size in shape]
    assert torch.allclose(some, logits(model)[:, -3:], atol=1e-6)


def test_4bit_gradients_survive_an_evaluation(tiny_llama: Path) -> None:
    """On CPUs with AVX512-BF16 an evaluation repacks the weights in place, after which gradients vanish in silence."""

    def gradients(model) -> torch.Tensor:
        model.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.requires_grad])

    model = load_4bit(tiny_llama)
    before = gradients(model)
    first_look = logits(model)
    after = gradients(model)

    assert before.abs().sum() > 0
    assert torch.allclose(after, before, rtol=1e-3, atol=1e-6)
    assert torch.allclose(logits(model), first_look)
