"""Any number of arms, each of one or several seeds: what is found, what is refused, and what is measured against what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from eval import compare, judge, verify
from eval.arms import find_arms, find_references
from eval.held_out import read_held_out
from eval.report import Report, read_report
from eval.tables import read_tables
from scripts import export_lora, train_dpo, train_sft
from scripts.common.artifacts import read_manifest, sha256_json
from scripts.common.config import load_config
from scripts.common.errors import UserError
from scripts.common.question import check_names, plan_sha256
from scripts.common.schema import Check
from tests.conftest import write_jsonl
from tests.support.chain import dpo_rows, write_chain
from tests.support.manifests import change_manifest

CHECKS = [{"name": "says it is", "must_contain": ["it is"]}, {"name": "short", "max_words": 6}]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train SFT and DPO under two seeds, one more DPO on the first SFT, and merge the first DPO."""
    folder = tmp_path_factory.mktemp("arms")
    config = write_chain(folder, eval={"checks": CHECKS, "max_prompts": 4, "max_new_tokens": 4})
    write_jsonl(folder / "dpo.jsonl", [*dpo_rows(), *({**row, "rejected": "no"} for row in dpo_rows())])
    for seed in (0, 1):
        train(train_sft, config, f"seed={seed}", f"sft.output_dir={folder}/out/sft_{seed}")
        dpo = [f"dpo.init_from={folder}/out/sft_{seed}", f"dpo.output_dir={folder}/out/dpo_{seed}"]
        train(train_dpo, config, f"seed={seed}", *dpo)
    strong = [f"dpo.init_from={folder}/out/sft_0", f"dpo.output_dir={folder}/out/strong_1", "dpo.beta=0.5"]
    train(train_dpo, config, "seed=1", *strong)
    adapter = ["--adapter", f"{folder}/out/dpo_0", "--out_dir", f"{folder}/out/merged_0"]
    assert export_lora.main(["--config", str(config), *adapter]) == 0
    return folder


def train(stage, config: Path, *settings: str) -> None:
    """Run a training stage with these settings."""
    assert stage.main(["--config", str(config), *(part for item in settings for part in ("--set", item))]) == 0


def arm(chain: Path, name: str, *folders: str) -> str:
    """Write an arm as it stands on the command line."""
    return f"{name}={','.join(str(chain / 'out' / folder) for folder in folders)}"


def run(chain: Path, out: Path, *models: str, settings: Sequence[str] = (), flags: Sequence[str] = ()) -> int:
    """Compare these arms into a folder."""
    sets = [part for item in (f"eval.output_dir={out}", *settings) for part in ("--set", item)]
    return compare.main(["--config", str(chain / "config.yaml"), *sets, "--models", *models, *flags])


@pytest.fixture(scope="module")
def report(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """Compare two seeds of SFT and DPO with one more arm and a merged model."""
    out = tmp_path_factory.mktemp("report") / "comparison"
    models = [
        arm(chain, "sft", "sft_0", "sft_1"),
        arm(chain, "strong", "strong_1"),
        arm(chain, "merged", "merged_0"),
        arm(chain, "dpo", "dpo_0", "dpo_1"),
    ]
    assert run(chain, out, *models, settings=['eval.plan.question=["dpo","sft"]'], flags=["--note", "by hand"]) == 0
    return out, read_report(out)


def test_every_arm_has_its_column_with_its_seeds(report: tuple[Path, Report], chain: Path) -> None:
    found = report[1]
    assert found.models == ["base", "sft", "strong", "merged", "dpo"]
    assert {name: (each.kind, each.stage, each.seeds) for name, each in found.arms.items()} == {
        "base": ("base", None, []),
        "sft": ("adapter", "sft", [0, 1]),
        "strong": ("adapter", "dpo", [1]),
        "merged": ("merged", "dpo", [0]),
        "dpo": ("adapter", "dpo", [0, 1]),
    }
    assert found.arms["dpo"].folders == [f"{chain}/out/dpo_0", f"{chain}/out/dpo_1"]
    assert (found.question.a, found.question.b, found.question.measures) == (
        "dpo", "sft", ["all_rules", "preference_accuracy"],
    )  # fmt: skip
    assert "by hand" in found.notes
    assert set(found.samples[0].answers) == set(found.models)


def test_every_figure_of_the_report_follows_from_its_items(report: tuple[Path, Report]) -> None:
    assert verify.main([str(report[0])]) == 0


def test_a_member_is_measured_as_it_is_when_it_is_the_only_one(
    report: tuple[Path, Report], chain: Path, tmp_path: Path
) -> None:
    """Neither the order of the seeds nor the arms beside it change a figure."""
    tables = {table.name: table for table in read_tables(*report)}
    assert run(chain, tmp_path / "c", arm(chain, "sft", "sft_1"), arm(chain, "dpo", "dpo_1")) == 0
    alone = {table.name: table for table in read_tables(tmp_path / "c", read_report(tmp_path / "c"))}
    assert set(alone) == set(tables)
    for name, table in alone.items():
        assert table.items == tables[name].items
        for each in ("sft", "dpo"):
            assert tables[name].seeds[each] == (0, 1)
            np.testing.assert_allclose(table.values[each][0], tables[name].values[each][1], rtol=1e-4, atol=1e-4)


def test_a_merged_model_answers_as_its_adapter_on_the_base(report: tuple[Path, Report]) -> None:
    tables = {table.name: table for table in read_tables(*report)}
    for table in tables.values():
        np.testing.assert_allclose(table.values["merged"][0], table.values["dpo"][0], rtol=1e-3, atol=1e-3)
    assert tables["reward_accuracy"].values["merged"].shape == (1, len(tables["reward_accuracy"].items))


def test_an_arm_in_int8_is_compared_with_the_same_adapter_on_full_weights(chain: Path, tmp_path: Path) -> None:
    models = [arm(chain, name, "sft_0") for name in ("sft", "sft_int8")] + [arm(chain, "merged_int8", "merged_0")]
    settings = [
        'eval.int8=["sft_int8","merged_int8"]', 'eval.plan.question=["sft_int8","sft"]',
        'eval.plan.measures=["held_out_loss"]', 'eval.margins={"held_out_loss": 0.05}',
    ]  # fmt: skip
    assert run(chain, tmp_path / "c", *models, settings=settings) == 0

    found = read_report(tmp_path / "c")
    [loss] = [metric for metric in found.metrics if metric.name == "held_out_loss"]
    full, rounded = (loss.models[name].value for name in ("sft", "sft_int8"))
    assert full != rounded
    assert full == pytest.approx(rounded, abs=0.01)
    assert found.verdict is not None
    assert found.verdict.outcome == "equivalent"
    assert any("sft_int8 and merged_int8: answers come from int8 weights" in note for note in found.notes)
    assert verify.main([str(tmp_path / "c")]) == 0


def test_an_arm_in_int8_that_there_is_not_is_refused(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(chain, tmp_path / "c", arm(chain, "sft", "sft_0"), settings=['eval.int8=["sft_int8"]']) == 2
    assert "eval.int8: no arm is called sft_int8; there are sft" in capsys.readouterr().err


def test_each_reward_is_against_the_adapter_of_its_own_seed(chain: Path) -> None:
    models = {
        "sft": [f"{chain}/out/sft_1", f"{chain}/out/sft_0"], "dpo": [f"{chain}/out/dpo_0", f"{chain}/out/dpo_1"],
        "strong": f"{chain}/out/strong_1", "merged": f"{chain}/out/merged_0",
    }  # fmt: skip
    arms = find_arms(load_config(chain / "config.yaml", [f"eval.models={json.dumps(models)}"]))
    assert find_references(arms) == {
        "sft, seed 1": "base", "sft, seed 0": "base", "dpo, seed 0": "sft, seed 0", "dpo, seed 1": "sft, seed 1",
        "strong": "sft, seed 0", "merged": "sft, seed 0",
    }  # fmt: skip


def test_an_arm_whose_member_continues_another_adapter_has_no_reward(chain: Path, tmp_path: Path) -> None:
    assert run(chain, tmp_path / "c", arm(chain, "sft", "sft_0"), arm(chain, "dpo", "dpo_0", "dpo_1")) == 0
    found = read_report(tmp_path / "c")
    [reward] = [metric for metric in found.metrics if metric.name == "reward_accuracy"]
    assert list(reward.models) == ["sft"]
    assert [note for note in found.notes if note.startswith(f"{chain}/out/dpo_1: dpo, seed 1 continues")]


def test_an_arm_that_all_seeds_continue_stands_for_all_of_them(chain: Path, tmp_path: Path) -> None:
    models = {"sft": f"{chain}/out/sft_0", "dpo": [f"{chain}/out/dpo_0", f"{chain}/out/strong_1"]}
    config = load_config(chain / "config.yaml", [f"eval.models={json.dumps(models)}"])
    assert [each.stands for each in find_arms(config)] == [True, False]
    assert run(chain, tmp_path / "c", *(arm(chain, "sft", "sft_0"), arm(chain, "dpo", "dpo_0", "strong_1"))) == 0
    found = read_report(tmp_path / "c")
    assert [
        note for note in found.notes if "The members of dpo differ in more than their seed (dpo.beta: 0.1, 0.5)" in note
    ]
    assert {table.seeds["sft"] for table in read_tables(tmp_path / "c", found)} == {(None,)}


def test_pairs_of_one_prompt_are_one_cluster(report: tuple[Path, Report]) -> None:
    tables = {table.name: table for table in read_tables(*report)}
    pairs = tables["preference_accuracy"]
    assert len(pairs.items) == 2 * len(set(pairs.clusters)) > 4
    assert len(set(pairs.items)) == len(pairs.items)
    assert len(set(tables["all_rules"].clusters)) == len(tables["all_rules"].items) == 4


def test_the_leading_measure_is_the_share_of_answers_that_keep_every_rule(report: tuple[Path, Report]) -> None:
    folder, found = report
    tables = {table.name: table for table in read_tables(folder, found)}
    assert found.metrics[0].name == "all_rules"
    singles = [tables[name].values["dpo"] for name in ("check_says_it_is", "check_short")]
    assert (tables["all_rules"].values["dpo"] == singles[0] * singles[1]).all()
    np.testing.assert_allclose(tables["checks_passed"].values["dpo"], (singles[0] + singles[1]) / 2)
    assert [metric.primary for metric in found.metrics] == [True, True, *[False] * (len(found.metrics) - 2)]
    for metric in found.metrics:
        assert metric.by_seed["dpo"] == pytest.approx(
            [np.average(row, weights=None) for row in tables[metric.name].values["dpo"]]
            if tables[metric.name].weights is None
            else [row.sum() / tables[metric.name].weights.sum() for row in tables[metric.name].values["dpo"]]
        )


def test_items_are_written_a_line_each_with_their_hash(report: tuple[Path, Report]) -> None:
    folder, found = report
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert len(lines) == sum(metric.n for metric in found.metrics)
    first = lines[0]
    assert list(first) == ["measure", "item", "cluster", "weight", "values", "sha256"]
    assert [len(values) for values in first["values"].values()] == [1, 2, 1, 1, 2]
    for line in lines:
        digest = line.pop("sha256")
        assert sha256_json(line) == digest


def test_a_changed_line_of_the_items_is_named(report: tuple[Path, Report], tmp_path: Path) -> None:
    copy = shutil.copytree(report[0], tmp_path / "copy")
    lines = (copy / "items.jsonl").read_text(encoding="utf-8").split("\n")
    lines[4] = lines[4].replace('"dpo": [', '"dpo": [1', 1)
    (copy / "items.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"items\.jsonl:5: was changed"):
        read_tables(copy, report[1])


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["sft"], "--models sft: wanted name=folder"),
        (["sft="], "--models sft=: wanted name=folder"),
        (["sft={sft_0},"], "wanted name=folder, or name=folder,folder"),
        (["sft={sft_0}", "SFT={sft_1}"], "two arms are called SFT"),
        (["Base={sft_0}"], "found the name 'Base'; wanted another name: `base` is the model without an adapter"),
        (["a/b={sft_0}"], "found the name 'a/b'; wanted a name of at most 40 letters"),
        (["a={nowhere}"], "eval.models.a: {out}/nowhere: no such folder"),
        (["a={empty}"], "eval.models.a: {out}/empty: no valid manifest.json, so it was not finished"),
        (["a={sft_0},{sft_0}"], "eval.models.a: {out}/sft_0 and {out}/sft_0 were trained with the same seed, 0"),
        (["a={sft_0},{dpo_1}"], "found adapters of different stages ({out}/sft_0 of sft, {out}/dpo_1 of dpo)"),
        (["a={sft_0}", "b={other_base}"], "{out}/other_base: was trained on another base model"),
        (["a={sft_0}", "b={merged_other}"], "{out}/merged_other: was trained on another base model"),
        (["a={sft_0}", "b={other_split}"], "eval.models.b: {out}/other_split: was trained with another split (seed 5"),
        (["a={sft_0}", "b={two_sides}"], "eval.models.b: {out}/two_sides: was trained by an earlier version, whose split"),
        (["a={sft_0},{sft_1}", "b={seed_7}"], "a and b have no seed in common (a has 0, 1 and b has 7)"),
        (["a={comparison}"], "found a folder of stage `comparison`, wanted sft or dpo or kto or merged"),
    ],
)  # fmt: skip
def test_refuses(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture, models: list[str], said: str) -> None:
    out = chain / "out"
    base, split = (getattr(read_manifest(out / "sft_0"), fact).model_dump() for fact in ("base_model", "split"))
    for name, source, facts in (
        ("other_base", "dpo_0", {"base_model": {**base, "fingerprint": "0" * 64}}),
        ("merged_other", "merged_0", {"base_model": {**base, "fingerprint": "0" * 64}}),
        ("other_split", "dpo_0", {"split": {**split, "seed": 5}}),
        ("two_sides", "dpo_0", {"split": {"seed": 0, "ratio": 0.25}}),
        ("seed_7", "sft_0", {"config": {**read_manifest(out / "sft_0").config, "seed": 7}}),
        ("comparison", "sft_0", {"stage": "comparison"}),
    ):
        if not (out / name).exists():
            change_manifest(shutil.copytree(out / source, out / name), **facts)
    (out / "empty").mkdir(exist_ok=True)
    folders = {path.name: str(path) for path in [*out.iterdir(), out / "nowhere"]}

    assert run(chain, tmp_path / "c", *(text.format(**folders) for text in models)) == 2

    error = capsys.readouterr().err
    assert said.format(out=out) in error
    assert "measuring" not in error
    assert "Traceback" not in error
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("eval.models={}", "eval.models: found {}"),
        ('eval.models={"base": "x"}', 'eval.models.base: found "base"; wanted another name'),
        ('eval.models={"a": "x", "A": "y"}', "wanted names that differ in more than capital letters"),
        ('eval.models={"a": []}', "eval.models.a: found []"),
        ('eval.plan.question=["dpo","dpo"]', "eval.plan.question: found dpo, dpo; wanted two of base, sft, dpo, kto"),
        ('eval.plan.question=["orpo","dpo"]', "eval.plan.question: found orpo, dpo; wanted two of base, sft, dpo, kto"),
        ('eval.plan.measures=["all_rulez"]', "eval.plan.measures: found all_rulez; wanted measures of all_rules,"),
        ('eval.margins={"loss": 0.1}', "eval.margins: found loss; wanted measures of all_rules,"),
        ('eval.margins={"all_rules": -0.1}', "eval.margins.all_rules: found -0.1; wanted greater than 0"),
    ],
)
def test_a_configuration_that_asks_for_what_there_is_not_is_refused(
    chain: Path, capsys: pytest.CaptureFixture, setting: str, said: str
) -> None:
    assert compare.main(["--config", str(chain / "config.yaml"), "--set", setting]) == 2
    assert said in capsys.readouterr().err


def test_runs_is_refused_and_names_the_study(chain: Path, capsys: pytest.CaptureFixture) -> None:
    assert compare.main(["--config", str(chain / "config.yaml"), "--runs", str(chain)]) == 2
    assert "python -m scripts.study" in capsys.readouterr().err


def test_a_measure_of_the_plan_that_cannot_be_measured_is_refused(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = ["eval.checks=[]", 'eval.plan.measures=["all_rules"]', 'eval.plan.question=["sft","base"]']
    assert run(chain, tmp_path / "c", arm(chain, "sft", "sft_0"), settings=settings) == 2
    error = capsys.readouterr().err
    assert (
        "eval.plan.measures: found all_rules, which cannot be measured here: there are no rules in eval.checks" in error
    )
    assert "measuring" not in error


def test_one_item_without_rules_or_pairs_is_compared(chain: Path, tmp_path: Path) -> None:
    settings = ["eval.checks=[]", "eval.max_prompts=1"]
    assert run(chain, tmp_path / "c", arm(chain, "sft", "sft_0"), settings=settings) == 0
    found = read_report(tmp_path / "c")
    assert [(metric.name, metric.n, metric.primary) for metric in found.metrics] == [("held_out_loss", 1, True)]
    assert found.question.measures == ["held_out_loss"]
    assert found.verdict.outcome in ("undecided",)


def test_looks_at_one_test_side_are_counted_beside_the_report(chain: Path, tmp_path: Path) -> None:
    """They survive the report; the validation side, another split and other data are not that test side."""
    out, sft, dpo = tmp_path / "c", arm(chain, "sft", "sft_0"), arm(chain, "dpo", "dpo_0")
    short = ["eval.max_prompts=1", "eval.max_new_tokens=1", "eval.checks=[]"]
    looks = []
    for models, settings in (
        ([sft], []), ([sft], []), ([sft], [f"sft.dataset_path={chain}/other.jsonl"]), ([sft, dpo], []),
    ):  # fmt: skip
        shutil.copy(chain / "sft.jsonl", chain / "other.jsonl")
        with (chain / "other.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"instruction": "one more", "input": "", "output": "yes"}\n')
        assert run(chain, out, *models, settings=[*short, *settings]) == 0
        looks.append(read_report(out).looks)
    assert looks == [1, 2, 1, 3]
    (tmp_path / "c.looks.jsonl").open("a").write("{}\n")
    assert run(chain, out, sft, settings=short) == 2


def test_variants_are_measured_on_the_validation_side_without_a_look_at_the_test_side(
    chain: Path, tmp_path: Path
) -> None:
    items = {}
    for side in ("validation", "test"):
        out = tmp_path / side
        assert (
            run(chain, out, arm(chain, "sft", "sft_0"), settings=["eval.max_new_tokens=1"], flags=["--side", side]) == 0
        )
        found = read_report(out)
        assert (found.side, found.looks) == (side, 1 if side == "test" else None)
        assert (tmp_path / f"{side}.looks.jsonl").exists() is (side == "test")
        items[side] = {item for table in read_tables(out, found) for item in table.items}
    assert items["validation"]
    assert not items["validation"] & items["test"]


def test_records_of_one_group_are_one_cluster(tmp_path: Path) -> None:
    """Two prompts of one customer are not two observations."""
    rows = [
        {"instruction": f"say {number}", "input": "", "output": "yes", "customer": f"c{number // 2}"}
        for number in range(40)
    ]
    config = write_chain(tmp_path)
    write_jsonl(tmp_path / "sft.jsonl", rows)
    held_out = read_held_out(load_config(config, ["data.group_field=customer"]), ["sft"])
    questions = held_out.questions(None)
    assert len(questions) == 2 * len({question.cluster for question in questions}) > 2


def test_the_plan_is_frozen_by_the_first_stage_and_handed_down(chain: Path, tmp_path: Path) -> None:
    values = load_config(chain / "config.yaml").values
    plans = [read_manifest(chain / "out" / name).plan for name in ("sft_0", "dpo_0", "strong_1", "merged_0")]
    assert plans[0].sha256 == plan_sha256(values)
    assert plans[1:] == [plans[0]] * 3

    short = ["eval.max_prompts=1", "eval.max_new_tokens=1"]
    models = [arm(chain, "sft", "sft_0"), arm(chain, "dpo", "dpo_0")]
    for settings, planned in (
        ([], True),
        (['eval.plan.question=["dpo","base"]'], False),
        (['eval.plan.measures=["held_out_loss"]'], False),
        (['eval.margins={"all_rules":0.1}'], False),
        (["eval.plan.alpha=0.01"], False),
        (['eval.checks=[{"name":"short","max_words":9}]'], False),
    ):
        assert run(chain, tmp_path / "c", *models, settings=[*short, *settings]) == 0
        assert read_report(tmp_path / "c").question.planned is planned, settings
    assert run(chain, tmp_path / "c", *reversed(models), settings=short) == 0
    assert read_report(tmp_path / "c").question.planned is False, "another order asks another question"


def test_another_number_of_seeds_than_planned_is_noted(chain: Path, tmp_path: Path) -> None:
    settings = ["eval.plan.seeds=3", "eval.max_prompts=1", "eval.max_new_tokens=1"]
    assert run(chain, tmp_path / "c", arm(chain, "sft", "sft_0", "sft_1"), settings=settings) == 0
    assert "eval.plan.seeds: 3 seeds were planned, but sft has 2." in read_report(tmp_path / "c").notes


def test_a_changed_system_message_is_noted(chain: Path, tmp_path: Path) -> None:
    settings = ["data.system_prompt=Be brief.", "eval.max_prompts=1", "eval.max_new_tokens=1"]
    assert run(chain, tmp_path / "c", arm(chain, "sft", "sft_0"), settings=settings) == 0
    [note] = [note for note in read_report(tmp_path / "c").notes if "system_prompt" in note]
    assert note.startswith(f"{chain}/out/sft_0: was trained with data.system_prompt: null, but the configuration has ")


def test_the_judge_asks_about_the_primary_question(report: tuple[Path, Report], chain: Path) -> None:
    config = load_config(chain / "config.yaml")
    contest = judge.choose_contest(config, report[1])
    assert contest.models == ("dpo", "sft")
    other = judge.choose_contest(load_config(chain / "config.yaml", ["eval.judge.models=[merged,strong]"]), report[1])
    assert other.models == ("merged", "strong")


def test_single_checks_are_measures_by_their_name() -> None:
    names = ["Says: it is!", "says it is", "!!!", "ÜBER 3 Wörter"]
    assert check_names([Check(name=name) for name in names]) == [
        "check_says_it_is", "check_2", "check_3", "check_über_3_wörter",
    ]  # fmt: skip
