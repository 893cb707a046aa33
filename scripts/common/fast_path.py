"""What makes TRL's trainers fast without a GPU: score answer tokens only, plain attention for short rows, adapters
multiplied in the base's dtype, and batches of similar length.

All are exact: the same loss and gradients as TRL's own code on the same batch in fp32.
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

from scripts.common.memory import SHORT_ROW_TOKENS

log = logging.getLogger(__name__)

# Logits of one tile; what lies beyond is recomputed in the backward pass instead of being kept.
TILE_BYTES = 512 * 2**20
BLOCK_BYTES = 4 * 2**20  # logits looked at together in fp32: few enough to stay in the processor's cache


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
            logits, factor = functional.linear(hidden, weight, bias), logit_scale / temperature
            if softcap is not None:
                logits, factor = softcap * torch.tanh(logits.float() * logit_scale / softcap), 1 / temperature
            found: tuple[torch.Tensor | None, ...] = _LabelStatistics.apply(logits, wanted, factor, outputs)
            return found

        rows = max(1, TILE_BYTES // (weight.element_size() * weight.shape[0]))
        if len(hidden_states) <= rows:
            return tile(hidden_states, labels)
        tiles = [
            torch.utils.checkpoint.checkpoint(tile, hidden, wanted, use_reentrant=False)
            for hidden, wanted in zip(hidden_states.split(rows), labels.split(rows), strict=True)
        ]
        return tuple(None if column[0] is None else torch.cat(column) for column in zip(*tiles, strict=True))


class _LabelStatistics(torch.autograd.Function):
    """Read off logits what TRL asks of them, block by block, so that they are never copied whole to fp32.

    Only the logits are kept for the backward pass, in their own dtype; softmax is taken again there.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, factor: float, outputs: Sequence[str]
    ) -> tuple[torch.Tensor | None, ...]:
        names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names if name == "log_probs" or name in outputs}
        log_totals = []
        for block, wanted in _blocks(logits, labels):
            scores = block.float() if factor == 1 else block.float() * factor
            best = scores.amax(-1, keepdim=True)
            scores = scores - best
            odds = scores.exp()
            total, of_label = odds.sum(-1), scores.gather(-1, wanted[:, None])[:, 0]
            log_totals.append(best[:, 0] + total.log())
            found["log_probs"].append(of_label - total.log())
            if "entropy" in found:
                found["entropy"].append(total.log() - torch.linalg.vecdot(odds, scores) / total)
            if "log_sum_sq_probs" in found:
                found["log_sum_sq_probs"].append(torch.linalg.vecdot(odds, odds).log() - 2 * total.log())
            if "mean_logits" in found:
                found["mean_logits"].append(scores.mean(-1) + best[:, 0])
            if "is_top1" in found:
                found["is_top1"].append(of_label == 0)  # a tie counts
        ctx.save_for_backward(logits, labels, torch.cat(log_totals))
        ctx.factor = factor
        results = tuple(torch.cat(found[name]) if name in found else None for name in names)
        ctx.mark_non_differentiable(*(result for result in results[1:] if result is not None))
        return results

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *others: Any) -> tuple[torch.Tensor, None, None, None]:
        logits, labels, log_totals = ctx.saved_tensors
        gradient, slope = gradient * ctx.factor, torch.empty_like(logits)
        for block, wanted, log_total, outer, target in _blocks(logits, labels, log_totals, gradient, slope):
            scores = block.float() if ctx.factor == 1 else block.float() * ctx.factor
            towards = (scores - log_total[:, None]).exp_().mul_(-outer[:, None])
            target.copy_(towards.scatter_add_(-1, wanted[:, None], outer[:, None]))
        return slope, None, None, None


def _blocks(logits: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut tensors of as many rows into blocks whose logits fit the processor's cache; no rows are one empty block."""
    rows = max(1, BLOCK_BYTES // (4 * logits.shape[-1]))
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)


class _LinearInInputDtype(torch.nn.Linear):
    """Multiply in the dtype of the input; the fp32 weight is cast on the way and receives an fp32 gradient."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight.to(input.dtype))


class _AdaptedProduct(torch.autograd.Function):
    """Compute x Wᵀ + b + s (x Aᵀ) Bᵀ (Hu et al. 2021, equation 3) and its gradients, adding in place.

    Operation by operation, the scaling and the sums each pass over a matrix of the size of the output once more,
    forwards and backwards; in a compiled layer they melt into what comes next, and adding in place would cost a copy.
    Shapes: x (…, I), weight (O, I), A (R, I), B (O, R).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor, s: float
    ) -> torch.Tensor:  # fmt: skip
        rows, A, B = x.reshape(-1, x.shape[-1]), A.to(x.dtype), B.to(x.dtype)
        down = rows @ A.T
        output = functional.linear(rows, weight, bias)
        output = output + (down @ B.T) * s if torch.compiler.is_compiling() else output.addmm_(down, B.T, alpha=s)
        ctx.save_for_backward(rows, weight, A, B, down)
        ctx.scaling = s
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, A, B, down = ctx.saved_tensors
        slope = gradient.reshape(-1, gradient.shape[-1])
        inner = (slope @ B).mul_(ctx.scaling)
        towards_x = None
        if ctx.needs_input_grad[0]:
            towards_x = slope @ weight
            towards_x = towards_x + inner @ A if torch.compiler.is_compiling() else towards_x.addmm_(inner, A)
            towards_x = towards_x.view(*gradient.shape[:-1], -1)
        towards_B = (down.T @ slope).T  # a third faster than slope.T @ down, which turns the larger matrix
        return towards_x, None, None, (inner.T @ rows).float(), towards_B.float().mul_(ctx.scaling), None


def speed_up(model: Any) -> None:
    """Choose the faster of equal computations for a model with adapters; call it before either adapter is first asked."""
    multiply_adapters_in_base_dtype(model)
    attend_plainly_to_short_rows(model)


def multiply_adapters_in_base_dtype(model: Any) -> None:
    """Let bf16 activations meet fp32 adapter weights in bf16, where PEFT would multiply in fp32.

    The weights that the optimizer moves stay fp32. With an fp32 base this changes nothing but the speed.
    """
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraLayer

    class LeanLoraLinear(LoraLinear):
        """PEFT's layer, with one fused product where a single plain adapter is at work."""

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            names = [name for name in self.active_adapters if name in self.lora_A]
            if self.disable_adapters or self.merged or args or kwargs or len(names) != 1 or x.device.type != "cpu":
                return super().forward(x, *args, **kwargs)
            (name,), base = names, self.base_layer
            plain = name not in self.lora_variant and isinstance(self.lora_dropout[name], torch.nn.Identity)
            if not plain or base.weight.requires_grad or self.lora_B[name].bias is not None:
                return super().forward(x)
            A, B = self.lora_A[name].weight, self.lora_B[name].weight
            return _AdaptedProduct.apply(x, base.weight, base.bias, A, B, self.scaling[name])

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for linears in (module.lora_A, module.lora_B):
                for linear in linears.values():
                    linear.__class__ = _LinearInInputDtype
            if type(module) is LoraLinear and type(module.base_layer) is torch.nn.Linear:
                module.__class__ = LeanLoraLinear


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend plainly while training on short rows and from a single new token, with torch's fused kernel otherwise.

    The backward pass of the fused CPU kernel would take a fifth of a step; the memory of plain attention grows with the
    square of the length.
    Shapes: query (B, H, T, D), key and value (B, G, S, D) with H a multiple of G; returns (B, T, H, D).
    """
    batch, heads, tokens, size = query.shape
    special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))
    plain = tokens <= SHORT_ROW_TOKENS if torch.is_grad_enabled() else tokens == 1
    if special or attention_mask is None or not plain:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        fused: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return fused
    groups = key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    stacked = (query * scale).reshape(batch, groups, -1, size)  # the heads that share a key share one product
    scores = (stacked @ key.transpose(2, 3)).view(batch, groups, heads // groups, tokens, -1)
    weights = functional.softmax(scores + attention_mask[:, :, None], dim=-1)
    weights = functional.dropout(weights, dropout, training=module.training)
    output = weights.view(batch, groups, -1, weights.shape[-1]) @ value
    return output.view(batch, heads, tokens, -1).transpose(1, 2).contiguous(), None


def attend_plainly_to_short_rows(model: Any) -> None:
    """Replace torch's fused attention on a CPU where plain matrix products are faster; other attention stays."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    base = model.get_base_model()
    if base.device.type == "cpu" and base.config._attn_implementation == "sdpa":
        AttentionInterface.register("plain_for_short_rows", _attend)
        AttentionMaskInterface.register("plain_for_short_rows", eager_mask)
        base.set_attn_implementation("plain_for_short_rows")


class SimilarLengthSampler(Sampler[int]):
    """Yield indices so that consecutive batches hold records of similar length, in an order that differs by epoch.

    A batch here is what one optimizer step sees: its parts are equally long on every process, and it is the same
    however it is split over processes and accumulated gradients. Lengths are jittered by 3 %, so that batches differ between epochs too; the batch order is random, so no trend
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
        jittered = [length * generator.uniform(0.97, 1.03) for length in self.lengths]
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
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return SimilarLengthSampler(lengths, batch_size, args.seed)
