"""DPO: the right reference, the right mathematics, one adapter for the plain base, and clear refusals."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import train_dpo, train_sft
from scripts.common.artifacts import read_manifest, sha256_file
from scripts.model.base import load_tokenizer
from tests.conftest import save_tiny_model, write_jsonl
from tests.support.chain import dpo_rows, manifest, start_stage, wait_for, write_chain
from tests.support.manifests import change_manifest, split_facts
from tests.support.stops import FAMILIES, change_generation_config, save_family_model
from tests.support.training import build_trainer

NAMES = ["red", "blue", "green", "gold"]
WITHOUT_SFT = ("--set", "dpo.init_from=null", "--set", "dpo.reference=base")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train SFT and DPO once."""
    folder = tmp_path_factory.mktemp("chain")
    config = str(write_chain(folder))
    assert train_sft.main(["--config", config]) == 0
    assert train_dpo.main(["--config", config]) == 0
    return folder


def build(folder: Path, run_dir: Path, *overrides: str):
    """Build the trainer of a DPO run without training it."""
    return build_trainer("dpo", folder / "config.yaml", run_dir, overrides)


def oracle_loss(trainer, batch, beta: float = 0.1) -> tuple[float, torch.Tensor]:
    """Compute the DPO loss of arXiv:2305.18290, equation 7, from full logits, independently of TRL."""

    def answer_logps(adapter: str) -> torch.Tensor:
        trainer.model.set_adapter(adapter)
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        log_probs = torch.log_softmax(logits[:, :-1].float(), -1)
        picked = log_probs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (picked * batch["completion_mask"][:, 1:]).sum(1)

    with torch.no_grad():
        ref_chosen, ref_rejected = answer_logps("ref").chunk(2)
        chosen, rejected = answer_logps("default").chunk(2)
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return float(-torch.nn.functional.logsigmoid(margin).mean()), margin


def nudge(trainer) -> None:
    """Move the policy away from the reference, so that margins are not zero."""
    generator = torch.Generator().manual_seed(1)
    for name, value in trainer.model.named_parameters():
        if ".default." in name:
            value.data += 0.05 * torch.randn(value.shape, generator=generator).to(value.device)


def test_the_first_margin_is_zero_and_the_first_loss_is_ln_2(chain: Path) -> None:
    metrics = manifest(chain / "out/dpo_adapter")["metrics"]
    assert metrics["step0_margin"] < 1e-5
    assert metrics["step0_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["held_out_loss_before"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.usefixtures("no_unpickling")
def test_killed_run_resumes_to_the_same_adapter_as_an_uninterrupted_one(chain: Path) -> None:
    steps = {"max_steps": 12, "save_steps": 2, "eval_steps": 2, "logging_steps": 1}
    common = ["--set", f"dpo.trainer={json.dumps(steps)}"]
    config = chain / "config.yaml"
    whole, broken = chain / "whole", chain / "broken"
    assert train_dpo.main(["--config", str(config), *common, "--set", f"dpo.output_dir={whole}"]) == 0
    overrides = [*common, "--set", f"dpo.output_dir={broken}"]
    process = start_stage("train_dpo", config, *overrides)
    try:
        checkpoint = f"checkpoints/checkpoint-{random.choice((2, 4, 6))}/trainer_state.json"
        wait_for(broken.with_name("broken.run") / checkpoint, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not broken.exists()

    assert train_dpo.main(["--config", str(config), *overrides, "--resume"]) == 0

    assert manifest(broken)["metrics"]["held_out_loss"] == manifest(whole)["metrics"]["held_out_loss"]
    assert sha256_file(broken / "adapter_model.safetensors") == sha256_file(whole / "adapter_model.safetensors")
    assert manifest(broken)["metrics"]["held_out_loss"] < manifest(broken)["metrics"]["held_out_loss_before"]


def test_training_lowers_the_held_out_preference_loss(chain: Path) -> None:
    metrics = manifest(chain / "out/dpo_adapter")["metrics"]
    assert metrics["held_out_loss"] < metrics["held_out_loss_before"] - 0.01


def test_trl_computes_the_loss_of_the_paper(chain: Path, tmp_path: Path) -> None:
    """The trainer's loss on a batch equals a short independent computation, and swapping the answers flips the margin."""
    trainer = build(chain, tmp_path)
    nudge(trainer)
    trainer.model.eval()
    rows = [trainer.train_dataset[index] for index in range(3)]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.no_grad():
        theirs = float(trainer.compute_loss(trainer.model, dict(batch)))
    ours, margin = oracle_loss(trainer, batch)
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert margin.abs().max() > 1e-3
    turned = [{**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows]
    swapped = trainer._prepare_inputs(trainer.data_collator(turned))
    _, flipped = oracle_loss(trainer, swapped)
    assert torch.allclose(flipped, -margin, atol=1e-5)


def test_the_loss_of_hand_worked_pairs() -> None:
    """Margins of 0, ln 3 and -ln 3 give losses ln 2, ln(4/3) and ln 4: -log sigmoid(m) = log(1 + exp(-m))."""
    margins = torch.tensor([0.0, math.log(3), -math.log(3)])
    expected = torch.tensor([math.log(2), math.log(4 / 3), math.log(4)])
    assert torch.allclose(-torch.nn.functional.logsigmoid(margins), expected)


def test_the_reference_is_a_copy_of_the_adapter_on_the_same_base(chain: Path, tmp_path: Path) -> None:
    """No second base is in memory: besides the two adapters every weight exists once."""
    trainer = build(chain, tmp_path)
    assert trainer.ref_model is None
    names = [name for name, _ in trainer.model.named_parameters()]
    assert sum("q_proj.base_layer" in name for name in names) == 2
    for name, value in trainer.model.named_parameters():
        if ".ref." in name:
            assert not value.requires_grad
            assert torch.equal(value, trainer.model.get_parameter(name.replace(".ref.", ".default.")))


def test_reference_base_is_the_bare_base(chain: Path, tmp_path: Path) -> None:
    trainer = build(chain, tmp_path, "dpo.reference=base")
    assert trainer.reference_adapter is None
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    with torch.no_grad():
        reference = trainer.compute_ref_log_probs(trainer.model, batch)
        trainer.model.disable_adapter_layers()
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probs = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    expected = (log_probs * batch["completion_mask"][:, 1:]).sum(1)
    assert torch.allclose(torch.cat(reference), expected, atol=1e-4)


def test_reference_pass_groups_pairs_by_length_and_gives_each_its_own_numbers(chain: Path, tmp_path: Path) -> None:
    trainer = build(chain, tmp_path)
    pairs = trainer.train_dataset.select(range(7)).remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
    pairs = pairs.map(lambda pair, number: {"chosen_ids": pair["chosen_ids"] * (number + 1)}, with_indices=True)
    seen, compute = [], trainer.compute_ref_log_probs

    def watched(model, batch):
        seen.append(batch["attention_mask"].sum(1).max().item())
        return compute(model, batch)

    trainer.compute_ref_log_probs = watched
    found = trainer._precompute_ref_logps(pairs, "train", 2)

    longest_first = sorted(pairs, key=trainer.row_length, reverse=True)
    sides = [
        len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in longest_first
    ]
    assert seen == [max(sides[start : start + 2]) for start in range(0, 7, 2)]
    for number, pair in enumerate(pairs):
        chosen, rejected = compute(trainer.model, trainer._prepare_inputs(trainer.data_collator([pair])))
        assert found[number]["ref_chosen_logps"] == pytest.approx(chosen.item(), abs=1e-3)
        assert found[number]["ref_rejected_logps"] == pytest.approx(rejected.item(), abs=1e-3)


def test_reference_is_not_asked_twice_unless_what_it_says_may_differ(chain: Path, tmp_path: Path, monkeypatch) -> None:
    from scripts.training.dpo import PreferenceTrainer

    asked, ask = [], PreferenceTrainer._ask_reference
    monkeypatch.setattr(PreferenceTrainer, "_ask_reference", lambda *a: (asked.append(a[2]), ask(*a))[1])
    kept = f"dpo.output_dir={tmp_path}/out/dpo"

    def numbers(*overrides: str) -> list[list[float]]:
        asked.clear()
        trainer = build(chain, tmp_path, kept, *overrides)
        trainer.kept_logps.keep()
        columns = ("ref_chosen_logps", "ref_rejected_logps")
        return [list(side[name]) for side in (trainer.train_dataset, trainer.eval_dataset) for name in columns]

    first = numbers()
    assert asked == ["train", "eval"]
    assert numbers("dpo.beta=0.5", "dpo.learning_rate=0.5") == first
    assert asked == []
    assert numbers("dpo.reference=base") != first
    assert asked == ["train", "eval"]
    numbers("performance.fast_path=false")
    assert asked == ["train", "eval"]
    for file in (tmp_path / "out/.reference_logps").iterdir():
        file.write_text(file.read_text()[:40])  # a disk that lost the rest
    assert numbers() == first
    assert asked == ["train", "eval"]


def test_numbers_that_cannot_be_kept_do_not_stop_a_run(chain: Path, tmp_path: Path, caplog) -> None:
    (tmp_path / ".reference_logps").write_text("no folder")

    trainer = build(chain, tmp_path, f"dpo.output_dir={tmp_path}/dpo")
    trainer.kept_logps.keep()

    assert all(math.isfinite(value) for value in trainer.train_dataset["ref_chosen_logps"])
    assert "cannot be kept" in caplog.text


def test_the_result_is_one_adapter_for_the_plain_base(chain: Path) -> None:
    """Plain PEFT loads it; it has the tensors of the SFT adapter with other values and no copy of the reference."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sft, dpo = (load_file(chain / f"out/{name}_adapter/adapter_model.safetensors") for name in ("sft", "dpo"))
    assert sft.keys() == dpo.keys()
    assert any(not torch.equal(sft[name], dpo[name]) for name in sft)
    assert not (chain / "out/dpo_adapter/ref").exists()
    base = AutoModelForCausalLM.from_pretrained(chain / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = base(ids).logits.detach().clone()
    adapted = PeftModel.from_pretrained(base, chain / "out/dpo_adapter")(ids).logits
    assert (adapted - plain).abs().max() > 1e-3


def test_lineage_names_the_sft_adapter_and_its_run(chain: Path) -> None:
    import mlflow

    sft, dpo = manifest(chain / "out/sft_adapter"), manifest(chain / "out/dpo_adapter")
    assert dpo["parent"]["sha256"] == read_manifest(chain / "out/sft_adapter").sha256
    mlflow.set_tracking_uri(f"sqlite:///{chain}/mlflow.db")
    run = mlflow.get_run(dpo["mlflow"]["run_id"])
    assert run.data.tags["mlflow.parentRunId"] == sft["mlflow"]["run_id"]
    assert run.info.status == "FINISHED"
    assert {"train/rewards/margins", "validation/logps/chosen", "validation/answers/eos_rate"} <= set(run.data.metrics)


def test_resuming_a_finished_run_does_nothing(chain: Path) -> None:
    before = (chain / "out/dpo_adapter/manifest.json").read_bytes()
    assert train_dpo.main(["--config", str(chain / "config.yaml"), "--resume"]) == 0
    assert (chain / "out/dpo_adapter/manifest.json").read_bytes() == before


def test_every_loss_of_the_schema_trains_a_step(chain: Path, tmp_path: Path) -> None:
    from typing import get_args

    from scripts.common.schema import DpoLoss

    trainer = build(chain, tmp_path, "dpo.sft_weight=0.3")
    nudge(trainer)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index] for index in range(2)]))
    losses = set()
    for name in get_args(DpoLoss):
        trainer.loss_types, trainer.loss_weights = [name, "sft"], [1.0, 0.3]
        trainer.label_smoothing = 0.1
        loss = trainer.compute_loss(trainer.model, dict(batch))
        assert torch.isfinite(loss), name
        losses.add(round(float(loss), 5))
    assert len(losses) > 8


REFUSALS = {
    "beta is not stated": (["dpo.beta=null"], "dpo.beta: missing"),
    "no adapter yet reference sft": (["dpo.init_from=null"], "dpo.reference: found sft"),
    "missing adapter": (["dpo.init_from=nowhere/sft_adapter"], "no such folder"),
    "data without a report": (["deid.required=true"], "no such report"),
    "too long": (["dpo.max_length=5"], "longer than dpo.max_length"),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refuses(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture, overrides: list[str], message: str
) -> None:
    settings = [part for item in (*overrides, f"dpo.output_dir={tmp_path}/out") for part in ("--set", item)]
    assert train_dpo.main(["--config", str(chain / "config.yaml"), *settings]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def broken_adapter(chain: Path, folder: Path, how: str) -> Path:
    """Copy the SFT adapter and spoil it."""
    adapter = folder / "adapter"
    shutil.copytree(chain / "out/sft_adapter", adapter)
    facts = manifest(adapter)
    if how == "half-written":
        (adapter / "manifest.json").unlink()
        return adapter
    if how == "tampered":
        (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
        return adapter
    if how == "other template":
        facts["chat_template_sha256"] = "0" * 64
    if how == "untrained":
        weights = adapter / "adapter_model.safetensors"
        tensors = {
            name: torch.zeros_like(value) if "lora_B" in name else value for name, value in load_file(weights).items()
        }
        save_file(tensors, weights, metadata={"format": "pt"})
        facts["files"][weights.name] = sha256_file(weights)
    (adapter / "manifest.json").write_text(json.dumps(facts), encoding="utf-8")
    return adapter


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("half-written", "was not finished"),
        ("tampered", "changed since"),
        ("other template", "another chat template"),
        ("untrained", "is untrained"),
    ],
)
def test_refuses_an_adapter_that_is(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture, how: str, message: str
) -> None:
    adapter = broken_adapter(chain, tmp_path, how)
    settings = ["--set", f"dpo.init_from={adapter}", "--set", f"dpo.output_dir={tmp_path}/out"]
    assert train_dpo.main(["--config", str(chain / "config.yaml"), *settings]) == 2
    assert message in capsys.readouterr().err


def test_refuses_an_adapter_of_another_base(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = save_tiny_model(tmp_path / "other", seed=7)
    settings = ["--set", f"base_model_id={other}", "--set", f"dpo.output_dir={tmp_path}/out"]
    assert train_dpo.main(["--config", str(chain / "config.yaml"), *settings]) == 2
    assert "another base model" in capsys.readouterr().err


def dry_run_from(chain: Path, adapter: Path, *settings: str) -> int:
    """Ask what DPO would do from this adapter."""
    changes = [f"dpo.init_from={adapter}", f"dpo.output_dir={adapter}_out", *settings]
    config = ["--config", str(chain / "config.yaml"), "--dry-run"]
    return train_dpo.main([*config, *(part for item in changes for part in ("--set", item))])


@pytest.mark.parametrize(
    "settings",
    [
        ["data.split_seed=3"],
        ["data.validation_ratio=0.5"],
        ["data.test_ratio=0.5"],
        ["data.split_seed=3", "data.validation_ratio=0.1"],
    ],
)
def test_refuses_an_adapter_that_may_have_trained_on_what_is_held_out_now(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture, settings: list[str]
) -> None:
    adapter = shutil.copytree(chain / "out/sft_adapter", tmp_path / "sft")

    assert dry_run_from(chain, adapter, *settings) == 2

    said = capsys.readouterr().err
    assert f"dpo.init_from: {adapter}: was trained with another split (seed 0, validation 0.15, test 0.2) than" in said
    assert f"Set {settings[0].partition('=')[0]}: " in said
    assert "or train again: `python -m scripts.train_sft`" in said
    real = [*settings, f"dpo.init_from={adapter}", f"dpo.output_dir={tmp_path}/out"]
    config = ["--config", str(chain / "config.yaml")]
    assert train_dpo.main([*config, *(part for item in real for part in ("--set", item))]) == 2
    assert not (tmp_path / "out").exists()


def test_takes_an_adapter_that_has_seen_nothing_of_what_is_held_out(chain: Path, tmp_path: Path) -> None:
    """Whether it was trained on other files, or with more held out."""
    adapter = shutil.copytree(chain / "out/sft_adapter", tmp_path / "sft")
    change_manifest(adapter, datasets=[{"path": "other.jsonl", "sha256": "0" * 64, "train": 3, "validation": 1}])

    assert dry_run_from(chain, adapter) == 0
    assert dry_run_from(chain, adapter, "data.validation_ratio=0.1", "data.test_ratio=0.15") == 0
    assert dry_run_from(chain, adapter, "data.validation_ratio=0", "data.test_ratio=0", "data.split_seed=3") == 0


def test_refuses_an_adapter_of_the_two_sided_split_of_earlier_versions(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    adapter = shutil.copytree(chain / "out/sft_adapter", tmp_path / "sft")
    change_manifest(adapter, split={"seed": 0, "ratio": 0.9})

    assert dry_run_from(chain, adapter) == 2

    said = capsys.readouterr().err
    assert f"dpo.init_from: {adapter}: was trained by an earlier version, whose split had no test side" in said
    assert "Train again: `python -m scripts.train_sft`." in said


def test_near_duplicates_are_listed_in_a_dry_run_and_counted_in_the_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = write_chain(tmp_path)
    text = "please say which of the colours on this old card is the brightest one"
    write_jsonl(tmp_path / "sft.jsonl", [{"instruction": f"{text} {word}", "output": word} for word in NAMES])

    common = ["--config", str(config), "--set", "data.split_seed=2"]  # one for the test, one for validation

    assert train_sft.main([*common, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert " records are left out: their prompts are close to one that is trained on" in said
    assert f"{tmp_path}/sft.jsonl:" in said

    assert train_sft.main(common) == 0
    (facts,) = manifest(tmp_path / "out/sft_adapter")["datasets"]
    assert facts["near_duplicates"] == 2
    assert facts["train"] + facts["validation"] + facts["test"] + facts["near_duplicates"] == len(NAMES)


def test_refuses_an_adapter_whose_own_start_had_another_split(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = shutil.copytree(chain / "out/sft_adapter", tmp_path / "first")
    change_manifest(first, split=split_facts(seed=7))
    second = shutil.copytree(chain / "out/dpo_adapter", tmp_path / "second")
    change_manifest(second, parent={"path": str(first), "sha256": read_manifest(first).sha256})

    assert dry_run_from(chain, second) == 2
    assert f"{second}: continues {first}, which was trained with another split (seed 7" in capsys.readouterr().err


def test_bad_pairs_are_named_by_line(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [
        *dpo_rows(1),
        {"prompt": "x", "chosen": "same", "rejected": "same "},
        {"prompt": "y", "chosen": "", "rejected": "b"},
    ]
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    settings = ["--set", f"dpo.dataset_path={path}", "--set", f"dpo.output_dir={tmp_path}/out"]
    assert train_dpo.main(["--config", str(chain / "config.yaml"), *settings]) == 2
    message = capsys.readouterr().err
    assert f"{path}:6: rejected: is the same as chosen" in message
    assert f"{path}:7: chosen: is empty" in message


@pytest.mark.parametrize("name", FAMILIES)
def test_both_stages_take_every_family_and_train_up_to_the_first_stop(name: str, tmp_path: Path, capsys) -> None:
    family = FAMILIES[name]
    save_family_model(tmp_path / "model", family)
    config = str(write_chain(tmp_path))

    assert train_sft.main(["--config", config, "--dry-run"]) == 0
    assert f" it is, 0{family.closing}<<<" in capsys.readouterr().err
    assert train_dpo.main(["--config", config, *WITHOUT_SFT, "--dry-run"]) == 0
    shown = capsys.readouterr().err
    assert f" it is, 0{family.closing}<<<\n--- rejected" in shown
    assert shown.endswith(f", 0{family.closing}<<<\n")


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_answer_that_holds_a_stop_of_the_base_is_refused(stage: str, tmp_path: Path, capsys) -> None:
    """Such an answer would end in its middle once it is served."""
    config = str(write_chain(tmp_path))
    tokens = load_tokenizer(tmp_path / "model").encode(" is", add_special_tokens=False)
    change_generation_config(tmp_path / "model", eos_token_id=tokens)
    main = {"sft": train_sft.main, "dpo": train_dpo.main}[stage]

    assert main(["--config", config, *WITHOUT_SFT, "--dry-run"]) == 2

    assert (
        f"{stage}.jsonl:1: the answer holds ' is', which ends answers, before the end of this one"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_such_an_answer_is_left_out_when_asked(stage: str, tmp_path: Path, capsys) -> None:
    config = str(write_chain(tmp_path))
    answers = [f"red {n}" for n in range(12)] + ["red it is"]
    write_jsonl(tmp_path / "sft.jsonl", [{"instruction": f"say {n}", "output": a} for n, a in enumerate(answers)])
    pairs = [{"prompt": f"say {n}", "chosen": a, "rejected": f"no {n}"} for n, a in enumerate(answers)]
    write_jsonl(tmp_path / "dpo.jsonl", pairs)
    tokens = load_tokenizer(tmp_path / "model").encode(" is", add_special_tokens=False)
    change_generation_config(tmp_path / "model", eos_token_id=tokens)
    main = {"sft": train_sft.main, "dpo": train_dpo.main}[stage]

    every = [*WITHOUT_SFT, "--dry-run", "--set", "data.test_ratio=0"]

    assert main(["--config", config, *every]) == 2
    said = capsys.readouterr().err
    assert f"1 of 13 records cannot be trained on\n  {tmp_path}/{stage}.jsonl:13: the answer holds ' is'" in said
    assert main(["--config", config, *every, "--set", "data.on_bad_row=skip"]) == 0
    assert "They are left out." in capsys.readouterr().err


def test_the_watch_sees_degeneration_and_stops(chain: Path, tmp_path: Path) -> None:
    """Answers that become repetitive warn once, and end the run where the key says so."""
    from types import SimpleNamespace

    from scripts.common.tracking import Tracker
    from scripts.model.generation import Health
    from scripts.training.degeneration import DegenerationWatch

    trainer = build(chain, tmp_path)
    pairs = [
        SimpleNamespace(prompt_ids=row["prompt_ids"], chosen_ids=row["chosen_ids"]) for row in trainer.eval_dataset
    ]
    watch = DegenerationWatch(trainer, Tracker(), pairs, stop=True)
    control, state = SimpleNamespace(should_training_stop=False), SimpleNamespace(global_step=1)
    watch.on_evaluate(None, state, control, {"eval_logps/chosen": -10.0})
    assert not control.should_training_stop
    watch.start = Health(mean_tokens=1.0, repetition=-0.5, eos_rate=1.3, distinct_2=1.0)
    watch.on_evaluate(None, state, control, {"eval_logps/chosen": -10.0})
    assert control.should_training_stop
    assert len(watch.warned) >= 2


def test_a_run_that_degenerates_ends_early_when_asked(chain: Path, tmp_path: Path) -> None:
    steps = {"max_steps": 12, "save_steps": 2, "eval_steps": 2, "lr_scheduler_type": "constant"}
    common = ["dpo.learning_rate=0.1", f"dpo.trainer={json.dumps(steps)}", f"dpo.output_dir={tmp_path}/out"]
    settings = [part for item in (*common, "dpo.stop_on_degeneration=true") for part in ("--set", item)]
    assert train_dpo.main(["--config", str(chain / "config.yaml"), *settings]) == 0
    assert manifest(tmp_path / "out")["metrics"]["steps"] < 12


def test_dry_run_trains_nothing(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = ["--set", f"dpo.output_dir={tmp_path}/out", "--dry-run"]
    assert train_dpo.main(["--config", str(chain / "config.yaml"), *settings]) == 0
    shown = capsys.readouterr().err
    assert "optimizer steps" in shown
    assert "--- rejected >>>" in shown
    assert not any(tmp_path.iterdir())
