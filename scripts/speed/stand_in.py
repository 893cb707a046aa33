"""Let the lean decoder stand in for a model's own forward pass, once it is proven to compute the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from scripts.common.distributed import sharding_engine
from scripts.model.forward import PaddedForward
from scripts.model.products import quicken_head
from scripts.speed.guard import distance, may_replace
from scripts.speed.lean_decoder import Cache, LeanDecoder, other_than_family
from scripts.speed.packing import Packed, pack

log = logging.getLogger(__name__)

PROVEN_ROWS, PROVEN_TOKENS = 2, 512
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.15}  # bf16 rounds to 0.02


class StandIn:
    """The forward pass of a model's decoder: lean where it can be, the library's where it cannot."""

    def __init__(self, model: Any, base: Any) -> None:
        self.base, self.decoder = base, base.base_model
        self.library, self.lean, self.padded = self.decoder.forward, LeanDecoder(self.decoder), PaddedForward(model, 0)
        self.proven: dict[bool, bool] = {}  # by whether gradients were asked for
        self.labels: torch.Tensor | None = None  # of the call in progress, where TRL's head reads no other tokens
        self.decoder.forward = self.forward
        model.register_forward_pre_hook(self._take_labels, with_kwargs=True)
        model.register_forward_hook(self._drop_labels, always_call=True)

    def _take_labels(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("fused_lm_head") and kwargs.get("shift_labels") is None:
            self.labels = kwargs["labels"]

    def _drop_labels(self, *_: Any) -> None:
        self.labels = None

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, use_cache: Any = None, **others: Any
    ) -> Any:  # fmt: skip
        """Return what the library's forward returns: last_hidden_state (B, T, C), of which some tokens hold anything.

        These are padding, and where TRL's head was called the tokens after which no label stands.
        """
        plain = input_ids is not None and not use_cache and all(value is None for value in others.values())
        # A reference asked within a training step must not touch what that step's backward pass still needs.
        within_step = self.decoder.training and not torch.is_grad_enabled()
        if (
            plain
            and not within_step
            and (attention_mask is None or attention_mask.ndim == 2)
            and not self._chance_of_base()
        ):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            real = mask != 0
            usual = position_ids is None or bool((position_ids == mask.cumsum(1) - 1)[real].all())
            if usual and bool(real.any(1).all()):
                rows = [ids[kept].tolist() for ids, kept in zip(input_ids, real, strict=True)]
                if self.takes(rows):
                    return self._in_rows(rows, real)
        return self.library(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, **others
        )

    def takes(self, rows: Sequence[Sequence[int]]) -> bool:
        """Return whether the lean decoder computes what the library does, proven on the first rows that are seen."""
        with_gradient = torch.is_grad_enabled()
        if with_gradient not in self.proven:
            tried = [row[:PROVEN_TOKENS] for row in rows[:PROVEN_ROWS]]
            self.proven[with_gradient] = may_replace(
                lambda: self._difference(tried), "computing with the model's own, slower forward pass"
            )
        return self.proven[with_gradient]

    def hidden(self, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the last hidden states at some places of each row, one row after the other, (n, C)."""
        self.lean.renew()
        packed = pack(_up_to(places, rows), share=not self.lean.left_to_chance).to(self.decoder.device)
        return self.lean.hidden(packed, wanted=torch.cat(_at(places, packed.places)))

    def similarity(self, row: Sequence[int]) -> Sequence[int]:
        """Return the row itself: neighbours begin alike, and what they share is computed once."""
        return row

    def logits(self, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the logits at some places of each row, one row after the other, (n, V)."""
        if not self.takes(rows):
            return self.padded.logits(rows, places)
        return logits_of(self.base, self.hidden(rows, places))

    def decoding(self, sample: Sequence[Sequence[int]]) -> LeanDecoding | None:
        """Return rows to be continued."""
        return LeanDecoding(self) if sample and self.takes(sample) else None

    def _in_rows(self, rows: Sequence[Sequence[int]], real: torch.Tensor) -> Any:
        wanted = real
        if self.labels is not None:
            labelled = torch.nn.functional.pad(self.labels[:, 1:] != -100, (0, 1))  # a token predicts the next one
            wanted = real & labelled if bool((real & labelled).any()) else real
        places = [chosen[kept].nonzero()[:, 0].tolist() for chosen, kept in zip(wanted, real, strict=True)]
        hidden = self.hidden(rows, places)
        index = torch.zeros(real.shape, dtype=torch.long, device=hidden.device)
        index[wanted] = torch.arange(len(hidden), device=hidden.device)
        return BaseModelOutputWithPast(last_hidden_state=torch.nn.functional.embedding(index, hidden))

    def _chance_of_base(self) -> bool:
        layers = self.decoder.layers
        return self.decoder.training and any(getattr(layer.self_attn, "attention_dropout", 0) for layer in layers)

    def _difference(self, rows: Sequence[Sequence[int]]) -> str | None:
        """Return how far both ways are apart on some rows: hidden states, and where asked for the adapters' gradients."""
        training = self.decoder.training
        self.decoder.eval()
        width = max(map(len, rows))
        padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.decoder.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.decoder.device)
        theirs = self.library(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state[mask == 1]
        ours = self.hidden(rows, [range(len(row)) for row in rows])
        apart = {"hidden states": distance(ours.detach(), theirs.detach())}
        moved = [parameter for parameter in self.decoder.parameters() if parameter.requires_grad]
        if torch.is_grad_enabled() and moved:
            toward = torch.randn_like(theirs)
            grads = [torch.autograd.grad((states * toward).sum(), moved) for states in (ours, theirs)]
            apart["gradients"] = distance(*(torch.cat([grad.flatten() for grad in side]) for side in grads))
        self.decoder.train(training)
        found = ", ".join(f"{name} {value:.1g}" for name, value in apart.items())
        if all(value <= TOLERANCE[theirs.dtype] for value in apart.values()):
            log.info("performance.fast_path: real tokens only, as the model itself computes them (%s apart)", found)
            return None
        return f"this model computes otherwise than its family ({found} apart)"


class LeanDecoding:
    """Rows that are continued together, one token at a time, each with its keys and values in a cache."""

    def __init__(self, forward: StandIn) -> None:
        self.forward, self.lean, decoder = forward, forward.lean, forward.decoder
        first = self.lean.layers[0]
        weight = decoder.embed_tokens.weight
        self.cache = Cache(len(self.lean.layers), first.groups, first.attention.head_dim, weight)
        self.lean.renew()

    def reserve(self, prompts: Sequence[Sequence[int]]) -> None:
        """Make room for prompts that are added next, all at once or some at a time."""
        self.cache.reserve(len(self.cache.lengths) + len(prompts), max(map(len, prompts)))

    def add(
        self, prompts: Sequence[Sequence[int]], beside: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read prompts into new rows at the end, and beside them rows that are not continued; what they share once.

        Return the logits of what follows each prompt, (new rows, V), and those at some places of the rows beside, (n, V).
        """
        self.reserve(prompts)
        packed = pack([*prompts, *_up_to(places, beside)]).to(self.forward.decoder.device)
        of_prompts, of_beside = packed.places[: len(prompts)], packed.places[len(prompts) :]
        wanted = [*(places[-1:] for places in of_prompts), *_at(places, of_beside)]
        hidden = self.lean.hidden(replace(packed, places=of_prompts), self.cache, torch.cat(wanted))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=hidden.device)
        self.cache.lengths = torch.cat([self.cache.lengths, lengths])
        logits = logits_of(self.forward.base, hidden)
        return logits[: len(prompts)].clone(), logits[len(prompts) :]  # a view would keep the many of the rows beside

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to every row; return the logits of the next, (rows, V)."""
        cache = self.cache
        cache.reserve(len(tokens), int(cache.lengths.max()) + 1)
        ids = torch.tensor(tokens, device=cache.lengths.device)
        hidden = self.lean.hidden(Packed(ids, cache.lengths, [], []), cache)
        cache.lengths = cache.lengths + 1
        return logits_of(self.forward.base, hidden)

    def drop(self, row: int) -> None:
        """Let a row leave; the last one takes its place."""
        self.cache.drop(row)


def _up_to(places: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return each row up to the last of its places: nothing after it has a part in what is asked."""
    return [row[: max(wanted, default=0) + 1] for row, wanted in zip(rows, places, strict=True)]


def _at(places: Sequence[Sequence[int]], rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return of each row what stands at its places."""
    return [row[torch.tensor(wanted, dtype=torch.long)] for row, wanted in zip(rows, places, strict=True)]


def logits_of(base: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return what a causal model's own head, with all its caps and scales, makes of hidden states (N, C): (N, V)."""
    decoder = base.base_model
    usual = decoder.forward
    decoder.forward = lambda **_: BaseModelOutputWithPast(last_hidden_state=hidden[None])
    try:
        stand_for = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        logits: torch.Tensor = base(input_ids=stand_for, use_cache=False).logits[0]
    finally:
        decoder.forward = usual
    return logits


def lean_decoder_of(base: Any, product: Callable[[list[Any]], Any]) -> LeanDecoder | None:
    """Return the lean decoder with products of another kind, unproven; None where the model is of another family."""
    plain = not getattr(base, "is_quantized", False)
    return LeanDecoder(base.base_model, product) if plain and other_than_family(base.base_model) is None else None


def stand_in(model: Any) -> StandIn | None:
    """Put the lean decoder in the place of a causal model's decoder; None where the model is of another family."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    reason = "the weights are split over processes" if sharding_engine() else other_than_family(base.base_model)
    if getattr(base, "is_loaded_in_8bit", False):
        reason = "an 8-bit base rounds the activations of a batch together"
    if reason:
        log.info("performance.fast_path: %s, so the model's own forward pass is used", reason)
        return None
    quicken_head(base)
    found = base.lean_forward = StandIn(model, base)  # where forward_of finds it
    return found


def stands_in_for(folder: Path) -> bool:
    """Return whether the model in a folder, whose weights are not read, is of the family of the lean decoder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sharding_engine() is None and other_than_family(base.base_model) is None


def stand_in_of(model: Any) -> StandIn | None:
    """Return what stands in for a model's decoder, if anything does."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "lean_forward", None)
