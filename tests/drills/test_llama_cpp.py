"""Exports as GGUF, read by llama.cpp itself: the same prompts, the same answers, the same ends as of the merged model.

    python -m pytest -q -m drill tests/drills/test_llama_cpp.py

`make drill` fetches llama.cpp (the wheel xllamacpp) into .drill; without it these drills are skipped.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import AddedToken

from scripts.dataset.chat_format import BOS_FIRST, ChatFormat, stop_token_ids, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.export import gguf_file, merging
from scripts.export_lora import main
from scripts.model.adapter import load_adapter
from scripts.model.base import load_full_precision, load_tokenizer
from tests.conftest import ROOT, tiny_tokenizer
from tests.export.test_gguf_file import sentencepiece_tokenizer
from tests.support.exporting import save_adapter
from tests.support.gguf_models import BASES, make_config, make_model, save_base
from tests.support.stops import FAMILIES, save_family_model

LLAMA_CPP = ROOT / ".drill"
OUT = Path("outputs/merged_gguf")
PROMPTS = (
    "Name three colours, and say why you like them.",
    "What is the capital of France?",
    "Write a short e-mail that moves a meeting to Thursday.",
)
# Where the two best tokens are closer than this, in nats, rounding to the file's type decides which of them is said.
ROUNDING = {"f16": 0.1, "q8_0": 0.5}
pytestmark = [
    pytest.mark.drill,
    pytest.mark.skipif(not (LLAMA_CPP / "xllamacpp").is_dir(), reason="needs llama.cpp, which `make drill` fetches"),
]

# In a process of its own; ends when its input does. Context length and all else come from the file.
SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
import xllamacpp
from xllamacpp import ggml_type, llama_flash_attn_type
wanted = xllamacpp.CommonParams()
wanted.model.path, wanted.n_ctx, wanted.n_parallel, wanted.n_gpu_layers, wanted.warmup = sys.argv[2], 0, 1, 0, False
wanted.cache_type_k = wanted.cache_type_v = ggml_type.GGML_TYPE_F32
wanted.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(wanted)
print("listens at", server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    """A llama.cpp that has read one file."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, path: str, **body: Any) -> Any:
        """Send a request and return the answer."""
        answer = httpx.post(f"{self.address}/{path}", json=body, timeout=300)
        answer.raise_for_status()
        return answer.json()

    def ids(self, text: str, *, whole: bool = False) -> list[int]:
        """Return the ids of a text with special tokens; of a whole prompt with the BOS that the file asks for."""
        return list(self.ask("tokenize", content=text, add_special=whole, parse_special=True)["tokens"])

    def prompt(self, messages: Sequence[Any]) -> list[int]:
        """Return the ids of a conversation by the file's own chat template."""
        return self.ids(self.ask("apply-template", messages=list(messages))["prompt"], whole=True)

    def answer(self, ids: list[int], tokens: int) -> tuple[list[int], bool]:
        """Return the greedy answer, with the token that ended it, and whether one did."""
        done = self.ask(
            "completion", prompt=ids, n_predict=tokens, temperature=0, return_tokens=True, cache_prompt=False
        )
        return done["tokens"], done["stop_type"] == "eos"


@contextmanager
def llama_cpp(file: Path) -> Iterator[LlamaCpp]:
    """Have llama.cpp read a file."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, LLAMA_CPP, file],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        said = next((line for line in server.stdout if line.startswith("listens at")), None)
        try:
            assert said, f"llama.cpp does not read {file}: {server.communicate()[1][-2000:]}"
            yield LlamaCpp(said.split()[-1])
        finally:
            server.kill()


@pytest.fixture
def export(write_config) -> Callable[..., Path]:
    """Return a function that exports an adapter as GGUF and returns the file."""
    path = write_config()

    def run(adapter: Path, dtype: str = "f16") -> Path:
        assert main(["--config", str(path), "--adapter", str(adapter), "--format", "gguf", "--dtype", dtype]) == 0
        return OUT / f"model-{dtype}.gguf"

    return run


def merged(base: Path, adapter: Path) -> Any:
    """Return base + adapter, merged in fp32."""
    return merging.merge(load_adapter(load_full_precision(base), adapter)).eval()


def compare_answers(model: Any, tokenizer: Any, theirs: LlamaCpp, tokens: int, rounding: float) -> list[bool]:
    """Compare prompts and greedy answers; return which of the answers ended by themselves."""
    stops = sorted(stop_token_ids(tokenizer))
    ended = []
    for text in PROMPTS:
        prompt = render_prompt(ChatFormat(tokenizer), user_turn(text))
        assert theirs.prompt(user_turn(text)) == prompt
        with torch.no_grad():
            whole = model.generate(
                torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=stops,
                repetition_penalty=1.0, pad_token_id=tokenizer.pad_token_id,
            )[0].tolist()  # fmt: skip
        at = len(prompt)
        while at < len(whole):
            said, stopped = theirs.answer(whole[:at], len(whole) - at)
            assert stopped == (said[-1] in stops)
            alike = next((place for place, token in enumerate(said) if token != whole[at + place]), len(said))
            at += alike
            if at < len(whole):  # only rounding may have decided; from there on the rest of our answer is compared
                check_tie(model, whole[:at], whole[at], said[alike], rounding)
                at += 1
        ended.append(whole[-1] in stops)
    return ended


def check_tie(model: Any, ids: list[int], ours: int, other: int, rounding: float) -> None:
    """Prove that two tokens are so close that rounding decides which of them follows."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    lead = float(logits[ours] - logits[other])
    assert lead <= rounding, f"after {ids[-8:]} the model says {ours}, {lead:.2f} nats before the {other} of llama.cpp"


@pytest.mark.parametrize("name", BASES)
def test_answers_are_those_of_the_merged_model(name: str, export, tmp_path) -> None:
    base = save_base(tmp_path / "base", name)
    adapter = save_adapter(base, tmp_path / "adapter")

    with llama_cpp(export(adapter)) as theirs:
        compare_answers(merged(base, adapter), load_tokenizer(base), theirs, 32, ROUNDING["f16"])


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_demo_model_answers_alike_and_stops_alike(dtype: str, demo_model: Path, export, tmp_path) -> None:
    adapter = save_adapter(demo_model, tmp_path / "adapter", strength=0.003)

    with llama_cpp(export(adapter, dtype)) as theirs:
        model, tokenizer = merged(demo_model, adapter), load_tokenizer(demo_model)
        assert any(compare_answers(model, tokenizer, theirs, 96, ROUNDING[dtype]))


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_end_at_the_closing_token_of_the_template(name: str, export, tmp_path) -> None:
    base = save_family_model(tmp_path / "base", FAMILIES[name])

    with llama_cpp(export(save_adapter(base, tmp_path / "adapter"))) as theirs:
        tokenizer = load_tokenizer(base)
        assert theirs.prompt(user_turn("hello")) == render_prompt(ChatFormat(tokenizer), user_turn("hello"))
        closing = tokenizer.convert_tokens_to_ids(FAMILIES[name].closing)
        assert theirs.answer(render_prompt(ChatFormat(tokenizer), user_turn("hello")), 8) == ([closing], True)


def real_tokenizer(name: str) -> Any:
    """Return a real tokenizer, or skip where it was not brought."""
    folder = ROOT / "models/tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    return load_tokenizer(folder)


def llama2_tokenizer() -> Any:
    """Return a sentencepiece tokenizer whose prompts begin with BOS."""
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = BOS_FIRST + tokenizer.chat_template
    return tokenizer


def phi3_tokenizer() -> Any:
    """Return a sentencepiece tokenizer whose special tokens swallow white space behind them, as Phi-3's do."""
    tokenizer = sentencepiece_tokenizer()
    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_tokens([AddedToken(token, special=True, rstrip=True, normalized=False) for token in names])
    tokenizer.add_special_tokens({"eos_token": AddedToken("<|endoftext|>", special=True, normalized=False)})
    tokenizer.chat_template = tiny_tokenizer().chat_template
    return tokenizer


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("gemma3", lambda: real_tokenizer("gemma3")),
        ("llama", lambda: real_tokenizer("llama3_1")),
        ("qwen3", lambda: real_tokenizer("qwen3")),
        ("llama", sentencepiece_tokenizer),
        ("mistral", llama2_tokenizer),
        ("phi3", phi3_tokenizer),
    ],
    ids=["Gemma 3", "Llama 3.1", "Qwen 3", "sentencepiece, plain text first", "sentencepiece, BOS first", "Phi-3"],
)
def test_texts_and_prompts_become_the_same_tokens(name: str, tokenizer: Callable[[], Any], tmp_path) -> None:
    ours = tokenizer()
    model = make_model(make_config(name, ours, hidden_size=32))

    with llama_cpp(gguf_file.write_gguf(model, ours, tmp_path, "q8_0", name)) as theirs:
        plain = gguf_file.starts_with_text(ours)  # such a prompt begins with a word, all other texts follow a token
        for text in (sentence.lstrip() if plain else ours.eos_token + sentence for sentence in gguf_file.SENTENCES):
            assert theirs.ids(text) == ours.encode(text, add_special_tokens=False), text
        for text in (*PROMPTS, *gguf_file.SENTENCES):
            assert theirs.prompt(user_turn(text)) == render_prompt(ChatFormat(ours), user_turn(text)), text
