"""What makes TRL's trainers fast without a GPU: score answer tokens only, and batches of similar length.

Both are exact: the same loss and gradients as TRL's own code on the same batch.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch.nn import functional
from torch.utils.data import Sampler

log = logging.getLogger(__name__)

# Logits of one tile in fp32; what lies beyond is recomputed in the backward pass instead of being kept.
TILE_BYTES = 512 * 2**20


def score_answers_only(device: str) -> bool:
    """Make TRL's LM head project only positions that carry a label, where it would project all of them.

    With Triton TRL does so itself. Elsewhere it scores every position, prompts and padding included, in a tiled loop;
    this replaces the two private names that decide it, after checking that they are what this release expects.
    """
    from trl.trainer import utils as trl_utils

    if device == "cuda":
        return False
    expected = ("_use_triton", "_ChunkedLogProbFunction", "add_fused_lm_head", "FusedCausalLMOutput")
    missing = [name for name in expected if not hasattr(trl_utils, name)]
    if missing:
        log.warning("performance.fast_path: this TRL has no %s; training with its own, slower head", ", ".join(missing))
        return False
    trl_utils._use_triton = lambda device: True
    trl_utils._ChunkedLogProbFunction = AnswerLogProbs
    return True


class AnswerLogProbs:
    """Stand in for TRL's chunked autograd function with plain operations, which are faster on a CPU."""

    @staticmethod
    def apply(
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: Sequence[str],
    ) -> tuple[torch.Tensor | None, ...]:
        """Return log-probs, entropy, log of summed squared probs, mean logit and top-1 hit of each label.

        Shapes: hidden_states (N, H), weight (V, H), labels (N,); every output (N,) in fp32.
        """

        def tile(hidden: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            logits = functional.linear(hidden, weight, bias).float()
            if logit_scale != 1.0:
                logits = logits * logit_scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if temperature != 1.0:
                logits = logits / temperature
            log_probs = functional.log_softmax(logits, dim=-1)
            with torch.no_grad():
                entropy = -(log_probs.exp() * log_probs).sum(-1) if "entropy" in outputs else None
                squares = torch.logsumexp(2 * log_probs, -1) if "log_sum_sq_probs" in outputs else None
                mean = logits.mean(-1) if "mean_logits" in outputs else None
                top1 = log_probs.argmax(-1) == wanted if "is_top1" in outputs else None
            return log_probs.gather(-1, wanted[:, None])[:, 0], entropy, squares, mean, top1

        rows = max(1, TILE_BYTES // (4 * weight.shape[0]))
        if len(hidden_states) <= rows:
            return tile(hidden_states, labels)
        tiles = [
            torch.utils.checkpoint.checkpoint(tile, hidden, wanted, use_reentrant=False)
            for hidden, wanted in zip(hidden_states.split(rows), labels.split(rows), strict=True)
        ]
        return tuple(None if column[0] is None else torch.cat(column) for column in zip(*tiles, strict=True))


class _LinearInInputDtype(torch.nn.Linear):
    """Multiply in the dtype of the input; the fp32 weight is cast on the way and receives an fp32 gradient."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight.to(input.dtype))


def multiply_adapters_in_base_dtype(model: Any) -> None:
    """Let bf16 activations meet fp32 adapter weights in bf16, where PEFT would multiply in fp32.

    The weights that the optimizer moves stay fp32. With an fp32 base this changes nothing.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for linears in (module.lora_A, module.lora_B):
                for linear in linears.values():
                    linear.__class__ = _LinearInInputDtype


class SimilarLengthSampler(Sampler[int]):
    """Yield indices so that consecutive batches hold records of similar length, in an order that differs by epoch.

    Lengths are jittered by a tenth, so that batches differ between epochs too; the batch order is random, so no trend
    in length runs through an epoch. The order depends on seed and epoch alone: a resumed run sees the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(self.seed * 1_000_003 + self.epoch)
        jittered = [length * generator.uniform(0.9, 1.1) for length in self.lengths]
        order = sorted(range(len(self.lengths)), key=jittered.__getitem__)
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        short = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # a short batch must come last
        generator.shuffle(batches)
        for batch in batches + short:
            yield from batch


class GroupedByLength:
    """Give a TRL trainer batches of similar length; `row_length` says what a row costs."""

    group_by_length: bool

    def row_length(self, row: dict[str, Any]) -> int:
        """Return the tokens a row takes."""
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        dataset = self.train_dataset if train_dataset is None else train_dataset  # type: ignore[attr-defined]
        args: Any = self.args  # type: ignore[attr-defined]
        lengths = [self.row_length(row) for row in dataset]
        return SimilarLengthSampler(lengths, args.train_batch_size, args.seed)
