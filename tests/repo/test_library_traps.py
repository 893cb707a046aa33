"""Behaviour of the pinned libraries that would spoil a run in silence; each test says how we stand against it."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.common.config import LoadedConfig
from scripts.common.machine import Machine
from scripts.common.run import Run
from scripts.common.schema import Config, Lora, Performance, Sft
from scripts.common.signals import StopSignal
from scripts.common.trl_arguments import OWNED_TRAINER_ARGUMENTS, REMOVED_TRAINER_ARGUMENTS
from scripts.dataset.rendering import Rendered
from scripts.model.adapter import add_lora, linear_layers, load_adapter
from scripts.model.base import load_base
from scripts.model.find import find_model
from scripts.model.memory import MemoryEstimate
from scripts.training.plan import Plan, trainer_arguments
from scripts.training.session import check_changed, snapshot, trainable_parameters
from scripts.training.sft import AnswerLossTrainer

CPU = Machine("cpu", torch.float32, 1, 1, ())
ROWS = [Rendered(list(range(5, 25 + n)), [-100] * 8 + list(range(13, 25 + n))) for n in range(6)]


def load(folder: Path):
    """Load a tiny base."""
    return load_base(folder, Config(), CPU)


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a saved adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    add_lora(load(tiny_llama), Lora(r=2), str(tiny_llama)).save_pretrained(folder, save_embedding_layers=False)
    return folder


def run_in(folder: Path, *, fast_path: bool = True, **trainer: object) -> Run:
    """Return a run whose checkpoints would go to a folder."""
    values = Config(sft=Sft(max_length=64, trainer=trainer), performance=Performance(fast_path=fast_path))
    return Run("sft", LoadedConfig(values, {}), folder, folder, StopSignal(), dry=False)


def plan_of(steps: int) -> Plan:
    """Return a plan of so many steps, for which nothing special is needed."""
    return Plan(steps, MemoryEstimate(0, 0, 0, 0, 0, 0), checkpointing=False, compiled=False, reasons=())


def make_trainer(
    model, folder: Path, tokenizer_folder: Path, rows: list[Rendered] = ROWS, **trainer: object
) -> AnswerLossTrainer:
    """Build the trainer as train_sft does."""
    from datasets import Dataset
    from trl import SFTConfig

    from scripts.model.base import load_tokenizer

    run = run_in(folder, max_steps=2, save_strategy="no", eval_strategy="no", **trainer)
    arguments = trainer_arguments(run, CPU, plan_of(2), validation=False)
    return AnswerLossTrainer(
        model=model,
        args=SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows]),
        processing_class=load_tokenizer(tokenizer_folder),
        group_by_length=True,
        held_out=[],
        answer_tokens=sum(row.trained_tokens for row in rows) / len(rows),
    )


def test_adapter_loaded_without_is_trainable_is_noticed_before_training(
    tiny_llama: Path, adapter: Path, tmp_path
) -> None:
    """PEFT loads adapters frozen; TRL then trains to the end and changes nothing (trap 2)."""
    from scripts.common.errors import UserError

    trainer = make_trainer(load_adapter(load(tiny_llama), adapter), tmp_path, tiny_llama)

    with pytest.raises(UserError, match="no weight of this adapter is trainable"):
        trainable_parameters(trainer.model)


def test_weights_that_did_not_move_are_noticed_after_training(tiny_llama: Path) -> None:
    from scripts.common.errors import UserError

    parameters = trainable_parameters(add_lora(load(tiny_llama), Lora(r=2), "base"))

    with pytest.raises(UserError, match="not one adapter weight changed"):
        check_changed(snapshot(parameters), parameters)


def test_weights_that_are_no_numbers_are_noticed_after_training(tiny_llama: Path) -> None:
    from scripts.common.errors import UserError

    parameters = trainable_parameters(add_lora(load(tiny_llama), Lora(r=2), "base"))
    before = snapshot(parameters)
    next(iter(parameters.values())).data.fill_(float("inf"))

    with pytest.raises(UserError, match="training diverged"):
        check_changed(before, parameters)


def test_adapter_folder_is_not_loaded_as_a_base(adapter: Path) -> None:
    """transformers accepts one and gives a base with the adapter in it (trap 3)."""
    from scripts.common.errors import UserError

    with pytest.raises(UserError, match="is an adapter"):
        find_model(str(adapter))


def test_trainer_arguments_are_accepted_on_a_machine_without_a_gpu(tmp_path: Path) -> None:
    """SFTConfig turns bf16 on by itself, which a CPU refuses, and checkpointing, which costs a quarter (trap 6)."""
    from trl import SFTConfig

    arguments = SFTConfig(**trainer_arguments(run_in(tmp_path), CPU, plan_of(10), validation=True))

    assert arguments.bf16 is False
    assert arguments.use_cpu is True
    assert not arguments.gradient_checkpointing
    assert arguments.activation_checkpointing is False
    assert arguments.report_to == []


def test_every_answer_token_counts_alike_in_batches_of_similar_length(tiny_llama: Path, tmp_path: Path) -> None:
    """Over an epoch the gradients add up to that of the mean over all tokens; what is logged is each batch's own mean."""
    rows = [Rendered(list(range(5, 9 + n)), [-100] * 4 + list(range(9, 9 + n))) for n in (2, 3, 4, 30, 31, 32)]
    gradients, losses = {}, []
    for size in (6, 3):
        torch.manual_seed(0)
        model = add_lora(load(tiny_llama), Lora(r=2, dropout=0.0), str(tiny_llama))
        trainer = make_trainer(model, tmp_path, tiny_llama, rows=rows, per_device_train_batch_size=size)
        batches = list(trainer.get_train_dataloader())
        for batch in batches:
            items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
            loss = trainer.compute_loss(model, batch, num_items_in_batch=items)
            assert loss.item() == pytest.approx(model(**batch).loss.item(), abs=1e-5)
            loss.backward()
            losses.append(loss.item())
        gradients[size] = {name: p.grad / len(batches) for name, p in model.named_parameters() if p.grad is not None}

    assert len(losses) == 1 + 2
    assert max(gradient.abs().max() for gradient in gradients[6].values()) > 1e-3
    for name, gradient in gradients[6].items():
        assert torch.allclose(gradients[3][name], gradient, atol=1e-6), name


@pytest.mark.parametrize("fast_path", [True, False])
def test_autocast_casts_on_a_gpu_only_where_the_fast_path_does_not(tmp_path: Path, fast_path: bool) -> None:
    """On top of it, it costs a third of a step."""
    gpu = Machine("cuda", torch.bfloat16, 1, 1, ())

    arguments = trainer_arguments(run_in(tmp_path, fast_path=fast_path), gpu, plan_of(10), validation=True)

    assert arguments["bf16"] is not fast_path


def test_our_labels_reach_the_model_untouched(tiny_llama: Path, tmp_path: Path) -> None:
    """TRL builds masks of its own from messages, of which some train the prompt (trap 7); ours go in as they are."""
    trainer = make_trainer(add_lora(load(tiny_llama), Lora(r=2), "base"), tmp_path, tiny_llama)

    seen = {}
    for batch in trainer.get_train_dataloader():
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            seen[int(mask.sum())] = (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
            assert (labels[~mask.bool()] == -100).all()

    assert seen == {len(row.input_ids): (row.input_ids, row.labels) for row in ROWS}


def test_trained_end_of_turn_survives_when_pad_and_eos_are_the_same_token(tiny_llama: Path, tmp_path: Path) -> None:
    """Some collators mask every pad token, and with it every EOS."""
    trainer = make_trainer(add_lora(load(tiny_llama), Lora(r=2), "base"), tmp_path, tiny_llama)
    trainer.processing_class.pad_token = trainer.processing_class.eos_token
    eos = trainer.processing_class.eos_token_id

    batch = trainer.data_collator([{"input_ids": [9, 8, eos], "labels": [-100, 8, eos]}, {"input_ids": [9, eos], "labels": [-100, eos]}])  # fmt: skip

    assert batch["labels"].tolist() == [[-100, 8, eos], [-100, eos, -100]]


def test_reported_training_loss_is_the_mean_over_answer_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    """The loss of a batch equals the one by hand, so prompts and padding carry none."""
    trainer = make_trainer(add_lora(load(tiny_llama), Lora(r=2), "base"), tmp_path, tiny_llama, logging_steps=1)
    wanted, count = 0.0, 0
    for row in ROWS:
        with torch.no_grad():
            log_probs = torch.log_softmax(load(tiny_llama).eval()(torch.tensor([row.input_ids])).logits[0], -1)
        for place, label in enumerate(row.labels):
            if label != -100:
                wanted, count = wanted - float(log_probs[place - 1, label]), count + 1

    trainer.train()

    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted / count, abs=1e-4)


def test_linear_layers_are_suffixes_without_the_head(tiny_llama: Path) -> None:
    """PEFT's all-linear writes full module names into the adapter, and TRL refuses LoRA on the head."""
    names = linear_layers(load(tiny_llama))

    assert "lm_head" not in names
    assert not any("." in name for name in names)


def test_names_we_refuse_in_the_trainer_block_are_ones_trl_has_or_had() -> None:
    """A release that brings a removed argument back, or drops one of ours, needs another answer."""
    from trl import DPOConfig, SFTConfig

    fields = {field.name for kind in (SFTConfig, DPOConfig) for field in dataclasses.fields(kind)}

    assert not set(REMOVED_TRAINER_ARGUMENTS) & fields
    assert not set(OWNED_TRAINER_ARGUMENTS) - fields


def test_private_names_of_the_fast_path_are_there_in_the_pinned_trl() -> None:
    from trl.trainer import utils

    for name in ("_use_triton", "_ChunkedLogProbFunction", "add_fused_lm_head", "FusedCausalLMOutput"):
        assert hasattr(utils, name)


def test_what_the_fast_path_replaces_takes_the_same_arguments_and_gives_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny_llama: Path
) -> None:
    """With another release a run would only be slower; here the difference shows (`make upgrade-check`)."""
    from trl import kernels
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    from scripts.speed.speed_up import speed_up, speed_up_training

    monkeypatch.setattr(utils, "_use_triton", chunked_logprob._use_triton)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", kernels.ChunkedLogProbFunction)
    model = add_lora(load(tiny_llama), Lora(r=2), "base")

    speed_up(model)
    speed_up_training(model, "cpu", compiled=False)

    assert "performance.fast_path" not in caplog.text
    assert utils._ChunkedLogProbFunction is not kernels.ChunkedLogProbFunction


def test_mlflow_refuses_a_folder_store_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this passes no more, tracking.open_store can drop its switch (trap 4)."""
    import mlflow

    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(mlflow.exceptions.MlflowException):
        mlflow.MlflowClient(str(tmp_path / "mlruns-a")).search_experiments()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert mlflow.MlflowClient(str(tmp_path / "mlruns-b")).search_experiments()


def test_demo_model_is_a_plain_model_that_can_be_trained(demo_model: Path) -> None:
    """A GGUF loaded without dequantize=True counts as quantised and can be neither saved nor trained (trap 5)."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo_model)

    assert getattr(config, "quantization_config", None) is None
    assert {path.suffix for path in demo_model.glob("*.safetensors")} == {".safetensors"}
    assert "4 bits" in (demo_model / "NOTICE").read_text(encoding="utf-8")
    assert (demo_model / "LICENSE").is_file()


def write_gguf(source: Any, path: Path) -> None:
    """Write a tiny Llama as a GGUF in full precision, its rotary halves interleaved as llama.cpp wants them."""
    import gguf

    shape = source.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}
    for name, tensor in source.state_dict().items():
        weight = tensor.float().numpy()
        if count := heads.get(name.split(".")[-2]):
            weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_conversion_gives_a_model_that_saves_and_loads_equal(tmp_path: Path, tiny_llama: Path) -> None:
    """The conversion of the demo model, on a tiny GGUF written here (trap 5)."""
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, GgufConfig

    source = load(tiny_llama)
    path = tmp_path / "tiny.gguf"
    write_gguf(source, path)

    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")

    assert model.num_parameters() == source.num_parameters()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_bitsandbytes_is_the_only_optional_part_of_loading(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main path must not touch requirements.gpu.txt."""
    assert importlib.util.find_spec("torch")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)

    assert load(tiny_llama).num_parameters() > 0
