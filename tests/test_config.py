"""The one YAML file: strict keys, useful complaints, overrides, and where each value came from."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shlex
from pathlib import Path

import pytest

from scripts.common.config import ROOT, add_config_arguments, load_config
from scripts.common.errors import UserError
from scripts.common.schema import OWNED_TRAINER_ARGUMENTS, REMOVED_TRAINER_ARGUMENTS, Config
from tests.conftest import run_python

HEADING = "the configuration is not valid\n  "
PASSWORD = (
    "found a password in the URL, which would be copied into manifests and MLflow. Take it out; "
    "MLflow takes MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD from the environment"
)


@pytest.fixture
def config_file(tmp_path: Path):
    """Return a function that writes a YAML text and returns its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "my.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    """Return what the user is told."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("seed: 1\nbase_model: x\n", 2, "base_model: unknown key; did you mean `base_model_id`?"),
        ("lora:\n  r: 8\n  aplha: 3\n", 3, "lora.aplha: unknown key; did you mean `lora.alpha`?"),
        ("learning_rate: 1e-4\n", 1, "learning_rate: unknown key; did you mean `sft.learning_rate`?"),
        ("lora:\n  zzz: 3\n", 2, "lora.zzz: unknown key; known keys: alpha, dropout"),
        ("eval:\n  judge:\n    modle: 3\n", 3, "eval.judge.modle: unknown key; did you mean `eval.judge.model`?"),
        ("sft:\n  dataset_path:\n  - path: a\n    wieght: 1\n", 4, "sft.dataset_path.0.wieght: unknown key; remove it"),
        ("strategy: 1\n", 1, "strategy: unknown key; known keys: base_model_id, "),
        ("lora:\n  boolean: 1\n", 2, "lora.boolean: unknown key; known keys: "),
    ],
)
def test_unknown_key_is_refused_with_line_and_nearest_name(config_file, text: str, line: int, said: str) -> None:
    path = config_file(text)

    told = refusal(path)

    assert f"{path}:{line}: {said}" in told
    assert told.endswith(said) or said.endswith((", ", ": ", "dropout"))


def test_a_mistake_is_told_in_one_line_under_the_heading(config_file) -> None:
    path = config_file("lora:\n  r: größe\n")

    assert refusal(path) == f'the configuration is not valid\n  {path}:2: lora.r: found "größe"; wanted a whole number'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora:\n  r: eight\n", ':2: lora.r: found "eight"; wanted a whole number'),
        ("lora:\n  r: 0\n", ":2: lora.r: found 0; wanted greater than 0"),
        ("lora:\n  r: 8.5\n", ":2: lora.r: found 8.5; wanted a whole number"),
        ("lora:\n  r: true\n", ":2: lora.r: found true; wanted a whole number"),
        ("offline: 1\n", ":1: offline: found 1; wanted a boolean"),
        ("data:\n  validation_ratio: 1.0\n", ":2: data.validation_ratio: found 1.0; wanted less than 1"),
        ("data:\n  on_bad_row: ignore\n", ":2: data.on_bad_row: found \"ignore\"; wanted 'stop' or 'skip'"),
        ("sft:\n  learning_rate: .nan\n", ":2: sft.learning_rate: found NaN; wanted"),
        ("sft: 3\n", ":1: sft: found 3; wanted lines of `key: value` under it"),
        ("lora:\n  target_modules: q_proj\n", ":2: lora.target_modules: found \"q_proj\"; wanted 'auto' or a list"),
        ("sft:\n  dataset_path:\n  - path: a.jsonl\n    weight: 0\n", ":4: sft.dataset_path.0.weight: found 0; wanted greater"),
        ("sft:\n  dataset_path:\n  - weight: 1\n", ":3: sft.dataset_path.0.path: missing; it has no default, so write it down"),
        ("performance:\n  threads: -1\n", ":2: performance.threads: found -1; wanted 'auto' or greater than 0"),
        ("base_model_id: 3\n", ":1: base_model_id: found 3; wanted a text"),
        ("lora:\n  r: 2024-01-01\n", ':2: lora.r: found "2024-01-01"; wanted a whole number'),
        (f"lora:\n  r: {'x' * 200}\n", f':2: lora.r: found "{"x" * 79}; wanted a whole number'),
    ],
)  # fmt: skip
def test_wrong_value_is_refused_with_line_and_what_was_wanted(config_file, text: str, said: str) -> None:
    assert said in refusal(config_file(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sft:\n  output_dir: ~/x\n", ':2: sft.output_dir: found "~/x"; wanted a path without ~, which only a shell knows'),
        ("sft:\n  dataset_path: []\n", ":2: sft.dataset_path: found []; wanted a text or a list, which should have at least 1 item"),
        ("eval:\n  judge:\n    models: [a]\n", ':3: eval.judge.models: found ["a"]; wanted a list, which should have at least 2 items'),
        ("eval:\n  judge:\n    base_url: ftp\n", ":3: eval.judge.base_url: found \"ftp\"; wanted a text of the pattern '^https?://[^\\s@?#]+$'"),
        ("eval:\n  checks:\n  - name: short\n    1: 2\n", ":4: eval.checks.0.1: found 1; wanted a text as key"),
    ],
)  # fmt: skip
def test_what_was_wanted_is_told_in_plain_words_to_the_end(config_file, text: str, said: str) -> None:
    path = config_file(text)

    assert refusal(path) == f"{HEADING}{path}{said}"


def test_wrong_block_built_by_set_is_told_with_the_flag_as_its_place(config_file) -> None:
    told = refusal(config_file("seed: 1\n"), "sft.dataset_path.a=1")

    assert told == f'{HEADING}--set: sft.dataset_path: found {{"a": 1}}; wanted a text or a list'


def test_text_that_is_no_character_is_refused_with_what_stands_before_it(config_file) -> None:
    path = config_file("")
    cause = f"{path} or --set: a text holds what is no character (not UTF-8): "

    long = refusal(path, rf'base_model_id="{"x" * 60}\ud800 and more"')

    assert long == cause + "'" + "x" * 40 + r"\ud800'. Retype it."
    assert refusal(path, r'seed="\ud800"') == cause + r"""'{"seed": "\ud800'. Retype it."""


def test_both_quantizations_at_once_are_refused(config_file) -> None:
    path = config_file("quantization:\n  load_in_4bit: true\n  load_in_8bit: true\n")

    assert refusal(path) == (
        f"{HEADING}{path}:3: quantization.load_in_8bit: found true beside load_in_4bit: true; wanted only one of them"
    )


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("sft:\n  output_dir: runs\ndpo:\n  output_dir: runs/dpo\n", 4, "runs/dpo"),
        ("sft:\n  output_dir: runs/sft\ndpo:\n  output_dir: runs\n", 4, "runs"),
        ("sft:\n  output_dir: outputs/dpo_adapter\n", 2, "outputs/dpo_adapter"),
        ("dpo:\n  output_dir: outputs/sft_adapter\n", 2, "outputs/sft_adapter"),
    ],
)
def test_stages_that_would_replace_each_others_output_are_refused(
    config_file, text: str, line: int, found: str
) -> None:
    path = config_file(text)

    assert refusal(path) == (
        f"{HEADING}{path}:{line}: dpo.output_dir: found {found}, wanted a folder apart from that of sft.output_dir: "
        "one would replace the other"
    )


def test_password_in_a_url_is_refused_at_any_depth_without_being_shown(config_file) -> None:
    path = config_file("seed: 1\ntracking:\n  mlflow_tracking_uri: https://me:secret@host/x\n")
    assert refusal(path) == f"{HEADING}{path}:3: tracking.mlflow_tracking_uri: {PASSWORD}"

    path = config_file("sft:\n  dataset_path:\n  - path: a\n  - path: s3://me:secret@host/x\n")
    assert refusal(path) == f"{HEADING}{path}:4: sft.dataset_path.1.path: {PASSWORD}"


def test_url_without_a_password_is_taken(config_file) -> None:
    path = config_file("tracking:\n  mlflow_tracking_uri: http://me@host:5000/a:b@c\n")

    assert load_config(path).values.tracking.mlflow_tracking_uri == "http://me@host:5000/a:b@c"


def test_mistake_that_a_merge_brings_in_is_told_with_the_file(config_file) -> None:
    """A key taken in by `<<` has no line of its own."""
    path = config_file("<<: {sed: 1}\n")
    assert refusal(path) == f"{HEADING}{path}: sed: unknown key; did you mean `seed`?"

    path = config_file(
        "<<:\n"
        "  quantization: {load_in_4bit: true, load_in_8bit: true}\n"
        "  sft: {output_dir: runs, trainer: {save_stratgy: 'no'}}\n"
        "  dpo: {output_dir: runs/dpo}\n"
        "  tracking: {mlflow_tracking_uri: 'http://me:secret@host'}\n"
    )
    assert refusal(path).splitlines() == [
        "the configuration is not valid",
        f"  {path}: sft.trainer.save_stratgy: TRL's SFTConfig has no such argument; did you mean `sft.trainer.save_strategy`?",
        f"  {path}: quantization.load_in_8bit: found true beside load_in_4bit: true; wanted only one of them",
        f"  {path}: dpo.output_dir: found runs/dpo, wanted a folder apart from that of sft.output_dir: one would replace the other",
        f"  {path}: tracking.mlflow_tracking_uri: {PASSWORD}",
    ]


def test_all_mistakes_are_told_at_once(config_file) -> None:
    told = refusal(config_file("sed: 1\nlora:\n  r: no\nsft:\n  max_length: -1\n"))

    assert all(f":{line}: " in told for line in (1, 3, 5))


def test_key_written_twice_is_refused_with_both_lines(config_file) -> None:
    path = config_file("lora:\n  r: 8\n  alpha: 16\n  r: 4\n")

    assert refusal(path) == f"{path}:4: lora.r: written twice, first in line 2. Keep one."
    path = config_file("sft:\n  dataset_path:\n  - path: a\n    path: b\n")
    assert refusal(path).startswith(f"{path}:4: sft.dataset_path.0.path: written twice")


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "2.0e-4", "0.0002", ".2e-3"])
def test_every_spelling_of_a_small_number_is_a_number(config_file, text: str) -> None:
    assert load_config(config_file(f"sft:\n  learning_rate: {text}\n")).values.sft.learning_rate == 2e-4


def test_words_that_hold_an_e_stay_text(config_file) -> None:
    assert load_config(config_file("base_model_id: 1e5f\n")).values.base_model_id == "1e5f"


def test_section_whose_keys_are_all_commented_out_is_allowed(config_file) -> None:
    assert load_config(config_file("lora:\n  # r: 8\n")).values == Config()
    assert load_config(config_file("eval:\n  judge:\n    # model: x\n")).values == Config()


def test_empty_file_gives_the_defaults(config_file) -> None:
    assert load_config(config_file("")).values == Config()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"base_model_id: caf\xe9\n", "my.yaml:1: byte 19 is not UTF-8. Save the file as UTF-8"),
        ("- a\n- b\n", "found list, wanted `key: value` lines"),
        ("just words\n", "found str, wanted `key: value` lines"),
        ("seed: 1\nlora: {r: 8\nsft: 3", ":3: not valid YAML: expected ',' or '}', but got ':'."),
        (
            "seed: 1\nlora: \x07\n",
            "my.yaml:2: not valid YAML: found the control character 0x07.",
        ),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_unreadable_file_is_refused(config_file, content: str | bytes, said: str) -> None:
    path = config_file(content)

    told = refusal(path)

    assert str(path) in told
    assert said in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nbase_model_id: 2026-99-99\n", ":2: not valid YAML: found '2026-99-99', which is no timestamp."),
        ("seed: !!timestamp soon\n", ":1: not valid YAML: found 'soon', which is no timestamp."),
        ("offline: !!bool maybe\n", ":1: not valid YAML: found 'maybe', which is no bool."),
        (f"seed: !!int {'x' * 60}\n", f":1: not valid YAML: found '{'x' * 40}', which is no int."),
        (
            "lora:\n\tr: 8\n",
            r":2: not valid YAML: found character '\t' that cannot start any token; indent with spaces, not with tabs.",
        ),
        (
            'base_model_id: "C:\\models"\n',
            ":1: not valid YAML: found unknown escape character 'm'; "
            r'in "double quotes" \ has a meaning; write paths with /, or without quotes.',
        ),
        (
            "seed: 1\nbase_model_id: a: b\n",
            ":2: not valid YAML: mapping values are not allowed here; a space follows each key's colon, "
            "keys of a section stand below each other, text that holds `: ` stands in quotes.",
        ),
        ("\n\nseed: \x07\n", ":3: not valid YAML: found the control character 0x07."),
        ("a: &a [*a]\n", ": not valid YAML: nested too deeply, or an alias (*name) holds itself."),
    ],
)
def test_broken_yaml_is_refused_with_its_line_and_what_to_do(config_file, text: str, said: str) -> None:
    path = config_file(text)

    assert refusal(path) == f"{path}{said}"


def test_aliases_that_expand_are_refused_before_they_fill_the_memory(config_file, monkeypatch) -> None:
    monkeypatch.setattr("scripts.common.config.MAX_KEYS", 5)
    path = config_file("a: &a [1, 2]\nb: [*a, *a]\n")

    assert refusal(path) == f"{path}: holds more than 5 keys and list entries. Do its aliases (*name) expand?"
    assert load_config(config_file("lora: {r: 8, alpha: 3}\nseed: 1\n")).values.lora.alpha == 3


def test_shipped_file_is_found_from_any_working_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    loaded = load_config("configs/config.yaml")

    assert loaded.values == load_config(ROOT / "configs" / "config.yaml").values
    assert all(origin.startswith("configs/config.yaml:") for origin in loaded.origins.values())
    assert loaded.flags == "--config configs/config.yaml"


def test_missing_file_is_named_as_it_was_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert refusal(Path("absent.yaml")).startswith("absent.yaml: no such configuration file. There are: ")


def test_missing_file_names_the_shipped_ones(tmp_path: Path) -> None:
    told = refusal(tmp_path / "absent.yaml")

    assert "no such configuration file" in told
    assert "There are: configs/config.yaml, configs/demo.yaml, " in told


def test_folder_as_config_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: found {os.strerror(errno.EISDIR)}, wanted a YAML file in UTF-8."


def test_impossible_file_name_is_refused() -> None:
    assert refusal(Path("a\0b.yaml")) == "a\0b.yaml: found ValueError, wanted a YAML file in UTF-8."


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("sft.learning_rate=1e-4", "sft", "learning_rate", 1e-4),
        ("lora.r=4", "lora", "r", 4),
        ('lora.target_modules=["q_proj", "v_proj"]', "lora", "target_modules", ["q_proj", "v_proj"]),
        ("data.system_prompt=no", "data", "system_prompt", "no"),
        ("data.system_prompt=Be kind = be brief", "data", "system_prompt", "Be kind = be brief"),
        ('data.system_prompt="5"', "data", "system_prompt", "5"),
        ("data.system_prompt=null", "data", "system_prompt", None),
        ("sft.trainer.max_steps=5", "sft", "trainer", {"max_steps": 5}),
        ("quantization.load_in_4bit=true", "quantization", "load_in_4bit", True),
    ],
)
def test_set_takes_json_and_otherwise_plain_text(config_file, override, section, key, value) -> None:
    path = config_file("data:\n  system_prompt: from the file\n")

    assert getattr(getattr(load_config(path, [override]).values, section), key) == value


def test_last_set_wins_over_file_and_earlier_ones(config_file) -> None:
    assert load_config(config_file("seed: 1\n"), ["seed=2", "seed=3"]).values.seed == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.learning_rate", "wanted KEY=VALUE"),
        ("=3", "wanted KEY=VALUE"),
        ("sft.=3", "--set sft.=3: wanted KEY=VALUE, such as --set sft.learning_rate=1e-4"),
        ("seed.deeper=3", "seed is a value, not a section"),
        ("sft.max_length.a.b=3", "--set sft.max_length.a.b: sft.max_length is a value, not a section."),
        ('sft.trainer={"learning_rate": 1}', "--set: sft.trainer.learning_rate: has a place of its own"),
        ("lora.rank=3", "--set: lora.rank: unknown key"),
        ("offline=no", '--set: offline: found "no"; wanted a boolean'),
    ],
)
def test_bad_set_is_refused(config_file, override: str, said: str) -> None:
    assert said in refusal(config_file("seed: 1\nsft:\n  max_length: 8\n"), override)


def test_set_fills_a_block_that_stands_empty_in_the_file(config_file) -> None:
    loaded = load_config(config_file("sft:\n  trainer:\n"), ["sft.trainer.max_steps=5"])

    assert loaded.values.sft.trainer == {"max_steps": 5}


def test_every_stage_takes_one_file_and_any_number_of_overrides() -> None:
    parser = argparse.ArgumentParser(prog="stage")
    add_config_arguments(parser)

    assert vars(parser.parse_args([])) == {"config": "configs/config.yaml", "overrides": []}
    assert parser.parse_args(["--set", "a=1", "--config", "my.yaml", "--set", "b=2"]).overrides == ["a=1", "b=2"]
    assert " ".join(parser.format_help().partition("show this help message and exit")[2].split()) == (
        "--config FILE YAML configuration (default: configs/config.yaml) "
        "--set KEY=VALUE override one key, such as sft.learning_rate=1e-4; may be repeated; values are JSON, else plain text"
    )


def test_origin_of_each_value_is_known(config_file) -> None:
    path = config_file("lora:\n  r: 8\nsft:\n  trainer:\n    max_steps: 5\n")

    loaded = load_config(path, ["seed=3"])

    assert loaded.origin("lora.r") == f"{path}:2"
    assert loaded.origin("lora.alpha") == "default"
    assert loaded.origin("seed") == "--set"
    assert loaded.origin("sft.trainer.max_steps") == f"{path}:5"
    replaced = load_config(path, ['sft.trainer={"max_steps": 6}'])
    assert replaced.origin("sft.trainer.max_steps") == "--set", "a block that is replaced takes its old lines with it"
    assert replaced.origin("lora.r") == f"{path}:2"


def test_resolved_yaml_loads_to_the_same_values(config_file, tmp_path: Path) -> None:
    path = config_file("lora: {r: 8}\nsft: {learning_rate: 3e-5, trainer: {max_steps: 5}}\n")
    loaded = load_config(path, ["data.system_prompt=no # comment: ü"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(loaded.to_yaml(), encoding="utf-8")

    again = load_config(resolved)

    assert again.values == loaded.values
    assert again.digest() == loaded.digest()
    assert re.search(r"r: 8 +# .*my.yaml:1", loaded.to_yaml())
    assert '"no # comment: ü"' in loaded.to_yaml()


def test_digest_follows_values_and_not_their_place(config_file) -> None:
    first = load_config(config_file("seed: 1\noffline: true\n")).digest()

    assert load_config(config_file("# moved\noffline: true\nseed: 1\n")).digest() == first
    assert load_config(config_file("seed: 2\noffline: true\n")).digest() != first


FIRST_CLASS = sorted({*Config.model_fields["sft"].annotation.model_fields} - {"trainer"})


@pytest.mark.parametrize("name", sorted({*FIRST_CLASS, *OWNED_TRAINER_ARGUMENTS, *REMOVED_TRAINER_ARGUMENTS}))
def test_trainer_block_refuses_what_has_another_place(config_file, name: str) -> None:
    path = config_file(f"sft:\n  trainer:\n    {name}: 1\n")

    told = refusal(path)

    assert f"{path}:3: sft.trainer.{name}: " in told
    if name in FIRST_CLASS:
        assert f"write sft.{name}" in told
    else:
        place = {**REMOVED_TRAINER_ARGUMENTS, **OWNED_TRAINER_ARGUMENTS}[name]
        assert place.format(section="sft") in told


def test_trainer_block_refuses_a_misspelt_argument_with_the_right_one(config_file) -> None:
    path = config_file("sft:\n  trainer:\n    save_stratgy: 'no'\n")

    assert f"{path}:3: sft.trainer.save_stratgy: TRL's SFTConfig has no such argument" in refusal(path)
    assert "did you mean `sft.trainer.save_strategy`?" in refusal(path)


def test_trainer_block_within_the_trainer_block_is_no_argument(config_file) -> None:
    path = config_file("sft:\n  trainer:\n    trainer: 1\n")

    assert f"{path}:3: sft.trainer.trainer: TRL's SFTConfig has no such argument; " in refusal(path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("eval_strategy", "sometimes", 'found "sometimes"; wanted "no" or "steps" or "epoch"'),
        ("max_steps", "many", 'found "many"; wanted a whole number'),
        ("max_steps", "true", "found true; wanted a whole number"),
        ("max_steps", "ü" * 200, f'found "{"ü" * 79}; wanted a whole number'),
        ("weight_decay", "true", "found true; wanted a number"),
        ("full_determinism", "1", "found 1; wanted true or false"),
        ("debug", "3", "found 3; wanted text or a list"),
        ("lr_scheduler_kwargs", "3", "found 3; wanted lines of `key: value` or text or null"),
        ("save_steps", "0", "found 0; wanted a number above 0"),
        ("logging_steps", "-1", "found -1; wanted a number above 0"),
        ("eval_steps", "null", "found null; wanted a number above 0"),
    ],
)
def test_trainer_block_refuses_a_value_of_the_wrong_kind(config_file, name: str, value: str, said: str) -> None:
    path = config_file(f"sft:\n  trainer:\n    {name}: {value}\n")

    assert refusal(path) == f"{HEADING}{path}:3: sft.trainer.{name}: {said}"


@pytest.mark.parametrize(
    "block",
    [
        {"max_steps": 3, "eval_strategy": "no", "save_strategy": "epoch", "weight_decay": 0.1, "warmup_steps": 0.1},
        {"full_determinism": True, "debug": ["underflow_overflow"], "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"save_steps": 1, "logging_steps": 0.5, "weight_decay": 0, "save_total_limit": None},
        {"trackio_static_space_id": "any kind of value"},
    ],
)
def test_trainer_block_takes_what_trl_takes(config_file, block: dict) -> None:
    loaded = load_config(config_file(f"sft: {json.dumps({'trainer': block})}\n"))

    assert loaded.values.sft.trainer == block


def test_config_error_needs_no_heavy_library(config_file) -> None:
    """A mistake must answer at once, so nothing slow may be imported before the configuration is checked."""
    path = config_file("sed: 1\n")
    program = (
        "import sys; from scripts.train_sft import main; code = main(['--config', sys.argv[1]]); "
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'mlflow', 'datasets', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy or 'pydantic' not in sys.modules else code)"
    )

    done = run_python("-c", program, path)

    assert done.returncode == 2, done.stderr
    assert "did you mean `seed`?" in done.stderr
    assert "Traceback" not in done.stderr


def test_flags_give_the_same_configuration_to_the_next_stage(config_file) -> None:
    first = load_config(config_file("seed: 3\n"), ["data.system_prompt=Be kind, 'friend'", "lora.r=4"])
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    again = parser.parse_args(shlex.split(first.flags))

    assert load_config(again.config, again.overrides).values == first.values
