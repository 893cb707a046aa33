"""The adapter: on the right layers, saved as plain LoRA, loaded only where it fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts.common.errors import UserError
from scripts.common.schema import Lora
from scripts.model.adapter import (
    add_lora,
    check_adapter_fits,
    linear_layers,
    load_adapter,
    merge_initialisation,
    save_initialisation,
)
from scripts.model.base import load_tokenizer
from tests.conftest import save_tiny_model
from tests.support.models import load, logits, take_steps
from tests.support.nested import save_tiny_gemma3

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


def test_nested_model_is_adapted_in_its_language_model_alone(tmp_path: Path) -> None:
    """Its vision tower has layers of the same names, and never sees a text."""
    model = load(save_tiny_gemma3(tmp_path / "gemma3"))
    towers = {name for name, module in model.named_modules() if "vision" in name and hasattr(module, "weight")}
    assert any(name.endswith("q_proj") for name in towers)

    assert linear_layers(model) == LLAMA_LIKE
    wrapped = add_lora(model, Lora(r=2), "base")

    adapted = [name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 2 * len(LLAMA_LIKE)
    assert all(".language_model.layers." in name for name in adapted)


def test_named_modules_of_a_nested_model_are_those_of_its_language_model(tmp_path: Path) -> None:
    wrapped = add_lora(load(save_tiny_gemma3(tmp_path / "gemma3")), Lora(target_modules=["q_proj"]), "base")

    adapted = [name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")]
    assert [name.partition("language_model.")[2] for name in adapted] == [
        f"layers.{n}.self_attn.q_proj" for n in (0, 1)
    ]


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
    assert check_adapter_fits(trained_adapter, tiny_llama, load_tokenizer(tiny_llama)).stage == "sft"


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
