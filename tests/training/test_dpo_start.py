"""What DPO starts from: the reference it says, on the very numbers that training uses, and nothing left to chance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts import train_dpo, train_sft
from scripts.common.errors import UserError
from scripts.training.dpo import PreferenceTrainer
from scripts.training.reference import prove_start
from tests.conftest import save_tiny_model, write_jsonl
from tests.support.chain import dpo_rows, manifest, write_chain
from tests.support.exporting import save_adapter
from tests.support.models import load
from tests.support.training import build_trainer

FRESH = ("dpo.init_from=null", "dpo.reference=base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, an SFT adapter, a configuration, and pairs whose rejected answers are the longer ones."""
    made = tmp_path_factory.mktemp("start")
    write_chain(made)
    save_adapter(made / "model", made / "out/sft_adapter")
    longer = [
        {**row, "rejected": " and ".join([row["rejected"]] * (2 + number % 3))} for number, row in enumerate(dpo_rows())
    ]
    write_jsonl(made / "dpo.jsonl", longer)
    return made


def columns(trainer) -> list[list[float]]:
    """Return what the reference said beforehand."""
    return [
        list(side[name])
        for side in (trainer.train_dataset, trainer.eval_dataset)
        for name in PreferenceTrainer.reference_columns
    ]


def plain_logps(model, pair: dict) -> list[float]:
    """Return the logps of both answers by a plain model, one unpadded sequence at a time."""
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        ids, answer = torch.tensor([pair["prompt_ids"] + pair[side]]), torch.tensor(pair[side])
        with torch.no_grad():
            log_probs = torch.log_softmax(model.eval()(ids).logits[0, len(pair["prompt_ids"]) - 1 : -1].float(), -1)
        found.append(float(log_probs.gather(-1, answer[:, None]).sum()))
    return found


# --- numbers computed beforehand


def test_ordinary_run_after_one_with_ld_alpha_starts_at_ln_2(folder: Path, tmp_path: Path) -> None:
    """ld_alpha weighs the end of the longer answer, so what the reference says under it is no other run's."""
    kept = f"dpo.output_dir={tmp_path}/out/dpo"
    weighed = build_trainer("dpo", folder / "config.yaml", tmp_path, [kept, 'dpo.trainer={"ld_alpha": 0.1}'])
    facts = prove_start(weighed)
    weighed.kept_logps.keep()
    ordinary = build_trainer("dpo", folder / "config.yaml", tmp_path, [kept])

    assert facts["step0_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert columns(weighed) != columns(ordinary)
    assert prove_start(ordinary)["step0_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert ordinary.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    "change",
    ['dpo.trainer={"ld_alpha": 0.5}', "dpo.reference=base", *(f"lora.init={init}" for init in ("pissa", "olora"))],
)
def test_what_changes_the_numbers_changes_what_they_are_kept_under(folder: Path, tmp_path: Path, change: str) -> None:
    fresh = FRESH if change.startswith("lora") else ()
    names = []
    for more in ((), (change,)):
        made = build_trainer("dpo", folder / "config.yaml", tmp_path, [f"dpo.output_dir={tmp_path}/d", *fresh, *more])
        names.append(set(made.kept_logps.unproven))

    assert len(names[0]) == len(names[1]) == 2, "training and held-out pairs"
    assert not names[0] & names[1]


def test_numbers_are_kept_only_once_they_are_proven(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """A start that is refused leaves nothing behind that a later run would take up."""
    import scripts.training.reference

    setting = ["--set", f"dpo.output_dir={tmp_path}/out/dpo"]
    with monkeypatch.context() as patched:
        patched.setattr(scripts.training.reference, "TOLERANCE", {torch.float32: -1.0})
        assert train_dpo.main(["--config", str(folder / "config.yaml"), *setting]) == 2
    assert not (tmp_path / "out/.reference_logps").exists()

    assert train_dpo.main(["--config", str(folder / "config.yaml"), *setting]) == 0
    assert len(list((tmp_path / "out/.reference_logps").iterdir())) == 2


@pytest.mark.parametrize("side", ["train", "validation"])
def test_start_is_proven_on_the_numbers_that_training_uses(folder: Path, tmp_path: Path, side: str) -> None:
    kept = [f"dpo.output_dir={tmp_path}/out/dpo"]
    first = build_trainer("dpo", folder / "config.yaml", tmp_path, kept)
    prove_start(first)
    first.kept_logps.keep()
    count = len(first.train_dataset if side == "train" else first.eval_dataset)
    for file in (tmp_path / "out/.reference_logps").iterdir():
        rows = json.loads(file.read_text(encoding="utf-8"))
        if len(rows) == count:
            file.write_text(json.dumps([[chosen + 0.1, rejected] for chosen, rejected in rows]), encoding="utf-8")

    with pytest.raises(UserError, match=r"not those it gives now.*Remove the folder .*\.reference_logps"):
        prove_start(build_trainer("dpo", folder / "config.yaml", tmp_path, kept))


def test_reference_that_is_asked_in_training_gives_the_same_loss(folder: Path, tmp_path: Path) -> None:
    losses = []
    for beforehand in (True, False):
        block = f"dpo.trainer={json.dumps({'precompute_ref_log_probs': beforehand, 'ld_alpha': 0.3})}"
        trainer = build_trainer("dpo", folder / "config.yaml", tmp_path, [f"dpo.output_dir={tmp_path}/d", block])
        assert (PreferenceTrainer.reference_columns[0] in trainer.train_dataset.column_names) == beforehand
        generator = torch.Generator().manual_seed(1)
        for name, value in trainer.model.named_parameters():
            if ".default." in name:
                value.data += 0.05 * torch.randn(value.shape, generator=generator)
        rows = [trainer.train_dataset[index] for index in (0, 5, 9)]
        loss = trainer.compute_loss(trainer.model.train(), trainer._prepare_inputs(trainer.data_collator(rows)))
        loss.backward()
        gradients = [value.grad for _, value in trainer.model.named_parameters() if value.grad is not None]
        losses.append((float(loss), gradients))

    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    assert abs(losses[0][0] - math.log(2)) > 1e-3
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(losses[0][1], losses[1][1], strict=True))


# --- a fresh adapter


@pytest.mark.parametrize(
    "lora",
    [
        *({"init": init} for init in ("default", "gaussian", "orthogonal", "pissa", "olora")),
        {"init": "pissa", "use_rslora": True},
        {"use_dora": True},
    ],
    ids=str,
)
def test_reference_of_a_fresh_adapter_is_the_plain_base(folder: Path, tmp_path: Path, lora: dict) -> None:
    """PiSSA and OLoRA move a part of the base into the adapter; without it the base is no longer the base."""
    settings = [*FRESH, *(f"lora.{name}={json.dumps(value)}" for name, value in lora.items())]
    trainer = build_trainer("dpo", folder / "config.yaml", tmp_path, [f"dpo.output_dir={tmp_path}/d", *settings])
    base = load(folder / "model")

    for row in (trainer.train_dataset[index] for index in (0, 7, 20)):
        assert [row[name] for name in PreferenceTrainer.reference_columns] == pytest.approx(
            plain_logps(base, row), abs=2e-3
        )
    facts = prove_start(trainer)
    assert facts["step0_margin"] < 1e-4
    assert facts["step0_loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapter_that_moved_the_base_is_saved_for_the_plain_base_and_continues_in_dpo(
    folder: Path, tmp_path: Path, init: str
) -> None:
    """SFT and DPO from it, and DPO without SFT: what is saved has on the plain base the held-out loss that was measured."""
    config, moved = str(folder / "config.yaml"), ["--set", f"lora.init={init}"]
    outputs = ["--set", f"sft.output_dir={tmp_path}/sft", "--set", f"dpo.output_dir={tmp_path}/dpo"]
    assert train_sft.main(["--config", config, *outputs, *moved]) == 0
    assert train_dpo.main(["--config", config, *outputs, *moved, "--set", f"dpo.init_from={tmp_path}/sft"]) == 0
    fresh = ["--set", f"dpo.output_dir={tmp_path}/fresh", *(part for item in FRESH for part in ("--set", item))]
    assert train_dpo.main(["--config", config, *moved, *fresh]) == 0

    for name, ranks in (("sft", 32), ("dpo", 32), ("fresh", 32)):
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert {value.shape[0] for key, value in tensors.items() if "lora_A" in key} == {ranks}
    for start, trained in ((f"{tmp_path}/sft", "dpo"), (None, "fresh")):
        again = [f"dpo.init_from={tmp_path}/{trained}", f"dpo.output_dir={tmp_path}/again", "dpo.reference=sft"]
        policy = build_trainer("dpo", folder / "config.yaml", tmp_path / "run", again)
        before = [f"dpo.init_from={start}", f"dpo.output_dir={tmp_path}/before"] if start else [*FRESH, f"dpo.output_dir={tmp_path}/before"]  # fmt: skip
        reference = build_trainer("dpo", folder / "config.yaml", tmp_path / "run", before)
        margins = torch.tensor(
            [
                0.1
                * (p["ref_chosen_logps"] - r["ref_chosen_logps"] - p["ref_rejected_logps"] + r["ref_rejected_logps"])
                for p, r in zip(policy.eval_dataset, reference.eval_dataset, strict=True)
            ]
        )
        loss = float(-torch.nn.functional.logsigmoid(margins).mean())
        assert loss == pytest.approx(manifest(tmp_path / trained)["metrics"]["held_out_loss"], abs=2e-4)


def test_what_an_earlier_run_moved_out_of_its_base_is_forgotten(folder: Path, tmp_path: Path) -> None:
    config, out = str(folder / "config.yaml"), ["--set", f"sft.output_dir={tmp_path}/sft"]
    assert train_sft.main(["--config", config, *out, "--set", "lora.init=pissa"]) == 0
    assert train_sft.main(["--config", config, *out]) == 0
    assert json.loads((tmp_path / "sft/adapter_config.json").read_text(encoding="utf-8"))["r"] == 16


@pytest.mark.parametrize("main", [train_sft.main, train_dpo.main])
@pytest.mark.parametrize(
    "beside", ["lora.use_dora=true", "quantization.load_in_4bit=true", "quantization.load_in_8bit=true"]
)
def test_moving_a_base_that_cannot_be_moved_is_refused_at_once(folder: Path, capsys, main, beside: str) -> None:
    settings = [part for item in ("lora.init=olora", beside, *FRESH) for part in ("--set", item)]

    assert main(["--config", str(folder / "config.yaml"), *settings, "--dry-run"]) == 2
    assert "lora.init: found olora, which moves a part of the base's weights" in capsys.readouterr().err


# --- dropout

DROPPING: dict[str, dict] = {
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.3, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"attn_pdrop": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3},
    "gpt_neo": {
        "attention_dropout": 0.3,
        "embed_dropout": 0.3,
        "resid_dropout": 0.3,
        "attention_types": [[["global"], 2]],
    },
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "stablelm": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "starcoder2": {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3},
    "mixtral": {"router_jitter_noise": 0.3, "attention_dropout": 0.3, "num_local_experts": 4},
    "llama": {"attention_dropout": 0.3},
}


@pytest.fixture(scope="module", params=DROPPING)
def dropping(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a configuration whose base leaves things to chance while it trains."""
    made = tmp_path_factory.mktemp(request.param)
    save_tiny_model(made / "model", request.param, **DROPPING[request.param])
    write_chain(made)
    return made / "config.yaml"


@pytest.mark.parametrize("fast_path", ["true", "false"])
def test_dpo_leaves_nothing_to_chance(dropping: Path, tmp_path: Path, fast_path: str) -> None:
    settings = [*FRESH, f"dpo.output_dir={tmp_path}/d", f"performance.fast_path={fast_path}"]
    trainer = build_trainer("dpo", dropping, tmp_path, [*settings, 'dpo.trainer={"precompute_ref_log_probs": false}'])
    trainer.aux_loss_enabled = False  # the routers' loss of a mixture comes on top
    rows = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index] for index in range(3)]))

    trained, again = (float(trainer.compute_loss(trainer.model.train(), dict(rows))) for _ in range(2))
    with torch.no_grad():
        evaluated = float(trainer.compute_loss(trainer.model.eval(), dict(rows)))

    assert trained == again == pytest.approx(math.log(2), abs=1e-5)
    assert evaluated == pytest.approx(trained, abs=1e-5)


@pytest.mark.parametrize("fast_path", ["true", "false"])
def test_sft_keeps_the_base_s_own_dropout_and_says_so(dropping: Path, tmp_path: Path, fast_path: str, caplog) -> None:
    caplog.set_level("INFO")
    trainer = build_trainer("sft", dropping, tmp_path, [f"performance.fast_path={fast_path}"])
    rows = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index] for index in range(3)]))

    one, other = (float(trainer.compute_loss(trainer.model.train(), dict(rows))) for _ in range(2))

    assert one != other
    assert "the base's own dropout is on" in caplog.text
    assert " 0.3" in caplog.text
