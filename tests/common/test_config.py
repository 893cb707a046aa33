"""The one YAML file: strict keys, useful complaints, overrides, and where each value came from."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.common.config import add_config_arguments, load_config
from scripts.common.paths import ROOT
from scripts.common.schema import Config
from tests.conftest import run_python
from tests.support.configs import refusal


def test_text_that_is_no_character_is_refused_with_what_stands_before_it(config_file) -> None:
    path = config_file("")
    cause = f"{path} or --set: a text holds something that is not a character (not UTF-8): "

    long = refusal(path, rf'base_model_id="{"x" * 60}\ud800 and more"')

    assert long == cause + "'" + "x" * 40 + r"\ud800'. Retype it."
    assert refusal(path, r'seed="\ud800"') == cause + r"""'{"seed": "\ud800'. Retype it."""


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

    message = refusal(path)

    assert str(path) in message
    assert said in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "seed: 1\nbase_model_id: 2026-99-99\n",
            ":2: not valid YAML: found '2026-99-99', which is not a valid timestamp.",
        ),
        ("seed: !!timestamp soon\n", ":1: not valid YAML: found 'soon', which is not a valid timestamp."),
        ("offline: !!bool maybe\n", ":1: not valid YAML: found 'maybe', which is not a valid bool."),
        (f"seed: !!int {'x' * 60}\n", f":1: not valid YAML: found '{'x' * 40}', which is not a valid int."),
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
    message = refusal(tmp_path / "absent.yaml")

    assert "no such configuration file" in message
    assert "There are: configs/config.yaml, configs/demo.yaml, " in message


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
        ("lora.target_modules=[q_proj,v_proj]", "lora", "target_modules", ["q_proj", "v_proj"]),
        ("lora.target_modules= [ q_proj, v_proj ] ", "lora", "target_modules", ["q_proj", "v_proj"]),
        ("lora.target_modules=[q_proj]", "lora", "target_modules", ["q_proj"]),
        ("lora.target_modules=[]", "lora", "target_modules", []),
        ("deid.allow_list=[Jane Doe,5]", "deid", "allow_list", ["Jane Doe", "5"]),
        ("sft.trainer.label_names=[a,b]", "sft", "trainer", {"label_names": ["a", "b"]}),
        ("data.system_prompt=[be kind,be brief]", "data", "system_prompt", "[be kind,be brief]"),
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


@pytest.mark.parametrize(
    "text", ["[q_proj,[v_proj]]", "['q_proj','v_proj']", '["q_proj",v_proj]', "[q_proj,]", "[,]", "[q_proj", "[{a: b}]"]
)
def test_what_is_neither_json_nor_bare_words_stays_text(config_file, text: str) -> None:
    message = refusal(config_file(""), f"lora.target_modules={text}")

    assert f"--set: lora.target_modules: found {json.dumps(text)}; wanted 'auto' or a list" in message


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
        "--set KEY=VALUE override one key, such as sft.learning_rate=1e-4; may be repeated; values are JSON, [a,b], else plain text"
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


@pytest.mark.parametrize(
    "override",
    [
        "data.system_prompt=Be kind, 'friend'",
        "data.system_prompt=two\nlines $HOME `id` !! \\ *",
        "lora.target_modules=[q_proj, v_proj]",
        'lora.target_modules=["q_proj", "v_proj"]',
        "lora.target_modules=[]",
        'sft.trainer={"lr_scheduler_kwargs": {"min_lr": 0}}',
    ],
)
def test_flags_give_the_same_configuration_to_the_next_stage(config_file, override: str) -> None:
    first = load_config(config_file("seed: 3\n"), [override, "lora.r=4"])
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    echo = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
    printed = subprocess.check_output(["sh", "-c", f"{shlex.join(echo)} {first.flags}"], text=True)
    again = parser.parse_args(json.loads(printed))

    assert load_config(again.config, again.overrides).values == first.values
