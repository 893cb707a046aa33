"""Save and load again, proving at each step that the answers are still those of base + adapter."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.common.config import LoadedConfig
from scripts.export import gguf_file, merging, ollama, parity, sharing
from scripts.export.gguf_weights import load_weights
from scripts.export.parts import Parts
from scripts.model.adapter import load_adapter, switched_to
from scripts.model.base import load_full_precision

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proof:
    """The logits of base + adapter for some prompts, and how far each other model is from them."""

    probes: list[list[int]]
    before_merge: parity.Stored
    figures: dict[str, parity.Parity]

    @property
    def effect(self) -> parity.Parity:
        """Return how far the adapter moves the base."""
        return self.figures["adapter_effect"]

    def measure(self, name: str, model: Any) -> parity.Parity:
        """Measure how far a model is from base + adapter, and keep the figures under a name."""
        self.figures[name] = parity.compare(self.before_merge, parity.scored_logits(model, self.probes))
        return self.figures[name]


def write_result(parts: Parts, folder: Path, logits: Path) -> Proof:
    """Prove that the adapter changes its base, and write it: merged, which is proven in fp32, or as it is.

    `logits` is an empty folder for those of base + adapter.
    """
    log.info("loading %s in fp32 with %s", parts.base_id, parts.adapter)
    model = load_adapter(load_full_precision(parts.base_folder), parts.adapter)
    probes = parity.build_probes(model, parts.chat, parity.held_out_prompts(parts.manifest))
    before_merge = parity.Stored(parity.scored_logits(model, probes), logits)
    with switched_to(model, None):
        effect = parity.compare(parity.scored_logits(model, probes), before_merge)
    log.info("the adapter changes the base: %s", effect)
    parity.check_effect(effect, parts.adapter)

    proof = Proof(probes, before_merge, {"adapter_effect": effect})
    if parts.merges:
        model = merging.merge(model)
        exact = proof.measure("merge", model)
        log.info("merged, in fp32: %s", exact)
        parity.check_exact(exact, effect, "the merged model")
    save(parts, model, folder)
    del model
    gc.collect()  # PEFT's wrappers refer to each other
    return proof


def save(parts: Parts, model: Any, folder: Path) -> None:
    """Write the result in the form that was asked for, and the licence of the base."""
    if not parts.merges:
        sharing.save_for_others(parts, folder)
    elif parts.gguf:
        file = gguf_file.write_gguf(model, parts.tokenizer, folder, parts.dtype, Path(parts.base_id).name)
        ollama.write_modelfile(parts.chat, folder, file.name, adds_bos=gguf_file.adds_bos(parts.tokenizer))
    else:
        merging.save_merged(model, parts.tokenizer, parts.dtype, folder)
    merging.copy_licence(parts.base_folder, folder)


def check_saved(parts: Parts, folder: Path, proof: Proof) -> None:
    """Load what was written, and refuse it if it does not answer as base + adapter did."""
    reloaded = proof.measure("reloaded", load_again(parts, folder, proof.probes))
    log.info("read again from disk in %s: %s", parts.dtype, reloaded)
    what = f"the {'merged model' if parts.merges else 'adapter'}, read again from disk in {parts.dtype},"
    if parts.dtype == "fp32":
        parity.check_exact(reloaded, proof.effect, what)
    else:
        parity.check_rounded(reloaded, parts.dtype, what)


def load_again(parts: Parts, folder: Path, probes: Sequence[Sequence[int]]) -> Any:
    """Load what was written, weights widened to fp32, so that only their own rounding shows."""
    if not parts.merges:
        return load_adapter(load_full_precision(parts.base_folder), folder)
    if not parts.gguf:
        return load_full_precision(folder)
    (file,) = folder.glob("*.gguf")
    gguf_file.check_tokenizer(file, parts.tokenizer, probes)
    return load_weights(file, parts.config)


def measure_quantised_base(parts: Parts, config: LoadedConfig, proof: Proof) -> None:
    """Measure how far the answers move because the base is not quantised as it was in training."""
    model = merging.load_as_trained(parts.base_folder, parts.adapter, config, parts.quantization)
    log.warning(
        "the adapter was trained on the base in %d bits and is merged into the full-precision base, which moves its answers: %s",
        parts.trained_in_bits,
        proof.measure("quantized_base", model),
    )
