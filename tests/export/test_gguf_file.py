"""GGUF: a model as llama.cpp and Ollama read it answers as base + adapter do; what the format cannot express is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from scripts.common.errors import UserError
from scripts.common.paths import ROOT
from scripts.dataset.chat_format import PLAIN_TEMPLATE, ChatFormat, plain_template
from scripts.dataset.rendering import render_prompt
from scripts.export import gguf_file, gguf_weights, proof
from scripts.export.ollama import go_template, write_modelfile
from scripts.export_lora import main
from scripts.model.base import load_tokenizer
from tests.conftest import run_python, save_tiny_model, tiny_tokenizer
from tests.support.exporting import figures, save_adapter
from tests.support.gguf_models import save_base
from tests.support.stops import FAMILIES, change_generation_config, save_family_model, stop_ids

OUT = Path("outputs/merged_gguf")
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Run far from this repository, with plain transformers and PEFT only.
ELSEWHERE = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
base, adapter, file = sys.argv[1:]
file = Path(file)
load = AutoModelForCausalLM.from_pretrained
ours = PeftModel.from_pretrained(load(base, dtype=torch.float32), adapter).eval()
theirs = load(file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)).eval()
tokenizers = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
answers = []
for model, tokenizer in zip((ours, theirs), tokenizers):
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Say 12 red words."}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answers.append(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0].tolist())
print(answers[0] == answers[1], len(answers[0]))
"""


@pytest.fixture
def export(write_config):
    """Return a function that exports an adapter as GGUF; the working folder is the test's own."""
    path = write_config()
    return lambda adapter, *arguments: main(
        ["--config", str(path), "--adapter", str(adapter), "--format", "gguf", *arguments]
    )


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory) -> Path:
    """Return an adapter of the tiny Llama; tests do not change it."""
    return save_adapter(tiny_llama, tmp_path_factory.mktemp("adapters") / "sft_adapter")


def fields(file: Path) -> dict:
    """Return a GGUF's metadata."""
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def test_f16_answers_as_base_and_adapter_in_plain_transformers(
    tiny_llama: Path, adapter: Path, export, tmp_path
) -> None:
    assert export(adapter) == 0

    assert {path.name for path in OUT.iterdir()} == {"model-f16.gguf", "Modelfile", "README.md", "manifest.json"}
    assert figures(OUT)["reloaded"]["greedy_agreement"] >= 0.98
    (tmp_path / "elsewhere").mkdir()
    file = (OUT / "model-f16.gguf").resolve()
    done = run_python("-c", ELSEWHERE, tiny_llama, adapter, file, cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "True"


def test_q8_0_is_smaller_and_held_to_its_own_bound(adapter: Path, export) -> None:
    from gguf import GGMLQuantizationType, GGUFReader

    assert export(adapter, "--dtype", "q8_0") == 0

    found = figures(OUT)
    assert (found["format"], found["dtype"]) == ("gguf", "q8_0")
    assert found["reloaded"]["greedy_agreement"] >= 0.95
    tensors = GGUFReader(OUT / "model-q8_0.gguf").tensors
    stored = {tensor.tensor_type for tensor in tensors if len(tensor.shape) == 2}
    assert stored == {GGMLQuantizationType.Q8_0}


def test_metadata_say_what_the_model_is(tiny_llama: Path, adapter: Path, export) -> None:
    assert export(adapter) == 0

    found, tokenizer = fields(OUT / "model-f16.gguf"), load_tokenizer(tiny_llama)
    assert found["general.architecture"] == "llama"
    assert (found["llama.attention.head_count"], found["llama.attention.head_count_kv"]) == (4, 2)
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.tokens"][tokenizer.eos_token_id] == tokenizer.eos_token
    assert found["tokenizer.ggml.token_type"][tokenizer.eos_token_id] == 3  # control
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert found["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("name", FAMILIES)
def test_file_names_as_many_stops_as_it_can_and_the_modelfile_all(name: str, export, tmp_path, capsys) -> None:
    family = FAMILIES[name]
    base = save_family_model(tmp_path / "base", family)
    tokenizer = load_tokenizer(base)

    assert export(save_adapter(base, tmp_path / "a")) == 0

    found = fields(OUT / "model-f16.gguf")
    written = {key: found.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")}
    assert {token for token in written.values() if token is not None} == stop_ids(base, family)
    assert (written["eos"], written["eot"]) == tuple(tokenizer.convert_tokens_to_ids([family.eos, family.closing]))
    lines = (OUT / "Modelfile").read_text().splitlines()
    assert {line for line in lines if "stop" in line.split()} == {f'PARAMETER stop "{stop}"' for stop in family.stops}
    assert "room for three stops" not in capsys.readouterr().err


def test_stops_that_the_format_has_no_room_for_are_named(export, tmp_path, capsys) -> None:
    """An id beyond the vocabulary has no text, so no format can hold it."""
    base = save_family_model(tmp_path / "base", FAMILIES["phi3"])
    change_generation_config(base, eos_token_id=[99999, 0, 3, 4])

    assert export(save_adapter(base, tmp_path / "a")) == 0

    found = fields(OUT / "model-f16.gguf")
    assert [found[f"tokenizer.ggml.{key}_token_id"] for key in ("eot", "eom")] == [1, 0]
    assert "room for three stops and this model has more: <|user|>, <|assistant|>. Ollama" in capsys.readouterr().err
    written = (OUT / "Modelfile").read_text()
    stops = [line.removeprefix("PARAMETER stop ") for line in written.splitlines() if line.startswith("PARAMETER stop")]
    assert stops == ['"<|pad|>"', '"<|end|>"', '"<|user|>"', '"<|assistant|>"', '"<|endoftext|>"']


def test_model_with_one_stop_is_given_no_other(adapter: Path, export) -> None:
    assert export(adapter) == 0

    assert not {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"} & set(fields(OUT / "model-f16.gguf"))


def test_rows_in_the_wrong_order_are_caught(tiny_llama: Path, export, tmp_path, monkeypatch, capsys) -> None:
    """The commonest fault of converters: queries and keys whose halves were not interleaved."""
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():  # a freshly initialised model hardly attends to anything
        for name, weight in model.named_parameters():
            if "self_attn" in name:
                weight.mul_(12)
    model.save_pretrained(base)
    made = save_adapter(base, tmp_path / "a")
    assert export(made) == 0

    shutil.rmtree(OUT)
    monkeypatch.setattr(gguf_weights, "interleaved", lambda weight, heads: weight)
    assert export(made) == 2

    assert "answers differently from base + adapter" in capsys.readouterr().err
    assert not OUT.exists()


def test_tokenizer_that_reads_otherwise_is_caught(adapter: Path, export, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gguf_file, "pre_tokenizer_name", lambda described: "llama-bpe")

    assert export(adapter) == 2

    assert "the tokenizer in the file reads" in capsys.readouterr().err
    assert not OUT.exists()


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "phi3, longrope"])
def test_other_architectures_are_exported_too(name: str, export, tmp_path) -> None:
    made = save_adapter(save_base(tmp_path / "base", name), tmp_path / "a")

    assert export(made) == 0

    assert figures(OUT)["reloaded"]["greedy_agreement"] >= 0.98


def test_architecture_that_is_not_written_is_refused_before_a_run_begins(
    tiny_gpt2: Path, export, tmp_path, capsys
) -> None:
    made = save_adapter(tiny_gpt2, tmp_path / "a")

    assert export(made) == 2

    assert "names the architecture gpt2, wanted llama, mistral, " in capsys.readouterr().err
    assert not list(Path("outputs").glob("*"))


def test_what_readers_do_not_expect_is_refused_before_weights_are_loaded(export, tmp_path, monkeypatch, capsys) -> None:
    made = save_adapter(save_base(tmp_path / "base", "qwen3", attention_bias=True), tmp_path / "a")
    monkeypatch.setattr(proof, "load_full_precision", None)

    assert export(made) == 2

    assert "q_proj.bias has no place in the GGUF of a qwen3" in capsys.readouterr().err


# --- tokenizers


def byte_level(*steps) -> dict:
    """Describe a byte-level tokenizer that splits words by these steps."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    return json.loads(core.to_str())


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
AFTER_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([PLAIN], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), PLAIN], "smollm"),
        ([pre_tokenizers.Split(Regex(gguf_file.LLAMA3_SPLIT), "isolated"), AFTER_SPLIT], "dbrx"),
    ],
)
def test_word_splitting_gets_the_name_that_readers_know(steps, name: str) -> None:
    assert gguf_file.pre_tokenizer_name(byte_level(*steps)) == name


@pytest.mark.parametrize(("name", "splits_as"), [("llama3_1", "llama-bpe"), ("qwen3", "qwen2"), ("gemma3", None)])
def test_real_tokenizers_are_known(name: str, splits_as: str | None) -> None:
    file = ROOT / "models/tokenizers" / name / "tokenizer.json"
    if not file.is_file():
        pytest.skip(f"needs {file}")

    assert gguf_file.pre_tokenizer_name(json.loads(file.read_text(encoding="utf-8"))) == splits_as


@pytest.mark.parametrize("name", ["tekken", "gpt-4o", "qwen2"])
def test_patterns_are_those_of_plain_transformers(name: str) -> None:
    (pattern,) = (pattern for pattern, known in gguf_file.SPLITS.items() if known == name)

    assert pattern == GGUF_PRE_TOKENIZER_SPLITS[name]


def test_name_that_would_mislead_a_reader_is_changed() -> None:
    """Where a name speaks of Phi-3, llama.cpp demands Phi-3's tokens, and makes them swallow white space."""
    tokenizer = tiny_tokenizer()
    assert gguf_file.name_for_readers("my-Phi3-tune", tokenizer) == "my-phi-tune"

    tokenizer.add_tokens([AddedToken(token, special=True) for token in sorted(gguf_file.PHI3_TOKENS)])
    tokenizer.add_tokens([AddedToken("<|asks|>", special=True, rstrip=True)])
    assert gguf_file.name_for_readers("tuned", tokenizer) == "tuned (phi-3)"


@pytest.mark.parametrize(
    "steps", [[pre_tokenizers.Whitespace()], [pre_tokenizers.Split(Regex(r"\d"), "isolated"), AFTER_SPLIT]]
)
def test_word_splitting_without_a_name_is_refused(steps) -> None:
    with pytest.raises(UserError, match="not one that GGUF readers know by name"):
        gguf_file.pre_tokenizer_name(byte_level(*steps))


def sentencepiece_tokenizer() -> LlamaTokenizer:
    """Train a tokenizer of Llama 2's kind: pieces with ▁ for a space, and bytes for what no piece covers."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.train([str(ROOT / "data/sft/sample_sft.jsonl")], trainers.BpeTrainer(vocab_size=900, show_progress=False))
    trained = json.loads(core.to_str())["model"]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [*special, *sorted(trained["vocab"], key=trained["vocab"].get)]
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = LlamaTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges)
    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def test_sentencepiece_tokenizer_reads_alike_after_the_way_through_a_file(export, tmp_path) -> None:
    base, tokenizer = tmp_path / "model", sentencepiece_tokenizer()
    save_tiny_model(base)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(
        base, vocab_size=len(tokenizer) + 3, bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)

    assert export(save_adapter(base, tmp_path / "a")) == 0

    found = fields(OUT / "model-f16.gguf")
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]  # unknown, control, control, byte
    assert found["tokenizer.ggml.tokens"][-1] == f"[PAD{len(tokenizer) + 2}]"


def test_bos_is_added_by_readers_only_where_training_had_it() -> None:
    tokenizer = tiny_tokenizer()
    assert not gguf_file.adds_bos(tokenizer)

    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    assert not gguf_file.adds_bos(tokenizer), "the template writes none, so no prompt began with one"

    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert gguf_file.adds_bos(tokenizer)
    template = go_template(ChatFormat(tokenizer), tokenizer.bos_token)
    assert template is not None
    assert "<|bos|>" not in template


# --- Ollama


def render_go(template: str, messages: list[dict]) -> str:
    """Render the little of Go's template language that a Modelfile of ours uses."""
    text, output = template, ""
    if start := re.match(r'\{\{ if ne \(index \.Messages 0\)\.Role "system" \}\}(.*?)\{\{ end \}\}', text, re.DOTALL):
        output += start[1] if messages[0]["role"] != "system" else ""
        text = text[start.end() :]
    body = re.fullmatch(r"\{\{ range \.Messages \}\}\{\{ (if .*?) end \}\}\{\{ end \}\}(.*)", text, re.DOTALL)
    assert body is not None, text
    cases = dict(re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)\{\{ (?=else|$)', body[1] + " ", re.DOTALL)) or {}
    for message in messages:
        output += cases[message["role"]].replace("{{ .Content }}", message["content"])
    return output + body[2]


def turns(*roles: str) -> list[dict]:
    """Make a conversation."""
    return [{"role": role, "content": f" what {role} {place} said\n"} for place, role in enumerate(roles)]


@pytest.mark.parametrize("template", [None, CHATML, PLAIN_TEMPLATE], ids=["markers", "ChatML with a default", "plain"])
@pytest.mark.parametrize(
    "roles", [("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user")]
)
def test_modelfile_renders_prompts_as_training_did(template: str | None, roles) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template

    translated = go_template(ChatFormat(tokenizer))

    assert translated is not None
    expected = tokenizer.apply_chat_template(turns(*roles), tokenize=False, add_generation_prompt=True)
    assert render_go(translated, turns(*roles)) == expected


@pytest.mark.parametrize("roles", [("user",), ("system", "user"), ("system", "user", "assistant", "user")])
def test_modelfile_begins_an_answer_where_the_adapter_was_trained_to(roles) -> None:
    """Qwen3 writes an empty thinking block before an answer without reasoning, and none before earlier ones."""
    tokenizer = tiny_tokenizer((Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text(encoding="utf-8"))
    empty = "<think>\n\n</think>\n\n"

    for chat, begun in ((ChatFormat(tokenizer), empty), (ChatFormat(tokenizer, thinking=True), "")):
        translated = go_template(chat)
        assert translated is not None
        prompt = render_go(translated, turns(*roles))
        assert prompt == tokenizer.decode(render_prompt(chat, turns(*roles)))
        assert prompt.endswith("<|im_start|>assistant\n" + begun)


def test_modelfile_leaves_bos_to_the_reader_that_adds_it() -> None:
    tokenizer = tiny_tokenizer(None)
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = plain_template(tokenizer)

    translated = go_template(ChatFormat(tokenizer), tokenizer.bos_token)

    assert gguf_file.adds_bos(tokenizer)
    assert translated is not None
    expected = tokenizer.apply_chat_template(turns("system", "user"), tokenize=False, add_generation_prompt=True)
    assert "<|start|>" + render_go(translated, turns("system", "user")) == expected


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("message['content']", "message['content'] | trim"),
        CHATML.replace("message['role'] + '\n'", "message['role'] + '\n' + loop.index | string"),
        CHATML.replace(
            "{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for", 1
        ),
    ],
    ids=["strips", "counts", "refuses system"],
)
def test_template_that_does_more_is_not_said_and_the_modelfile_says_so(template: str, tmp_path) -> None:
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    tokenizer.chat_template = template

    assert go_template(ChatFormat(tokenizer)) is None
    write_modelfile(ChatFormat(tokenizer), tmp_path, "model-f16.gguf", adds_bos=False)

    written = (tmp_path / "Modelfile").read_text()
    assert "TEMPLATE" not in written
    assert "cannot be expressed in Ollama's template language" in written


def test_modelfile_names_the_file_and_every_stop_token(adapter: Path, export) -> None:
    assert export(adapter) == 0

    written = (OUT / "Modelfile").read_text()
    assert written.startswith('FROM ./model-f16.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|end|>"' in written
