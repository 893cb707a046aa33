"""Which modules an adapter is put on, chosen from the architecture alone so that a wrong choice is refused at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError

IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")
NOT_FOR_TEXT = re.compile(r"vision|visual|image|audio")  # towers that some models keep within their decoder
ROUTER = re.compile(r"\.(router|gate|shared_expert_gate)(\.|$)")  # in models that have experts


@dataclass(frozen=True)
class Targets:
    """What PEFT is to adapt: `names` as it is given them, `modules` as their full paths; and what stays untouched."""

    names: list[str]
    modules: list[str]
    expert_parameters: int
    left_out: list[str]

    def __str__(self) -> str:
        text = f"adapter on {', '.join(_last_parts(self.modules))}"
        if self.expert_parameters:
            text += f"; experts stay untouched: {self.expert_parameters:,} parameters"
        if self.left_out:
            text += f"; also untouched: {', '.join(self.left_out)}"
        return text


def targets_of_folder(folder: Path, target_modules: str | list[str]) -> Targets:
    """Choose the modules for the model in a folder, without its weights.

    Raises: UserError when the modules asked for cannot be adapted.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from scripts.model.find import blamed_on

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with blamed_on(folder), torch.device("meta"):  # neither memory nor weights
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return choose_targets(model, target_modules)


def choose_targets(model: Any, target_modules: str | list[str]) -> Targets:
    """Find the modules that `lora.target_modules` stands for: in the language model alone, and no expert.

    Raises: UserError when one of them cannot be adapted, be saved or be loaded again.
    """
    modules, experts = dict(model.named_modules()), _expert_parameters(model)
    left_out: list[str] = []
    if target_modules == "auto":
        linear = _linear_layers_in_blocks(model)
        silent = _only_read(model) | _lost_when_loaded(model, linear)
        taken_for_experts = _taken_for_experts(model, _last_parts(linear)) if experts else []
        wanted = [
            path
            for path in linear
            if path.rpartition(".")[2] not in taken_for_experts and not (experts and ROUTER.search(path))
            if path not in silent
        ]
        names = _last_parts(wanted)
        left_out = [f"some {name}" if name in names else name for name in _last_parts(set(linear) - set(wanted))]
        if not names:
            raise UserError("lora.target_modules: auto found no linear layer in this architecture; name the modules.")
    else:
        names = list(target_modules)
        wanted = _named_modules(model, names, experts)
        if read := _last_parts(set(wanted) & _only_read(model)):
            raise _cannot_adapt(
                model, read, "these weights are read and their layers never called, so an adapter would be silent"
            )
        if lost := _last_parts(_lost_when_loaded(model, wanted)):
            raise _cannot_adapt(model, lost, "they are renamed when an adapter is loaded again, which would lose them")
    if set(_matching(modules, names)) != set(wanted):  # other modules have the same name
        names = wanted
    return Targets(names, wanted, sum(experts.values()), left_out)


def linear_layers(model: Any) -> list[str]:
    """Name the linear layers of the decoder blocks: what `lora.target_modules: auto` stands for."""
    return _last_parts(choose_targets(model, "auto").modules)


def _last_parts(paths: Iterable[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _matching(modules: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return the paths at which PEFT finds modules of these names."""
    return [path for path in modules if any(f".{path}".endswith(f".{name}") for name in names)]


def _for_text(model: Any) -> dict[str, Any]:
    """Return what a text passes through below the embeddings: a vision tower, say, may have layers of the same names."""
    decoder = set(model.get_decoder().modules())
    return {
        path: module for path, module in model.named_modules() if module in decoder and not NOT_FOR_TEXT.search(path)
    }


def _linear_layers_in_blocks(model: Any) -> list[str]:
    import torch
    from transformers.pytorch_utils import Conv1D

    return [
        path
        for path, module in _for_text(model).items()
        if isinstance(module, torch.nn.Linear | Conv1D) and IN_A_BLOCK.search(path)
    ]


def _only_read(model: Any) -> set[str]:
    """Return the layers whose weights their module reads instead of calling them: an adapter there would be silent."""
    modules = dict(model.named_modules())
    of_mamba = {  # by its kernels, on a GPU
        f"{path}.{name}"
        for path, module in modules.items()
        if {"A_log", "D"} <= {name for name, _ in module.named_parameters(recurse=False)}
        for name, _ in module.named_children()
        if name != "in_proj"
    }
    return of_mamba | {path for path in modules if path.endswith(".altup.correction_coefs")}  # Gemma 3n's, in training


def _lost_when_loaded(model: Any, paths: Iterable[str]) -> set[str]:
    """Return the modules whose adapters would not be found again: some families' checkpoints are renamed by loose patterns."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    if get_checkpoint_conversion_mapping(model.config.model_type) is None:
        return set()  # without PEFT, which loads for seconds

    import torch
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    saved = {f"base_model.model.{path}.lora_A.weight": path for path in paths}
    weights = dict.fromkeys(saved, torch.empty(0))
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), weights, "default")
    found = {name.replace(".lora_A.default.", ".lora_A.") for name in loaded}
    return {path for name, path in saved.items() if name not in found}


def _expert_parameters(model: Any) -> dict[str, int]:
    """Return the sizes of the parameters that hold all experts of a layer in one, by their paths."""
    from torch.nn.modules.conv import _ConvNd

    return {
        f"{path}.{name}": parameter.numel()
        for path, module in _for_text(model).items()
        if any(weight.ndim == 3 for weight in module.parameters(recurse=False)) and not isinstance(module, _ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
    }


def _taken_for_experts(model: Any, names: Iterable[str]) -> list[str]:
    """Return the names that PEFT takes for those of transformers 4's experts and router, even where other modules have them.

    It would adapt the fused parameters in their place, in an adapter that neither it nor this project loads again.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    taken = []
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of two that are fused cannot go alone
            taken.append(name)
        if config.target_parameters:
            taken.append(name)
    return taken


def _named_modules(model: Any, names: list[str], experts: Mapping[str, int]) -> list[str]:
    import torch

    modules, for_text = dict(model.named_modules()), _for_text(model)
    found = {name: _matching(modules, [name]) for name in names}
    taken = _taken_for_experts(model, names) if experts else []
    fused = [name for name, paths in found.items() if name in taken or (not paths and _matching(experts, [name]))]
    if fused:
        reason = (
            "here these names stand for experts or their router, which lie in one tensor per layer, and no adapter on them "
            "could be loaded again"
        )
        raise _cannot_adapt(model, fused, reason)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = [
        name
        for name, paths in found.items()
        if any(isinstance(modules[path], torch.nn.Embedding) or modules[path] in ends for path in paths)
    ]
    if embeddings:
        reason = (
            "an adapter on embeddings or the LM head would be lost, because training reads the head's own weights and the "
            "saved file leaves embeddings out. Rows of new tokens cannot be trained either; use tokens that the base knows"
        )
        raise _cannot_adapt(model, embeddings, reason)
    routers = [name for name, paths in found.items() if any("Router" in type(modules[path]).__name__ for path in paths)]
    if routers:
        raise _cannot_adapt(model, routers, "a router gives its experts more than the numbers of a linear layer")
    wanted = [path for paths in found.values() for path in paths if path in for_text]
    if not wanted:
        reason = "lies outside the language model" if any(found.values()) else "is no module of this model"
        raise _cannot_adapt(model, names, f"none of them {reason}" if len(names) > 1 else f"this {reason}")
    return list(dict.fromkeys(wanted))


def _cannot_adapt(model: Any, names: Iterable[str], reason: str) -> UserError:
    return UserError(
        f"lora.target_modules: {', '.join(names)}: {reason}.\nLinear layers of this model: {', '.join(linear_layers(model))}."
    )
