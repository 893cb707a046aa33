"""Find, load, fingerprint and adapt models: the only module that calls from_pretrained."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from scripts.common.artifacts import read_manifest
from scripts.common.config import ROOT
from scripts.common.errors import UserError, did_you_mean
from scripts.common.rendering import PLAIN_TEMPLATE, template_sha256, tokenizer_sha256
from scripts.common.runtime import Machine
from scripts.common.schema import Config, Lora

log = logging.getLogger(__name__)

DEMO_MODEL = "models/smollm2-135m-instruct"
MODEL_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "README.md",
    "LICENSE*",
    "NOTICE*",
]
# Config entries that say how a copy was stored or called, not what the model computes.
UNIMPORTANT = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "pad_token_id",
}
SAMPLES_PER_TENSOR = 16
_HUB_ID = re.compile(r"(?!\.|models/)[\w.-]+(/[\w.-]+)?")
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


def find_model(model_id: str, revision: str | None = None) -> Path:
    """Return the local folder of a model, downloading it from the Hub when it is not here yet.

    Raises: UserError when it is neither a folder, nor cached, nor reachable, or no language model that can be loaded.
    """
    folder = _folder_of(model_id, revision)
    _check_architecture(model_id, folder)
    _check_model(folder)
    return folder


def _folder_of(model_id: str, revision: str | None = None) -> Path:
    local = next((path for path in (Path(model_id), ROOT / model_id) if path.is_dir()), None)
    folder = local or _hub_folder(model_id, revision)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{model_id}: is an adapter, wanted a base or merged model.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{model_id}: the folder holds no config.json, so it is no model. Correct base_model_id.")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{model_id}: the folder holds no *.safetensors; other weight files are never read. Convert it first."
        )
    return folder


def find_local_model(model_id: str, revision: str | None = None) -> Path | None:
    """Return a model's folder when it is on this machine; None stands for a Hub id that would have to be downloaded.

    What it holds is not tried with transformers, whose import takes longer than whoever asks here would wait.

    Raises: UserError when the folder that is meant holds no model.
    """
    named = any(path.is_dir() for path in (Path(model_id), ROOT / model_id))
    if named or model_id == DEMO_MODEL or not _HUB_ID.fullmatch(model_id):
        return _folder_of(model_id)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _folder_of(snapshot_download(model_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, UserError):  # never asked for, no id, or a download cut off
        return None


def _check_model(folder: Path) -> None:
    """Refuse a folder whose configuration or weight files are no language model that transformers knows."""
    from safetensors import safe_open
    from transformers import AutoConfig

    with _told_as(folder / "config.json"):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for file in folder.glob("*.safetensors"):
        with _told_as(file):
            safe_open(file, framework="pt")


@contextmanager
def _told_as(path: Path) -> Iterator[None]:
    """Say of which file a library's refusal speaks."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # they raise a dozen kinds for files that are damaged or not for them
        if "memory" in str(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{path}: cannot be used: {reason}\nCorrect base_model_id, or fetch the model again.") from None


def _check_architecture(model_id: str, folder: Path) -> None:
    """Refuse what only code from the model's own folder could load; such code is never run."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, TypeError, KeyError, RecursionError):
        named = None
    if not isinstance(named, str):
        raise UserError(f"{model_id}: its config.json names no model_type. Bring the model anew.")
    if named not in KNOWN:
        raise UserError(
            f"{model_id}: its config.json names the architecture {named!r}, which the installed transformers does not have "
            "as a causal model, and code from a model's folder is never run. Use another base model."
        )


def _hub_folder(model_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    if not _HUB_ID.fullmatch(model_id):
        mend = (
            " Run `python -m scripts.get_demo_model` first."
            if model_id == DEMO_MODEL
            else did_you_mean(model_id) or did_you_mean(ROOT / model_id) or " Correct base_model_id."
        )
        raise UserError(f"{model_id}: no such model folder.{mend}")
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=MODEL_FILES))
    except Exception as error:  # network, cache and access problems come as a dozen kinds
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        raise UserError(
            f"base_model_id: {model_id} is not in the local cache and "
            + ("HF_HUB_OFFLINE=1 forbids the Hub" if offline else f"the Hub did not give it ({type(error).__name__})")
            + f".\nWithout a model hub use the demo model: `python -m scripts.get_demo_model`, then base_model_id: {DEMO_MODEL}."
            + (
                ""
                if offline
                else "\nIf it is cached, HF_HUB_OFFLINE=1 (or offline: true) uses the cache without asking the Hub."
            )
        ) from None


def gguf_file(folder: Path) -> str | None:
    """Return the name of the GGUF file that a folder holds instead of safetensors."""
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise UserError(f"{folder}: holds {len(files)} GGUF files ({', '.join(files)}). Keep one per folder.")
    return files[0]


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer, with a pad token and a chat template in any case."""
    from transformers import AutoTokenizer

    inside = None if (folder / "tokenizer_config.json").is_file() else gguf_file(folder)
    where = {"gguf_file": inside} if inside else {}
    with _told_as(folder / (inside or "tokenizer.json")):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
        tokenizer.backend_tokenizer.to_str()
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}: its tokenizer has no EOS token, so an answer could never end. Use another base model."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        log.info("the base brings no chat template; using the project's plain one, which is stored with the adapter")
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def load_base(folder: Path, config: Config, machine: Machine) -> Any:
    """Load the frozen base in the chosen dtype, quantised when the configuration asks for it; a GGUF is dequantised."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as logging_of_transformers

    logging_of_transformers.disable_progress_bar()
    if name := gguf_file(folder):
        from transformers import GgufConfig

        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=machine.dtype,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        ).to(machine.device)
        model.config.use_cache = False
        return model
    quantized = config.quantization.load_in_4bit or config.quantization.load_in_8bit
    quantization = _quantization_config(config, machine) if quantized else None
    place: int | str = int(os.environ.get("LOCAL_RANK", "0")) if machine.device == "cuda" else "cpu"
    with _told_as(folder):
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=machine.dtype,
            quantization_config=quantization,
            device_map={"": place} if quantized else None,  # without it a quantised base goes to any GPU there is
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    _check_loaded(folder, loading)
    if quantized and machine.device == "cpu":
        _keep_4bit_weights_unpacked(model)
    if not quantized:
        model.to(machine.device)
    model.config.use_cache = False
    if machine.device == "cpu":
        model.get_output_embeddings().register_forward_pre_hook(_make_contiguous)
    return model


def _check_loaded(folder: Path, loading: dict[str, Any]) -> None:
    # transformers fills what a file lacks with random values, and only logs it.
    absent = sorted(loading["missing_keys"])
    if absent:
        raise UserError(
            f"{folder}: its weight files lack {len(absent)} tensors, the first is {absent[0]}. Fetch the model again."
        )


def _make_contiguous(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    # Given a slice of the positions, torch copies the head's weights for every row of the batch before it multiplies.
    return (arguments[0].contiguous(), *arguments[1:])


def load_full_precision(folder: Path) -> Any:
    """Load a model in fp32 on the CPU while holding hardly more than the model itself.

    A mapped file would count beside the widened weights, half the model again for a bf16 base; read tensor by tensor,
    nothing stays.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging as logging_of_transformers

    logging_of_transformers.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = safe_open(file, framework="pt", backend="pread")
        weights.update({name: tensors.get_slice(name) for name in tensors.keys()})  # noqa: SIM118
    architecture = AutoModelForCausalLM._model_mapping[type(config)]
    with _told_as(folder):
        model, loading = architecture.from_pretrained(
            None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
        )
    _check_loaded(folder, loading)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.get_output_embeddings().register_forward_pre_hook(_make_contiguous)
    return model.eval()


def _quantization_config(config: Config, machine: Machine) -> Any:
    from transformers import BitsAndBytesConfig

    key = "load_in_4bit" if config.quantization.load_in_4bit else "load_in_8bit"
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(
            f"quantization.{key}: bitsandbytes is not installed. `pip install -r requirements.gpu.txt`, or set it to false."
        ) from None
    if config.quantization.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=machine.dtype,
    )


def _keep_4bit_weights_unpacked(model: Any) -> None:
    # On AVX512-BF16 an evaluation repacks 4-bit weights in place; afterwards gradients vanish and merges are garbage.
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def base_fingerprint(folder: Path) -> str:
    """Identify a base by its configuration and sampled weights, whatever folder, id or float type it is stored in.

    Samples are rounded to bf16, so that an fp32 and a bf16 copy of one model are the same base.

    Raises: UserError when a file cannot be read whole, such as after a copy that was cut off.
    """
    from safetensors import SafetensorError

    try:
        return _fingerprint(folder)
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"{folder}: its config.json or a *.safetensors is damaged or cut off ({error}). Remove the folder and bring the model again."
        ) from None


def _fingerprint(folder: Path) -> str:
    import torch
    from safetensors import safe_open

    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(
        json.dumps({k: v for k, v in described.items() if k not in UNIMPORTANT}, sort_keys=True).encode()
    )
    owner: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            owner.update(dict.fromkeys(tensors.keys(), file))
    for file in sorted(set(owner.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(name for name, where in owner.items() if where == file):
                shape = tensors.get_slice(name).get_shape()
                digest.update(f"{name}{shape}".encode())
                digest.update(_samples(tensors, name, shape).to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _samples(tensors: Any, name: str, shape: list[int]) -> Any:
    """Read a few values spread over a tensor without reading all of it."""
    rows = shape[0] if shape else 1
    picked = sorted({(rows * step) // SAMPLES_PER_TENSOR for step in range(SAMPLES_PER_TENSOR)})
    import torch

    if not shape:
        return tensors.get_tensor(name).reshape(1)
    part = tensors.get_slice(name)
    values = [part[row : row + 1].reshape(-1) for row in picked]
    return torch.cat([value[:: max(1, math.ceil(len(value) / SAMPLES_PER_TENSOR))] for value in values])


def linear_layers(model: Any) -> list[str]:
    """Name the linear layers of the decoder blocks: what `lora.target_modules: auto` stands for."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head and re.search(r"\.\d+\.", name)
    }
    if not names:
        raise UserError("lora.target_modules: auto found no linear layer in this architecture; name the modules.")
    return sorted(names)


def add_lora(model: Any, lora: Lora, base_id: str) -> Any:
    """Wrap a base with a fresh adapter whose weights stay fp32, and name the modules it adapts."""
    from peft import LoraConfig, get_peft_model

    targets = linear_layers(model) if lora.target_modules == "auto" else lora.target_modules
    log.info("adapter on %s", ", ".join(targets))
    initial: Any = True if lora.init == "default" else lora.init
    try:
        wrapped = get_peft_model(
            model,
            LoraConfig(
                r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(targets), use_rslora=lora.use_rslora,
                use_dora=lora.use_dora, init_lora_weights=initial, task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
    except ValueError as error:
        known = ", ".join(linear_layers(model))
        raise UserError(f"lora: PEFT refuses this adapter: {error}\nLinear layers of this model: {known}.") from None
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
    if config.init_lora_weights in ("pissa", "olora"):
        config.init_lora_weights = True  # what is saved is weights, not a recipe to make them again
        model.save_pretrained(scratch / "initial_adapter", save_embedding_layers=False)


def _check_adapter_config(path: Path, weights: Path) -> None:
    """Refuse an adapter whose configuration asks PEFT for more than a LoRA on named modules.

    PEFT matches patterns of it against every module, imports modules it names, and reserves memory for any rank.
    """
    from peft import LoraConfig
    from safetensors import SafetensorError, safe_open

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
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


def load_adapter(model: Any, adapter: str | Path, *, trainable: bool = False, name: str = "default") -> Any:
    """Put a finished adapter on its base, or beside those that are on it already.

    Raises: UserError when a weight is missing, not finite, or does not fit the base.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    weights = Path(adapter) / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{adapter}: holds no adapter_model.safetensors; other weight files are never read.")
    _check_adapter_config(Path(adapter) / "adapter_config.json", weights)
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(adapter, adapter_name=name, is_trainable=trainable, use_safetensors=True)
            wrapped = model
        else:
            wrapped = PeftModel.from_pretrained(
                model, adapter, adapter_name=name, is_trainable=trainable, use_safetensors=True
            )
        with safe_open(weights, framework="pt") as tensors:
            found = set(tensors.keys())
    except (RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{adapter}: does not fit the base model: {' '.join(str(error).split())[:300]}") from None
    # PEFT passes over what does not match; the base would then answer in the adapter's name.
    wanted = set(get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False))
    if wanted != found:
        first = min(wanted ^ found)
        where = "is missing from the file" if first in wanted else "has no place in the base"
        raise UserError(
            f"{adapter}: does not fit the base model: {len(wanted ^ found)} tensors differ; {first} {where}."
        )
    bad = [key for key, value in wrapped.named_parameters() if f".{name}." in key and not torch.isfinite(value).all()]
    if bad:
        raise UserError(
            f"{adapter}: {len(bad)} tensors hold NaN or infinite values, the first is {bad[0]}. Train it again."
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


def check_adapter_fits(
    adapter: str | Path, base_folder: Path, tokenizer: Any, stages: tuple[str, ...] = ("sft", "dpo")
) -> dict[str, Any]:
    """Return an adapter's manifest after proving that it was made on this base, tokenizer and template."""
    manifest = read_manifest(adapter, stages=stages)
    facts = {
        "base model": (manifest["base_model"]["fingerprint"], base_fingerprint(base_folder)),
        "tokenizer": (manifest["tokenizer_sha256"], tokenizer_sha256(tokenizer)),
        "chat template": (manifest["chat_template_sha256"], template_sha256(tokenizer)),
    }
    for what, (made_on, found) in facts.items():
        if made_on != found:
            raise UserError(
                f"{adapter}: was trained on another {what} ({made_on[:12]}…) than {base_folder} has ({found[:12]}…). "
                f"It was made on {manifest['base_model']['id']}; set base_model_id to it, or train the adapter again."
            )
    return manifest
