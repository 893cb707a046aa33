"""Load the base once and stack all adapters on it, each proven to fit and to have an effect."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.common.artifacts import Manifest, read_manifest
from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.paths import portable_path, resolve
from scripts.common.schema import Config
from scripts.common.stages import ADAPTER_STAGES, BASE, DPO, KTO, SFT, TRAINING_STAGES
from scripts.dataset.chat_format import ChatFormat, template_sha256, tokenizer_sha256
from scripts.dataset.rendering import render_prompt
from scripts.model.adapter import check_adapter_fits, largest_logit_change, load_adapter
from scripts.model.base import load_base, load_tokenizer
from scripts.model.find import find_model
from scripts.model.products import quicken_head
from scripts.model.shape import ModelShape
from serve.stacking import LoraWeights, RowAdapters, stack_adapters

log = logging.getLogger(__name__)

MERGE_INSTEAD = (
    "which cannot share a batch. Merge it with `python -m scripts.export_lora` and set serve.adapter_path to the merged "
    "folder."
)

# The kinds of layers that keep keys and values, or nothing; convolution, state space and recurrence keep more.
WITHOUT_STATE = {"full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"}


@dataclass(frozen=True)
class Served:
    """One model that requests can name."""

    name: str
    parent: str | None = None
    sha256: str | None = None
    trained_from: str | None = None  # the hash of the adapter that a preference loss measured it against
    beta: float = 1.0
    path: Path | None = None
    adapter: str = ""  # its place in the stack; another one once a new version has taken the name

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapter", self.adapter or self.name)


@dataclass(frozen=True)
class Models:
    """All that is served: one network in memory, answering under several names."""

    network: Any
    tokenizer: Any
    chats: dict[str, ChatFormat]  # how each served model reads and writes
    shape: ModelShape
    rows: RowAdapters
    served: dict[str, Served]
    default: str
    source: str  # key and value of the configuration that name the network
    folder: Path  # of the network
    instead_of: str | None = None  # serve.adapter_path, where another answers in the place of what was never made


def load_models(config: Config, machine: Machine) -> Models:
    """Load base and adapters as the section `serve` asks, and prove each adapter.

    Raises: UserError naming the adapter, what is wrong with it and the stage to run.
    """
    first, instead_of = find_default(config)
    if first and (first / "config.json").is_file() and not (first / "adapter_config.json").is_file():
        return _load_merged(config, machine, first)
    folder = find_model(config.base_model_id, config.base_model_revision)
    tokenizer = load_tokenizer(folder)
    paths, default = _named_adapters(config, first)
    manifests = {name: _checked(config, name, path, folder, tokenizer) for name, path in paths.items()}
    network = load_base(folder, config, machine).eval()
    source = f"base_model_id: {config.base_model_id}"
    shape = _shape_of(network, source)
    weights = {}
    for name, path in paths.items():
        wrapped = load_adapter(network, path)
        weights[name] = lora_weights(wrapped, path)
        network = wrapped.unload()
    rows = stack_adapters(network, weights, machine.device, machine.dtype)
    quicken_head(network, pack=True)
    chats = {BASE: ChatFormat.of_base(tokenizer, config.data)}
    chats |= {name: ChatFormat.of(tokenizer, manifest) for name, manifest in manifests.items()}
    chats[BASE].check_kwargs("data.chat_template_kwargs")
    for name, chat in chats.items():
        if chat.system_prompt != config.data.system_prompt:
            log.info("%s: reads prompts with the system prompt it was trained with, not data.system_prompt", name)
    served = {BASE: Served(BASE)} | {
        name: describe(name, paths[name], manifest) for name, manifest in manifests.items()
    }
    models = Models(network, tokenizer, chats, shape, rows, served, default, source, folder, instead_of)
    prove_adapters(models, list(manifests))
    return models


def cannot_serve(network: Any, source: str, reason: str) -> UserError:
    """Refuse a network for which the engine was not shown to compute what the network itself computes."""
    text = network.config.get_text_config(decoder=True)
    kinds = sorted(set(getattr(text, "layer_types", None) or ()) - WITHOUT_STATE)
    if kinds:
        reason = f"its layers of the kind {', '.join(kinds)} keep more than keys and values ({reason})"
    elif network._is_stateful and not hasattr(text, "layer_types"):
        reason = f"it is recurrent ({text.model_type}) and keeps no keys and values ({reason})"
    return UserError(f"{source}: this server cannot run it: {reason}. Use another base model, or serve it with vLLM.")


def _shape_of(network: Any, source: str) -> ModelShape:
    try:
        shape = ModelShape.of(network.config)
    except AttributeError as error:  # a network of another kind, as BLT
        raise cannot_serve(network, source, " ".join(str(error).split())) from None
    if not shape.heads:
        raise cannot_serve(network, source, "it has no attention")
    return shape


def find_default(config: Config) -> tuple[Path | None, str | None]:
    """Return the folder that answers when a request names none, and `serve.adapter_path` where it stands in for that.

    A folder that this configuration would write, and never has, gives way to the adapter that its training continues, and
    that to the base. Any other path is taken as it is, and is missed where it leads nowhere.
    """
    wanted = config.serve.adapter_path
    if wanted is None:
        return None, None
    folder = resolve(wanted)
    own = [resolve(getattr(config, stage.name).output_dir).absolute() for stage in (KTO, DPO, SFT)]
    if folder.absolute() not in own or folder.exists() or folder.with_name(f"{folder.name}.old").exists():
        return folder, None
    found = next((other for other in own[own.index(folder.absolute()) + 1 :] if other.is_dir()), None)
    answers = portable_path(found) if found else f"the base, {config.base_model_id},"
    log.warning("serve.adapter_path: %s was never made, so %s answers in its place", wanted, answers)
    return found, wanted


def _named_adapters(config: Config, first: Path | None) -> tuple[dict[str, Path], str]:
    """Give every adapter its name: the key in serve.adapters, otherwise the stage that made it."""
    paths = {name: resolve(path) for name, path in config.serve.adapters.items()}
    for name in paths:
        if name == BASE or not name.isidentifier():
            raise UserError(f"serve.adapters.{name}: wanted a name of letters, digits and _ other than `{BASE}`.")
    if first is None:
        return paths, BASE
    known = next((name for name, path in paths.items() if path.resolve() == first.resolve()), None)
    if known:
        return paths, known
    if not first.is_dir():
        raise _absent(config, "serve.adapter_path", first)
    name = read_manifest(first, stages=ADAPTER_STAGES, verify=False).stage
    if name in paths:
        raise UserError(
            f"serve.adapters.{name}: {paths[name]} has the name of serve.adapter_path ({first}, stage `{name}`). "
            "Choose another name."
        )
    return {**paths, name: first}, name


def _absent(config: Config, key: str, path: Path) -> UserError:
    """Name the stage that writes the folder; where the configuration does not say so, all of them in their order."""
    stages = list(TRAINING_STAGES.values())
    writers = [stage for stage in stages if resolve(getattr(config, stage.name).output_dir) == path] or stages
    commands = ", then ".join(f"`python -m {stage.script}`" for stage in writers)
    return UserError(
        f"{key}: {path}: no such folder. Run {commands} first, correct the path, "
        "or set serve.adapter_path: null and no serve.adapters to serve the base alone."
    )


def read_adapter(models: Models, path: Path) -> tuple[Manifest, dict[str, LoraWeights]]:
    """Check and read an adapter beside a running server: the network in use is not touched.

    Raises: UserError with what is wrong with it.
    """
    manifest = check_adapter_fits(path, models.folder, models.tokenizer)
    return manifest, lora_weights(load_adapter(_hollow_copy(models.network), path), path)


def _hollow_copy(network: Any) -> Any:
    """Return the same network with weights that all share one number, and so take no memory."""
    with torch.device("meta"):
        hollow = type(network)(network.config)
    for module in hollow.modules():
        for name, tensor in [*module.named_parameters(recurse=False)]:
            number = torch.zeros((), dtype=torch.float32)
            setattr(module, name, torch.nn.Parameter(number.expand(tensor.shape), requires_grad=False))
    return hollow


def _checked(config: Config, name: str, path: Path, folder: Path, tokenizer: Any) -> Manifest:
    if not path.is_dir():
        raise _absent(config, f"serve adapter `{name}`", path)
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
    facts = {
        "tokenizer": (manifest.tokenizer_sha256, tokenizer_sha256(tokenizer)),
        "chat template": (manifest.chat_template_sha256, template_sha256(tokenizer)),
    }
    for what, (made_with, present) in facts.items():
        if made_with != present:
            raise UserError(f"{folder}: its {what} is not the one it was made with. Export it again.")
    network = load_base(folder, config, machine).eval()
    source = f"serve.adapter_path: {folder}"
    rows = RowAdapters({}, machine.device, machine.dtype)
    rows.index = {manifest.stage: 0}  # the network itself
    quicken_head(network, pack=True)
    served = {manifest.stage: Served(manifest.stage, sha256=manifest.sha256)}
    chats = {manifest.stage: ChatFormat.of(tokenizer, manifest)}
    return Models(network, tokenizer, chats, _shape_of(network, source), rows, served, manifest.stage, source, folder)


def lora_weights(wrapped: Any, path: Path) -> dict[str, LoraWeights]:
    """Return an adapter's matrices out of PEFT.

    Raises: UserError when it is more than a plain LoRA, or nothing.
    """
    weights: dict[str, LoraWeights] = {}
    for name, module in wrapped.base_model.model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        if set(module.lora_A) != {"default"} or module.lora_variant:
            raise UserError(f"{path}: {name} is not a plain LoRA layer (DoRA or another variant), {MERGE_INSTEAD}")
        scaled = module.lora_B["default"].weight.float() * module.scaling["default"]
        weights[name] = LoraWeights(module.lora_A["default"].weight.detach(), scaled.detach())
    if any("lora_" not in key and ".modules_to_save." in key for key, _ in wrapped.named_parameters()):
        raise UserError(f"{path}: holds whole modules beside LoRA, {MERGE_INSTEAD}")
    if not weights:
        raise UserError(f"{path}: holds no LoRA layer, {MERGE_INSTEAD}")
    if not any(layer.B.any() for layer in weights.values()):
        raise UserError(
            f"{path}: its B matrices are all zero, so it would answer as the base does. Was it trained at all?"
        )
    return weights


def describe(name: str, path: Path, manifest: Manifest, adapter: str = "") -> Served:
    """Say what an adapter is."""
    beta = float(manifest.section.get("beta", 1.0))  # only a preference loss has one
    trained_from = manifest.parent.sha256 if manifest.parent else None
    return Served(name, BASE, manifest.sha256, trained_from, beta, path, adapter)


@torch.inference_mode()
def prove_adapters(models: Models, adapters: Sequence[str]) -> None:
    """Run one prompt through the base and each adapter: one that changes no logit, or breaks them, must not be served."""
    ids, rows = proof_prompt(models), [BASE, *adapters]
    models.rows.set(rows)
    logits = models.network(torch.tensor([ids] * len(rows), device=models.network.device), logits_to_keep=1).logits
    plain, *others = logits[:, -1]
    for name, changed in zip(adapters, others, strict=True):
        largest_logit_change(changed, plain, f"serve adapter `{name}`", "it would answer as the base does")


def proof_prompt(models: Models) -> list[int]:
    """Return the tokens of a question, on which models are compared before they are served."""
    chat = models.chats[models.served[models.default].adapter]
    ids = render_prompt(chat, chat.user_turn("What is the capital of France?"))
    if not ids:
        raise UserError("the base model's chat template writes no token for a question. Use another base model.")
    return ids
