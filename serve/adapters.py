"""Load the base once and stack all adapters on it, each proven to fit and to have an effect."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.common.adapted_linears import family
from scripts.common.artifacts import artifact_sha256, read_manifest
from scripts.common.config import ROOT
from scripts.common.errors import UserError
from scripts.common.modeling import check_adapter_fits, find_model, load_adapter, load_base, load_tokenizer
from scripts.common.rendering import render_prompt, template_sha256, tokenizer_sha256, user_turn
from scripts.common.runtime import Machine
from scripts.common.schema import Config

log = logging.getLogger(__name__)

BASE = "base"
STAGE_SCRIPTS = {"sft": "scripts.train_sft", "dpo": "scripts.train_dpo"}


@dataclass(frozen=True)
class Served:
    """One model that requests can name."""

    name: str
    parent: str | None = None
    sha256: str | None = None
    reference: str | None = None
    beta: float = 1.0


@dataclass(frozen=True)
class Models:
    """All that is served: one network in memory, answering under several names."""

    network: Any
    tokenizer: Any
    rows: RowAdapters
    served: dict[str, Served]
    default: str


@dataclass(frozen=True)
class LoraWeights:
    """The matrices of one adapter for one linear layer, the scale folded into B. A: (r, in), B: (out, r)."""

    A: torch.Tensor
    B: torch.Tensor


class RowAdapters:
    """Say which adapter each row of the running batch uses; one mask serves every layer.

    Each adapter owns a block of rank columns. A row's mask is 1 in the block of its adapter and 0 elsewhere.
    """

    def __init__(self, ranks: dict[str, int], device: str, dtype: torch.dtype) -> None:
        self.ranks = ranks
        self.index = {BASE: 0, **{name: number for number, name in enumerate(ranks, 1)}}
        table, start = torch.zeros(len(self.index), sum(ranks.values())), 0
        for name, rank in ranks.items():
            table[self.index[name], start : start + rank] = 1
            start += rank
        self.table = table.to(device, dtype)
        self.mask: torch.Tensor | None = None

    def set(self, names: Sequence[str]) -> None:
        """Choose the adapters of the next forward pass. A batch of base rows does no adapter work."""
        indices = [self.index[name] for name in names]
        self.mask = self.table[indices].unsqueeze(1) if any(indices) else None


class StackedLinears(nn.Module):
    """Linear layers that read the same input, with all adapters under each other: two products serve any mixture of rows.

    y = W x + b + B (mask * A x), A: (sum of ranks, in), B: (out, sum of ranks), for each layer. The A stand below the W
    in one matrix: beside a few tokens, a small product takes as long as a large one.
    """

    def __init__(self, bases: list[Any], As: list[torch.Tensor], Bs: list[torch.Tensor], rows: RowAdapters) -> None:
        super().__init__()
        self.rows, self.widths = rows, [len(B) for B in Bs]
        self.base: nn.Module | None = None
        weights, bias = As, None
        if not all(type(base) is nn.Linear for base in bases):
            (self.base,) = bases  # quantised, or stored the other way round
        else:
            weights = [base.weight.detach() for base in bases] + As
            if any(base.bias is not None for base in bases):
                parts = [
                    As[0].new_zeros(len(B)) if base.bias is None else base.bias.detach()
                    for base, B in zip(bases, Bs, strict=True)
                ]
                bias = torch.cat([*parts, As[0].new_zeros(sum(map(len, As)))])
        self.register_buffer("weight", torch.cat(weights), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("B_t", torch.block_diag(*[B.t() for B in Bs]).contiguous(), persistent=False)
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        self.B_t: torch.Tensor

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the output of each layer. x: (B, T, in)."""
        product = nn.functional.linear(x, self.weight, self.bias)
        y, hidden = (
            (self.base(x), product)
            if self.base is not None
            else product.split([sum(self.widths), len(self.B_t)], dim=-1)
        )
        if self.rows.mask is not None:
            hidden = hidden.unflatten(-1, (len(self.widths), -1)) * self.rows.mask[:, :, None]
            y = torch.addmm(y.flatten(0, 1), hidden.view(-1, len(self.B_t)), self.B_t).view(*x.shape[:-1], -1)
        outputs: tuple[torch.Tensor, ...] = y.split(self.widths, dim=-1)
        return outputs


class Member(nn.Module):
    """Stand where one of several stacked layers stood; the first to be asked computes for all."""

    def __init__(self, stack: StackedLinears, index: int, shared: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.stack, self.index, self.shared = stack, index, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        source, output = self.shared.pop(self.index, (None, None))
        if output is None or source is not x:
            self.shared.update({index: (x, part) for index, part in enumerate(self.stack(x))})
            _, output = self.shared.pop(self.index)
        return output


def load_models(config: Config, machine: Machine) -> Models:
    """Load base and adapters as the section `serve` asks, and prove each adapter.

    Raises: UserError naming the adapter, what is wrong with it and the stage to run.
    """
    serve = config.serve
    first = _resolve(serve.adapter_path) if serve.adapter_path else None
    if first and (first / "config.json").is_file() and not (first / "adapter_config.json").is_file():
        return _load_merged(config, machine, first)
    folder = find_model(config.base_model_id, config.base_model_revision)
    tokenizer = load_tokenizer(folder)
    paths, default = _named_adapters(config, first)
    manifests = {name: _checked(name, path, folder, tokenizer) for name, path in paths.items()}
    network = load_base(folder, config, machine).eval()
    weights = {}
    for name, path in paths.items():
        network, weights[name] = _lora_weights(network, path, machine)
    rows = stack_adapters(network, weights, machine.device, machine.dtype)
    models = Models(network, tokenizer, rows, _describe(manifests), default)
    prove_adapters(models, config)
    return models


def _resolve(path: str) -> Path:
    return Path(path) if Path(path).exists() else ROOT / path


def _named_adapters(config: Config, first: Path | None) -> tuple[dict[str, Path], str]:
    """Give every adapter its name: the key in serve.adapters, otherwise the stage that made it."""
    paths = {name: _resolve(path) for name, path in config.serve.adapters.items()}
    for name in paths:
        if name == BASE or not name.isidentifier():
            raise UserError(f"serve.adapters.{name}: wanted a name of letters, digits and _ other than `{BASE}`.")
    if first is None:
        return paths, BASE
    known = next((name for name, path in paths.items() if path.resolve() == first.resolve()), None)
    if known:
        return paths, known
    if not first.is_dir():
        stage = "sft" if "sft" in first.name else "dpo"
        raise _absent("serve.adapter_path", first, stage)
    name = str(read_manifest(first, stages=("sft", "dpo"), verify=False)["stage"])
    if name in paths:
        raise UserError(
            f"serve.adapters.{name}: {paths[name]} has the name of serve.adapter_path ({first}, stage `{name}`). "
            "Choose another name."
        )
    return {**paths, name: first}, name


def _absent(key: str, path: Path, stage: str) -> UserError:
    return UserError(
        f"{key}: {path}: no such folder. Run `python -m {STAGE_SCRIPTS[stage]}` first, correct the path, "
        "or set serve.adapter_path: null and no serve.adapters to serve the base alone."
    )


def _checked(name: str, path: Path, folder: Path, tokenizer: Any) -> dict[str, Any]:
    if not path.is_dir():
        raise _absent(f"serve adapter `{name}`", path, "sft" if "sft" in (name, path.name) else "dpo")
    return check_adapter_fits(path, folder, tokenizer)


def _load_merged(config: Config, machine: Machine, folder: Path) -> Models:
    """Serve a merged model under its stage's name: there is no plain base beside it."""
    if config.serve.adapters:
        raise UserError(
            f"serve.adapters: {folder} is a merged model, which takes no adapters. Remove serve.adapters, "
            "or set serve.adapter_path to an adapter."
        )
    manifest = read_manifest(folder, stages=("merged",))
    tokenizer = load_tokenizer(folder)
    facts = (("tokenizer", tokenizer_sha256), ("chat_template", template_sha256))
    for what, digest in facts:
        if manifest[f"{what}_sha256"] != digest(tokenizer):
            raise UserError(f"{folder}: its {what.replace('_', ' ')} is not the one it was made with. Export it again.")
    network = load_base(folder, config, machine).eval()
    rows = RowAdapters({}, machine.device, machine.dtype)
    rows.index = {"merged": 0}
    served = {"merged": Served("merged", sha256=artifact_sha256(manifest))}
    return Models(network, tokenizer, rows, served, "merged")


def _lora_weights(network: Any, path: Path, machine: Machine) -> tuple[Any, dict[str, LoraWeights]]:
    """Take an adapter's matrices out of PEFT and hand the bare network back."""
    wrapped = load_adapter(network, path)
    found: dict[str, LoraWeights] = {}
    for name, module in wrapped.base_model.model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        if set(module.lora_A) != {"default"} or module.lora_variant:
            raise UserError(
                f"{path}: {name} is no plain LoRA layer (DoRA or another variant), which cannot share a batch. "
                "Merge it with `python -m scripts.export_lora` and set serve.adapter_path to the merged folder."
            )
        scaled = module.lora_B["default"].weight.float() * module.scaling["default"]
        found[name] = LoraWeights(module.lora_A["default"].weight.detach(), scaled.detach())
    others = [key for key, value in wrapped.named_parameters() if "lora_" not in key and ".modules_to_save." in key]
    if others or not found:
        raise UserError(
            f"{path}: holds {'whole modules beside LoRA' if others else 'no LoRA layer'}, which cannot share a batch. "
            "Merge it with `python -m scripts.export_lora` and set serve.adapter_path to the merged folder."
        )
    if not any(layer.B.any() for layer in found.values()):
        raise UserError(
            f"{path}: its B matrices are all zero, so it would answer as the base does. Was it trained at all?"
        )
    return wrapped.unload(), found


def stack_adapters(
    network: Any, weights: dict[str, dict[str, LoraWeights]], device: str, dtype: torch.dtype
) -> RowAdapters:
    """Replace adapted linear layers by ones that hold all adapters; ranks and targets may differ."""
    ranks = {name: max(len(layer.A) for layer in layers.values()) for name, layers in weights.items()}
    rows = RowAdapters(ranks, device, dtype)
    for targets in _that_read_the_same(network, {layer for layers in weights.values() for layer in layers}):
        bases, As, Bs = [network.get_submodule(target) for target in targets], [], []
        for target in targets:
            sample = next(layers[target] for layers in weights.values() if target in layers)
            A = torch.zeros(sum(ranks.values()), sample.A.shape[1])
            B = torch.zeros(sample.B.shape[0], sum(ranks.values()))
            start = 0
            for name, layers in weights.items():
                if target in layers:
                    rank = len(layers[target].A)
                    A[start : start + rank], B[:, start : start + rank] = layers[target].A, layers[target].B
                start += ranks[name]
            As.append(A.to(device, dtype))
            Bs.append(B.to(device, dtype))
        stack = StackedLinears(bases, As, Bs, rows)
        shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for index, target in enumerate(targets):
            owner, _, child = target.rpartition(".")
            setattr(network.get_submodule(owner), child, Member(stack, index, shared))
    for parameter in network.parameters():  # while one weight lies in the mapped file, all of it stays in memory
        parameter.data = parameter.data.clone()
    return rows


def _that_read_the_same(network: Any, targets: set[str]) -> list[list[str]]:
    """Group layers that are known to be given the same input one after the other; the others stay alone."""
    groups: dict[tuple[str, int | str], list[str]] = {}
    for target in sorted(targets):
        together = type(network.get_submodule(target)) is nn.Linear
        groups.setdefault(family(target) if together else (target, ""), []).append(target)
    return list(groups.values())


def _describe(manifests: dict[str, dict[str, Any]]) -> dict[str, Served]:
    served = {BASE: Served(BASE)}
    by_sha256 = {artifact_sha256(manifest): name for name, manifest in manifests.items()}
    for name, manifest in manifests.items():
        beta = (manifest.get("config") or {}).get("dpo", {}).get("beta", 1.0) if manifest["stage"] == "dpo" else 1.0
        parent = by_sha256.get((manifest.get("parent") or {}).get("sha256", ""), BASE)
        served[name] = Served(name, BASE, artifact_sha256(manifest), parent, float(beta))
    return served


@torch.inference_mode()
def prove_adapters(models: Models, config: Config) -> None:
    """Run one prompt through every model: an adapter that changes no logit, or breaks them, must not be served."""
    ids = render_prompt(models.tokenizer, user_turn("What is the capital of France?", config.data.system_prompt))
    if not ids:
        raise UserError("the base model's chat template writes no token for a question. Use another base model.")
    names = list(models.served)
    models.rows.set(names)
    logits = models.network(torch.tensor([ids] * len(names), device=models.network.device), logits_to_keep=1).logits
    for name, row in zip(names, logits[:, -1].float(), strict=True):
        if not torch.isfinite(row).all():
            raise UserError(f"serve adapter `{name}`: gives NaN or infinite logits. Train it again.")
        if name != names[0] and torch.equal(row, logits[0, -1].float()):
            raise UserError(
                f"serve adapter `{name}`: changes no logit of the base, so it would answer as the base does. "
                "Was it trained at all?"
            )
