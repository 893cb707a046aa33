"""What an adapter is put on: the linear layers of the language model; anything that would be lost is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from scripts.common.errors import UserError
from scripts.common.schema import Lora
from scripts.model.adapter import add_lora, load_adapter
from scripts.model.targets import choose_targets, linear_layers, targets_of_folder
from tests.conftest import save_tiny_model
from tests.support.architectures import save_family
from tests.support.experts import save_tiny_mixture
from tests.support.models import load, logits, take_steps
from tests.support.nested import save_tiny_gemma3

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
AUTO = {
    "mixtral": ATTENTION,
    "qwen2_moe": ["down_proj", "gate_proj", *ATTENTION[:3], "up_proj", "v_proj"],  # a shared expert is a plain MLP
    "qwen3_moe": ATTENTION,
    "gpt_oss": ATTENTION,
    "phimoe": ATTENTION,
    "deepseek_v3": ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"],
}


# --- mixtures of experts


@pytest.mark.parametrize(("family", "layers"), AUTO.items())
def test_adapter_of_a_mixture_trains_and_can_be_loaded_again(tmp_path: Path, family, layers) -> None:
    base = save_tiny_mixture(tmp_path / "base", family)
    model = load(base)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert linear_layers(model) == layers

    wrapped = add_lora(model, Lora(r=2), "base")
    take_steps(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    plain = load(base)
    assert not torch.equal(logits(wrapped), logits(plain))
    assert torch.allclose(logits(load_adapter(plain, tmp_path / "adapter")), logits(wrapped), atol=1e-6)
    after = {name.replace("base_layer.", ""): parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "routers and experts stay"


@pytest.mark.parametrize(
    ("family", "parameters"),
    [("mixtral", 2 * 4 * 3 * 32 * 64), ("deepseek_v3", 4 * 3 * 32 * 16), ("gpt_oss", 2 * 4 * (3 * 32 * 64 + 128 + 32))],
)
def test_what_stays_untouched_is_said(tmp_path: Path, family, parameters) -> None:
    said = str(targets_of_folder(save_tiny_mixture(tmp_path / family, family), "auto"))

    assert said.startswith(f"adapter on {', '.join(AUTO[family])}; experts stay untouched: {parameters:,} parameters")
    beside = "; also untouched: down_proj, gate_proj, up_proj"
    assert said.endswith(beside if family == "deepseek_v3" else "parameters")


def test_router_is_named_among_what_stays_untouched(tmp_path: Path) -> None:
    assert str(targets_of_folder(save_tiny_mixture(tmp_path / "m", "phimoe"), "auto")).endswith("untouched: router")


def test_model_without_experts_says_nothing_of_them(tiny_llama: Path) -> None:
    assert "untouched" not in str(targets_of_folder(tiny_llama, "auto"))


@pytest.mark.parametrize(
    ("family", "modules", "refused"),
    [
        ("mixtral", ["q_proj", "w1", "w2", "w3"], "w1, w2, w3"),
        ("mixtral", ["q_proj", "down_proj"], "down_proj"),
        ("mixtral", ["gate"], "gate"),
        ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"], "gate_proj, up_proj, down_proj"),
        ("qwen3_moe", ["q_proj", "up_proj"], "up_proj"),
        ("deepseek_v3", ["o_proj", "shared_experts.down_proj"], "shared_experts.down_proj"),
        ("gpt_oss", ["gate_up_proj"], "gate_up_proj"),
        ("gpt_oss", ["experts.down_proj", "q_proj"], "experts.down_proj"),
        ("phimoe", ["q_proj", "router"], "router"),
    ],
)
def test_experts_and_routers_asked_for_are_refused_before_weights_are_read(tmp_path, family, modules, refused) -> None:
    folder = save_tiny_mixture(tmp_path / family, family)
    (folder / "model.safetensors").unlink()

    with pytest.raises(
        UserError, match=rf"^lora.target_modules: {refused}: (.|\n)*Linear layers of this model: .*_proj"
    ):
        targets_of_folder(folder, modules)


def test_plain_layers_beside_experts_can_be_named(tmp_path: Path) -> None:
    folder = save_tiny_mixture(tmp_path / "m", "qwen2_moe")

    found = targets_of_folder(folder, ["q_proj", "down_proj", "shared_expert_gate"])

    assert found.modules == [
        f"model.layers.{layer}.{name}"
        for name in ("self_attn.q_proj", "mlp.shared_expert.down_proj", "mlp.shared_expert_gate")
        for layer in (0, 1)
    ]


# --- embeddings, heads and towers


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("llama", "embed_tokens"), ("llama", "lm_head"), ("gpt2", "wte"), ("gpt2", "wpe"), ("gpt2", "lm_head")],
)
def test_embeddings_and_heads_are_refused_before_weights_are_read(tmp_path: Path, architecture, name) -> None:
    folder = save_tiny_model(tmp_path / architecture, architecture)
    layer = "q_proj" if architecture == "llama" else "c_attn"
    (folder / "model.safetensors").unlink()

    with pytest.raises(UserError, match=f"^lora.target_modules: {name}: .*LM head(.|\n)*{layer}"):
        targets_of_folder(folder, [layer, name])


def test_head_under_another_name_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "neox", "gpt_neox")

    for name in ("embed_in", "embed_out"):
        with pytest.raises(UserError, match=f"^lora.target_modules: {name}: "):
            targets_of_folder(folder, [name])


def test_module_of_the_vision_tower_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fc1, out_proj: none of them lies .*language model"):
        targets_of_folder(save_tiny_gemma3(tmp_path / "gemma3"), ["fc1", "out_proj"])


def causal(kind: str, **changes: Any) -> Any:
    """Build a model that sees or hears, as it is loaded for text, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **changes))


@pytest.mark.parametrize("kind", ["gemma3", "git", "got_ocr2", "phi4_multimodal"])
def test_towers_are_never_adapted(kind: str) -> None:
    """Some lie beside the decoder, others within it."""
    model = causal(kind)
    towers = ("vision", "image", "audio")
    assert any(word in name for name, _ in model.named_modules() for word in towers)

    found = choose_targets(model, "auto").modules

    assert found
    assert not [name for name in found if any(word in name for word in towers)]


# --- layers on which an adapter would do nothing


@pytest.mark.parametrize(
    ("family", "untouched"),
    [("Falcon-H1", "out_proj"), ("Granite 4", "out_proj"), ("Gemma 3n", "correction_coefs")],
)
def test_layers_whose_weights_are_read_without_calling_them_get_no_adapter(tmp_path: Path, family, untouched) -> None:
    folder = save_family(tmp_path / "base", family)
    targets = targets_of_folder(folder, "auto")

    assert targets.left_out == [untouched]
    assert not any(path.endswith(untouched) for path in targets.modules)
    with pytest.raises(UserError, match=rf"lora.target_modules: {untouched}: .* would be silent\.\nLinear layers"):
        targets_of_folder(folder, [untouched, "q_proj"])


def test_linear_attention_gets_its_output_adapted(tmp_path: Path) -> None:
    """It has a state as Mamba's, and no kernel that reads the weights of its last layer."""
    assert "out_proj" in linear_layers(load(save_family(tmp_path / "base", "Qwen3.5")))


def test_what_would_be_lost_when_the_adapter_is_loaded_again_gets_none(tmp_path: Path) -> None:
    """Laguna's checkpoints are renamed by a pattern that takes its shared experts for those of another layout."""
    folder = save_family(tmp_path / "base", "Laguna")

    targets = targets_of_folder(folder, "auto")
    assert not [path for path in targets.modules if "shared_experts" in path]
    assert str(targets).endswith("also untouched: some down_proj, some gate_proj, some up_proj"), "layer 0 is dense"
    with pytest.raises(UserError, match=r"lora.target_modules: down_proj, gate_proj: .* lose them"):
        targets_of_folder(folder, ["q_proj", "gate_proj", "down_proj"])


def test_adapter_that_would_be_lost_is_refused_where_it_was_made_elsewhere(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "base", "Laguna")
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load(folder), config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    with pytest.raises(UserError, match=r"PEFT loads 2 of its tensors as others, the first is .*shared_experts"):
        load_adapter(load(folder), tmp_path / "adapter")
