"""Write a merged Llama as GGUF, the format of llama.cpp and Ollama, and read it back to prove it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from scripts.common.errors import UserError
from scripts.dataset.chat_format import ChatFormat, closing_token_id, stop_token_ids, user_turn
from scripts.dataset.rendering import render_prompt

log = logging.getLogger(__name__)

# What a file has to name its word splitting by; readers know no other way.
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
        f"--format gguf: the tokenizer ({model['type']}; {', '.join(kinds) or 'no word splitting'}) is not one that GGUF readers "
        "know by name. Export safetensors and convert them with llama.cpp's convert_hf_to_gguf.py."
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
    tensors = [
        (title, weight, heads, stored_type(weight, kind))
        for title, weight, heads in named_tensors(
            model, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        )
    ]
    for title, weight, _, stored in tensors:
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        size = weight.numel() // block * block_bytes
        writer.add_tensor_info(title, tuple(weight.shape), numpy.dtype(numpy.float32), size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, weight, heads, stored in tensors:
        writer.write_tensor_data(gguf.quantize((interleaved(weight, heads) if heads else weight).numpy(), stored))
    writer.close()
    return file


def named_tensors(model: Any, names: Any) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield each weight under its GGUF name, and for queries and keys the number of their heads."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        title = names.get_name(name, try_suffixes=(".weight",))
        if title is None:
            raise UserError(f"--format gguf: {name} cannot be stored in the GGUF of a Llama. Export safetensors.")
        yield title, weight, heads.get(name.split(".")[-2], 0)


def stored_type(weight: torch.Tensor, kind: str) -> Any:
    """Choose how a tensor is stored: norms stay fp32, and rows that Q8_0 cannot divide into blocks stay f16."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if weight.dim() == 1:
        return GGMLQuantizationType.F32
    divisible = weight.shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0][0] == 0
    return GGMLQuantizationType.Q8_0 if kind == "q8_0" and divisible else GGMLQuantizationType.F16


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head from halves to pairs, as llama.cpp rotates neighbours and transformers halves."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Write vocabulary, merges or scores, special tokens and the chat template."""
    from gguf import TokenType

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    pre_tokenizer = pre_tokenizer_name(described)
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]  # rows of the embedding that no token uses
    types = [TokenType.UNUSED] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        tokens[index] = token
        types[index] = (
            TokenType.BYTE if not pre_tokenizer and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else TokenType.NORMAL
        )
    for added in described["added_tokens"]:
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    if pre_tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer)
        writer.add_token_merges(merges)
    else:  # readers join the pair with the best score first, so the score of a piece is the rank of its merge
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault(merge.replace(" ", ""), rank)
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = TokenType.UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for add, token_id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    add_further_stops(writer, tokenizer)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_space_prefix(not pre_tokenizer)
    writer.add_chat_template(tokenizer.chat_template)


def add_further_stops(writer: Any, tokenizer: Any) -> None:
    """Write the stops beside EOS: the format has room for two, the end of a turn and that of a message."""
    closing = closing_token_id(tokenizer)
    others = stop_token_ids(tokenizer) - {tokenizer.eos_token_id}
    stops = sorted((token for token in others if token < len(tokenizer)), key=lambda token: (token != closing, token))
    for add, token_id in zip((writer.add_eot_token_id, writer.add_eom_token_id), stops, strict=False):
        add(token_id)
    if left_out := stops[2:]:
        texts = ", ".join(tokenizer.decode([token], skip_special_tokens=False) for token in left_out)
        log.warning(
            "a GGUF file has room for three stops and this model has more: %s. Ollama takes them from the Modelfile; "
            "for llama.cpp name them yourself (--reverse-prompt)",
            texts,
        )


def adds_bos(tokenizer: Any) -> bool:
    """Say whether a reader has to put BOS before a prompt: only if the prompts of training began with one."""
    first = tokenizer("a")["input_ids"][0]
    return bool(first == tokenizer.bos_token_id == render_prompt(ChatFormat(tokenizer), user_turn("a"))[0])


def check_tokenizer(file: Path, tokenizer: Any, probes: Sequence[Sequence[int]]) -> None:
    """Prove that the file's own tokenizer gives the ids of ours, for texts of many kinds and for whole prompts.

    The folder must hold no tokenizer.json, which transformers would read instead of the file.
    """
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in (*SENTENCES, *(tokenizer.decode(ids) for ids in probes)):
        ours, theirs = (t.encode(text, add_special_tokens=False) for t in (tokenizer, read))
        if ours != theirs:
            raise UserError(
                f"--format gguf: the tokenizer in the file reads {text[:60]!r} as {theirs[:12]}, ours as {ours[:12]}. "
                "Nothing was written. Export safetensors."
            )
    if json.loads(tokenizer.backend_tokenizer.to_str())["model"]["byte_fallback"]:
        log.warning(
            "llama.cpp puts a space after each special token of a sentencepiece tokenizer, which training did not: "
            "compare some answers there with those of the adapter"
        )
    if read.chat_template != tokenizer.chat_template:
        raise UserError("--format gguf: the chat template did not survive. Nothing was written. Export safetensors.")


def load_gguf(file: Path) -> Any:
    """Load a GGUF with its weights widened to fp32."""
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging as logging_of_transformers

    logging_of_transformers.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
