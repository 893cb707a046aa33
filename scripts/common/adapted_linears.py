"""Adapted linear layers as few, large products: layers that read the same input share one, and the adapter is part of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch.nn import functional

from scripts.common.runtime import sharding

# Layers of one decoder layer that are given the same input, one after the other.
SIBLINGS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


def family(name: str) -> tuple[str, int | str]:
    """Return what the names of layers that are given the same input have in common."""
    owner, _, child = name.rpartition(".")
    return owner, next((number for number, names in enumerate(SIBLINGS) if child in names), child)


def share_products(model: Any) -> None:
    """Let plain adapters work in their base's dtype, as part of the base's own products.

    The weights that the optimizer moves stay fp32. With an fp32 base this changes nothing but the speed. Other layers,
    quantised or with dropout or a variant of LoRA, compute as PEFT does.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for linears in (module.lora_A, module.lora_B):
                for linear in linears.values():
                    linear.__class__ = _LinearInInputDtype
    decoder = model.get_base_model().base_model
    if sharding():
        return
    products = [Product(layers) for layers in _that_read_the_same(model)]
    for product in products:
        for place, layer in enumerate(product.layers):
            layer.__class__ = SharingLinear
            layer.product, layer.place = product, place
    moved = {layer.base_layer.weight for product in products for layer in product.layers}
    for parameter in decoder.parameters():  # while one weight lies in the mapped file, all of it stays in memory
        if parameter.device.type == "cpu" and not parameter.requires_grad and parameter not in moved:
            parameter.data = parameter.data.clone()

    def renew(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        # A reference asked within a training step must not touch what that step's backward pass still needs.
        within_step = module.training and not torch.is_grad_enabled()
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        one_more = not torch.is_grad_enabled() and input_ids is not None and input_ids.shape[1] == 1
        for product in products:
            product.renew(None if within_step else product.plain_adapter(), one_more)

    decoder.register_forward_pre_hook(renew, with_kwargs=True)


def _that_read_the_same(model: Any) -> Iterable[list[Any]]:
    groups: dict[tuple[str, int | str], list[Any]] = {}
    for name, module in model.named_modules():
        plain = type(module) is LoraLinear and type(module.base_layer) is torch.nn.Linear
        if plain and not module.base_layer.weight.requires_grad:
            groups.setdefault(family(name), []).append(module)
    return groups.values()


class _LinearInInputDtype(torch.nn.Linear):
    """Multiply in the dtype of the input; the fp32 weight is cast on the way and receives an fp32 gradient."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight.to(input.dtype))


class SharingLinear(LoraLinear):
    """PEFT's layer as a part of a shared product, while a single plain adapter is at work."""

    product: Product
    place: int

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output; PEFT computes it where the product does not."""
        if not self.product.ready_for(x) or args or kwargs:
            return super().forward(x, *args, **kwargs)
        return self.product.output(self.place, x)


class Product:
    """Layers that read the same input. The first that is asked computes for all.

    The base weights W, moved here, and the adapter's A and B make one matrix [[W, s B], [A, 0]], whose upper rows turn
    (x, A x) into the outputs and whose left columns turn (dy, (s B)ᵀ dy) into the input's gradient. Layer by layer, each
    adapter would pass over a matrix of the size of the output once more, forwards and backwards.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.inputs, self.outputs = layers[0].in_features, sum(layer.out_features for layer in layers)
        self.whole: torch.Tensor | None = None
        self.matrix: torch.Tensor | None = None  # the part of it that the adapter at work fills, if one is
        self.bias: torch.Tensor | None = None
        self.factors: tuple[Any, ...] = ()
        self.places: tuple[torch.Tensor, ...] = ()  # where in the matrix each factor goes
        self.scales: tuple[float, ...] = ()
        self.at_work: str | None = None
        self.computed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.inference_mode(False)  # what is made in inference mode could not be changed outside it
    @torch.no_grad()
    def renew(self, name: str | None, one_more: bool) -> None:
        """Take over an adapter, which may be another one or have moved since the last pass; with None, stand back.

        Optimizers move weights without leaving a mark on them, so only a pass for one more token takes them for unmoved.
        """
        self.computed.clear()
        if name is None:
            self.matrix = self.at_work = None
            return
        if one_more and name == self.at_work:
            return
        As = [layer.lora_A[name].weight for layer in self.layers]
        Bs = [layer.lora_B[name].weight for layer in self.layers]
        self.factors, self.scales = (*As, *Bs), tuple(layer.scaling[name] for layer in self.layers)
        self.at_work = name
        if self.matrix is None or [place.shape for place in self.places] != [factor.shape for factor in self.factors]:
            self._make_room_for(As, Bs)
        torch._foreach_copy_(self.places, (*As, *torch._foreach_mul(Bs, self.scales)))

    def _make_room_for(self, As: list[torch.Tensor], Bs: list[torch.Tensor]) -> None:
        """Choose the part of the matrix that these adapters fill, and each one's place in it."""
        rank = sum(map(len, As))
        if self.whole is None or self.whole.shape[1] < self.inputs + rank:
            self.whole = self._with_room()
        self.matrix = self.whole[: self.outputs + rank, : self.inputs + rank]
        self.matrix[:, self.inputs :] = 0
        lower, right = self.matrix[self.outputs :, : self.inputs], self.matrix[: self.outputs, self.inputs :]
        ranks = [len(A) for A in As]
        columns = zip(right.split([len(B) for B in Bs]), range(len(Bs)), strict=True)
        self.places = (*lower.split(ranks), *(rows.split(ranks, 1)[place] for rows, place in columns))

    def plain_adapter(self) -> str | None:
        """Name the one adapter that all layers use without dropout, bias or variant; None where they do not."""
        found: set[str | None] = set()
        for layer in self.layers:
            names = [name for name in layer.active_adapters if name in layer.lora_A]
            plain = len(names) == 1 and not layer.disable_adapters and not layer.merged
            plain = plain and names[0] not in layer.lora_variant and layer.lora_B[names[0]].bias is None
            plain = plain and isinstance(layer.lora_dropout[names[0]], torch.nn.Identity)
            found.add(names[0] if plain else None)
        return found.pop() if len(found) == 1 else None

    def _with_room(self) -> torch.Tensor:
        """Move the base weights into a matrix that has room for the largest adapter, and return it."""
        rank = sum(max(len(linear.weight) for linear in layer.lora_A.values()) for layer in self.layers)
        bases = [layer.base_layer for layer in self.layers]
        whole: torch.Tensor = bases[0].weight.new_zeros(self.outputs + rank, self.inputs + rank)
        row = 0
        for base in bases:
            part = whole[row : row + len(base.weight), : self.inputs]
            part.copy_(base.weight)
            base.weight.data = part
            row += len(part)
        if any(base.bias is not None for base in bases):
            biases = [base.weight.new_zeros(base.out_features) if base.bias is None else base.bias for base in bases]
            self.bias = torch.cat(biases)
        return whole

    def ready_for(self, x: torch.Tensor) -> bool:
        """Tell whether the product takes this input."""
        return self.matrix is not None and self.matrix.dtype == x.dtype

    def output(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Return what one of the layers makes of x, computing for all when the input is new."""
        source, found = self.computed.pop(place, (None, None))
        if found is None or source is not x:
            parts = _AdaptedProduct.apply(x, self.matrix, self.bias, self.scales, *self.factors)
            self.computed.update({other: (x, part) for other, part in enumerate(parts)})
            _, found = self.computed.pop(place)
        return found


class _AdaptedProduct(torch.autograd.Function):
    """Compute W x + b + s B A x (Hu et al. 2021, equation 3) of stacked layers, and its gradients.

    Shapes: x (…, I), matrix (O + R, I + R), bias (O); then each layer's A (r, I), then each layer's B (o, r).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, scales: tuple[float, ...], *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        As, Bs = factors[: len(scales)], factors[len(scales) :]
        widths, ranks = [len(B) for B in Bs], [len(A) for A in As]
        rows = x.reshape(-1, x.shape[-1])
        down = rows @ matrix[sum(widths) :, : rows.shape[1]].T
        both = torch.cat([rows, down], 1)
        output = functional.linear(both, matrix[: sum(widths)], bias)
        ctx.save_for_backward(both, matrix)  # its parts apart would be kept beside it when compiled
        ctx.scales, ctx.ranks, ctx.shape = scales, ranks, x.shape
        return tuple(part.view(*x.shape[:-1], -1) for part in output.split(widths, 1))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        both, matrix = ctx.saved_tensors
        rows, down = both.split([both.shape[1] - sum(ctx.ranks), sum(ctx.ranks)], 1)
        slopes = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        slope = slopes[0] if len(slopes) == 1 else torch.cat(slopes, 1)
        left, right = matrix.split([rows.shape[1], down.shape[1]], 1)
        inner = slope @ right[: slope.shape[1]]
        towards_x = None
        if ctx.needs_input_grad[0]:
            towards_x = (torch.cat([slope, inner], 1) @ left).view(ctx.shape)
        towards_A = (inner.T @ rows).float().split(ctx.ranks)
        towards_B = [
            (of_A.T @ of_output).T.float().mul_(scale)  # a third faster than of_output.T @ of_A: the smaller one turns
            for of_output, of_A, scale in zip(slopes, down.split(ctx.ranks, 1), ctx.scales, strict=True)
        ]
        return towards_x, None, None, None, *towards_A, *towards_B
