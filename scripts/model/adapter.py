"""The LoRA adapter of a base: make one, load one safely, switch between several, copy its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.common.artifacts import Manifest, read_manifest
from scripts.common.distributed import is_main_process
from scripts.common.errors import UserError
from scripts.common.schema import Lora
from scripts.common.stages import ADAPTER_STAGES
from scripts.dataset.chat_format import template_sha256, tokenizer_sha256
from scripts.model.fingerprint import base_fingerprint
from scripts.model.targets import choose_targets, linear_layers

if TYPE_CHECKING:
    import torch

FLOATS = ("F32", "BF16", "F16")

# What an adapter of this project may say otherwise than PEFT's defaults do.
ADAPTER_KEYS: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "task_type": lambda value: value == "CAUSAL_LM",
    "r": lambda value: type(value) is int and 0 < value < 2**31,
    "lora_alpha": lambda value: type(value) in (int, float) and 0 < value < 2**31,
    "lora_dropout": lambda value: type(value) in (int, float) and 0 <= value < 1,
    "target_modules": lambda value: (
        isinstance(value, list) and all(isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in value)
    ),
    "init_lora_weights": lambda value: value in (True, False, "gaussian", "orthogonal"),
    "use_rslora": lambda value: type(value) is bool,
    "use_dora": lambda value: type(value) is bool,
    "fan_in_fan_out": lambda value: type(value) is bool,
    "inference_mode": lambda value: True,
    "base_model_name_or_path": lambda value: True,
    "peft_version": lambda value: True,
}


def add_lora(model: Any, lora: Lora, base_id: str) -> Any:
    """Wrap a base with a fresh adapter whose weights stay fp32."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    targets = choose_targets(model, lora.target_modules)
    initial: Any = True if lora.init == "default" else lora.init
    try:
        wrapped = get_peft_model(
            model,
            LoraConfig(
                r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets.names, use_rslora=lora.use_rslora,
                use_dora=lora.use_dora, init_lora_weights=initial, task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
    except ValueError as error:
        known = ", ".join(linear_layers(model))
        raise UserError(f"lora: PEFT refuses this adapter: {error}\nLinear layers of this model: {known}.") from None
    base = wrapped.get_base_model()
    elsewhere = {path for path, module in base.named_modules() if isinstance(module, LoraLayer)} ^ set(targets.modules)
    if elsewhere:
        raise UserError(f"lora.target_modules: PEFT adapts otherwise than asked, the first is {min(elsewhere)}.")
    wrapped.peft_config["default"].base_model_name_or_path = base_id
    return wrapped


def merge_initialisation(model: Any, scratch: Path) -> dict[str, Any]:
    """Return what save_pretrained needs to write a PiSSA or OLoRA adapter as one for the plain base.

    Both move a part of the base weights into the adapter; the saved difference to the starting adapter is a plain LoRA.
    """
    start = scratch / "initial_adapter"
    return {"path_initial_model_for_weight_conversion": str(start)} if start.is_dir() else {}


def save_initialisation(model: Any, scratch: Path) -> None:
    """Keep the starting adapter where `merge_initialisation` will need it."""
    config = model.peft_config["default"]
    if config.init_lora_weights in ("pissa", "olora") and is_main_process():
        config.init_lora_weights = True  # what is saved is weights, not a recipe to make them again
        model.save_pretrained(scratch / "initial_adapter", save_embedding_layers=False)


def adapted_modules(adapter: str | Path) -> list[str]:
    """Return the names of the modules that a finished adapter is put on."""
    names: list[str] = _check_adapter_config(Path(adapter))["target_modules"]
    return names


def _check_adapter_config(adapter: Path) -> dict[str, Any]:
    """Return an adapter's configuration, unless it asks PEFT for more than a LoRA on named modules.

    PEFT matches patterns of it against every module, imports modules it names, and reserves memory for any rank.
    """
    from peft import LoraConfig
    from safetensors import SafetensorError, safe_open

    path, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{adapter}: holds no adapter_model.safetensors; other weight files are never read.")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        plain = LoraConfig(task_type="CAUSAL_LM").to_dict()
        unknown = {
            name: value for name, value in found.items() if value != plain.get(name) and name not in ADAPTER_KEYS
        }
        wrong = [(name, value) for name, value in unknown.items() if value or name not in plain]
        wrong += [(name, found.get(name)) for name, is_right in ADAPTER_KEYS.items() if not is_right(found.get(name))]
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be read as an adapter's configuration ({type(error).__name__}). Train it again."
        ) from None
    if wrong:
        name, value = wrong[0]
        raise UserError(
            f"{path}: {name}: found {json.dumps(value)[:80]}, which no adapter of this project has, so it is not loaded. "
            "Train it again."
        )
    try:
        with safe_open(weights, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(key)
                if part.get_dtype() not in FLOATS:
                    raise UserError(f"{weights}: {key}: found {part.get_dtype()}, wanted one of {', '.join(FLOATS)}.")
                if "lora_A" in key and part.get_shape()[:1] != [found["r"]]:
                    raise UserError(
                        f"{path}: r: found {found['r']}, but {key} has the shape {part.get_shape()}. Train it again."
                    )
    except SafetensorError as error:
        raise UserError(f"{weights}: cannot be read ({error}). Train the adapter again.") from None
    return found


def load_adapter(model: Any, adapter: str | Path, *, trainable: bool = False, name: str = "default") -> Any:
    """Put a finished adapter on its base, or beside those that are on it already.

    Raises: UserError when a weight is missing, not finite, or does not fit the base.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_adapter_config(Path(adapter))
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(adapter, adapter_name=name, is_trainable=trainable, use_safetensors=True)
            wrapped = model
        else:
            wrapped = PeftModel.from_pretrained(
                model, adapter, adapter_name=name, is_trainable=trainable, use_safetensors=True
            )
        saved = load_file(Path(adapter) / "adapter_model.safetensors")
    except (RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{adapter}: does not fit the base model: {' '.join(str(error).split())[:300]}") from None
    # PEFT passes over what does not match; the base would then answer in the adapter's name.
    weights = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    if differ := weights.keys() ^ saved.keys():
        where = "is missing from the file" if min(differ) in weights else "has no place in the base"
        raise UserError(f"{adapter}: does not fit the base model: {len(differ)} tensors differ; {min(differ)} {where}.")
    bad = [key for key, value in wrapped.named_parameters() if f".{name}." in key and not torch.isfinite(value).all()]
    if bad:
        raise UserError(
            f"{adapter}: {len(bad)} tensors hold NaN or infinite values, the first is {bad[0]}. Train it again."
        )
    lost = [  # under ZeRO-3 a process holds no whole weight to look at
        key
        for key, value in weights.items()
        if value.shape == saved[key].shape and not torch.equal(value.cpu().to(saved[key].dtype), saved[key])
    ]
    if lost:
        raise UserError(
            f"{adapter}: PEFT loads {len(lost)} of its tensors as others, the first is {lost[0]}. "
            "Train an adapter on other modules."
        )
    return wrapped


@contextmanager
def switched_to(model: Any, adapter: str | None) -> Iterator[None]:
    """Compute with another adapter of the same model, or with none, and go back; what trains stays what trains."""
    if adapter is None:
        with model.disable_adapter():
            yield
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    previous = model.active_adapter
    model.set_adapter(adapter)
    try:
        yield
    finally:
        model.set_adapter(previous)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def adapter_kept(model: Any) -> Iterator[None]:
    """Keep the adapter's fp32 weights where TRL rounds those of a quantised base to bf16, in which small steps vanish."""
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, data in kept:
        parameter.data = data


def largest_logit_change(changed: torch.Tensor, plain: torch.Tensor, adapter: str, otherwise: str) -> float:
    """Return the largest change that an adapter makes to a logit of its base.

    Raises: UserError when a logit is not finite, or when none changes, in which case it would be as `otherwise` says.
    """
    if not changed.isfinite().all():
        raise UserError(f"{adapter}: gives NaN or infinite logits. Train it again.")
    largest = float((changed.float() - plain.float()).abs().max())
    if largest == 0:
        raise UserError(f"{adapter}: changes no logit of the base, so {otherwise}. Was it trained at all?")
    return largest


def whole_weights(model: Any, adapter: str) -> dict[str, Any]:
    """Copy the weights of one adapter in fp32, put together where processes hold parts; every process must call it."""
    found = {name: parameter for name, parameter in model.named_parameters() if f".{adapter}." in name}
    with _gathered(list(found.values())):
        return {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().float().cpu().clone()
            for name, value in found.items()
        }


def _gathered(parameters: list[Any]) -> AbstractContextManager[Any]:
    if any(hasattr(parameter, "ds_id") for parameter in parameters):  # DeepSpeed ZeRO-3
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
        return gathered
    return nullcontext()


def check_adapter_fits(adapter: str | Path, base_folder: Path, tokenizer: Any) -> Manifest:
    """Return an adapter's manifest after proving that it was made on this base, tokenizer and template."""
    manifest = read_manifest(adapter, stages=ADAPTER_STAGES)
    check_made_on(adapter, manifest, base_folder, facts_of_base(base_folder, tokenizer))
    return manifest


def facts_of_base(base_folder: Path, tokenizer: Any) -> dict[str, str]:
    """Return what must be the same of a base for everything that is made on it."""
    return {
        "base model": base_fingerprint(base_folder),
        "tokenizer": tokenizer_sha256(tokenizer),
        "chat template": template_sha256(tokenizer),
    }


def check_made_on(folder: str | Path, manifest: Manifest, base_folder: Path, facts: dict[str, str]) -> None:
    """Refuse what was made on another base, tokenizer or template than the one with these facts."""
    made_on = (manifest.base_model.fingerprint, manifest.tokenizer_sha256, manifest.chat_template_sha256)
    for (what, found), there in zip(facts.items(), made_on, strict=True):
        if there != found:
            raise UserError(
                f"{folder}: was trained on another {what} ({there[:12]}…) than {base_folder} has ({found[:12]}…). "
                f"It was made on {manifest.base_model.id}; set base_model_id to it, or train the adapter again."
            )
