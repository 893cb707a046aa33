"""The comparison: what was held out, what was measured, and a verdict that does not see what is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from eval import compare
from eval.arms import Member, find_arms, members_of
from eval.figures import spoken
from eval.held_out import HeldOut, read_held_out
from eval.measuring import Loaded, Prepared, load_models, measure_models
from eval.report import Report, read_report
from scripts import train_dpo, train_sft
from scripts.common.artifacts import read_manifest
from scripts.common.config import load_config
from scripts.common.schema import Data
from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.records import parse_record
from scripts.model.adapter import load_adapter
from scripts.model.base import load_base, load_tokenizer
from tests.conftest import save_tiny_model, write_jsonl
from tests.support.chain import manifest, write_chain
from tests.support.exporting import save_adapter
from tests.support.manifests import change_manifest
from tests.support.models import CPU
from tests.support.stops import FAMILIES, change_generation_config, save_family_model

CHECKS = [{"name": "says it is", "must_contain": ["it is"]}, {"name": "short", "max_words": 6}]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a pair of adapters and compare them once."""
    folder = tmp_path_factory.mktemp("compare")
    config = str(write_chain(folder, eval={"checks": CHECKS}))
    assert train_sft.main(["--config", config]) == 0
    assert train_dpo.main(["--config", config]) == 0
    assert compare.main(["--config", config]) == 0
    return folder


@pytest.fixture(scope="module")
def report(compared: Path) -> Report:
    """Return the report as it was written."""
    return read_report(compared / "out/comparison")


def test_every_metric_has_intervals_around_its_value(report: Report) -> None:
    assert {metric.name for metric in report.metrics} >= {
        "held_out_loss",
        "preference_accuracy",
        "reward_accuracy",
        "checks_passed",
    }
    for metric in report.metrics:
        for estimate in (*metric.models.values(), *metric.differences, *metric.baselines.values()):
            if estimate.ci_low is not None:
                assert estimate.ci_low <= estimate.value <= estimate.ci_high, metric.name


def test_the_verdict_is_words_and_an_outcome(report: Report) -> None:
    assert report.verdict.outcome in ("better", "worse", "undecided")
    assert report.verdict.compared == ["dpo", "sft"]
    assert report.verdict.text.endswith(".")


def test_held_out_prompts_were_trained_on_by_no_stage(compared: Path, report: Report) -> None:
    from scripts.dataset.records import load_datasets, parse_preference, parse_record
    from scripts.dataset.split import side_of

    values = load_config(compared / "config.yaml").values
    trained = set()
    for path, parse in ((values.sft.dataset_path, parse_record), (values.dpo.dataset_path, parse_preference)):
        for file in load_datasets(path, parse, values.data, "x"):
            trained |= {r.prompt[-1]["content"] for r in file.records if side_of(r, values.data) != "test"}
    samples = [json.loads(line) for line in (compared / "out/comparison/samples.jsonl").read_text().split("\n") if line]
    assert len(samples) == report.metrics[0].n > 5
    assert not trained & {sample["prompt"] for sample in samples}


def test_the_folder_is_a_finished_artifact_below_the_dpo_adapter(compared: Path) -> None:
    import mlflow

    facts = manifest(compared / "out/comparison")
    assert facts["stage"] == "comparison"
    assert {"report.html", "report.json", "samples.jsonl"} <= set(facts["files"])
    mlflow.set_tracking_uri(f"sqlite:///{compared}/mlflow.db")
    run = mlflow.get_run(facts["mlflow"]["run_id"])
    assert run.data.tags["mlflow.parentRunId"] == manifest(compared / "out/dpo_adapter")["mlflow"]["run_id"]
    assert not [name for name in run.data.metrics if not name.startswith("system/")], "charts of one bar"
    report = read_report(compared / "out/comparison")
    asked = next(metric for metric in report.metrics if metric.primary)
    assert float(run.data.tags[f"summary.{compare.told(asked)}.dpo"]) == pytest.approx(
        asked.models["dpo"].value, rel=1e-5
    )
    verdict, _, table = run.data.tags["mlflow.note.content"].partition("\n\n")
    assert verdict == report.verdict.text
    fence, header, *rows, end = table.splitlines()
    assert (fence, header.split(), end) == ("```", ["held", "out", "n", "base", "sft", "dpo"], "```")
    assert len(rows) == len(report.metrics)
    assert {len(row) for row in rows} == {len(header)}
    assert "\xa0" not in table, "MLflow would show its name"
    loss = next(metric for metric in report.metrics if metric.name == "held_out_loss")
    assert any(
        spoken(loss.models["dpo"].value, loss.unit).replace("\xa0", " ") in row
        for row in rows
        if row.startswith(loss.title)
    )


def test_a_dry_run_checks_the_arms_and_says_what_they_can_show(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = ["--config", str(compared / "config.yaml"), "--set", f"eval.output_dir={tmp_path}/other", "--dry-run"]

    assert compare.main(config) == 0

    said = capsys.readouterr().err
    assert f"dpo: {compared}/out/dpo_adapter (seed 0)" in said
    assert "the question: dpo against sft in all_rules and preference_accuracy; planned before training" in said
    assert "all_rules: " in said
    assert "1 seed: shows a difference between these two adapters of" in said
    assert not any(tmp_path.iterdir()), "nothing is measured or counted as a look"
    assert compare.main([*config, "--models", f"a={tmp_path}/none"]) == 2


def adapter_of(stage: str, compared: Path) -> Member:
    """Return one of the chain's adapters, as the comparison finds it."""
    found = {member.label: member for member in members_of(find_arms(load_config(compared / "config.yaml")))}
    return found[stage]


def test_held_out_loss_of_the_report_equals_that_of_training(compared: Path) -> None:
    """What train_sft measured on its validation side is what the comparison measures on the same records."""
    values = load_config(compared / "config.yaml").values
    tokenizer = load_tokenizer(compared / "model")
    held_out = read_held_out(load_config(compared / "config.yaml"), ["sft"], "validation")
    prepared = Prepared(tokenizer, held_out, values)
    sft = adapter_of("sft", compared)
    loaded = load_models(compared / "model", [sft], values)
    chats = dict.fromkeys(("base", "sft"), ChatFormat.of(tokenizer, sft.manifest))
    result = measure_models(loaded, {"base": {}, "sft": {}}, prepared, chats)
    metrics = manifest(compared / "out/sft_adapter")["metrics"]
    for name, key in (("base", "held_out_loss_before"), ("sft", "held_out_loss")):
        scores = result[name].targets
        loss = -sum(score.logps for score in scores) / sum(score.tokens for score in scores)
        assert loss == pytest.approx(metrics[key], abs=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_model_that_always_says_a_stop_is_measured_as_ending_at_once(name: str, tmp_path: Path) -> None:
    """Nor does a minimum length that the base recommends change it."""
    family = FAMILIES[name]
    config = load_config(write_chain(tmp_path)).values
    for stop in sorted(family.stops):
        folder = save_family_model(tmp_path / stop.strip("<|>"), family, stop)
        change_generation_config(folder, min_new_tokens=3, repetition_penalty=1.5)
        adapter = save_adapter(folder, folder / "sft", strength=0.001)
        tokenizer = load_tokenizer(folder)
        model = load_adapter(load_base(folder, config, CPU), adapter, name="sft")
        prompt = user_turn("hello")
        record = parse_record({"messages": [*prompt, {"role": "assistant", "content": "a"}]}, "x:1", Data())
        held_out = HeldOut((record,))
        chats = dict.fromkeys(("base", "sft"), ChatFormat(tokenizer))
        loaded = Loaded(model, {"base": None, "sft": "sft"})
        measured = measure_models(loaded, {"base": {}, "sft": {}}, Prepared(tokenizer, held_out, config), chats)
        assert [each.health.eos_rate for each in measured.values()] == [1, 1], stop
        assert [answer.token_ids for each in measured.values() for answer in each.answers] == [[], []]


def test_the_same_adapter_twice_gives_exactly_zero(compared: Path, tmp_path: Path) -> None:
    """One adapter under two names differs in nothing, and the verdict says that no difference can be shown."""
    sft = compared / "out/sft_adapter"
    found = run_compare(compared, tmp_path, "--models", f"one={sft}", f"two={sft}")
    for metric in found.metrics:
        [difference] = [d for d in metric.differences if {d.a, d.b} == {"one", "two"}]
        assert difference.value == 0
        assert difference.p_value == 1
    assert found.verdict.outcome == "undecided"
    assert found.samples[0].changed == 0


def run_compare(compared: Path, folder: Path, *arguments: str, settings: Sequence[str] = ()) -> Report:
    """Compare with these arguments into a folder, and return the report."""
    shorter = ["eval.max_prompts=2", "eval.max_new_tokens=4", *settings, f"eval.output_dir={folder}/comparison"]
    flags = [part for item in shorter for part in ("--set", item)]
    assert compare.main(["--config", str(compared / "config.yaml"), *flags, *arguments]) == 0
    return read_report(folder / "comparison")


def test_arms_that_read_prompts_differently_are_measured_each_in_its_way_and_marked(
    compared: Path, tmp_path: Path
) -> None:
    other = tmp_path / "dpo_adapter"
    shutil.copytree(compared / "out/dpo_adapter", other)
    change_manifest(other, system_prompt="Be brief.", template_date="2026-01-31")
    settings = [f"dpo.output_dir={other}", f"eval.output_dir={tmp_path}/comparison", "eval.max_prompts=2"]
    config = ["--config", str(compared / "config.yaml"), *(part for item in settings for part in ("--set", item))]

    assert compare.main(config) == 0

    [note] = [note for note in read_report(tmp_path / "comparison").notes if "read the same prompt differently" in note]
    assert "sft and dpo" in note
    assert "system_prompt: None and 'Be brief.'" in note
    assert "template_date: None and '2026-01-31'" in note
    loaded = load_config(compared / "config.yaml")
    tokenizer = load_tokenizer(compared / "model")
    prepared = Prepared(tokenizer, read_held_out(loaded, ["sft"]), loaded.values)
    manifests = [adapter_of("sft", compared).manifest, read_manifest(other)]
    plain, brief = (prepared.items(ChatFormat.of(tokenizer, made)) for made in manifests)
    assert ["Be brief." in tokenizer.decode(items.prompts[0]) for items in (plain, brief)] == [False, True]


def test_held_out_records_that_training_set_aside_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of a base with a table of positions: one record is longer than it, others leave no room for a whole answer."""
    save_tiny_model(tmp_path / "model", "gpt2", n_positions=128)
    config = write_chain(tmp_path)
    rows = [{"instruction": f"say {n} " + "la " * (120 if n % 5 == 3 else 30), "output": "yes"} for n in range(24)]
    write_jsonl(tmp_path / "sft.jsonl", rows)
    settings = ["sft.trainer.max_steps=2", "data.test_ratio=0.7", "eval.max_new_tokens=90"]
    common = ["--config", str(config), *(part for item in settings for part in ("--set", item))]
    assert train_sft.main([*common, "--set", "data.on_bad_row=skip"]) == 0

    assert compare.main(common) == 2
    assert "tokens, and the base has 128 positions" in capsys.readouterr().err
    assert compare.main([*common, "--set", "data.on_bad_row=skip"]) == 0
    report = read_report(tmp_path / "out/comparison")
    assert 0 < len(report.samples) < 24
    assert all(health["mean_tokens"] <= 90 for health in report.health.values())


def test_refuses_adapters_of_another_split(compared: Path, capsys: pytest.CaptureFixture) -> None:
    assert compare.main(["--config", str(compared / "config.yaml"), "--set", "data.split_seed=5"]) == 2
    assert "may have seen" in capsys.readouterr().err


def test_refuses_an_adapter_of_another_base_before_anything_is_measured(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "dpo_adapter"
    shutil.copytree(compared / "out/dpo_adapter", other)
    base = manifest(other)["base_model"]
    change_manifest(other, base_model={**base, "fingerprint": "0" * 64})
    settings = ["--set", f"dpo.output_dir={other}", "--set", f"eval.output_dir={tmp_path}/c"]

    assert compare.main(["--config", str(compared / "config.yaml"), *settings]) == 2

    said = capsys.readouterr().err
    assert f"{other}: was trained on another base model" in said
    assert "measuring" not in said


def test_refuses_when_there_is_nothing_to_compare(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = ["--set", f"sft.output_dir={tmp_path}/a", "--set", f"dpo.output_dir={tmp_path}/b"]
    assert (
        compare.main(["--config", str(compared / "config.yaml"), *settings, "--set", f"eval.output_dir={tmp_path}/c"])
        == 2
    )
    assert "no adapter to compare" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_without_a_dpo_adapter_base_and_sft_are_compared(compared: Path, tmp_path: Path) -> None:
    """And only as many answers of only the length that was asked for."""
    settings = ["--set", f"dpo.output_dir={tmp_path}/none", "--set", f"eval.output_dir={tmp_path}/comparison"]
    settings += ["--set", "eval.max_prompts=3", "--set", "eval.max_new_tokens=2"]
    assert compare.main(["--config", str(compared / "config.yaml"), *settings]) == 0
    found = read_report(tmp_path / "comparison")
    assert found.models == ["base", "sft"]
    assert len(found.samples) == 3
    assert max(health["mean_tokens"] for health in found.health.values()) <= 2


def test_every_check_has_its_row_by_name(report: Report) -> None:
    assert {tuple(sample.checks["sft"]) for sample in report.samples} == {("says it is", "short")}


def test_answers_are_given_in_batches_of_the_size_asked_for(compared: Path) -> None:
    loaded = load_config(compared / "config.yaml", ["eval.batch_size=2", "eval.max_new_tokens=1"])
    tokenizer = load_tokenizer(compared / "model")
    prepared = Prepared(tokenizer, read_held_out(loaded, ["sft"]), loaded.values)
    models = load_models(compared / "model", [], loaded.values)
    rows: list[int] = []
    generate = models.model.generate
    models.model.generate = lambda **inputs: rows.append(len(inputs["input_ids"])) or generate(**inputs)
    measure_models(models, {"base": {}}, prepared, {"base": ChatFormat(tokenizer)})
    assert max(rows) == 2


def test_comparing_on_other_data_than_the_adapter_was_trained_on_is_reported(
    compared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who trains with --set sft.dataset_path=… and forgets it here would read figures about the sample data."""
    moved = shutil.copy(compared / "sft.jsonl", tmp_path / "moved.jsonl")

    assert notes(compared, []) == []
    assert notes(compared, [f"sft.dataset_path={moved}"]) == [], "the same records under another name"
    assert "WARNING" not in caplog.text
    [note] = notes(compared, ["sft.dataset_path=data/sft/sample_sft.jsonl"])

    assert f"--set sft.dataset_path={compared}/sft.jsonl" in note
    assert note in caplog.text


def notes(folder: Path, settings: list[str]) -> list[str]:
    """Return what a comparison says about its lineage before it measures anything."""
    config = load_config(folder / "config.yaml", settings)
    return compare.prepare(config, find_arms(config)).notes


def copied(adapter: Path, folder: Path, **facts: object) -> Path:
    """Copy a finished adapter and overwrite facts of its manifest."""
    shutil.copytree(adapter, folder)
    change_manifest(folder, **facts)
    return folder


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_file_that_has_changed_since_training_is_reported(compared: Path, tmp_path: Path, stage: str) -> None:
    data = {"path": str(compared / f"{stage}.jsonl"), "sha256": "0" * 64, "train": 30, "validation": 10}
    other = copied(compared / f"out/{stage}_adapter", tmp_path / "other", datasets=[data])

    [note] = notes(compared, [f"{stage}.output_dir={other}"])

    assert f"{other}: {compared}/{stage}.jsonl has changed since it was trained on (000000000000…, now " in note


@pytest.mark.parametrize("split", [{"seed": 5}, {"test_ratio": 0.01}, {"group_field": "id"}])
def test_adapters_of_other_seeds_are_refused_with_another_split(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture, split: dict
) -> None:
    made = manifest(compared / "out/dpo_adapter")["split"] | split
    other = copied(compared / "out/dpo_adapter", tmp_path / "other", split=made)
    models = ["--models", f"sft={compared}/out/sft_adapter", f"dpo={compared}/out/dpo_adapter,{other}"]

    assert compare.main(["--config", str(compared / "config.yaml"), *models]) == 2

    said = capsys.readouterr().err
    assert f"eval.models.dpo: {other}: was trained with another split" in said
    assert "may have seen" in said
    assert "measuring" not in said


def test_adapter_that_continues_one_of_another_split_is_refused(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made = manifest(compared / "out/sft_adapter")["split"] | {"seed": 5}
    first = copied(compared / "out/sft_adapter", tmp_path / "first", split=made)
    parent = {"path": str(first), "sha256": read_manifest(first).sha256}
    other = copied(compared / "out/dpo_adapter", tmp_path / "other", parent=parent)

    assert compare.main(["--config", str(compared / "config.yaml"), "--set", f"dpo.output_dir={other}"]) == 2

    assert f"{other}: continues {first}, which was trained with another split (seed 5" in capsys.readouterr().err


def test_sft_trained_again_after_dpo_is_not_its_reference(compared: Path, tmp_path: Path) -> None:
    """The reward of DPO is that against what it was trained against, or none."""
    config, again = str(compared / "config.yaml"), tmp_path / "again"
    assert train_sft.main(["--config", config, "--set", f"sft.output_dir={again}", "--set", "seed=1"]) == 0
    parent = {"path": str(again), "sha256": read_manifest(compared / "out/sft_adapter").sha256}
    replaced = copied(compared / "out/dpo_adapter", tmp_path / "replaced", parent=parent)
    for dpo, advice in (
        (compared / "out/dpo_adapter", f"--set sft.output_dir={compared}/out/sft_adapter"),
        (replaced, "Train dpo again"),
    ):
        out = tmp_path / f"comparison_{dpo.name}"
        settings = [f"sft.output_dir={again}", f"dpo.output_dir={dpo}", f"eval.output_dir={out}", "eval.max_prompts=2"]
        assert compare.main(["--config", config, *(part for item in settings for part in ("--set", item))]) == 0

        found = read_report(out)
        [reward] = [metric for metric in found.metrics if metric.name == "reward_accuracy"]
        assert (list(reward.models), reward.title) == (["sft"], "Implicit-reward accuracy (sft against base)")
        assert (found.lineage["sft"]["reference"], found.lineage["dpo"]["reference"]) == ("base", None)
        assert found.lineage["dpo"]["parent"]["sha256"] != found.lineage["sft"]["sha256"]
        [note] = [note for note in found.notes if "its implicit reward is left out" in note]
        assert f"sft is {again}" in note
        assert advice in note
        assert note.split(": ")[1] in (out / "report.html").read_text(encoding="utf-8")


def test_reward_is_measured_against_the_adapter_it_was_trained_against(report: Report) -> None:
    [reward] = [metric for metric in report.metrics if metric.name == "reward_accuracy"]
    assert reward.title == "Implicit-reward accuracy (sft against base, dpo against sft)"
    assert [report.lineage[name]["reference"] for name in ("sft", "dpo")] == ["base", "sft"]
    assert not [note for note in report.notes if "continues" in note]


def test_dpo_without_its_sft_has_no_reward(compared: Path, tmp_path: Path) -> None:
    settings = [f"sft.output_dir={tmp_path}/none", f"eval.output_dir={tmp_path}/comparison", "eval.max_prompts=2"]
    config = ["--config", str(compared / "config.yaml"), *(part for item in settings for part in ("--set", item))]

    assert compare.main(config) == 0

    found = read_report(tmp_path / "comparison")
    assert {metric.name for metric in found.metrics} == {
        "held_out_loss", "preference_accuracy", "all_rules", "checks_passed", "check_says_it_is", "check_short"
    }  # fmt: skip
    assert [note for note in found.notes if "which is not compared here. dpo was trained against that adapter" in note]
