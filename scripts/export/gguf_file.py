"""Write a merged Llama as GGUF, the format of llama.cpp and Ollama, and read it back to prove it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from scripts.common.errors import UserError

# What a file has to name its word splitting by; readers know no other way.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCES = (
    "Hello, world! It's 17:45, and 1234 + 5.6 = 1239.6.",
    "  two  spaces\n\n\tand a tab\r\nand CRLF ",
    "Grüße, naïve café, 你好, Привет, 🙂 ½ ²",
    "def f(x_1): return {'a': [x_1 ** 2]}  # don't",
)


def check_supported(config: Any, tokenizer: Any) -> None:
    """Refuse what this writer cannot put into a GGUF without loss."""
    if config.model_type != "llama":
        raise UserError(
            f"--format gguf: found the architecture {config.model_type}, wanted llama. Export safetensors and convert them "
            "with llama.cpp's convert_hf_to_gguf.py."
        )
    scaling = (config.rope_parameters or {}).get("rope_type", "default")
    if scaling != "default" or config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
        raise UserError(
            f"--format gguf: this Llama has rope scaling `{scaling}`, biases or another activation, which are not written. "
            "Export safetensors and convert them with llama.cpp's convert_hf_to_gguf.py."
        )
    pre_tokenizer_name(json.loads(tokenizer.backend_tokenizer.to_str()))


def pre_tokenizer_name(described: dict[str, Any]) -> str | None:
    """Return the name under which GGUF readers know how this tokenizer splits words; None for a sentencepiece BPE.

    Raises: UserError when they know none.
    """
    model, splitting = described["model"], described["pre_tokenizer"]
    steps = splitting.get("pretokenizers", [splitting]) if splitting else []
    kinds = [step["type"] for step in steps]
    if model["type"] == "BPE" and model["byte_fallback"]:
        return None
    if model["type"] == "BPE" and not described["normalizer"] and kinds[-1:] == ["ByteLevel"]:
        if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") == LLAMA3_SPLIT:
            return "llama-bpe"
    raise UserError(
        f"--format gguf: the tokenizer ({model['type']}; {', '.join(kinds) or 'no word splitting'}) is none that GGUF readers "
        "know by a name. Export safetensors and convert them with llama.cpp's convert_hf_to_gguf.py."
    )


def write_gguf(model: Any, tokenizer: Any, folder: Path, kind: str, name: str) -> Path:
    """Write one file with weights, tokenizer and chat template; tensors go to disk one by one."""
    import gguf

    config = model.config
    file = folder / f"model-{kind}.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == "q8_0" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = list(named_tensors(model, names))
    for title, weight, _ in tensors:
        stored = stored_type(weight, kind)
        size = weight.numel() * 4
        if stored == gguf.GGMLQuantizationType.F16:
            size = weight.numel() * 2
        shape: Sequence[int] = tuple(weight.shape)
        if stored == gguf.GGMLQuantizationType.Q8_0:
            shape = gguf.quant_shape_to_byte_shape(shape, stored)
            size = int(numpy.prod(shape))
        dtype = {gguf.GGMLQuantizationType.F32: numpy.float32, gguf.GGMLQuantizationType.F16: numpy.float16}
        writer.add_tensor_info(title, shape, numpy.dtype(dtype.get(stored, numpy.uint8)), size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, weight, heads in tensors:
        values = (rotated(weight, heads) if heads else weight).detach().numpy()
        writer.write_tensor_data(gguf.quantize(values, stored_type(weight, kind)))
    writer.close()
    return file
