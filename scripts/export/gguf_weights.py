"""The weights of a GGUF: their names there, the form a reader expects, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM

from scripts.common.errors import UserError
from scripts.export.gguf_architectures import INSTEAD, Architecture, architecture_of, rope_factors
from scripts.model.shape import ModelShape


@dataclass(frozen=True)
class Weight:
    """A weight of a model and what a file holds instead."""

    name: str  # in transformers
    title: str  # in the file
    values: torch.Tensor
    paired_heads: int  # whose rows are reordered; 0 where none are
    from_one: bool  # whether 1 is added

    def stored(self) -> torch.Tensor:
        """Return what the file holds."""
        values = interleaved(self.values, self.paired_heads) if self.paired_heads else self.values
        return values + 1 if self.from_one else values

    def restored(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the weight of which a file holds `stored`."""
        values = in_halves(stored, self.paired_heads) if self.paired_heads else stored
        return values - 1 if self.from_one else values


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head from halves to pairs, as llama.cpp rotates neighbours and transformers halves."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def in_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head from pairs to halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def named_weights(model: Any, known: Architecture) -> Iterator[Weight]:
    """Yield the weights of the language model; a vision tower beside it has no place in the file.

    Raises: UserError for a weight that readers of this architecture do not know.
    """
    import gguf

    text = model.config.get_text_config(decoder=True)
    shape = ModelShape.of(text)
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads} if known.pairs else {}
    titles = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, known.name.upper()), shape.layers)
    named = {f"model.{name}": values for name, values in model.get_decoder().state_dict().items()}
    if not text.tie_word_embeddings:
        named |= {f"lm_head.{name}": values for name, values in model.get_output_embeddings().state_dict().items()}
    for name, values in named.items():
        *_, layer, kind = name.split(".")
        title = titles.get_name(name, try_suffixes=(".weight", ".bias"))
        if title is None or (kind == "bias" and layer not in known.biases):
            raise UserError(f"--format gguf: {name} has no place in the GGUF of a {text.model_type}. {INSTEAD}")
        yield Weight(name, title, values, heads.get(layer, 0), known.norms_from_one and layer.endswith("norm"))


def write_weights(writer: Any, model: Any, kind: str) -> None:
    """Write header and weights; they go to disk one by one."""
    import gguf

    known = architecture_of(model.config)
    factors = rope_factors(model.config.get_text_config(decoder=True))
    weights = [
        *named_weights(model, known),
        *(Weight(title, title, values, 0, False) for title, values in factors.items()),
    ]
    for weight in weights:
        stored = stored_type(weight.values, kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        size = weight.values.numel() // block * block_bytes
        shape = tuple(weight.values.shape)
        writer.add_tensor_info(weight.title, shape, numpy.dtype(numpy.float32), size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for weight in weights:
        writer.write_tensor_data(gguf.quantize(weight.stored().numpy(), stored_type(weight.values, kind)))


def stored_type(weight: torch.Tensor, kind: str) -> Any:
    """Choose how a tensor is stored: norms stay fp32, and rows that Q8_0 cannot divide into blocks stay f16."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if weight.dim() == 1:
        return GGMLQuantizationType.F32
    divisible = weight.shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0][0] == 0
    return GGMLQuantizationType.Q8_0 if kind == "q8_0" and divisible else GGMLQuantizationType.F16


def load_weights(file: Path, config: Any) -> Any:
    """Load the language model of a configuration with the weights of a file, widened to fp32."""
    import gguf

    text = config.get_text_config(decoder=True)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    weights = {}
    for weight in named_weights(without_weights(text), architecture_of(text)):
        tensor = held[weight.title]
        weights[weight.name] = weight.restored(torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)))
    family = AutoModelForCausalLM._model_mapping[type(text)]
    return family.from_pretrained(None, config=text, state_dict=weights, dtype=torch.float32).eval()


def without_weights(text: Any) -> Any:
    """Return a language model that has names and shapes only."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(text)
