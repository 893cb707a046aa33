"""Every architecture of the table is read again as it was, also by plain transformers; what is not in it is refused at once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from scripts.common.errors import UserError
from scripts.export import gguf_file
from scripts.export.gguf_architectures import ARCHITECTURES, context_length
from scripts.export.gguf_weights import load_weights
from tests.conftest import ROOT, run_python, tiny_tokenizer
from tests.support.gguf_models import BASES, YARN, make_config, make_model, scaled
from tests.support.nested import save_tiny_gemma3

IDS = torch.arange(5, 105).reshape(2, 50)
IRREGULAR = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def written(name: str, folder: Path, tokenizer) -> tuple:
    """Write a tiny model as GGUF; return it and its file."""
    config = make_config(name, tokenizer)
    gguf_file.check_supported(config, tokenizer)
    model = make_model(config)
    return model, gguf_file.write_gguf(model, tokenizer, folder, "f16", name)


def differ(model, other) -> float:
    """Return the largest difference of two models' logits, in standard deviations of the first's."""
    with torch.no_grad():
        logits = model(IDS).logits
        return float((logits - other(IDS).logits).abs().max() / logits.std())


@pytest.mark.parametrize("name", BASES)
def test_file_holds_what_the_model_computes(name: str, tokenizer, tmp_path) -> None:
    model, file = written(name, tmp_path, tokenizer)

    assert differ(model, load_weights(file, model.config)) < 0.05
    gguf_file.check_tokenizer(file, tokenizer, [[5, 6, 7]])


@pytest.mark.parametrize("name", ["llama", "llama, tied", "qwen2", "qwen3", "phi3", "gemma3"])
def test_plain_transformers_read_the_same(name: str, tokenizer, tmp_path) -> None:
    """Its reader knows these by itself; what it has no key for (scaled positions, soft caps) it ignores."""
    model, file = written(name, tmp_path, tokenizer)

    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )

    assert differ(model, read.eval()) < 0.05


def test_language_model_is_taken_out_of_a_nested_one(tokenizer, tmp_path) -> None:
    base = save_tiny_gemma3(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["query_pre_attn_scalar"] = config["text_config"]["head_dim"]
    (base / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    gguf_file.check_supported(model.config, tokenizer)

    file = gguf_file.write_gguf(model, tokenizer, tmp_path, "f16", "nested")

    assert differ(model, load_weights(file, model.config)) < 0.05


@pytest.mark.parametrize(
    ("name", "length"), [("llama", 512), ("mistral", 150), ("phi3", 150), ("phi3, longrope", 256), ("gemma3", 512)]
)
def test_file_promises_no_more_context_than_a_reader_computes_right(name: str, length: int, tokenizer) -> None:
    config = make_config(name, tokenizer)

    assert context_length(ARCHITECTURES[config.model_type], config) == length


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("llama", {"hidden_act": "gelu"}, "this llama has hidden_act gelu"),
        ("llama", scaled("dynamic", factor=2.0), "rope scaling `dynamic`"),
        ("llama", {"attention_bias": True}, "q_proj.bias has no place in the GGUF of a llama"),
        ("smollm3", {"mlp_bias": True}, "proj.bias has no place"),
        ("qwen3", {"attention_bias": True}, "q_proj.bias has no place"),
        ("qwen3", {"rope_parameters": {**YARN["rope_parameters"], "beta_fast": 16}}, "beta_fast in its rope scaling"),
        ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings True"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ("gemma2", {"layer_types": IRREGULAR}, "windows in another order"),
        ("gemma3", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar 100"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "other layers without positions"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}}, "in part"),
    ],
)  # fmt: skip
def test_what_readers_would_compute_otherwise_is_refused(name: str, changes: dict, says: str, tokenizer) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        gguf_file.check_supported(make_config(name, tokenizer, **changes), tokenizer)


def test_readme_has_a_row_for_each_architecture() -> None:
    text = (ROOT / "scripts/export/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+)[^|]*\| (\w+) \| ([\w, ]+) \|$", text, re.MULTILINE)

    assert [(family, name, tuple(kinds.split(", "))) for family, name, kinds in rows] == [
        (family, known.name, known.scalings) for family, known in ARCHITECTURES.items()
    ]


@pytest.mark.parametrize(
    "described",
    [
        {"model_type": "cohere2"},
        {"model_type": "qwen3_moe"},
        {"model_type": "mistral3", "text_config": {"model_type": "ministral3"}},
    ],
    ids=lambda described: described["model_type"],
)
def test_other_architecture_is_refused_by_its_name_without_torch(described: dict, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(described))
    code = """
import sys
from pathlib import Path
from scripts.common.errors import UserError
from scripts.export.gguf_architectures import check_model_type
try:
    check_model_type(Path(sys.argv[1]))
except UserError as error:
    print(error, "torch" in sys.modules)
"""
    done = run_python("-c", code, tmp_path)

    found = described.get("text_config", described)["model_type"]
    assert f"names the architecture {found}, wanted llama, mistral, " in done.stdout, done.stderr
    assert done.stdout.strip().endswith("False")
