"""Choose a base model that is on this machine, and count tokens as it does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.common.paths import ROOT
from scripts.common.schema import Config
from scripts.model.find import find_local_model
from scripts.model.memory import parameter_count
from scripts.starting.asking import Asker
from scripts.starting.minutes import Speed

CHARACTERS_PER_TOKEN = 3  # of Latin letters, fewer than there are; used where no tokenizer is here
DEFAULT_PARAMETERS = 1_100_000_000  # of the default base
LONGEST_SECONDS = 1200  # of an epoch, on the base that is proposed where several are here
# What a chat template writes around each message, and around a conversation: at most, and usually.
TURN_TOKENS, FRAME_TOKENS, USUAL_FRAME_TOKENS = 8, 96, 16


@dataclass(frozen=True)
class Base:
    """A model to train on, with what its files say."""

    id: str
    folder: Path | None  # None where it would have to be downloaded
    parameters: int
    hidden: int
    positions: int | None
    chats: bool  # whether it brings a chat template

    def count_tokens(self, conversations: Sequence[Sequence[str]], frame: int = FRAME_TOKENS) -> list[int]:
        """Count the tokens of conversations, generously: what their templates write is assumed, not rendered."""
        return [
            sum(lengths) + frame + TURN_TOKENS * len(lengths)
            for lengths in (self.count_texts(texts) for texts in conversations)
        ]

    def count_texts(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text; where there is no tokenizer, by its length."""
        file = self.folder / "tokenizer.json" if self.folder else None
        if file is None or not file.is_file():
            return [len(text.encode()) // CHARACTERS_PER_TOKEN + 1 for text in texts]
        from tokenizers import Tokenizer

        if file not in _TOKENIZERS:
            _TOKENIZERS[file] = Tokenizer.from_file(str(file))
        return [len(encoding.ids) for encoding in _TOKENIZERS[file].encode_batch(list(texts), add_special_tokens=False)]


_TOKENIZERS: dict[Path, Any] = {}


def bases_here() -> list[Base]:
    """Return the models below models/ and in the Hub's cache that can be trained, the smallest first."""
    found = {base.id: base for base in (*_in_folder(ROOT / "models"), *_in_cache())}
    return sorted(found.values(), key=lambda base: base.parameters)


def default_base() -> Base:
    """Return the base of the configuration's default, which the first run downloads."""
    return Base(Config().base_model_id, None, DEFAULT_PARAMETERS, 2048, 2048, chats=True)


def choose_base(count_tokens: Callable[[Base], int], speed: Speed, asker: Asker) -> Base:
    """Choose among the models that are here: the largest that learns these examples once over in a bearable time.

    One with a chat template is preferred, as only such a model was made to answer.
    """
    here = bases_here()
    here = [base for base in here if base.chats] or here
    if not here:
        return default_base()
    if len(here) == 1:
        return here[0]
    bearable = [
        base
        for base in here
        if not speed.flops or speed.training_seconds(base.parameters, count_tokens(base)) <= LONGEST_SECONDS
    ]
    proposed = bearable[-1] if bearable else here[0]
    name = asker.choose("which base model?", [base.id for base in here], proposed.id)
    return next(base for base in here if base.id == name)


def _in_folder(folder: Path) -> Iterator[Base]:
    for file in sorted(folder.glob("*/config.json")):
        base = _describe(f"{folder.name}/{file.parent.name}", file.parent)
        if base:
            yield base


def _in_cache() -> Iterator[Base]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for folder in sorted(Path(HF_HUB_CACHE).glob("models--*")):
        name = folder.name.removeprefix("models--").replace("--", "/")
        try:
            local = find_local_model(name)
        except UserError:  # of another kind, such as an adapter
            continue
        base = _describe(name, local) if local else None
        if base:
            yield base


def _describe(name: str, folder: Path) -> Base | None:
    """Read what a folder says of its model; None for an adapter, an encoder, or weights in another format."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = folder / "tokenizer_config.json"
        described = json.loads(tokenizer.read_text(encoding="utf-8")) if tokenizer.is_file() else {}
    except (OSError, ValueError):
        return None
    kinds = " ".join(config.get("architectures") or ()) if isinstance(config, dict) else ""
    if not any(folder.glob("*.safetensors")) or not ("CausalLM" in kinds or "LMHead" in kinds):
        return None
    text = config.get("text_config") or config
    hidden = next((text[key] for key in ("hidden_size", "n_embd", "d_model") if isinstance(text.get(key), int)), 2048)
    positions = next(
        (text[key] for key in ("max_position_embeddings", "n_positions") if isinstance(text.get(key), int)), None
    )
    chats = (folder / "chat_template.jinja").is_file() or "chat_template" in described
    return Base(name, folder, parameter_count(folder), hidden, positions, chats)
