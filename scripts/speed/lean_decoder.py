"""The whole computation of a modern decoder over real tokens only: no padding, and what rows share is computed once."""

# The family: RMSNorm, rotary positions, grouped-query attention and a gated MLP (Llama, Mistral, Qwen 2 and 3, SmolLM, Granite,
# Gemma, OLMo 2). A batch is one packed list of N tokens (packing.py). Sizes, here and in the shapes below:
#
#     N tokens   C hidden size   I inner size of the MLP   D size of a head   G heads of keys and values
#     R heads of queries that share each of them, so G * R heads of queries
#
# The weights are the transformers model's own. Only adapters have gradients. The products write what they read beside it
# (lora_products.py), so each function here leaves `room` columns free after its output: a view into a wider tensor.

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch.nn import functional
from transformers.activations import SiLUActivation

from scripts.model.memory import LEAN_KEPT_KEYS
from scripts.model.shape import ModelShape
from scripts.speed.lora_products import Product, with_room
from scripts.speed.packing import Alike, Packed, Piece

LAYER_PARTS = ("self_attn", "mlp")
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
NORMS_OF_HEADS = ("q_norm", "k_norm")
Attention = Callable[..., torch.Tensor]  # of what `rotated` returns, and room
CACHE_STEP = 64  # tokens by which the places of a cache grow
QUERY_BLOCK = 64  # tokens whose scores are looked at together; keys after the last of them are left out


class RMSNorm(torch.autograd.Function):
    """Return x / rms(x) * (weight + offset), computed in fp32 (Zhang and Sennrich 2019, equation 4); x (N, C)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offset: float, eps: float, room: int) -> torch.Tensor:
        wide = x.float()
        inverse = (torch.linalg.vecdot(wide, wide)[..., None] / x.shape[-1] + eps).rsqrt_()
        output = with_room(len(x), x.shape[1], room, x)
        if offset:  # Gemma rounds once, after the weight
            output.copy_(wide * inverse * (weight.float() + offset))
        elif x.dtype == wide.dtype:
            torch.mul(x, inverse, out=output).mul_(weight)
        else:
            output.copy_(wide * inverse).mul_(weight)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        scale = weight.float() + ctx.offset if ctx.offset else weight
        grad_scaled, wide = (grad * scale).float(), x.float()
        along = torch.linalg.vecdot(grad_scaled, wide)[..., None] * inverse**3 / x.shape[-1]
        return grad_scaled.mul_(inverse).addcmul_(wide, along, value=-1).to(x.dtype), None, None, None, None


class Rotate(torch.autograd.Function):
    """Do what `rotated` does, with a gradient; `room` is that of the gradient of heads."""

    @staticmethod
    def forward(
        ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float, groups: int, room: int
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.scale, ctx.width, ctx.room = scale, heads.shape[1], room
        return rotated(heads, cos, sin, scale, groups)

    @staticmethod
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        groups, count, size = grad_k.shape
        grad = with_room(count, ctx.width, ctx.room, grad_k)
        turned, of_v = _heads_of(grad, groups, size)
        grad_turned = turned.new_empty(turned.shape)
        q, k = _queries_and_keys(grad_turned, groups)
        torch.mul(grad_q, ctx.scale, out=q)
        k.copy_(grad_k)
        _turn(grad_turned, cos, -sin, output=turned)  # back by the same angle
        of_v.copy_(grad_v.transpose(0, 1))
        return grad, None, None, None, None, None


def rotated(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float, groups: int
) -> tuple[torch.Tensor, ...]:
    """Cut heads (N, (G R + 2 G) D) into q (G, N, R, D), k and v (G, N, D); turn q and k by their position, and scale q.

    cos, sin: (N, 1, D), sin as `_signed` returns it. Where they are given for every head (`_Layer.for_heads`), all heads
    stay together, (N, G R + 2 G, D).
    """
    if cos.shape[1] > 1:
        return (_turn(heads.view(cos.shape), cos, sin),)
    turning, v = _heads_of(heads, groups, cos.shape[2])
    q, k = _queries_and_keys(_turn(turning, cos, sin), groups)
    queries = torch.mul(q, scale, out=q.new_empty(q.shape))
    return queries, k.contiguous(), v.transpose(0, 1).contiguous()


def _heads_of(heads: torch.Tensor, groups: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of the heads that are turned, (N, G R + G, D), and of v, (N, G, D)."""
    parts = heads.unflatten(1, (-1, size))
    return parts[:, :-groups], parts[:, -groups:]


def _queries_and_keys(turned: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views q (G, N, R, D) and k (G, N, D)."""
    q, k = turned[:, :-groups], turned[:, -groups:]
    return q.unflatten(1, (groups, -1)).transpose(0, 1), k.transpose(0, 1)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
    """Return x * cos + (-x2, x1) * sin (Su et al. 2021, equation 34), x1 and x2 being the halves of each head; x (N, H, D)."""
    return torch.mul(x, cos, out=output).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


def _signed(sin: torch.Tensor) -> torch.Tensor:
    """Return sin for halves that change places, (-x2, x1) being x's: the first half negative."""
    first, second = sin.chunk(2, -1)
    return torch.cat([-first, second], -1)


class Attend(torch.autograd.Function):
    """Let each token look at the tokens before it in its row. q (G, N, R, D), scaled; k and v (G, N, D); returns (N, G R D).

    Pieces that are alike stand side by side, P of them, so that all cores have work; of these the queries are taken block by
    block, so that the scores fit the processor's cache and keys after the block are left out.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, window: int | None, room: int
    ) -> torch.Tensor:
        groups, count, size = k.shape
        output = with_room(count, groups * q.shape[2] * size, room, q)
        kept = []
        for alike in packed.alike:
            queries, keys, values = _gathered(q, k, v, alike)
            found = []
            for block, used in _blocks(alike):
                weights = _weights(queries[:, block], keys[:, :used], alike, window)
                found.append((weights @ values[:, :used]).view_as(queries[:, block]))
                kept.append(weights if used <= LEAN_KEPT_KEYS else None)
            _put(output.view(count, groups, -1).transpose(0, 1), _together(found), alike)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.packed, ctx.window = packed, window
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, *saved = ctx.saved_tensors
        groups, count, size = k.shape
        kept = iter(saved)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_of_groups = grad.contiguous().view(count, groups, -1).transpose(0, 1)
        for alike in ctx.packed.alike:
            queries, keys, values = _gathered(q, k, v, alike)
            grads = _side_by_side(grad_of_groups, alike, own=True)
            grads.view(groups, -1, grads.shape[-1])[:, alike.padding] = 0
            grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
            found: list[torch.Tensor] = []
            for block, used in _blocks(alike):
                weights = next(kept)
                if weights is None:
                    weights = _weights(queries[:, block], keys[:, :used], alike, ctx.window)
                queries_of_block, grad_found = (x[:, block].reshape(len(x), -1, size) for x in (queries, grads))
                grad_weights = grad_found @ values[:, :used].transpose(1, 2)
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grad_keys[:, :used] += grad_scores.transpose(1, 2) @ queries_of_block
                grad_values[:, :used] += weights.transpose(1, 2) @ grad_found
                found.append((grad_scores @ keys[:, :used]).view_as(queries[:, block]))
            _put(grad_q.view(groups, count, -1), _together(found), alike)
            _add(grad_k, grad_keys, alike)
            _add(grad_v, grad_values, alike)
        return grad_q, grad_k, grad_v, None, None, None


def _gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alike: Alike) -> tuple[torch.Tensor, ...]:
    """Return queries (G P, T, R D), keys and values (G P, S + T, D) of pieces side by side."""
    queries = _side_by_side(q.flatten(2), alike, own=True)
    return queries, _side_by_side(k, alike, own=False), _side_by_side(v, alike, own=False)


def _side_by_side(x: torch.Tensor, alike: Alike, *, own: bool) -> torch.Tensor:
    """Gather the tokens of pieces from x (G, N, W): their own (G P, T, W), or all that they see (G P, S + T, W)."""
    flat, rows = _rows(x, alike, own)
    return flat.index_select(0, rows).view(len(x) * len(alike.pieces), -1, x.shape[2])


def _add(total: torch.Tensor, gathered: torch.Tensor, alike: Alike) -> None:
    """Add what was computed of all that pieces see, (G P, S + T, W), to where it stands in (G, N, W)."""
    flat, rows = _rows(total, alike, own=False)
    flat.index_add_(0, rows, gathered.flatten(0, 1))


def _rows(x: torch.Tensor, alike: Alike, own: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (G, N, W) as rows of W, in which order ever G and N lie in memory, and which of them pieces take."""
    groups, count, width = x.shape
    rows = alike.rows(groups, x.stride(0) // width, x.stride(1) // width, own=own)
    return x.as_strided((groups * count, width), (width, 1)), rows


def _together(blocks: list[torch.Tensor]) -> torch.Tensor:
    """Return what was computed of blocks of queries, (G P, t, W) each: (G P, T, W)."""
    return torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]


def _put(total: torch.Tensor, gathered: torch.Tensor, alike: Alike) -> None:
    """Put what was computed of pieces (G P, T, W) where their own tokens stand in (G, N, W)."""
    by_piece = gathered.view(len(total), len(alike.pieces), *gathered.shape[1:])
    for number, piece in enumerate(alike.pieces):
        total[:, piece.start : piece.end] = by_piece[:, number, : len(piece)]


def _blocks(alike: Alike) -> Iterator[tuple[slice, int]]:
    """Yield the columns of some queries, and how many columns of keys they see."""
    own = alike.own.shape[1]
    for begin in range(0, own, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, own)
        yield slice(begin, end), alike.past_tokens + end


def _weights(q: torch.Tensor, k: torch.Tensor, alike: Alike, window: int | None) -> torch.Tensor:
    """Return how much queries (G P, t, R D) look at the keys up to the last of them (G P, s, D): (G P, t R, s)."""
    (rows, tokens, _), (_, seen, size) = q.shape, k.shape
    scores = q.reshape(rows, -1, size) @ k.transpose(1, 2)
    by_token = scores.view(-1, len(alike.pieces), tokens, scores.shape[1] // tokens, seen)
    if tokens > 1:
        by_token[..., seen - tokens :] += scores.new_full((tokens, tokens), -torch.inf).triu_(1)[:, None]
    if window is not None and seen > window:
        place = torch.arange(seen, device=q.device)
        by_token.masked_fill_((place[seen - tokens :, None] - place >= window)[:, None], -torch.inf)
    for number, piece in enumerate(alike.pieces):
        gap = alike.past_tokens - piece.past_tokens
        if gap:  # no infinity here: the queries of a short piece's padding may see nothing else
            by_token[:, number, ..., :gap] = torch.finfo(scores.dtype).min
    return scores.softmax(-1)


def _attend_within(
    packed: Packed, window: int | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, room: int
) -> torch.Tensor:
    if q.device.type != "cpu":
        return attend_padded(packed.pieces, window, q, k, v)
    attended: torch.Tensor = Attend.apply(q, k, v, packed, window, room)
    return attended


def attend_padded(
    pieces: Sequence[Piece], window: int | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Do what Attend does in one call of torch's fused kernel, for a GPU: it would wait for the host between pieces."""
    looking = [torch.arange(piece.start, piece.end) for piece in pieces]
    seen = [
        torch.cat([torch.arange(*stretch) for stretch in (*piece.past, (piece.start, piece.end))]) for piece in pieces
    ]
    # Padded on the left, so that the last query and the last key of each piece, the same token, end in the last column.
    queries, keys = (
        torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=-1, padding_side="left")
        for each in (looking, seen)
    )
    width, length = queries.shape[1], keys.shape[1]
    distance = torch.arange(width)[:, None] + length - width - torch.arange(length)
    allowed = (distance >= 0) & (distance < (window or length)) & ((keys >= 0)[:, None] | (distance == 0))
    mask = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, torch.finfo(q.dtype).min)
    real, queries, keys = (queries >= 0).to(q.device), queries.clamp(min=0).to(q.device), keys.clamp(min=0).to(q.device)
    heads = q.transpose(1, 2).flatten(0, 1)  # (G R, N, D)
    keys_of_heads, values_of_heads = (x.repeat_interleave(q.shape[2], 0)[:, keys].transpose(0, 1) for x in (k, v))
    found = functional.scaled_dot_product_attention(
        heads[:, queries].transpose(0, 1), keys_of_heads, values_of_heads, mask[:, None].to(q.device), scale=1.0
    )
    return found.transpose(1, 2)[real].flatten(1)  # pieces follow one another as their tokens do


class KeysAndValues(Protocol):
    """What layers attend to beside the tokens that are read."""

    def continues(self, packed: Packed) -> bool:
        """Return whether each row gets one new token; then a layer attends with all heads of a token in one tensor."""

    def attention(self, number: int, packed: Packed, window: int | None) -> Attention:
        """Return how a layer attends."""


class Cache:
    """Keys and values of rows that are continued; a row has a place of its own, and the places grow by need.

    Shapes: states (layers, 2, B, G, S, D), of which the first `lengths` of each row count.
    """

    def __init__(self, layers: int, groups: int, size: int, like: torch.Tensor) -> None:
        self.states = like.new_empty(layers, 2, 0, groups, 0, size)
        self.lengths = torch.zeros(0, dtype=torch.long, device=like.device)

    @property
    def lengths(self) -> torch.Tensor:
        """Return how many tokens each row has."""
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: torch.Tensor) -> None:
        self._lengths = lengths
        self._of_step: dict[int | None, _Seen] = {}

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for so many rows of so many tokens."""
        layers, _, had_rows, groups, had_tokens, size = self.states.shape
        if rows > had_rows or tokens > had_tokens:
            tokens = max(had_tokens, -(-tokens // CACHE_STEP) * CACHE_STEP)
            # Zeros: what a shorter row does not have yet gets the weight 0, and 0 times what lay in memory may be no number.
            states = self.states.new_zeros(layers, 2, max(rows, had_rows), groups, tokens, size)
            states[:, :, :had_rows, :, :had_tokens] = self.states
            self.states = states

    def drop(self, row: int) -> None:
        """Put the last row in the place of another."""
        last = len(self.lengths) - 1
        if row != last:
            length = int(self.lengths[last])
            self.states[:, :, row, :, :length] = self.states[:, :, last, :, :length]
            self.lengths[row] = self.lengths[last]
        self.lengths = self.lengths[:last]

    def continues(self, packed: Packed) -> bool:
        """Return whether each row gets one new token; rows that are read come in pieces."""
        return not packed.pieces

    def attention(self, number: int, packed: Packed, window: int | None) -> Attention:
        """Return how a layer attends: within whole rows that are read, or from one new token of each row to all before it."""
        return partial(self._continue if self.continues(packed) else self._read, number, packed, window)

    def _read(self, number: int, packed: Packed, window: int | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, room: int) -> torch.Tensor:  # fmt: skip
        """Keep the keys and values of new rows, which come after those that are there."""
        places = torch.nn.utils.rnn.pad_sequence(packed.places, batch_first=True)
        rows, width = slice(len(self.lengths), len(self.lengths) + len(places)), places.shape[1]
        for state, values in zip(self.states[number], (k, v), strict=True):
            state[rows, :, :width] = values[:, places].transpose(0, 1)
        return _attend_within(packed, window, q, k, v, room)

    def _continue(
        self, number: int, packed: Packed, window: int | None, heads: torch.Tensor, room: int
    ) -> torch.Tensor:
        """Add a token to every row; heads (B, G R + 2 G, D): those of queries first, then of keys and of values."""
        seen = self._of_step.get(window) or self._of_step.setdefault(window, self._look(len(heads), window))
        states = seen.states[number]
        (_, rows, groups, _, size) = states.shape
        q, new = heads.tensor_split([heads.shape[1] - 2 * groups], 1)
        states[:, seen.rows, :, self.lengths] = new.view(rows, 2, groups, size)
        keys, values = states
        scores = q.view(rows, groups, -1, size) @ keys.transpose(2, 3)
        if seen.hidden is not None:
            scores += seen.hidden
        found = (scores.softmax(-1) @ values).view(rows, -1)
        return with_room(rows, found.shape[1], room, found).copy_(found) if room else found

    def _look(self, rows: int, window: int | None) -> _Seen:
        """Return what a step looks at. A row alone sees all its keys."""
        used = int(self.lengths.max()) + 1
        states, numbers = self.states[:, :, :rows, :, :used].unbind(), torch.arange(rows, device=self.lengths.device)
        if rows == 1 and (window is None or used <= window):
            return _Seen(states, numbers, None)
        place = torch.arange(used, device=self.lengths.device)
        hidden = place > self.lengths[:, None]
        if window is not None:
            hidden |= place <= self.lengths[:, None] - window
        scores = self.states.new_zeros(rows, used).masked_fill_(hidden, -torch.inf)
        return _Seen(states, numbers, scores[:, None, None])


@dataclass(frozen=True)
class _Seen:
    """What all layers of a step look at."""

    states: tuple[torch.Tensor, ...]  # of each layer, up to the longest row, (2, B, G, S, D)
    rows: torch.Tensor  # their numbers, (B,)
    hidden: torch.Tensor | None  # -inf where a row has no key, (B, 1, 1, S); None where each has all


class Gate(torch.autograd.Function):
    """Return act(gate) * up of both, (N, 2 I): the gated unit of Shazeer 2020, equations 5 and 6. Only `both` is kept."""

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor, act: Any, room: int, grad_room: int) -> torch.Tensor:
        ctx.save_for_backward(both)
        ctx.act, ctx.room = act, grad_room
        return gated(both, act, room)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, 1)
        grad_both = with_room(len(both), both.shape[1], ctx.room, both)
        grad_gate, grad_up = grad_both.chunk(2, 1)
        if isinstance(ctx.act, (torch.nn.SiLU, SiLUActivation)):  # of nearly all these models: written where it belongs
            torch.mul(grad, ctx.act(gate), out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
            return grad_both, None, None, None
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            acted = ctx.act(gate)
        grad_gate.copy_(torch.autograd.grad(acted, gate, grad * up)[0])
        torch.mul(grad, acted.detach(), out=grad_up)
        return grad_both, None, None, None


def gated(both: torch.Tensor, act: Any, room: int) -> torch.Tensor:
    """Return act(gate) * up of both, (N, 2 I)."""
    gate, up = both.chunk(2, 1)
    return torch.mul(act(gate), up, out=with_room(len(up), up.shape[1], room, up) if room else None)


class LeanDecoder:
    """The forward pass of a transformers decoder, with its own weights, over packed rows."""

    def __init__(self, decoder: Any, product: Callable[[list[Any]], Any] = Product) -> None:
        self.decoder = decoder
        windows = ModelShape.of(decoder.config).windows
        # Where local and global layers turn by other angles, the library asks for those of one kind.
        self.of_kind = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
        kinds = decoder.config.layer_types if self.of_kind else [None] * len(windows)
        of_layers = zip(decoder.layers, windows, kinds, strict=True)
        self.layers = [_Layer(layer, window, kind, product) for layer, window, kind in of_layers]
        self.norm = _Norm(decoder.norm)

    @property
    def left_to_chance(self) -> bool:
        """Return whether an adapter's dropout is on: then no two rows may share what one of them draws."""
        return any(product.left_to_chance for layer in self.layers for product in layer.products)

    def renew(self) -> None:
        """Take over the adapters as they are now."""
        for layer in self.layers:
            for product in layer.products:
                product.renew()

    def hidden(
        self, packed: Packed, cache: KeysAndValues | None = None, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the last hidden states of packed rows (N, C), which continue those of the cache where one is given.

        Where the places of the wanted ones are given, (n,), the last layer computes no others: (n, C).
        """
        x = self.decoder.embed_tokens(packed.ids[None])[0] * getattr(self.decoder, "embedding_multiplier", 1)
        turns = self._turns(x, packed.positions, of_heads=cache is not None and cache.continues(packed))
        for number, layer in enumerate(self.layers):
            attend = (
                partial(_attend_within, packed, layer.window)
                if cache is None
                else cache.attention(number, packed, layer.window)
            )
            arguments = (x, *turns[layer.turning], attend, wanted if layer is self.layers[-1] else None)
            if torch.is_grad_enabled() and layer.module.gradient_checkpointing and layer.module.training:
                x = torch.utils.checkpoint.checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return self.norm(x)

    def _turns(self, x: torch.Tensor, positions: torch.Tensor, of_heads: bool) -> dict[Any, tuple[torch.Tensor, ...]]:
        """Return cos and sin as `rotated` takes them, (N, 1, D) or of all heads, for layers that turn alike."""
        found: dict[Any, tuple[torch.Tensor, ...]] = {}
        for layer in self.layers:
            if layer.turning not in found:
                kind = [layer.kind] if self.of_kind else []
                cos, sin = (of_row[0, :, None] for of_row in self.decoder.rotary_emb(x[None], positions[None], *kind))
                if not layer.turns:
                    cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
                found[layer.turning] = layer.for_heads(cos, _signed(sin)) if of_heads else (cos, _signed(sin))
        return found


class _Norm:
    """A norm of the library's, whose weight some families store less 1."""

    def __init__(self, module: Any) -> None:
        self.weight, self.eps = module.weight, getattr(module, "variance_epsilon", None) or module.eps
        ones = torch.ones_like(module.weight)[None]
        with torch.no_grad():
            self.offset = float((module(ones)[0].float() - module.weight.float()).mean().round())
            # x w / sqrt(|x|² / C + ε) = x (w √C) / hypot(|x|, √(C ε)), in half as many operations
            self.scaled = (self.weight.float() + self.offset) * len(self.weight) ** 0.5
            self.least = self.scaled.new_tensor((len(self.weight) * self.eps) ** 0.5)

    def __call__(self, x: torch.Tensor, room: int = 0) -> torch.Tensor:
        if not torch.is_grad_enabled() and x.dtype == torch.float32:
            rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.least)
            return torch.mul(x, self.scaled, out=with_room(len(x), x.shape[1], room, x) if room else None).div_(rms)
        normed: torch.Tensor = RMSNorm.apply(x, self.weight.detach(), self.offset, self.eps, room)
        return normed


class _Layer:
    """One decoder layer: attention and MLP, each behind or before a norm, or both, and added to what it read."""

    def __init__(self, module: Any, window: int | None, kind: str | None, product: Callable[[list[Any]], Any]) -> None:
        self.module, self.window, self.kind = module, window, kind
        attention, mlp = module.self_attn, module.mlp
        self.attention, self.act = attention, mlp.act_fn
        self.turns = bool(getattr(attention, "use_rope", True))  # SmolLM3 leaves positions out in some layers
        self.qkv = product([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o, self.gate_up, self.down = (
            product([attention.o_proj]),
            product([mlp.gate_proj, mlp.up_proj]),
            product([mlp.down_proj]),
        )
        self.products = (self.qkv, self.o, self.gate_up, self.down)
        norms = {name: _Norm(getattr(module, name)) for name in NORMS if hasattr(module, name)}
        # Gemma 3 also norms what attention and MLP give, and OLMo 2 only that; then the names mean other places.
        inner = "post_feedforward_layernorm" in norms
        self.before_attention = norms.get("input_layernorm")
        self.after_attention = norms["post_attention_layernorm"] if inner else None
        self.before_mlp = norms.get("pre_feedforward_layernorm" if inner else "post_attention_layernorm")
        self.after_mlp = norms.get("post_feedforward_layernorm")
        self.norms_of_heads = [_Norm(getattr(attention, name)) for name in NORMS_OF_HEADS if hasattr(attention, name)]
        self.multiplier = getattr(module, "residual_multiplier", 1)  # Granite's
        self.groups = self.qkv.layers[1].out_features // attention.head_dim
        self.turning = (self.kind, self.turns, self.attention.scaling, self.groups)

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: Attention,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the next hidden states of all tokens (N, C), or of the wanted ones: others are only attended to."""
        heads = self.qkv(self._before(self.before_attention, x, self.qkv))
        if self.norms_of_heads:
            heads = self._with_normed_heads(heads)
        turned = (heads, cos, sin, self.attention.scaling, self.groups)
        parts = Rotate.apply(*turned, self.qkv.room) if torch.is_grad_enabled() else rotated(*turned)
        attended = attend(*parts, self.o.room)
        if wanted is not None:
            x, attended = x.index_select(0, wanted), attended.index_select(0, wanted)
        x = self._joined(x, attended, self.o, self.after_attention)
        both = self.gate_up(self._before(self.before_mlp, x, self.gate_up))
        if torch.is_grad_enabled():
            inner = Gate.apply(both, self.act, self.down.room, self.gate_up.room)
        else:
            inner = gated(both, self.act, self.down.room)
        return self._joined(x, inner, self.down, self.after_mlp)

    def for_heads(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return cos and sin (N, 1, D) for each head of a token, (N, G R + 2 G, D): queries are scaled, too, and values stay."""
        size = self.attention.head_dim
        queries = self.qkv.layers[0].out_features // size
        return tuple(
            torch.cat(
                [
                    *[x * self.attention.scaling] * queries,
                    *[x] * self.groups,
                    *[torch.full_like(x, of_v)] * self.groups,
                ],
                1,
            )
            for x, of_v in ((cos, 1), (sin, 0))
        )

    def _before(self, norm: _Norm | None, x: torch.Tensor, product: Any) -> torch.Tensor:
        return norm(x, product.room) if norm else x

    def _joined(self, x: torch.Tensor, inner: torch.Tensor, product: Any, norm: _Norm | None) -> torch.Tensor:
        if norm:
            return x + norm(product(inner))
        return product(inner, x) if self.multiplier == 1 else torch.add(x, product(inner), alpha=self.multiplier)

    def _with_normed_heads(self, heads: torch.Tensor) -> torch.Tensor:
        """Norm each head of queries and keys, or as OLMo 2 all heads of a token together."""
        q, k, v = heads.split([layer.out_features for layer in self.qkv.layers], 1)
        normed = [
            norm(part.reshape(-1, len(norm.weight))).view_as(part)
            for norm, part in zip(self.norms_of_heads, (q, k), strict=True)
        ]
        return torch.cat([*normed, v], 1)


def other_than_family(decoder: Any) -> str | None:
    """Return what a decoder has or lacks beside the family that this file computes; None where it belongs to it.

    What has all these parts and yet computes something else shows when it is proven on data (stand_in.py).
    """
    if not len(getattr(decoder, "layers", ())) or not all(hasattr(decoder.layers[0], part) for part in LAYER_PARTS):
        return "its layers are no attention and MLP"
    for part, wanted, optional in _parts(decoder):
        found = {name for name, _ in (*part.named_children(), *part.named_parameters(recurse=False))}
        more, missing = sorted(found - wanted - optional), sorted(wanted - found)
        if more or missing:
            said = [f"{verb} {', '.join(names)}" for verb, names in (("has", more), ("lacks", missing)) if names]
            return f"{type(part).__name__} {' and '.join(said)}"
    for layer in decoder.layers:
        if getattr(layer.self_attn, "attn_logit_softcapping", None):
            return "its attention caps scores"
        if getattr(layer.self_attn, "is_causal", True) is not True:
            return "its attention looks ahead"
    return None


def _parts(decoder: Any) -> Iterator[tuple[Any, set[str], set[str]]]:
    """Yield the parts of a decoder, and what each of them must and may have. Some families change from layer to layer.

    The caller stops at a part that is wrong, so what a part must have is there once the next one is asked for.
    """
    yield decoder, {"embed_tokens", "layers", "norm", "rotary_emb"}, set()
    norms = [decoder.norm]
    for layer in decoder.layers:
        behind = NORMS[3] if hasattr(layer, NORMS[3]) else NORMS[0]
        yield layer, {*LAYER_PARTS, NORMS[1], behind}, set(NORMS)
        yield layer.self_attn, {"q_proj", "k_proj", "v_proj", "o_proj"}, set(NORMS_OF_HEADS)
        yield layer.mlp, {"gate_proj", "up_proj", "down_proj", "act_fn"}, set()
        norms += [getattr(layer, name) for name in NORMS if hasattr(layer, name)]
        norms += [getattr(layer.self_attn, name) for name in NORMS_OF_HEADS if hasattr(layer.self_attn, name)]
    yield from ((norm, {"weight"}, set()) for norm in norms)
