"""Write a merged model as GGUF, the format of llama.cpp and Ollama, and read it back to prove it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.dataset.chat_format import ChatFormat, closing_token_id, stop_token_ids, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.export.gguf_architectures import INSTEAD, architecture_of, describe_model
from scripts.export.gguf_weights import named_weights, without_weights, write_weights

log = logging.getLogger(__name__)

# What a file has to name its word splitting by; readers know no other way.
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
CONTRACTIONS, REST = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    LLAMA3_SPLIT: "llama-bpe",
    LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
    rf"{WORD[0]}|{WORD[1]}|\p{{N}}{REST}": "tekken",
    rf"{WORD[0]}{CONTRACTIONS}|{WORD[1]}{CONTRACTIONS}|\p{{N}}{{1,3}}{REST}": "gpt-4o",
}
PHI3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
SENTENCES = (
    "Hello, world! It's 17:45, and 1234 + 5.6 = 1239.6.",
    "  two  spaces\n\n\tand a tab\r\nand CRLF ",
    "Grüße, naïve café, 你好, Привет, 🙂 ½ ²",
    "def f(x_1): return {'a': [x_1 ** 2]}  # don't",
)


def check_supported(config: Any, tokenizer: Any) -> None:
    """Refuse what this writer cannot put into a GGUF without loss; needs no weights."""
    known, text = architecture_of(config), config.get_text_config(decoder=True)
    pre_tokenizer_name(json.loads(tokenizer.backend_tokenizer.to_str()))
    list(named_weights(without_weights(text), known))


def pre_tokenizer_name(described: dict[str, Any]) -> str | None:
    """Return the name under which GGUF readers know how this tokenizer splits words; None for a sentencepiece BPE.

    Raises: UserError when they know none.
    """
    model, splitting = described["model"], described["pre_tokenizer"]
    steps = splitting.get("pretokenizers", [splitting]) if splitting else []
    kinds = [step["type"] for step in steps]
    if model["type"] == "BPE" and model["byte_fallback"]:
        return None
    plain = described["normalizer"] in (None, {"type": "NFC"})  # Qwen composes accents; readers leave a text as it is
    if model["type"] == "BPE" and plain and kinds[-1:] == ["ByteLevel"]:
        if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and (name := SPLITS.get(steps[0]["pattern"].get("Regex"))):
            # Both split alike; the second joins the pieces of a word even if the whole is a token.
            return "dbrx" if name == "llama-bpe" and not model["ignore_merges"] else name
    raise UserError(
        f"--format gguf: the tokenizer ({model['type']}; {', '.join(kinds) or 'no word splitting'}) is not one that GGUF readers "
        f"know by name. {INSTEAD}"
    )


def write_gguf(model: Any, tokenizer: Any, folder: Path, kind: str, name: str) -> Path:
    """Write one file with weights, tokenizer and chat template; tensors go to disk one by one."""
    import gguf

    text = model.config.get_text_config(decoder=True)
    known = architecture_of(text)
    if text is not model.config:
        log.info("the language model alone is written, without what stands beside it")
    file = folder / f"model-{kind}.gguf"
    writer = gguf.GGUFWriter(file, known.name)
    writer.add_type("model")
    writer.add_name(name_for_readers(name, tokenizer))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == "q8_0" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe_model(writer, known, text)
    add_tokenizer(writer, tokenizer, text.vocab_size)
    write_weights(writer, model, kind)
    writer.close()
    return file


def name_for_readers(name: str, tokenizer: Any) -> str:
    """Return a model's name as a file may give it.

    Where a name speaks of Phi-3, llama.cpp expects Phi-3's special tokens, which swallow white space behind them.
    """
    swallowing = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
    if swallowing and set(tokenizer.get_vocab()) >= PHI3_TOKENS:
        return f"{name} (phi-3)"
    return re.sub("phi-?3", "phi", name, flags=re.IGNORECASE)


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
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        # A run of spaces is only found once they are ▁, as any piece of a sentencepiece BPE.
        types[added["id"]] = TokenType.NORMAL if not pre_tokenizer and set(added["content"]) == {"▁"} else kind
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
    writer.add_add_space_prefix(
        not pre_tokenizer and puts_space(tokenizer, "" if starts_with_text(tokenizer) else tokenizer.eos_token)
    )
    writer.add_chat_template(tokenizer.chat_template)


def puts_space(tokenizer: Any, before: str = "") -> bool:
    """Say whether a sentencepiece tokenizer puts a space at the start of a text, or of what follows a special token."""
    ids = tokenizer.encode(f"{before}a", add_special_tokens=False)
    return bool(tokenizer.convert_ids_to_tokens(ids)[1 if before else 0].startswith("▁"))


def starts_with_text(tokenizer: Any) -> bool:
    """Say whether prompts begin with ordinary text, as the plain template's may."""
    return render_prompt(ChatFormat(tokenizer), user_turn("a"))[0] not in tokenizer.added_tokens_decoder


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
    from transformers import PreTrainedTokenizerFast

    read = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)  # also for models it cannot read
    for text in (*SENTENCES, *(tokenizer.decode(ids) for ids in probes)):
        ours, theirs = (t.encode(text, add_special_tokens=False) for t in (tokenizer, read))
        if ours != theirs:
            raise UserError(
                f"--format gguf: the tokenizer in the file reads {text[:60]!r} as {theirs[:12]}, ours as {ours[:12]}. "
                "Nothing was written. Export safetensors."
            )
    sentencepiece = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["byte_fallback"]
    both_ways = puts_space(tokenizer) != puts_space(tokenizer, tokenizer.eos_token)
    if sentencepiece and both_ways and starts_with_text(tokenizer):
        log.warning(
            "llama.cpp puts a space after each special token of this sentencepiece tokenizer, which training did not: compare "
            "some answers to later turns there with those of the adapter"
        )
    if read.chat_template != tokenizer.chat_template:
        raise UserError("--format gguf: the chat template did not survive. Nothing was written. Export safetensors.")
