"""Load a base model and its tokenizer: in the dtype of the machine, quantised, or in full precision."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.paths import portable_path
from scripts.common.schema import Config
from scripts.dataset.chat_format import plain_template, set_stops_of_base
from scripts.model.find import blamed_on, gguf_file

log = logging.getLogger(__name__)

LARGE = 2e9  # bytes; less is loaded in a second or two


def load_tokenizer(folder: Path) -> Any:
    """Load a model's tokenizer, with a pad token and a chat template in any case, and with the model's stops.

    The folder must be the model's: an adapter's holds the tokenizer, but not the stops.
    """
    from transformers import AutoTokenizer

    inside = None if (folder / "tokenizer_config.json").is_file() else gguf_file(folder)
    where = {"gguf_file": inside} if inside else {}
    with blamed_on(folder / (inside or "tokenizer.json")):
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
        tokenizer.chat_template = plain_template(tokenizer)
    set_stops_of_base(
        tokenizer, _stops_in_gguf(folder / inside) if inside else _stops_in(folder / "generation_config.json")
    )
    return tokenizer


def _stops_in(file: Path) -> list[int]:
    """Return the ids in a generation_config.json at which the model's makers end an answer."""
    if not file.is_file():
        return []
    with blamed_on(file):
        stops = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    ids = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(type(token) is int for token in ids):
        raise UserError(f"{file}: eos_token_id: found {stops!r}, wanted an id or a list of ids. Fetch the model again.")
    return ids


def _stops_in_gguf(file: Path) -> list[int]:
    """Return the ids that a GGUF file names for the end of a text, of a turn and of a message."""
    from gguf import GGUFReader, Keys

    with blamed_on(file):
        reader = GGUFReader(file)
        names = (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
        return [int(field.contents()) for name in names if (field := reader.get_field(name))]


def load_base(folder: Path, config: Config, machine: Machine) -> Any:
    """Load the frozen base in the chosen dtype, quantised when the configuration asks for it; a GGUF is dequantised."""
    from transformers import AutoModelForCausalLM

    _show_loading(folder)
    if name := gguf_file(folder):
        from transformers import GgufConfig

        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=machine.dtype,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        ).to(machine.device)
        _set_for_training(model)
        return model
    quantized = config.quantization.load_in_4bit or config.quantization.load_in_8bit
    quantization = _quantization_config(config, machine) if quantized else None
    place: int | str = int(os.environ.get("LOCAL_RANK", "0")) if machine.device == "cuda" else "cpu"
    with blamed_on(folder):
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
    _set_for_training(model)
    if machine.device == "cpu":
        model.get_output_embeddings().register_forward_pre_hook(_make_contiguous)
    return model


def _set_for_training(model: Any) -> None:
    """Change what TRL and the library's trainer read in a configuration."""
    model.config.use_cache = False
    text = model.config.get_text_config(decoder=True)
    if hasattr(text, "num_local_experts") and not hasattr(text, "num_experts"):
        text.num_experts = text.num_local_experts  # TRL knows no other name; Granite's and Phi's mixtures only this one
    if cap := getattr(text, "logits_soft_cap", None) or getattr(text, "output_logit_soft_cap", None):
        text.final_logit_softcapping = cap  # TRL's head knows Gemma's name, and not those of RecurrentGemma and xLSTM
    if hasattr(text, "router_aux_loss_coef") and not _has_router(model):
        text.router_aux_loss_coef = 0.0  # else TRL asks for router logits; small Granite 4 models have none


def _has_router(model: Any) -> bool:
    """Return whether a layer gives router logits, as far as its family says which would."""
    recorders = [getattr(module, "_can_record_outputs", None) or {} for module in model.modules()]
    kinds = [getattr(each["router_logits"], "target_class", object) for each in recorders if "router_logits" in each]
    return not kinds or any(isinstance(module, tuple(kinds)) for module in model.modules())


def _show_loading(folder: Path) -> None:
    """Say what is loaded; where that takes a while and somebody watches, with the library's bar."""
    from transformers.utils import logging as logging_of_transformers

    size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf"))
    log.info("loading %s (%.1f GB)", portable_path(folder), size / 1e9)
    if size > LARGE and sys.stderr.isatty():
        logging_of_transformers.enable_progress_bar()
    else:
        logging_of_transformers.disable_progress_bar()


def copy_out_of_file(parameters: Iterable[Any]) -> None:
    """Give weights memory of their own; while one of them lies in the mapped file, all of that file stays in memory."""
    for parameter in parameters:
        parameter.data = parameter.data.clone()


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
    with blamed_on(folder):
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
