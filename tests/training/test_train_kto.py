"""KTO: the paper's loss, TRL's gradient, the right reference, one adapter for the plain base, and clear refusals."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eval import compare
from eval.report import read_report
from scripts import export_lora, train_kto, train_sft
from scripts.common.artifacts import read_manifest, sha256_file
from scripts.common.config import load_config
from scripts.common.errors import UserError
from scripts.common.machine import choose_machine
from scripts.common.question import plan_sha256
from scripts.common.schema import Kto
from scripts.dataset.rendering import RenderedFeedback
from scripts.training.kto import balance, in_batches
from scripts.training.reference import prove_start
from tests.conftest import write_jsonl
from tests.support.chain import kto_rows, manifest, start_stage, wait_for, write_kto_chain
from tests.support.serving import assert_vllm_loads
from tests.support.training import build_trainer


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train SFT and KTO once."""
    folder = tmp_path_factory.mktemp("chain")
    config = str(write_kto_chain(folder))
    assert train_sft.main(["--config", config]) == 0
    assert train_kto.main(["--config", config]) == 0
    return folder


def build(folder: Path, run_dir: Path, *overrides: str):
    """Build the trainer of a KTO run without training it."""
    return build_trainer("kto", folder / "config.yaml", run_dir, overrides)


def train(chain: Path, *overrides: str, flags: tuple[str, ...] = ()) -> int:
    """Run the stage with these settings."""
    settings = [part for item in overrides for part in ("--set", item)]
    return train_kto.main(["--config", str(chain / "config.yaml"), *settings, *flags])


def nudge(model) -> None:
    """Move the policy away from the reference, so that rewards are not zero."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if ".default." in name:
            value.data += 0.05 * torch.randn(value.shape, generator=generator)


def favour_mismatched(model, batch) -> None:
    """Move the policy so that mismatched answers become likelier, which makes the KL term greater than 0."""
    ids, answers = batch["KL_input_ids"], batch["KL_completion_mask"]
    labels = ids.masked_fill(answers == 0, -100)
    model(input_ids=ids, attention_mask=batch["KL_attention_mask"], labels=labels).loss.backward()
    with torch.no_grad():
        for value in model.parameters():
            if value.grad is not None:
                value -= 0.05 * value.grad / value.grad.norm()
    model.zero_grad()


def batch_of(trainer):
    """Return a batch of both labels, without what the reference says of it."""
    rows = [
        row for label in (True, False) for row in [row for row in trainer.train_dataset if row["label"] == label][:2]
    ]
    return trainer.data_collator([{k: v for k, v in row.items() if not k.startswith("ref_")} for row in rows])


def gradients(model) -> dict[str, torch.Tensor]:
    """Return the gradient of every weight that trains."""
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


# --- the loss


def oracle_loss(model, batch, beta: float, weights: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of arXiv:2402.01306, equations 6 and 7, from full logits, independently of TRL; and its KL term."""

    def logps(adapter: str, prefix: str = "") -> torch.Tensor:
        model.set_adapter(adapter)
        ids = batch[f"{prefix}input_ids"]
        logits = model(input_ids=ids, attention_mask=batch[f"{prefix}attention_mask"]).logits[:, :-1]
        picked = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
        return (picked * batch[f"{prefix}completion_mask"][:, 1:]).sum(1)

    with torch.no_grad():
        reference, reference_kl, kl = logps("ref"), logps("ref", "KL_"), logps("default", "KL_")
    z0 = (kl - reference_kl).mean().clamp(min=0)
    reward = logps("default") - reference
    liked = batch["label"].bool()
    value = torch.where(liked, torch.sigmoid(beta * (reward - z0)), torch.sigmoid(beta * (z0 - reward)))
    weight = torch.where(liked, *(torch.tensor(each) for each in weights))
    return (weight * (1 - value)).mean(), z0


@pytest.mark.parametrize("fast_path", ["true", "false"])
def test_loss_and_gradient_are_those_of_the_paper(chain: Path, tmp_path: Path, fast_path: str) -> None:
    trainer = build(chain, tmp_path, f"performance.fast_path={fast_path}", "kto.undesirable_weight=1.7", "kto.beta=0.5")
    batch = batch_of(trainer)
    favour_mismatched(trainer.model, batch)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    ours = gradients(trainer.model)
    trainer.model.zero_grad()

    weights = trainer.desirable_weight, 1.7
    wanted, z0 = oracle_loss(trainer.model, batch, 0.5, weights)
    wanted.backward()

    assert float(loss) == pytest.approx(float(wanted), abs=1e-6)
    assert float(z0) > 1e-3, "the KL term takes part"
    for name, gradient in gradients(trainer.model).items():
        assert torch.allclose(ours[name], gradient, atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_gradient_of_a_batch_is_plain_trls(chain: Path, tmp_path: Path, monkeypatch, loss_type: str) -> None:
    """TRL's own trainer, with its own head and PEFT's own layers, asks the reference itself."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import KTOConfig, KTOTrainer
    from trl.trainer import utils

    from scripts.model.base import load_tokenizer

    heads = {name: getattr(utils, name) for name in ("_use_triton", "_ChunkedLogProbFunction")}
    trainer = build(chain, tmp_path, f"kto.loss_type={loss_type}")
    batch = batch_of(trainer)
    favour_mismatched(trainer.model, batch)
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    loss.backward()
    ours = gradients(trainer.model)

    if not heads["_use_triton"].__module__.startswith("scripts"):
        for name, value in heads.items():
            monkeypatch.setattr(utils, name, value)
    base = AutoModelForCausalLM.from_pretrained(chain / "model", dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, chain / "out/sft_adapter", is_trainable=True)
    weights = {name: getattr(trainer, name) for name in ("desirable_weight", "undesirable_weight")}
    settings = KTOConfig(
        str(tmp_path / "plain"), loss_type=loss_type, per_device_train_batch_size=4, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", **weights,
    )  # fmt: skip
    plain = KTOTrainer(policy, args=settings, train_dataset=Dataset.from_list(kto_rows()), processing_class=load_tokenizer(chain / "model"))  # fmt: skip
    for name, value in trainer.model.named_parameters():
        if ".default." in name:
            plain.model.get_parameter(name).data.copy_(value)
    theirs = plain.compute_loss(plain.model.train(), dict(batch))
    theirs.backward()

    assert float(loss) == pytest.approx(float(theirs), abs=1e-6)
    found = gradients(plain.model)
    assert found.keys() == ours.keys()
    for name, gradient in found.items():
        assert torch.allclose(ours[name], gradient, atol=1e-6, rtol=1e-4), name


def test_first_loss_is_a_half_for_every_record_of_either_label_and_any_weight(chain: Path, tmp_path: Path) -> None:
    """Equal models have reward 0 and KL 0, so equation 7 gives 1 - sigmoid(0) for a thumb up as for one down."""
    trainer = build(chain, tmp_path, "kto.desirable_weight=3", "kto.undesirable_weight=2")
    rows = [next(row for row in trainer.train_dataset if row["label"] == label) for label in (True, False)]
    trainer.model.eval()
    with torch.no_grad():
        losses = [float(trainer.compute_loss(trainer.model, trainer.data_collator([row]))) for row in rows]
        assert [trainer.starting(row).loss for row in rows] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert losses == pytest.approx([1.5, 1.0], abs=1e-5)


def test_start_of_a_run_is_proven_and_written_down(chain: Path) -> None:
    metrics = manifest(chain / "out/kto_adapter")["metrics"]
    assert metrics["step0_reward"] < 1e-5
    assert metrics["step0_loss"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["thumbs_up"] * metrics["desirable_weight"] == pytest.approx(
        metrics["thumbs_down"] * metrics["undesirable_weight"]
    )


@pytest.mark.parametrize("what", ["the policy", "an own answer", "a mismatched answer"])
def test_start_that_is_not_what_it_should_be_is_refused(chain: Path, tmp_path: Path, what: str) -> None:
    trainer = build(chain, tmp_path, f"kto.output_dir={tmp_path}/kto")
    if what == "the policy":
        nudge(trainer.model)
    else:
        column = "ref_logps" if what == "an own answer" else "ref_KL_logps"
        values = [value + 0.1 for value in trainer.train_dataset[column]]
        trainer.train_dataset = trainer.train_dataset.remove_columns([column]).add_column(column, values)

    with pytest.raises(UserError, match=r"step 0: .*reward.*Nothing was trained"):
        prove_start(trainer)


def test_reference_is_a_frozen_copy_of_the_adapter_or_the_bare_base(chain: Path, tmp_path: Path) -> None:
    trainer = build(chain, tmp_path)
    assert trainer.reference_adapter == "ref"
    for name, value in trainer.model.named_parameters():
        if ".ref." in name:
            assert not value.requires_grad
            assert torch.equal(value, trainer.model.get_parameter(name.replace(".ref.", ".default.")))
    assert build(chain, tmp_path, "kto.reference=base").reference_adapter is None


def test_without_an_sft_adapter_the_reference_is_the_base(chain: Path, tmp_path: Path) -> None:
    trainer = build(chain, tmp_path, "kto.init_from=null")

    assert prove_start(trainer)["step0_loss"] == pytest.approx(0.5, abs=1e-6)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    with torch.no_grad(), trainer.model.disable_adapter():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    log_probs = torch.log_softmax(logits.float(), -1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    expected = (log_probs * batch["completion_mask"][:, 1:]).sum()
    assert trainer.train_dataset[0]["ref_logps"] == pytest.approx(float(expected), abs=1e-3)


# --- a run


@pytest.mark.usefixtures("no_unpickling")
def test_killed_run_resumes_to_the_same_adapter_as_an_uninterrupted_one(chain: Path) -> None:
    steps = {"max_steps": 12, "save_steps": 2, "eval_steps": 2, "logging_steps": 1}
    common = f"kto.trainer={json.dumps(steps)}"
    whole, broken = chain / "whole", chain / "broken"
    assert train(chain, common, f"kto.output_dir={whole}") == 0
    process = start_stage("train_kto", chain / "config.yaml", "--set", common, "--set", f"kto.output_dir={broken}")
    try:
        checkpoint = f"checkpoints/checkpoint-{random.choice((2, 4, 6))}/trainer_state.json"
        wait_for(broken.with_name("broken.run") / checkpoint, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not broken.exists()

    assert train(chain, common, f"kto.output_dir={broken}", flags=("--resume",)) == 0

    assert manifest(broken)["metrics"]["held_out_loss"] == manifest(whole)["metrics"]["held_out_loss"]
    assert sha256_file(broken / "adapter_model.safetensors") == sha256_file(whole / "adapter_model.safetensors")
    assert manifest(broken)["metrics"]["held_out_loss"] < manifest(broken)["metrics"]["held_out_loss_before"]


def test_training_makes_liked_answers_likelier_than_others(chain: Path, tmp_path: Path) -> None:
    steps = {"max_steps": 30, "eval_steps": 30, "save_steps": 30}
    assert train(chain, f"kto.output_dir={tmp_path}/kto", f"kto.trainer={json.dumps(steps)}", "kto.beta=0.5") == 0
    series = json.loads((tmp_path / "kto/curves.json").read_text(encoding="utf-8"))["series"]
    assert series["eval_rewards/margins"][-1][1] > 0.2


def test_held_out_figures_are_means_over_the_records_they_are_about(chain: Path, tmp_path: Path) -> None:
    """In batches of any size: TRL's mean over batches would count a batch with one thumb down as much as one with four."""
    found = []
    for size in (1, 3):
        trainer = build(chain, tmp_path, f'kto.trainer={{"per_device_eval_batch_size": {size}}}', "data.validation_ratio=0.3", "kto.init_from=null")  # fmt: skip
        nudge(trainer.model)
        found.append(trainer.evaluate())
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert found[0][f"eval_{name}"] == pytest.approx(found[1][f"eval_{name}"], abs=1e-4), name


def test_the_result_is_one_adapter_for_the_plain_base(chain: Path) -> None:
    """Plain PEFT loads it; it has the tensors of the SFT adapter with other values and no copy of the reference."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sft, kto = (load_file(chain / f"out/{name}_adapter/adapter_model.safetensors") for name in ("sft", "kto"))
    assert sft.keys() == kto.keys()
    assert any(not torch.equal(sft[name], kto[name]) for name in sft)
    assert not (chain / "out/kto_adapter/ref").exists()
    base = AutoModelForCausalLM.from_pretrained(chain / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = base(ids).logits.detach().clone()
    assert (PeftModel.from_pretrained(base, chain / "out/kto_adapter")(ids).logits - plain).abs().max() > 1e-3


def test_lineage_names_the_sft_adapter_and_its_run(chain: Path) -> None:
    import mlflow

    sft, kto = manifest(chain / "out/sft_adapter"), manifest(chain / "out/kto_adapter")
    assert kto["stage"] == "kto"
    assert kto["parent"]["sha256"] == read_manifest(chain / "out/sft_adapter").sha256
    mlflow.set_tracking_uri(f"sqlite:///{chain}/mlflow.db")
    run = mlflow.get_run(kto["mlflow"]["run_id"])
    assert run.data.tags["mlflow.parentRunId"] == sft["mlflow"]["run_id"]
    assert {"train/kl", "validation/rewards/margins", "validation/answers/eos_rate"} <= set(run.data.metrics)


def test_resuming_a_finished_run_does_nothing(chain: Path) -> None:
    before = (chain / "out/kto_adapter/manifest.json").read_bytes()
    assert train(chain, flags=("--resume",)) == 0
    assert (chain / "out/kto_adapter/manifest.json").read_bytes() == before


def test_a_run_that_degenerates_ends_early_when_asked(chain: Path, tmp_path: Path, capsys) -> None:
    steps = {"max_steps": 12, "save_steps": 2, "eval_steps": 2, "lr_scheduler_type": "constant"}
    settings = ["kto.learning_rate=0.1", f"kto.trainer={json.dumps(steps)}", f"kto.output_dir={tmp_path}/out"]
    assert train(chain, *settings, "kto.stop_on_degeneration=true") == 0
    assert manifest(tmp_path / "out")["metrics"]["steps"] < 12
    assert "Lower kto.learning_rate or raise kto.beta." in capsys.readouterr().err


def test_dry_run_trains_nothing(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert train(chain, f"kto.output_dir={tmp_path}/out", flags=("--dry-run",)) == 0
    shown = capsys.readouterr().err
    assert "optimizer steps" in shown
    assert "--- thumb down >>>" in shown
    assert not any(tmp_path.iterdir())


# --- batches and weights


def row(prompt: int, answer: int, liked: bool = True, length: int = 3) -> RenderedFeedback:
    """Make a record of one repeated prompt token and one repeated answer token."""
    return RenderedFeedback([prompt] * 4 + [answer] * length, [-100] * 4 + [answer] * length, liked)


def test_mismatched_answers_are_the_batchs_own_and_of_other_prompts_where_there_are_such() -> None:
    rows = [
        row(prompt, 100 + number, length=3 + number % 5) for number, prompt in enumerate([1, 1, 2, 2, 3, 3, 4, 5, 6])
    ]
    for by_length in (True, False):
        found = in_batches(rows, 4, 7, by_length=by_length)
        assert sorted(each["completion_ids"][0] for each in found) == [answer for answer in range(100, 109)]
        for start in (0, 4):
            batch = found[start : start + 4]
            own, other = ([each[name][0] for each in batch] for name in ("completion_ids", "KL_completion_ids"))
            assert sorted(own) == sorted(other)
            prompt_of = {each["completion_ids"][0]: each["prompt_ids"] for each in batch}
            assert all(prompt_of[each["KL_completion_ids"][0]] != each["prompt_ids"] for each in batch)
        assert found[8]["KL_completion_ids"][0] == found[7]["completion_ids"][0], "a last record that is alone"
        assert max(len(each["prompt_ids"] + each["KL_completion_ids"]) for each in found) <= 11
    assert in_batches(rows, 4, 7, by_length=True) == in_batches(rows, 4, 7, by_length=True)
    assert in_batches(rows, 4, 7, by_length=False) != in_batches(rows, 4, 8, by_length=False)


@pytest.mark.parametrize("by_length", [True, False])
def test_a_side_without_records_makes_no_batch(by_length: bool) -> None:
    assert in_batches([], 4, 0, by_length=by_length) == []


def test_prompts_that_are_all_the_same_are_still_given_another_answer() -> None:
    found = in_batches([row(1, 100), row(1, 101)], 2, 0, by_length=True)
    assert all(each["KL_completion_ids"] != each["completion_ids"] for each in found)


@pytest.mark.parametrize(
    ("up", "down", "section", "wanted"),
    [
        (30, 30, Kto(), (1.0, 1.0)),
        (10, 40, Kto(), (4.0, 1.0)),
        (40, 10, Kto(), (1.0, 4.0)),
        (40, 10, Kto(desirable_weight=2.0), (2.0, 8.0)),
        (40, 10, Kto(undesirable_weight=2.0), (0.5, 2.0)),
        (40, 10, Kto(desirable_weight=1.0, undesirable_weight=1.0), (1.0, 1.0)),
    ],
)
def test_auto_lets_both_labels_weigh_the_same(up: int, down: int, section: Kto, wanted: tuple, caplog) -> None:
    found = balance(section, [row(1, 2)] * up + [row(1, 2, liked=False)] * down)

    assert (found["desirable_weight"], found["undesirable_weight"]) == pytest.approx(wanted)
    assert ("recommends 1 to 4/3" in caplog.text) == (wanted == (1.0, 1.0) and up != down)


# --- refusals

REFUSALS = {
    "no data": (["kto.dataset_path=null"], "kto.dataset_path: found null"),
    "a batch of one": (["kto.per_device_train_batch_size=1"], "kto.per_device_train_batch_size: found 1; wanted greater than 1"),
    "missing adapter": (["kto.init_from=nowhere/sft_adapter"], "no such folder"),
    "data without a report": (["deid.required=true"], "no such report"),
    "too long": (["kto.max_length=5"], "longer than kto.max_length"),
    "shuffled by TRL": (['kto.trainer={"train_sampling_strategy": "random"}'], "decided elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refuses(chain: Path, tmp_path: Path, capsys, overrides: list[str], message: str) -> None:
    assert train(chain, *overrides, f"kto.output_dir={tmp_path}/out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("label", "seen", "lacking"), [(True, "up", "down"), (False, "down", "up")])
@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_thumbs_that_all_point_one_way_are_one_clear_message(
    chain: Path, tmp_path: Path, capsys, label: bool, seen: str, lacking: str, flags: tuple[str, ...]
) -> None:
    path = write_jsonl(tmp_path / "all.jsonl", [{**each, "label": label} for each in kto_rows()])
    assert train(chain, f"kto.dataset_path={path}", f"kto.output_dir={tmp_path}/out", flags=flags) == 2
    said = capsys.readouterr().err
    assert f"training records have a thumb {seen}, but KTO learns from the difference" in said
    assert f"Add records with a thumb {lacking}." in said
    assert "Traceback" not in said


def test_bad_records_are_named_by_line(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [
        *kto_rows(1),
        {"prompt": "x", "completion": "y", "label": 5},
        {"prompt": "x", "completion": "", "label": True},
    ]
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    assert train(chain, f"kto.dataset_path={path}", f"kto.output_dir={tmp_path}/out") == 2
    message = capsys.readouterr().err
    assert f"{path}:6: label: found 5, wanted true or false" in message
    assert f"{path}:7: completion: is empty" in message


# --- the other stages take its adapter


def test_its_adapter_is_what_vllm_loads_and_our_server_names_it_kto(chain: Path) -> None:
    from serve.adapters import load_models

    adapter = chain / "out/kto_adapter"
    assert_vllm_loads(adapter, chain / "model")
    config = load_config(chain / "config.yaml", [f"serve.adapter_path={adapter}"])
    models = load_models(config.values, choose_machine(config.values))
    assert models.default == "kto"
    assert "kto" in models.served


def test_its_adapter_becomes_a_file_for_ollama(chain: Path, tmp_path: Path) -> None:
    flags = [
        "--adapter",
        str(chain / "out/kto_adapter"),
        "--format",
        "gguf",
        "--set",
        f"export.gguf_dir={tmp_path}/gguf",
    ]
    assert export_lora.main(["--config", str(chain / "config.yaml"), *flags]) == 0

    assert (tmp_path / "gguf/Modelfile").read_text(encoding="utf-8").startswith("FROM ./model-f16.gguf")
    assert "fine-tuned with KTO and merged" in (tmp_path / "gguf/README.md").read_text(encoding="utf-8")


def test_lm_eval_measures_it_on_records_of_sft_and_kto(chain: Path) -> None:
    from eval.lmeval.candidates import find_candidates, unseen_by

    candidates = find_candidates([str(chain / "out/kto_adapter")])
    assert [each.label for each in candidates] == ["kto"]
    assert unseen_by(candidates, load_config(chain / "config.yaml")) == ["sft", "kto"]


# --- an arm of the comparison


def test_kto_is_an_arm_where_its_adapter_is_there(chain: Path, tmp_path: Path, capsys) -> None:
    settings = ["--set", f"eval.output_dir={tmp_path}/c", "--set", f"dpo.output_dir={tmp_path}/none"]
    assert compare.main(["--config", str(chain / "config.yaml"), *settings]) == 0

    report = read_report(tmp_path / "c")
    assert list(report.models) == ["base", "sft", "kto"]
    assert (report.question.a, report.question.b) == ("kto", "sft")
    assert report.lineage["kto"]["reference"] == "sft"
    disliked = {each["prompt"] for each in kto_rows() if not each["label"]}
    samples = (tmp_path / "c/samples.jsonl").read_text(encoding="utf-8")
    assert not [prompt for prompt in disliked if f'"{prompt}"' in samples], "an answer that was not liked is no target"
    assert "rate " in samples


def test_a_chain_without_kto_is_planned_and_compared_as_before(chain: Path, capsys) -> None:
    """No warning of an adapter that nobody asked for, and a plan about DPO and SFT."""
    from eval.arms import find_arms

    without = load_config(chain / "config.yaml", ["kto.dataset_path=null", f"kto.output_dir={chain}/no_kto"])

    assert [arm.name for arm in find_arms(without)] == ["sft"]
    assert "kto" not in capsys.readouterr().err
    assert plan_sha256(without.values) == plan_sha256(without.values, ("dpo", "sft"))
    asked = load_config(chain / "config.yaml")
    assert plan_sha256(asked.values) == plan_sha256(asked.values, ("kto", "dpo"))
