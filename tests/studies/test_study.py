"""A study for real: two seeds of two variants on a tiny model, stopped, killed and continued to the same report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest

from scripts import study
from scripts.common.artifacts import locked_run_dir, read_manifest, sha256_file
from tests.conftest import ROOT, write_jsonl
from tests.support.chain import dpo_rows, manifest, wait_for, write_chain
from tests.support.pairs import CHECKS, manifest_of, write_pairs_chain
from tests.support.studies import run_forked

VARY = ["--vary", "dpo.beta=0.05,0.2"]
BETAS = ("beta-0.05", "beta-0.2")


def write_study(folder: Path, store: Path) -> Path:
    """Write the configuration of a study as small as can be, with a rule that answers keep or break."""
    shutil.copy(store, folder / "mlflow.db")
    return write_chain(
        folder,
        study={"output_dir": str(folder / "study"), "seeds": 2},
        tracking={"log_adapter": False},
        eval={"max_new_tokens": 4, "max_prompts": 6},
    )


def start(config: Path, *flags: str) -> subprocess.Popen[str]:
    """Start a study as a user does."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/study.py"), "--config", str(config), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def result_of(folder: Path) -> dict[str, Any]:
    """Read what a study found."""
    return json.loads((folder / "study/study.json").read_text())["result"]


def figures_of(report: Path) -> dict[str, Any]:
    """Read the figures of a report and what it concludes, without dates and paths."""
    content = json.loads(report.read_text())
    return {key: content[key] for key in ("verdict", "models", "question", "metrics")}


def weights_of(folder: Path) -> dict[str, str]:
    """Return the hash of the weights of every adapter of a study."""
    made = (folder / "study").glob("seed-*/*/adapter_model.safetensors")
    return {path.parent.relative_to(folder).as_posix(): sha256_file(path) for path in made}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """Return the folder of a study that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_study(folder, empty_store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "run_stage", run_forked)
        assert study.main(["--config", str(config), *VARY]) == 0
    return folder


@pytest.fixture
def again(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that continues a copy of the whole study, which lies in the test's folder."""
    monkeypatch.setattr(study, "run_stage", run_forked)
    shutil.copytree(whole / "study", tmp_path / "study")
    command = ["--config", str(whole / "config.yaml"), "--set", f"study.output_dir={tmp_path}/study", *VARY]
    return lambda *flags: study.main([*command, *flags])


def block(folder: Path) -> None:
    """Put something where a run would put its adapter, so that it fails."""
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("not an adapter")


@pytest.mark.slow
def test_a_study_that_is_stopped_and_killed_continues_to_the_same_report(
    whole: Path, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = write_study(tmp_path, empty_store), tmp_path / "study"

    first = start(config, *VARY)
    wait_for(out / "seed-0/sft_adapter.run/state.json", first)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM, first.communicate()[0]
    second = start(config, *VARY)
    wait_for(out / "seed-0/dpo_adapter_beta-0.05.run/state.json", second)
    second.kill()  # the stage that it runs lives on; the next study waits for it
    second.wait()
    monkeypatch.setattr(study, "run_stage", run_forked)

    assert study.main(["--config", str(config), *VARY]) == 0

    assert len(weights_of(whole)) == 6
    assert weights_of(tmp_path) == weights_of(whole)
    assert result_of(tmp_path) == result_of(whole)
    for name in ("validation", "comparison"):
        assert figures_of(out / name / "report.json") == figures_of(whole / "study" / name / "report.json")
    assert manifest(out)["stage"] == "study"


def test_the_report_is_about_the_variant_that_validation_chose(whole: Path) -> None:
    found = result_of(whole)
    ranking, report = (
        json.loads((whole / "study" / name / "report.json").read_text()) for name in ("validation", "comparison")
    )

    assert (ranking["side"], ranking["models"]) == ("validation", ["base", *BETAS])
    assert (report["side"], report["models"]) == ("test", ["base", "sft", "dpo"])
    (metric,) = [metric for metric in ranking["metrics"] if metric["name"] == found["measure"]]
    values = {variant["name"]: variant["value"] for variant in found["variants"]}
    assert values == {name: metric["models"][name]["value"] for name in BETAS}
    assert found["chosen"] == max(values, key=values.__getitem__)
    assert found["seeds"] == report["arms"]["dpo"]["seeds"] == report["arms"]["sft"]["seeds"] == [0, 1]
    assert [Path(folder).name for folder in report["arms"]["dpo"]["folders"]] == [f"dpo_adapter_{found['chosen']}"] * 2
    assert any(
        f"the variant {found['chosen']}, the best of 2 on the validation side" in note for note in report["notes"]
    )


def test_seeds_make_other_adapters_on_the_same_split(whole: Path) -> None:
    made = [manifest(whole / f"study/seed-{seed}/sft_adapter") for seed in (0, 1)]

    assert [one["config"]["seed"] for one in made] == [0, 1]
    assert made[0]["files"]["adapter_model.safetensors"] != made[1]["files"]["adapter_model.safetensors"]
    assert made[0]["split"] == made[1]["split"]
    assert made[0]["datasets"] == made[1]["datasets"]


def test_what_the_reference_says_is_asked_once_for_all_variants_of_a_seed(whole: Path) -> None:
    for seed in (0, 1):
        first, second = (whole / f"study/seed-{seed}/dpo_adapter_{name}.log" for name in BETAS)
        assert "is taken from" not in first.read_text()
        assert second.read_text().count("is taken from") == 2  # training and held-out pairs
        assert "reference equals the starting policy" in second.read_text()


def test_every_run_stands_below_that_of_the_study(whole: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{whole}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "llm-finetune-sft-dpo"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags["stage"] == "study"]
    stages = sorted(
        run.data.tags["stage"] for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    )

    assert stages == ["comparison"] * 2 + ["dpo"] * 4 + ["sft"] * 2
    assert parent.info.status == "FINISHED"
    assert parent.info.run_id == manifest(whole / "study")["mlflow"]["run_id"]
    assert parent.data.tags["chosen"] == result_of(whole)["chosen"]
    ranking = parent.data.tags["mlflow.note.content"].splitlines()
    assert f"Chosen: {result_of(whole)['chosen']}." in ranking[0]
    assert [line[2:].partition(":")[0] for line in ranking[2:]] == [one["name"] for one in result_of(whole)["variants"]]
    assert not [name for name in parent.data.metrics if not name.startswith("system/")], "charts of one bar"


def test_the_folder_proves_itself_like_that_of_any_stage(whole: Path) -> None:
    found = read_manifest(whole / "study", stages=("study",))

    assert {
        "study.json",
        "comparison/report.html",
        "comparison/manifest.json",
        "seed-1/sft_adapter/manifest.json",
    } <= set(found.files)
    assert found.metrics["chosen"] == result_of(whole)["chosen"]


def test_a_finished_study_is_not_made_again(again: Callable[..., int], tmp_path: Path) -> None:
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*/manifest.json")}

    assert again() == 0

    assert len(made) == 8
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert result_of(tmp_path)["seeds"] == [0, 1]


def test_a_run_that_fails_is_named_the_rest_continues_and_the_same_command_tries_it_again(
    again: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    block(out / "seed-2/dpo_adapter_beta-0.05")

    assert again("--seeds", "0,2,1") == 1

    said = capsys.readouterr().err
    assert "seed-2/dpo_adapter_beta-0.05: exit code 2" in said
    assert "is not a folder of stage `dpo`" in said
    assert str(out / "seed-2/dpo_adapter_beta-0.05.log") in said
    assert read_manifest(out / "seed-2/dpo_adapter_beta-0.2", stages=("dpo",))
    found = result_of(tmp_path)
    assert found["seeds"] == [0, 1]
    assert found["missing"] == ["seed-2/dpo_adapter_beta-0.05: exit code 2"]
    report = json.loads((out / "comparison/report.json").read_text())
    assert any("Missing in this study: seed-2/dpo_adapter_beta-0.05" in note for note in report["notes"])

    shutil.rmtree(out / "seed-2/dpo_adapter_beta-0.05")
    assert again("--seeds", "0,2,1") == 0
    assert result_of(tmp_path)["seeds"] == [0, 2, 1]


def test_without_its_sft_adapter_nothing_of_a_seed_is_trained(
    again: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block(tmp_path / "study/seed-2/sft_adapter")

    assert again("--seeds", "3") == 1

    assert "seed-2/dpo_adapter_beta-0.2: not trained, because seed-2/sft_adapter failed" in capsys.readouterr().err
    assert result_of(tmp_path)["seeds"] == [0, 1]
    assert [reason.partition(":")[0] for reason in result_of(tmp_path)["missing"]] == [
        "seed-2/sft_adapter", "seed-2/dpo_adapter_beta-0.05", "seed-2/dpo_adapter_beta-0.2",
    ]  # fmt: skip


def test_a_study_without_a_whole_seed_says_so_and_keeps_what_there_is(
    again: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block(tmp_path / "study/seed-7/sft_adapter")

    assert again("--seeds", "[7]") == 2

    assert "no seed has all its adapters" in capsys.readouterr().err
    assert not (tmp_path / "study/manifest.json").exists()
    assert read_manifest(tmp_path / "study/seed-0/sft_adapter")


def test_two_studies_in_one_folder_exclude_each_other(
    again: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked_run_dir(tmp_path / "study"):
        assert again() == 2

    assert "another process is writing it" in capsys.readouterr().err


def test_a_variant_with_a_long_name_has_a_short_one_in_the_comparison() -> None:
    assert study.arm_name("beta-0.05_loss_type-ipo", 2) == "beta-0.05_loss_type-ipo"
    assert study.arm_name("beta-0.05_loss_type-ipo_learning_rate-0.0001", 2) == "variant 2"


# --- several arms, on pairs that each seed makes

ARMS = ["dpo", "dpo_demonstrations", "dpo_checks", "kto_checks"]


def write_study_of_arms(folder: Path, store: Path) -> Path:
    """Write the configuration of a study whose arms train on their own adapter's answers, and KTO under two betas."""
    shutil.copy(store, folder / "mlflow.db")
    config = write_pairs_chain(
        folder,
        study={"output_dir": str(folder / "study"), "seeds": 2, "arms": ARMS},
        tracking={"log_adapter": False},
        eval={"checks": CHECKS, "max_new_tokens": 8, "max_prompts": 6},
        kto={"init_from": str(folder / "out/sft_adapter"), "output_dir": str(folder / "out/kto_adapter"), "max_length": 200,
             "learning_rate": 2e-3, "trainer": {"max_steps": 4}},
    )  # fmt: skip
    write_jsonl(folder / "dpo.jsonl", dpo_rows())
    return config


@pytest.mark.slow
def test_a_study_of_arms_that_is_killed_continues_to_the_same_report(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every seed samples its own adapter once, and trains DPO and KTO on what is preferred among these answers."""
    vary = ["--vary", "kto.beta=0.1,0.3"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, config = (write_study_of_arms(tmp_path / name, empty_store) for name in ("whole", "killed"))
    out = tmp_path / "killed/study"
    process = start(config, *vary)
    wait_for(out / "seed-0/pairs_demonstrations.jsonl.run", process)
    process.kill()  # the stage that it runs lives on; the next study waits for it
    process.wait()
    process = start(config, *vary)
    wait_for(out / "seed-1/kto_adapter_checks_beta-0.1.run/state.json", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, process.communicate()[0]
    monkeypatch.setattr(study, "run_stage", run_forked)

    for path in (whole, config):
        assert study.main(["--config", str(path), *vary]) == 0

    made = weights_of(tmp_path / "whole")
    assert len(made) == 2 * (1 + 3 + 2)
    assert weights_of(tmp_path / "killed") == made
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "whole")
    for seed in (0, 1):
        for by in ("demonstrations", "checks"):
            ours, theirs = (tmp_path / name / f"study/seed-{seed}/pairs_{by}.jsonl" for name in ("killed", "whole"))
            assert ours.read_bytes() == theirs.read_bytes()
            answered = read_manifest(theirs.parent / "sft_adapter").sha256
            assert manifest_of(theirs).parent.sha256 == answered
        assert "sampled already" in (out / f"seed-{seed}/pairs_checks.jsonl.log").read_text()
        kto = manifest(out / f"seed-{seed}/kto_adapter_checks_beta-0.3")
        assert kto["datasets"][0]["sha256"] == sha256_file(out / f"seed-{seed}/pairs_checks.jsonl")
        assert kto["metrics"]["thumbs_up"] == kto["metrics"]["thumbs_down"]
    assert figures_of(out / "comparison/report.json") == figures_of(tmp_path / "whole/study/comparison/report.json")
    report = json.loads((out / "comparison/report.json").read_text())
    assert report["models"] == ["base", "sft", *ARMS]
    assert (report["question"]["a"], report["question"]["b"], report["question"]["planned"]) == ("kto_checks", "dpo_checks", True)  # fmt: skip
    ranking = json.loads((out / "validation/report.json").read_text())
    assert ranking["models"] == ["base", "kto_checks beta-0.1", "kto_checks beta-0.3"]
    chosen = result_of(tmp_path / "killed")["chosen"].split(", ")
    assert chosen[:3] == ARMS[:3]
    assert chosen[3] in ranking["models"]
    notes = "\n".join(report["notes"])
    assert "dpo_checks is DPO on pairs of the answers that each seed's SFT adapter gave" in notes
    assert f"kto_checks is the variant {chosen[3].split()[1]}, the best of 2" in notes
    assert "mean its own data?" not in notes

    # An adapter that is made again makes the pairs of its answers, and what was trained on them, again.
    shutil.rmtree(out / "seed-1/sft_adapter")
    assert study.main(["--config", str(config), "--set", "tracking.log_adapter=true", *vary]) == 0
    assert weights_of(tmp_path / "killed") == made


# --- what is said before anything is trained


@pytest.fixture
def config(tmp_path: Path, write_config: Callable[..., Path]) -> str:
    """Return the path of a configuration without a model, in the working folder."""
    write_jsonl(tmp_path / "pairs.jsonl", dpo_rows())
    return str(
        write_config(dpo={"dataset_path": "pairs.jsonl", "beta": 0.1}, study={"output_dir": "mine", "seeds": [3, 1]})
    )


def test_dry_run_lists_the_runs_and_writes_nothing(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.rglob("*"))

    assert study.main(["--config", config, "--set", "dpo.reference=sft", "--dry-run"]) == 0

    said = capsys.readouterr().err
    assert "mine: 4 runs of training, 4 of them left, and 1 of comparison: time left not known yet" in said
    assert [line.split()[-1] for line in said.splitlines() if "to train" in line] == [
        "seed-3/sft_adapter", "seed-3/dpo_adapter", "seed-1/sft_adapter", "seed-1/dpo_adapter",
    ]  # fmt: skip
    assert "2 seeds: shows a difference between these adapters of two seeds of" in said
    assert set(tmp_path.rglob("*")) == before


def test_dry_run_of_an_earlier_study_knows_what_is_left_and_how_long_it_takes(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main(["--config", str(whole / "config.yaml"), *VARY, "--seeds", "3", "--dry-run"]) == 0

    said = capsys.readouterr().err
    assert "9 runs of training, 3 of them left, and 2 of comparison: about" in said
    assert "finished  seed-1/dpo_adapter_beta-0.2" in said
    assert "to train  seed-2/sft_adapter" in said


def test_flags_decide_seeds_and_variants(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["--vary", "dpo.beta=1,2,3,4,5", "--vary", "lora.r=1,2,3"]

    assert study.main(["--config", config, "--set", "seed=5", "--seeds", "2", *grid, "--yes", "--dry-run"]) == 0

    said = capsys.readouterr().err
    assert "mine: 36 runs of training" in said
    assert "seed-6/dpo_adapter_beta-5.0_r-3" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seeds", ""], '--seeds: study.seeds: found ""; wanted a whole number or a list'),
        (["--seeds", "0"], "--seeds: study.seeds: found 0; wanted greater than 0"),
        (["--seeds", "two"], '--seeds: study.seeds: found "two"; wanted a whole number or a list'),
        (["--seeds", "[]"], "--seeds: study.seeds: found []; wanted"),
        (["--seeds", "1,2,1"], "--seeds: study.seeds: found [1, 2, 1]; wanted"),
        (["--seeds", "1,,2"], '--seeds: study.seeds: found "[1,,2]"; wanted'),
        (["--seeds", "1,-2"], "--seeds: study.seeds.1: found -2; wanted"),
        (["--vary", "dpo.bta=1,2"], "--vary: dpo.bta: unknown key; did you mean `dpo.beta`?"),
        (["--vary", "dpo.beta=1,2,3,4,5,6,7,8,9,10,11,12,13"], "13 variants, each trained under every seed"),
        (["--set", "dpo.beta=null"], "dpo.beta: missing"),
        (["--set", "dpo.dataset_path=none.jsonl"], "dpo.dataset_path: "),
        (["--set", "dpo.init_from=other"], "dpo.init_from: found other, but in a study"),
        (["--set", "data.validation_ratio=0", "--vary", "dpo.beta=1,2"], "ranked on the validation side"),
        (["--set", "base_model_id=./none"], "./none"),
        (["--set", "data.test_ratio=0"], "data.test_ratio: found 0, but a study reports on the test side"),
        (["--set", "eval.plan.question=[mild,strong]"], "eval.plan.question"),
        (["--set", "eval.plan.question=[kto,sft]"], "found kto, sft, but this study compares base, sft, dpo"),
        (["--set", "study.arms=[dpo_votes]"], "study.arms"),
        (["--set", "study.arms=[dpo,dpo]"], "study.arms: found [\"dpo\", \"dpo\"]; wanted each of them once"),
        (["--set", "study.arms=[kto]"], "kto.dataset_path: found null"),
        (["--set", "study.arms=[dpo,kto_checks]"], "eval.checks: there is no rule"),
        (["--set", "study.arms=[dpo_judge]"], "eval.judge: an endpoint needs base_url and model"),
        (["--set", "study.arms=[kto_demonstrations]", "--set", "kto.init_from=other"], "in a study KTO continues the SFT adapter"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_before_anything_is_trained(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert study.main(["--config", config, *flags]) == 2

    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert not (tmp_path / "mine").exists()
