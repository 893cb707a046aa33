"""What a study trains: values are read as --set reads them, runs share what they can, and mistakes are refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.common.config import load_config
from scripts.common.errors import UserError
from scripts.studies.plan import as_flags, find_variants, parse_vary, plan_members, seeds_of, split_values


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Return the path of a configuration that both stages accept."""
    path = tmp_path / "config.yaml"
    path.write_text("seed: 4\ndpo: {beta: 0.1}\n")
    return str(path)


def plan(config: str, *vary: str, seeds: str = "2", overrides: tuple[str, ...] = (), many: bool = False):
    """Plan a study."""
    variants = find_variants(config, overrides, parse_vary(vary), many=many)
    values = load_config(config, [*overrides, f"study.seeds={seeds}"]).values
    return plan_members(variants, seeds_of(values), Path("out"))


def refusal(config: str, *vary: str) -> str:
    """Return the message about a --vary that is refused."""
    with pytest.raises(UserError) as caught:
        plan(config, *vary)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.05,0.1", ["0.05", "0.1"]),
        (" a , b ", ["a", "b"]),
        ("[q_proj,v_proj],auto", ["[q_proj,v_proj]", "auto"]),
        ('{"a": [1,2], "b": 3},{}', ['{"a": [1,2], "b": 3}', "{}"]),
        ('"one, two",three', ['"one, two"', "three"]),
        (r'"a \", b",c', [r'"a \", b"', "c"]),
        ('["a]","b"],x', ['["a]","b"]', "x"]),
        ('5" wide,6" wide', ['5" wide', '6" wide']),
        ("", [""]),
        ("a,,b", ["a", "", "b"]),
    ],
)
def test_commas_within_brackets_and_quotes_do_not_separate(text: str, parts: list[str]) -> None:
    assert split_values(text) == parts


def test_values_are_json_or_else_text() -> None:
    found = parse_vary(
        ["dpo.beta=5e-2,1", "lora.target_modules=[q_proj,v_proj],auto", 'data.system_prompt=null,"a, b",no']
    )

    assert found == {
        "dpo.beta": [0.05, 1],
        "lora.target_modules": [["q_proj", "v_proj"], "auto"],
        "data.system_prompt": [None, "a, b", "no"],
    }


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        (["dpo.bta=0.1,0.2"], "--vary: dpo.bta: unknown key; did you mean `dpo.beta`?"),
        (["dpo.trainer.max_step=1,2"], "--vary: dpo.trainer.max_step: TRL's DPOConfig has no such argument"),
        (["sead=1,2"], "--vary: sead: unknown key; did you mean `seed`?"),
        (["dpo.beta=0.1,high"], '--vary: dpo.beta: found "high"; wanted a number'),
        (["dpo.beta"], "--vary dpo.beta: wanted KEY=VALUE"),
        (["dpo.beta="], "--vary dpo.beta=: found no value"),
        (["dpo.beta=0.1,,0.2"], "found no value where one was wanted"),
        (["dpo.beta=0.1,0.10"], "--vary: dpo.beta=0.1 is there twice"),
        (["dpo.beta=1,1.0"], "--vary: dpo.beta=1.0 is there twice"),
        (["dpo.beta=0.1", "dpo.beta=0.2"], "--vary dpo.beta: given twice"),
        (["seed=1,2"], "--vary seed: cannot be varied: its seeds are given by --seeds"),
        (["data.split_seed=1,2"], "one study has one split"),
        (["data.validation_ratio=0.1,0.2"], "one study has one split"),
        (["sft.output_dir=a,b"], "names the folders of its runs itself"),
        (["dpo.init_from=a,b"], "names the folders of its runs itself"),
        (["kto.output_dir=a,b"], "names the folders of its runs itself"),
        (["pairs.temperature=1,2"], "all variants are given the same pairs"),
        (["kto.beta=0.1,0.2"], "--vary kto.beta: changes no arm of this study (dpo)"),
        (["tracking.experiment=a,b"], "it changes nothing that is trained"),
        (["eval.batch_size=1,2"], "it changes nothing that is trained"),
        (["study.seeds=1,2"], "it changes nothing that is trained"),
        (["base_model_id=a,b"], "one base"),
        (["dpo={},{}"], "it is a section; name a key in it"),
        (["dpo.reference=sft,base,none"], 'found "none"'),
        (["dpo.beta=0.1,0.2,0.3,0.4", "lora.r=1,2,3,4"], "4 of dpo.beta × 4 of lora.r make 16 variants"),
    ],
)
def test_a_mistake_in_vary_is_refused_with_the_reason(config: str, vary: list[str], said: str) -> None:
    assert said in refusal(config, *vary)


def test_twelve_variants_need_no_permission_and_more_do(config: str) -> None:
    grid = ("dpo.beta=0.1,0.2,0.3,0.4", "lora.r=1,2,3")

    assert len({member.variant for member in plan(config, *grid) if member.kind == "dpo"}) == 12
    more = plan(config, *grid, "lora.alpha=1,2", many=True)
    assert len({member.variant for member in more if member.kind == "dpo"}) == 24


def test_variants_of_dpo_share_the_sft_adapter_of_their_seed(config: str) -> None:
    members = plan(config, "dpo.beta=0.05,0.1", "dpo.loss_type=sigmoid,ipo")

    first = [member.name for member in members if member.seed == 4]
    assert first == [
        "seed-4/sft_adapter",
        "seed-4/dpo_adapter_beta-0.05_loss_type-sigmoid",
        "seed-4/dpo_adapter_beta-0.05_loss_type-ipo",
        "seed-4/dpo_adapter_beta-0.1_loss_type-sigmoid",
        "seed-4/dpo_adapter_beta-0.1_loss_type-ipo",
    ]
    assert [member.seed for member in members] == [4] * 5 + [5] * 5
    sft, dpo = members[0], members[1]
    assert sft.settings == {"seed": 4, "sft.output_dir": "out/seed-4/sft_adapter"}
    assert dpo.parent is sft
    assert dpo.settings == {
        "seed": 4,
        "sft.output_dir": "out/seed-4/sft_adapter",
        "dpo.output_dir": "out/seed-4/dpo_adapter_beta-0.05_loss_type-sigmoid",
        "dpo.init_from": "out/seed-4/sft_adapter",
        "dpo.beta": 0.05,
        "dpo.loss_type": "sigmoid",
    }


def test_arms_share_the_sft_adapter_and_the_pairs_of_their_seed_and_vary_by_their_own_keys(config: str) -> None:
    arms = ("study.arms=[dpo,dpo_checks,kto_checks,kto_demonstrations]",)
    members = plan(config, "dpo.beta=0.1,0.2", "kto.beta=0.3", "dpo.dataset_path=a,b", seeds="1", overrides=arms)

    made = {member.name.removeprefix("seed-4/"): member for member in members}
    assert list(made) == [
        "sft_adapter",
        "pairs_checks.jsonl",
        "pairs_demonstrations.jsonl",
        *(f"dpo_adapter_beta-{beta}_dataset_path-{data}" for beta in (0.1, 0.2) for data in "ab"),
        *(f"dpo_adapter_checks_beta-{beta}" for beta in (0.1, 0.2)),
        "kto_adapter_checks_beta-0.3",
        "kto_adapter_demonstrations_beta-0.3",
    ]
    pairs, kto = made["pairs_checks.jsonl"], made["kto_adapter_checks_beta-0.3"]
    assert pairs.flags[-6:] == ["--by", "checks", "--from", "out/seed-4/sft_adapter", "--out", "out/seed-4/pairs_checks.jsonl"]  # fmt: skip
    assert kto.needs == [made["sft_adapter"], pairs]
    assert kto.settings == {
        "seed": 4,
        "kto.beta": 0.3,
        "sft.output_dir": "out/seed-4/sft_adapter",
        "kto.output_dir": "out/seed-4/kto_adapter_checks_beta-0.3",
        "kto.init_from": "out/seed-4/sft_adapter",
        "kto.dataset_path": "out/seed-4/pairs_checks.jsonl",
    }


def test_kto_is_an_arm_where_it_has_data(config: str, tmp_path: Path) -> None:
    members = plan(config, "kto.beta=0.1,0.2", seeds="1", overrides=(f"kto.dataset_path={tmp_path}/thumbs.jsonl",))

    assert [member.path.name for member in members] == [
        "sft_adapter", "dpo_adapter", "kto_adapter_beta-0.1", "kto_adapter_beta-0.2",
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["lora.r=4,8", "sft.num_train_epochs=4,8", "data.train_on=all,last"])
def test_what_decides_sft_is_trained_again_only_where_it_differs(config: str, key: str) -> None:
    members = plan(config, key, "dpo.beta=0.05,0.1", seeds="1")

    assert [member.stage.name for member in members] == ["sft", "sft", "dpo", "dpo", "dpo", "dpo"]
    name = key.partition("=")[0]
    for member in members[2:]:
        assert member.parent
        assert member.parent.settings[name] == member.settings[name]
        assert "dpo.beta" not in member.parent.settings


def test_without_vary_there_is_one_adapter_per_stage_and_seed(config: str) -> None:
    assert [member.name for member in plan(config, seeds="[7,1]")] == [
        "seed-7/sft_adapter", "seed-7/dpo_adapter", "seed-1/sft_adapter", "seed-1/dpo_adapter",
    ]  # fmt: skip


def test_dpo_from_the_base_waits_for_no_sft_adapter(config: str) -> None:
    members = plan(config, overrides=("dpo.init_from=null", "dpo.reference=base"), seeds="1")

    assert [member.parent for member in members] == [None, None]
    assert "dpo.init_from" not in members[1].settings


def test_seeds_change_the_seed_and_never_the_split(config: str) -> None:
    for member in plan(config, "dpo.beta=0.1,0.2", seeds="[1,2]"):
        flags = as_flags(member.settings)
        assert f"seed={member.seed}" in flags
        assert not any(flag.startswith("data.") for flag in flags)


def test_variants_have_names_that_can_be_read_and_never_meet(config: str) -> None:
    members = plan(
        config, 'data.system_prompt=be brief,be-brief,Be-brief,"be/brief",null', "sft.learning_rate=1e-3", "dpo.learning_rate=1e-4", seeds="1"
    )  # fmt: skip

    names = [member.variant for member in members if member.stage.name == "dpo"]
    assert len({name.lower() for name in names}) == 5
    assert "system_prompt-be-brief_sft.learning_rate-0.001_dpo.learning_rate-0.0001" in names
    assert all("/" not in name and " " not in name for name in names)


def test_names_stay_when_values_are_added(config: str) -> None:
    few = {member.name for member in plan(config, "dpo.beta=0.1")}

    assert few < {member.name for member in plan(config, "dpo.beta=0.3,0.1,0.2", seeds="3")}


def test_settings_reach_a_stage_as_they_were_read(config: str) -> None:
    settings = {
        "data.system_prompt": 'say "no", or\nyes',
        "dpo.beta": 0.05,
        "lora.target_modules": ["q_proj", "v_proj"],
    }

    values = load_config(config, as_flags(settings)[1::2]).values

    assert (values.data.system_prompt, values.dpo.beta) == ('say "no", or\nyes', 0.05)
    assert values.lora.target_modules == ["q_proj", "v_proj"]
