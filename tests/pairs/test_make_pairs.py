"""The command: what is sampled, who prefers, what is written, and what a kill or a mistake leaves behind."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eval import compare
from eval.checks import passes
from eval.report import read_report
from scripts import make_pairs, train_dpo, train_kto
from scripts.common.artifacts import read_manifest, sha256_file
from scripts.common.config import load_config
from scripts.common.deid_report import check_deid_report, report_path
from scripts.common.errors import UserError
from scripts.common.pairs_manifest import pairs_manifest_path
from scripts.dataset.records import load_datasets, parse_preference, parse_record
from scripts.dataset.split import side_of
from scripts.doctor import check_data
from tests.conftest import write_jsonl
from tests.eval.test_judge import endpoint
from tests.support.chain import start_stage
from tests.support.pairs import add_adapter, manifest_of, read_pairs, rows, vote, write_pairs_project

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make model, adapter and data once."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs_project(folder)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Run:
    """Return a function that runs the command in an empty folder and returns its exit code and what it said."""
    monkeypatch.chdir(tmp_path)

    def run_command(by: str, *more: str, config: Path = made / "config.yaml") -> tuple[int, str]:
        capfd.readouterr()
        code = make_pairs.main(["--config", str(config), "--by", by, "--out", "pairs.jsonl", *more])
        return code, capfd.readouterr().err

    return run_command


def prompts_of(config: Path, side: str) -> set[str]:
    """Return the prompts of one side."""
    data = load_config(config).values.data
    (file,) = load_datasets(str(config.parent / "sft.jsonl"), parse_record, data, "key")
    return {record.prompt[0]["content"] for record in file.records if side_of(record, data) == side}


def set_(**keys: object) -> list[str]:
    """Write overrides; __ stands for the dot."""
    return [part for key, value in keys.items() for part in ("--set", f"{key.replace('__', '.')}={json.dumps(value)}")]


# --- what is sampled and who prefers


def test_your_own_answer_is_preferred_to_samples_of_training_prompts_only(made: Path, run: Run) -> None:
    code, said = run("demonstrations")

    pairs, manifest = read_pairs(Path("pairs.jsonl")), manifest_of(Path("pairs.jsonl"))
    own = {row["instruction"]: row["output"] for row in rows()}
    train = prompts_of(made / "config.yaml", "train")
    assert (code, manifest.counts["prompts"], manifest.counts["samples"]) == (0, len(train), 4 * len(train))
    assert len(train) < len(own)
    assert {pair["prompt"] for pair in pairs} <= train
    assert all(pair["chosen"] == own[pair["prompt"]] != pair["rejected"] for pair in pairs)
    assert {pair.keys() == {"prompt", "chosen", "rejected"} for pair in pairs} == {True}
    assert len(pairs) == len(manifest.pairs) == manifest.counts["pairs"] > 20
    assert {(pair.labeller, pair.chosen) for pair in manifest.pairs} == {("own answer", None)}
    assert f"{len(pairs)} pairs" in said
    assert "scripts.train_dpo" in said


def test_records_of_a_group_stay_on_its_side_and_carry_it_on(tmp_path: Path, made: Path, run: Run) -> None:
    shutil.copytree(made / "model", tmp_path / "grouped/model")
    config = write_pairs_project(
        tmp_path / "grouped", data={"group_field": "customer", "validation_ratio": 0.15, "test_ratio": 0.2}
    )

    code, said = run("demonstrations", config=config)

    assert code == 0, said
    data = load_config(config).values.data
    (file,) = load_datasets("pairs.jsonl", parse_preference, data, "key")
    assert {side_of(record, data) for record in file.records} == {"train"}
    customer = {row["instruction"]: row["customer"] for row in rows()}
    assert all(pair["customer"] == customer[pair["prompt"]] for pair in read_pairs(Path("pairs.jsonl")))


def test_samples_that_keep_more_rules_are_preferred(made: Path, run: Run) -> None:
    assert run("checks")[0] == 0

    checks = load_config(made / "config.yaml").values.eval.checks

    def kept(text: str) -> int:
        return sum(passes(check, text, "", None) for check in checks)

    pairs = read_pairs(Path("pairs.jsonl"))
    assert len(pairs) > 10
    assert all(kept(pair["chosen"]) > kept(pair["rejected"]) for pair in pairs)
    assert {pair.labeller.partition(",")[0] for pair in manifest_of(Path("pairs.jsonl")).pairs} == {"checks"}


def say_team(body: dict) -> str:
    """Prefer the answer that names the team, wherever it stands."""
    first, second = body["messages"][1]["content"].partition("ANSWER B")[::2]
    return "TIE" if ("team" in first) == ("team" in second) else "A" if "team" in first else "B"


def test_a_judge_prefers_only_what_it_names_in_both_orders(run: Run) -> None:
    with endpoint(say_team) as server:
        judged = set_(eval__judge__base_url=server.url, eval__judge__model="m")
        assert run("judge", *judged)[0] == 0
        asked = len(server.asked)
        assert run("judge", *judged)[0] == 0
        assert len(server.asked) == asked, "no reply is paid for twice"

    pairs, counts = read_pairs(Path("pairs.jsonl")), manifest_of(Path("pairs.jsonl")).counts
    assert pairs
    assert all("team" in pair["chosen"] and "team" not in pair["rejected"] for pair in pairs)
    assert asked == 2 * counts["pairs that the judge was asked about"]
    assert counts["pairs that the judge finds equal or judges by their order"] > 0


def test_a_judge_who_goes_by_the_order_prefers_nothing(run: Run) -> None:
    with endpoint(lambda body: "A") as server:
        code, said = run("judge", *set_(eval__judge__base_url=server.url, eval__judge__model="m"))

    assert code == 2
    assert "no pair is left" in said
    assert "judges by their order" in said
    assert not Path("pairs.jsonl").exists()


def test_samples_and_votes_outlive_an_endpoint_that_is_down(run: Run) -> None:
    with endpoint(say_team) as server:
        judged = set_(eval__judge__base_url=server.url, eval__judge__model="m")
    code, said = run("judge", *judged)
    assert (code, "cannot connect" in said) == (2, True)

    replies = iter(range(5))
    with endpoint(lambda body: say_team(body) if next(replies, None) is not None else (401, {}, "no")) as server:
        code, said = run(
            "judge", *set_(eval__judge__base_url=server.url, eval__judge__model="m", eval__judge__concurrent_requests=1)
        )
    assert (code, "answered 401" in said) == (2, True)
    assert "sampled already" in said
    with endpoint(say_team) as server:
        code, said = run("judge", *set_(eval__judge__base_url=server.url, eval__judge__model="m"))
        assert code == 0
        asked = manifest_of(Path("pairs.jsonl")).counts["pairs that the judge was asked about"]
        assert len(server.asked) == 2 * asked - 5


def test_votes_become_pairs_and_those_on_held_out_prompts_do_not(made: Path, run: Run) -> None:
    train, test = (sorted(prompts_of(made / "config.yaml", side)) for side in ("train", "test"))
    own = "it is done, the team has done it this week"
    votes = [
        vote(made, train[0], best=0, worst=2),
        vote(made, train[1], outcome="tie"),
        vote(made, train[2], outcome="all_bad"),
        vote(made, train[3], outcome="own", own=own),
        vote(made, train[4], worst=1),
        vote(made, train[4], outcome="undone"),
        vote(made, test[0]),
    ]
    write_jsonl(Path("votes.jsonl"), votes)

    code, said = run("votes", "--votes", "votes.jsonl", *set_(pairs__balance_length=False))

    assert code == 0, said
    pairs, counts = read_pairs(Path("pairs.jsonl")), manifest_of(Path("pairs.jsonl")).counts
    assert [pair["prompt"] for pair in pairs] == [train[0], train[0], train[3], train[3]]
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == ("the team is on it", "to to to the on")
    assert pairs[2]["chosen"] == own
    assert counts["votes on prompts that are held out"] == 1
    assert counts["prompts with nothing to prefer"] == 3


def test_another_adapter_is_asked_when_it_is_named(made: Path, run: Run) -> None:
    other = add_adapter(made, made / "config.yaml", "other", seed=9)

    assert run("demonstrations", "--from", str(other))[0] == 0

    assert manifest_of(Path("pairs.jsonl")).parent.path == str(other)


# --- the settings


def test_settings_reach_the_samples(run: Run) -> None:
    assert (
        run("demonstrations", *set_(pairs__samples_per_prompt=3, pairs__max_prompts=5, pairs__batch_size=2, seed=4))[0]
        == 0
    )

    (file,) = Path("pairs.jsonl.run").glob("samples-*.jsonl")
    batches = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert {len(samples) for batch in batches for samples in batch} == {3}
    assert manifest_of(Path("pairs.jsonl")).seed == 4

    assert run("demonstrations", *set_(pairs__max_new_tokens=2))[0] == 0
    counts = manifest_of(Path("pairs.jsonl")).counts
    assert counts["samples cut at pairs.max_new_tokens"] > counts["samples"] / 2
    assert len(list(Path("pairs.jsonl.run").glob("samples-*.jsonl"))) == 2, "what was sampled before stays"


@pytest.mark.parametrize("most", [1, 3])
def test_so_many_pairs_are_made_of_a_prompt_at_most(most: int, run: Run) -> None:
    assert run("demonstrations", *set_(pairs__max_per_prompt=most))[0] == 0

    prompts = [pair["prompt"] for pair in read_pairs(Path("pairs.jsonl"))]
    assert max(map(prompts.count, prompts)) == most


def test_lengths_are_balanced_unless_that_is_not_wanted(run: Run) -> None:
    def longer() -> tuple[int, int]:
        pairs = read_pairs(Path("pairs.jsonl"))
        return sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs), len(pairs)

    unbalanced = set_(pairs__balance_length=False, pairs__max_per_prompt=4)
    assert run("demonstrations", *unbalanced)[0] == 0
    before = longer()
    assert run("demonstrations", *set_(pairs__max_per_prompt=4))[0] == 0
    after = longer()

    assert before[0] / before[1] > after[0] / after[1]
    assert (
        manifest_of(Path("pairs.jsonl")).counts["pairs left out to keep lengths in balance"] == before[1] - after[1] > 0
    )


# --- kills and mistakes


def test_a_killed_run_resumes_at_whole_batches_byte_for_byte(made: Path, run: Run) -> None:
    settings = set_(pairs__samples_per_prompt=8, pairs__batch_size=1)
    assert run("demonstrations", *settings)[0] == 0
    whole = Path("pairs.jsonl").read_bytes()
    (sampled,) = Path("pairs.jsonl.run").glob("samples-*.jsonl")
    lines = sampled.read_bytes()
    process = start_stage(
        "make_pairs", made / "config.yaml", "--by", "demonstrations", "--out", "killed/pairs.jsonl", *settings
    )
    partly = Path("killed/pairs.jsonl.run") / sampled.name
    while not partly.exists() or not partly.stat().st_size:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = partly.read_bytes()
    assert 0 < before.count(b"\n") < lines.count(b"\n")
    partly.write_bytes(before + b'[[{"text": "cut')

    code, said = run("demonstrations", "--out", "killed/pairs.jsonl", *settings)

    assert code == 0
    assert "batches are sampled already" in said
    assert partly.read_bytes() == lines
    assert Path("killed/pairs.jsonl").read_bytes() == whole
    ours, theirs = (
        manifest_of(Path(name)).model_dump(exclude={"created"}) for name in ("killed/pairs.jsonl", "pairs.jsonl")
    )
    assert ours == theirs


def test_another_file_of_pairs_of_the_same_answers_costs_no_sampling(run: Run) -> None:
    assert run("demonstrations")[0] == 0

    code, said = run("checks", "--out", "checks.jsonl")

    assert (code, "prompts are sampled already" in said) == (0, True), said
    assert manifest_of(Path("checks.jsonl")).by == "checks"
    assert Path("pairs.jsonl").exists()


def test_a_run_that_was_killed_before_its_manifest_was_written_can_be_repeated(run: Run) -> None:
    assert run("demonstrations")[0] == 0
    earlier = pairs_manifest_path(Path("pairs.jsonl")).read_text(encoding="utf-8")
    assert run("checks")[0] == 0
    pairs_manifest_path(Path("pairs.jsonl")).write_text(earlier, encoding="utf-8")

    assert run("checks")[0] == 0

    assert manifest_of(Path("pairs.jsonl")).sha256 == sha256_file(Path("pairs.jsonl"))


REFUSED = {
    "no checks": ("checks", set_(eval__checks=[]), "eval.checks: there is no rule"),
    "a check that is no rule": ("checks", set_(eval__checks=[{"name": "x", "regex": "("}]), "eval.checks[0].regex"),
    "all samples equal": ("checks", set_(pairs__temperature=1e-6), "prompts with nothing to prefer"),
    "all samples cut": ("demonstrations", set_(pairs__max_new_tokens=1, pairs__temperature=1e-6), "samples"),
    "no endpoint": ("judge", [], "eval.judge: an endpoint needs base_url and model"),
    "another split": ("checks", set_(data__split_seed=7), "was trained with another split"),
    "no training prompt": ("checks", ["--from", "nowhere"], "nowhere: no such folder"),
    "votes without a file": ("votes", [], "--votes FILE belongs to --by votes"),
    "a file without votes": ("checks", ["--votes", "votes.jsonl"], "--votes FILE belongs to --by votes"),
    "votes that are not there": ("votes", ["--votes", "vote.jsonl"], "--votes vote.jsonl: no such file. Did you mean"),
    "a table": ("checks", ["--out", "pairs.csv"], "wanted `.jsonl`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_get_one_message_and_write_nothing(case: str, run: Run) -> None:
    by, more, text = REFUSED[case]
    Path("votes.jsonl").write_text("", encoding="utf-8")

    code, said = run(by, *more)

    assert (code, text in said) == (2, True), said
    assert "Traceback" not in said
    assert not list(Path().glob("pairs*.manifest.json")) + list(Path().glob("pairs.???*[lv]"))


BAD_VOTES: dict[str, tuple[dict, str]] = {
    "another adapter": ({"adapter": "f" * 64}, "votes on answers of another adapter (2 of ffffffffffff…)"),
    "a number too high": ({"best": 4}, "votes.jsonl:2: best and worst: wanted two different numbers from 0 to 3"),
    "best is worst": ({"best": 1, "worst": 1}, "votes.jsonl:2: best and worst"),
    "nothing named": ({"best": None}, "votes.jsonl:2: best, worst: wanted with the outcome `best`"),
    "no own answer": ({"outcome": "own", "best": None}, "votes.jsonl:2: own: wanted a text"),
    "no such outcome": ({"outcome": "good"}, "votes.jsonl:2: outcome"),
    "no question": ({"prompt": [{"role": "assistant", "content": "x"}]}, "votes.jsonl:2: prompt: wanted a text"),
    "a message without text": ({"prompt": [{"role": "user"}]}, "votes.jsonl:2: prompt: wanted a text"),
    "no prompt": ({"prompt": " "}, "votes.jsonl:2: prompt: wanted a text"),
    "pairs": ({"chosen": "a", "rejected": "b"}, "--set dpo.dataset_path=votes.jsonl"),
}


@pytest.mark.parametrize("case", BAD_VOTES)
def test_votes_that_cannot_be_used_are_refused_by_line(case: str, made: Path, run: Run) -> None:
    changes, text = BAD_VOTES[case]
    bad = {**vote(made, "task 1"), **changes}
    write_jsonl(Path("votes.jsonl"), [bad if case == "another adapter" else vote(made, "task 0"), bad])

    code, said = run("votes", "--votes", "votes.jsonl")

    assert (code, text in said) == (2, True), said
    assert not Path("pairs.jsonl").exists()


@pytest.mark.parametrize("outcome", [None, "tie", "all_bad", "undone"])
def test_an_empty_queue_makes_no_file(outcome: str | None, made: Path, run: Run) -> None:
    write_jsonl(Path("votes.jsonl"), [vote(made, f"task {n}", outcome=outcome) for n in range(3)] if outcome else [])

    code, said = run("votes", "--votes", "votes.jsonl")

    assert code == 2
    assert ("no pair is left" if outcome else "the file holds no vote") in said
    assert not Path("pairs.jsonl").exists()


@pytest.mark.parametrize("change", ["another file", "an edited one", "what the adapter was trained on"])
def test_no_file_but_an_earlier_one_of_its_own_is_replaced(change: str, made: Path, run: Run) -> None:
    more: list[str] = []
    if change == "another file":
        Path("pairs.jsonl").write_text("mine\n", encoding="utf-8")
    else:
        assert run("demonstrations")[0] == 0
    if change == "an edited one":
        Path("pairs.jsonl").write_text("edited\n", encoding="utf-8")
    if change == "what the adapter was trained on":
        data = [{"path": "pairs.jsonl", "sha256": sha256_file(Path("pairs.jsonl"))}]
        data[0]["path"] = str(Path("pairs.jsonl").resolve())
        more = ["--from", str(add_adapter(made, made / "config.yaml", "second", datasets=data))]
    before = Path("pairs.jsonl").read_bytes()

    code, said = run("demonstrations", *more)

    assert code == 2
    assert ("--out pairs_2.jsonl" if more else "will not be replaced") in said
    assert Path("pairs.jsonl").read_bytes() == before


# --- what comes after


def write_report(data: Path) -> None:
    """Write what de-identification says of a file."""
    report = {
        "schema": 1,
        "output": {"sha256": sha256_file(data)},
        "counts": {"input": 9, "output": 8},
        "created": "now",
    }
    report_path(data).write_text(json.dumps(report), encoding="utf-8")


def test_reports_of_the_data_vouch_for_the_pairs(tmp_path: Path, made: Path, run: Run) -> None:
    shutil.copytree(made, tmp_path / "scrubbed")
    config = write_pairs_project(tmp_path / "scrubbed")
    required = set_(deid__required=True)
    code, said = run("demonstrations", *required, config=config)
    assert (code, "no report vouches for" in said, "sft.jsonl" in said) == (2, True, True)
    assert run("demonstrations", config=config)[0] == 0
    train = ["--config", str(config), "--set", "dpo.dataset_path=pairs.jsonl", *required, "--dry-run"]
    with pytest.raises(UserError, match=r"descends from .*sft\.jsonl"):
        check_deid_report("pairs.jsonl", sha256_file(Path("pairs.jsonl")))
    assert train_dpo.main(train) == 2

    write_report(tmp_path / "scrubbed/sft.jsonl")
    assert run("demonstrations", *required, config=config)[0] == 0

    assert train_dpo.main(train) == 0
    assert check_deid_report("pairs.jsonl", sha256_file(Path("pairs.jsonl")))["counts"] == {"input": 9, "output": 8}
    with Path("pairs.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(UserError, match="were changed after they were made"):
        check_deid_report("pairs.jsonl", sha256_file(Path("pairs.jsonl")))


def test_a_parent_that_is_gone_vouches_for_nothing(made: Path, run: Run) -> None:
    write_report(made / "sft.jsonl")
    try:
        parent = {"path": str(made / "gone"), "sha256": "a" * 64}
        later = add_adapter(made, made / "config.yaml", "later", parent=parent)
        code, said = run("demonstrations", "--from", str(later), *set_(deid__required=True))
    finally:
        report_path(made / "sft.jsonl").unlink()

    assert (code, str(made / "gone") in said) == (2, True)


def test_kto_takes_the_two_answers_of_each_pair_as_a_thumb_up_and_one_down(made: Path, run: Run) -> None:
    assert run("checks")[0] == 0
    settings = set_(kto__dataset_path="pairs.jsonl", kto__output_dir="out/kto", kto__max_length=200)
    trained = [*settings, *set_(kto__init_from=str(made / "out/sft_adapter"), kto__trainer={"max_steps": 2})]

    assert train_kto.main(["--config", str(made / "config.yaml"), *trained]) == 0

    kto = read_manifest("out/kto")
    pairs = len(read_pairs(Path("pairs.jsonl")))
    assert (kto.metrics["thumbs_up"], kto.metrics["thumbs_down"]) == (pairs, pairs)
    assert kto.datasets[0].sha256 == sha256_file(Path("pairs.jsonl"))


def test_dpo_trains_on_the_pairs_and_is_compared_on_the_test_prompts_of_sft(
    made: Path, run: Run, capfd: pytest.CaptureFixture
) -> None:
    """Hand-made pairs may have asked for evaluations; there is nothing to evaluate, and nothing is to be changed for it."""
    assert run("checks")[0] == 0
    common = [
        "--config",
        str(made / "config.yaml"),
        "--set",
        "dpo.dataset_path=pairs.jsonl",
        *set_(dpo__output_dir="out/dpo"),
    ]
    asked = set_(
        dpo__trainer={"max_steps": 2, "warmup_steps": 0, "eval_strategy": "steps", "eval_steps": 1},
        dpo__stop_on_degeneration=True,
    )

    assert train_dpo.main([*common, *asked, *set_(dpo__early_stopping_patience=2)]) == 0

    said = capfd.readouterr().err
    assert "the pairs were made of training prompts" in said
    assert "data.validation_ratio" not in said
    assert "nothing is evaluated during training" in said
    assert "dpo.stop_on_degeneration has no effect" in said
    only_dpo = ["--models", "dpo=out/dpo"]
    assert compare.main([*common, *set_(eval__output_dir="out/comparison"), *only_dpo]) == 0
    report = read_report(Path("out/comparison"))
    records, *_ = [
        finding
        for finding in check_data(load_config(made / "config.yaml", ["dpo.dataset_path=pairs.jsonl"]))
        if "dpo." in finding.text
    ]
    assert (records.status, "made of training prompts" in records.text) == ("ok", True)
    assert {sample.prompt for sample in report.samples} == prompts_of(made / "config.yaml", "test")
