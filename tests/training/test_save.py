"""The curves a person looks at, how parameters are named, and the proof that the saved file holds what trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import train_sft
from scripts.common.curves import Curves, read_curves, write_curves
from scripts.common.errors import UserError
from scripts.common.schema import Config, Lora
from scripts.model.adapter import add_lora, load_adapter, merge_initialisation, save_initialisation, whole_weights
from scripts.training.save import check_saved, draw_curves, flatten, initial_weights, next_stage
from tests.support.chain import write_chain
from tests.support.models import load, take_steps


def test_curves_are_drawn_with_and_without_rewards(tmp_path: Path) -> None:
    from matplotlib import image

    sft = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.1}, {"step": 2, "loss": 1.5}]
    dpo = [{**entry, "rewards/margins": 0.1, "rewards/chosen": 0.2, "rewards/rejected": 0.1} for entry in sft]

    draw_curves(Curves.of(sft, "sft"), tmp_path / "sft.png")
    draw_curves(Curves.of(dpo, "dpo"), tmp_path / "dpo.png")

    one, two = (image.imread(tmp_path / name) for name in ("sft.png", "dpo.png"))
    assert one.shape[1] > 400
    assert two.shape[1] == pytest.approx(2 * one.shape[1], abs=4)
    assert one.std() > 0.05


def test_the_figures_of_the_curves_are_kept_and_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    history = [
        {"step": 1, "loss": 2.0, "learning_rate": 1e-4},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "eval_loss": 1.9},
    ]

    assert read_curves(tmp_path) is None, "an adapter of an earlier version has only the picture"
    write_curves(tmp_path, Curves.of(history, "sft", 7))

    curves = read_curves(tmp_path)
    assert curves is not None
    assert (curves.stage, curves.seed) == ("sft", 7)
    assert curves.series == {"loss": [(1, 2.0)], "eval_loss": [(3, 1.9)]}


def test_nested_values_are_named_by_their_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


# --- what was saved is what trained


def save(base: Path, folder: Path, **lora) -> tuple[Path, list[str], dict[str, torch.Tensor]]:
    """Train an adapter a little and save it as the stages do; return the file, what trained, and its weights."""
    model = add_lora(load(base), Lora(r=2, target_modules=["q_proj", "down_proj"], **lora), "base")
    save_initialisation(model, folder)
    take_steps(model)
    weights = whole_weights(model, "default")
    initialisation = merge_initialisation(model, folder)
    state = weights | (initial_weights(folder / "initial_adapter") if initialisation else {})
    kwargs = {"selected_adapters": ["default"], "save_embedding_layers": False, **initialisation}
    model.save_pretrained(folder / "adapter", state_dict=state, **kwargs)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return folder / "adapter/adapter_model.safetensors", trained, weights


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"init": "pissa"}, {"init": "olora", "use_rslora": True}])
def test_saved_file_holds_all_that_trained(tiny_llama: Path, tmp_path: Path, lora) -> None:
    file, trained, weights = save(tiny_llama, tmp_path, **lora)

    check_saved(file, trained, weights)

    assert len(trained) == 4 * (3 if "use_dora" in lora else 2)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapter_that_starts_with_a_part_of_the_base_is_saved_for_the_plain_base(tmp_path: Path, init: str) -> None:
    config = str(write_chain(tmp_path))

    assert train_sft.main(["--config", config, "--set", f"lora.init={init}", "--set", "lora.r=2"]) == 0

    loaded = load_adapter(load(tmp_path / "model"), tmp_path / "out/sft_adapter")
    assert loaded.peft_config["default"].r == 4


@pytest.mark.parametrize("fault", ["missing", "rounded", "shorter"])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"init": "pissa"}])
def test_saved_file_that_lacks_a_tensor_stops_the_run(tiny_llama: Path, tmp_path: Path, lora, fault) -> None:
    file, trained, weights = save(tiny_llama, tmp_path, **lora)
    tensors = load_file(file)
    name = list(tensors)[-1]
    tensor = tensors.pop(name)
    changed = {"rounded": tensor.bfloat16().float(), "shorter": tensor[:-1].contiguous()}
    if fault in changed:
        tensors[name] = changed[fault]
    save_file(tensors, file)

    with pytest.raises(
        UserError, match=r"was trained, but what was saved (is missing|differs from it)\. Nothing was put"
    ):
        check_saved(file, trained, weights)


def test_weights_that_trained_but_were_never_collected_stop_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    """An adapter on embeddings keeps its matrices under names of another form."""
    file, trained, weights = save(tiny_llama, tmp_path)

    with pytest.raises(UserError, match=r"embed_tokens\.lora_embedding_A was trained, but what was saved is missing"):
        check_saved(file, [*trained, "base_model.model.model.embed_tokens.lora_embedding_A.default"], weights)


@pytest.mark.parametrize(
    ("stage", "sections", "following"),
    [
        ("sft", {}, "scripts.train_dpo"),  # sample data for both
        ("sft", {"sft": {"dataset_path": "mine.jsonl"}}, "eval.compare"),
        ("sft", {"sft": {"dataset_path": "mine.jsonl"}, "dpo": {"dataset_path": "pairs.jsonl"}}, "scripts.train_dpo"),
        ("sft", {"sft": {"dataset_path": "mine.jsonl"}, "kto": {"dataset_path": "thumbs.jsonl"}}, "scripts.train_kto"),
        ("sft", {"sft": {"dataset_path": "mine.jsonl"}, "data": {"test_ratio": 0}}, None),
        ("dpo", {}, "eval.compare"),
    ],
)
def test_the_next_step_is_one_that_there_are_data_for(stage: str, sections: dict, following: str | None) -> None:
    run = SimpleNamespace(stage=stage, values=Config.model_validate(sections))
    assert next_stage(run) == following
