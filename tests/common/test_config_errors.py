"""What the configuration refuses: the message names file, line, what was found and what was wanted."""

from __future__ import annotations

import pytest

from scripts.common.config import load_config
from tests.support.configs import HEADING, refusal

PASSWORD = (
    "found a password in the URL, which would be copied into manifests and MLflow. Take it out; "
    "MLflow takes MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD from the environment"
)


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

    message = refusal(path)

    assert f"{path}:{line}: {said}" in message
    assert message.endswith(said) or said.endswith((", ", ": ", "dropout"))


def test_a_mistake_is_reported_in_one_line_under_the_heading(config_file) -> None:
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
def test_what_was_wanted_is_reported_in_plain_words_to_the_end(config_file, text: str, said: str) -> None:
    path = config_file(text)

    assert refusal(path) == f"{HEADING}{path}{said}"


def test_wrong_block_built_by_set_is_reported_with_the_flag_as_its_place(config_file) -> None:
    message = refusal(config_file("seed: 1\n"), "sft.dataset_path.a=1")

    assert message == f'{HEADING}--set: sft.dataset_path: found {{"a": 1}}; wanted a text or a list'


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


def test_files_of_what_people_say_are_three(config_file) -> None:
    path = config_file("serve: {votes_path: runs/said.jsonl, thumbs_path: ./runs/said.jsonl}\n")

    assert "serve.thumbs_path: found ./runs/said.jsonl, wanted another file than serve.votes_path" in refusal(path)


def test_url_without_a_password_is_taken(config_file) -> None:
    path = config_file("tracking:\n  mlflow_tracking_uri: http://me@host:5000/a:b@c\n")

    assert load_config(path).values.tracking.mlflow_tracking_uri == "http://me@host:5000/a:b@c"


def test_mistake_that_a_merge_brings_in_is_reported_with_the_file(config_file) -> None:
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


def test_all_mistakes_are_reported_at_once(config_file) -> None:
    message = refusal(config_file("sed: 1\nlora:\n  r: no\nsft:\n  max_length: -1\n"))

    assert all(f":{line}: " in message for line in (1, 3, 5))
