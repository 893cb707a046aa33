"""No dead knobs: every configuration key and every flag is read, and has a test that fails when it does nothing.

`PROOFS` names that test. `make drill` runs each of them with its key ignored (whoever reads the key gets the default, see
tests/offline/sitecustomize.py) and wants it to fail.
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from scripts.common import schema
from scripts.common.schema import Config
from tests.conftest import ROOT, run_python
from tests.repo.test_entry_points import STAGES, module_name

DECLARING = {"schema.py", "make_docs.py"}


def names_read(path: Path) -> set[str]:
    """Return every name that is read as an attribute, as a text key of a dumped configuration, or through `open_run`."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    opened = [
        argument
        for node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "open_run"
        for argument in node.args
    ]
    named = {argument.id for argument in opened if isinstance(argument, ast.Name)}
    opened += [node.value for node in nodes if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in named]
    texts = {item.value for node in opened for item in ast.walk(node) if isinstance(item, ast.Constant)}
    slices = [node.slice for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)]
    return (
        attributes
        | {text.rpartition(".")[2] for text in texts if isinstance(text, str)}
        | {item.value for item in slices if isinstance(item, ast.Constant) and isinstance(item.value, str)}
    )


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Name every key of a section and of those in it."""
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += keys(inner, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


READ = set().union(
    *(
        names_read(path)
        for folder in ("scripts", "serve", "eval")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in DECLARING
    )
)
KEYS = [
    *keys(Config),
    *(f"{entry.__name__}.{name}" for entry in (schema.Check, schema.WeightedDataset) for name in entry.model_fields),
]


def flags() -> set[str]:
    """Name every flag of every entry point beside --help."""
    found = set()
    for path in STAGES:
        parser = importlib.import_module(module_name(path)).build_parser()
        found |= {
            f"{module_name(path)} {action.option_strings[-1]}" for action in parser._actions if action.option_strings
        }
    return {flag for flag in found if not flag.endswith(" --help")}


# --- where each one's effect is shown

EFFECTS = "repo/test_key_effects.py::test_key_reaches_the_trainer"
SFT, DPO, KTO = (f"training/test_train_{stage}.py::" for stage in ("sft", "dpo", "kto"))
SCRUB, DEID = "deid/test_scrubbing.py::", "deid/test_deid_presidio.py::"
JUDGE, LMEVAL, COMPARE = "eval/test_judge.py::", "eval/test_run_lmeval.py::", "eval/test_compare.py::"
STUDY = "studies/test_study.py::"
ARMS = "eval/test_arms.py::"
PAIRS = "pairs/test_make_pairs.py::"
FAULTS, EXPORT = "serve/test_faults.py::", "export/test_export_lora.py::"
CHECK = "eval/test_checks.py::test_each_condition_decides"
PROOFS = {
    "base_model_id": SFT + "test_manifest_of_a_finished_adapter_is_complete",
    "base_model_revision": "repo/test_key_effects.py::test_revision_chooses_among_cached_ones",
    "seed": EFFECTS,
    "offline": JUDGE + "test_what_cannot_work_is_refused_with_the_reason",
    "quantization.load_in_4bit": "model/test_quantized.py::test_missing_bitsandbytes_names_the_key_and_the_requirements_file",
    "quantization.load_in_8bit": "repo/test_key_effects.py::test_8bit_loads_8bit_layers",
    **{
        f"lora.{name}": "model/test_adapter.py::test_lora_flags_reach_the_saved_adapter"
        for name in ("r", "alpha", "dropout", "use_rslora", "use_dora")
    },
    "lora.target_modules": "model/test_adapter.py::test_named_modules_are_the_only_ones_adapted",
    "lora.init": EFFECTS,
    **{
        f"data.{key}": "dataset/test_split.py::test_split_seed_changes_which_prompts_and_ratios_how_many"
        for key in ("validation_ratio", "test_ratio", "split_seed")
    },
    "data.group_field": "dataset/test_split.py::test_a_group_stays_on_one_side_in_every_file_and_with_any_prompt",
    "data.on_bad_row": SFT + "test_bad_rows_are_written_to_the_run_folder_when_skipped",
    "data.train_on": "dataset/test_records.py::test_train_on_decides_which_answers_carry_the_loss",
    "data.merge_turns": "dataset/test_columns.py::test_consecutive_turns_are_joined_on_request",
    "data.system_prompt": "dataset/test_records.py::test_system_prompt_goes_only_before_conversations_that_bring_none",
    "data.chat_template_kwargs": "training/test_start.py::test_an_argument_that_the_template_does_not_know_is_refused",
    "data.template_date": "training/test_start.py::test_a_configured_day_is_taken_and_must_be_the_parents",
    "sft.dataset_path": SFT + "test_weights_of_datasets_reach_training",
    "sft.output_dir": SFT + "test_same_seed_gives_the_same_adapter_and_another_seed_another",
    "sft.max_length": SFT + "test_answer_longer_than_max_length_is_refused_with_its_line_and_the_fix",
    "sft.early_stopping_patience": "repo/test_key_effects.py::test_early_stopping_is_on_only_when_asked_for",
    "dpo.dataset_path": DPO + "test_bad_pairs_are_named_by_line",
    "dpo.output_dir": DPO + "test_a_run_that_degenerates_ends_early_when_asked",
    "dpo.max_length": DPO + "test_refuses",
    "dpo.early_stopping_patience": "repo/test_key_effects.py::test_early_stopping_is_on_only_when_asked_for",
    **{
        f"{name}.{key}": EFFECTS
        for name in ("sft", "dpo", "kto")
        for key in (
            "num_train_epochs",
            "learning_rate",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "trainer",
        )
    },
    "dpo.init_from": DPO + "test_refuses_an_adapter_that_is",
    "dpo.reference": EFFECTS,
    "dpo.beta": EFFECTS,
    "dpo.loss_type": EFFECTS,
    "dpo.sft_weight": EFFECTS,
    "dpo.stop_on_degeneration": DPO + "test_a_run_that_degenerates_ends_early_when_asked",
    **{
        f"pairs.{name}": PAIRS + "test_settings_reach_the_samples"
        for name in ("samples_per_prompt", "max_prompts", "max_new_tokens", "batch_size")
    },
    "pairs.temperature": PAIRS + "test_mistakes_get_one_message_and_write_nothing",
    "pairs.max_per_prompt": PAIRS + "test_so_many_pairs_are_made_of_a_prompt_at_most",
    "pairs.balance_length": PAIRS + "test_lengths_are_balanced_unless_that_is_not_wanted",
    "study.output_dir": STUDY + "test_dry_run_lists_the_runs_and_writes_nothing",
    "study.seeds": STUDY + "test_dry_run_lists_the_runs_and_writes_nothing",
    "study.arms": "studies/test_plan.py::test_arms_share_the_sft_adapter_and_the_pairs_of_their_seed_and_vary_by_their_own_keys",
    "kto.dataset_path": KTO + "test_bad_records_are_named_by_line",
    "kto.output_dir": KTO + "test_a_run_that_degenerates_ends_early_when_asked",
    "kto.max_length": KTO + "test_refuses",
    "kto.early_stopping_patience": "repo/test_key_effects.py::test_early_stopping_is_on_only_when_asked_for",
    "kto.init_from": KTO + "test_refuses",
    **{f"kto.{key}": EFFECTS for key in ("reference", "beta", "loss_type", "desirable_weight", "undesirable_weight")},
    "kto.stop_on_degeneration": KTO + "test_a_run_that_degenerates_ends_early_when_asked",
    "performance.device": "repo/test_key_effects.py::test_machine_is_the_one_asked_for",
    "performance.dtype": "repo/test_key_effects.py::test_machine_is_the_one_asked_for",
    "performance.threads": "repo/test_key_effects.py::test_machine_is_the_one_asked_for",
    "performance.gradient_checkpointing": EFFECTS,
    "performance.fast_path": EFFECTS,
    "performance.compile": "speed/test_compiling.py::test_every_layer_but_the_first_is_compiled",
    "performance.group_by_length": EFFECTS,
    "eval.output_dir": COMPARE + "test_without_a_dpo_adapter_base_and_sft_are_compared",
    "eval.max_new_tokens": COMPARE + "test_without_a_dpo_adapter_base_and_sft_are_compared",
    "eval.batch_size": COMPARE + "test_answers_are_given_in_batches_of_the_size_asked_for",
    "eval.max_prompts": COMPARE + "test_without_a_dpo_adapter_base_and_sft_are_compared",
    "eval.checks": COMPARE + "test_every_metric_has_intervals_around_its_value",
    "eval.int8": ARMS + "test_an_arm_in_int8_is_compared_with_the_same_adapter_on_full_weights",
    "eval.models": ARMS + "test_each_reward_is_against_the_adapter_of_its_own_seed",
    "eval.plan.question": ARMS + "test_every_arm_has_its_column_with_its_seeds",
    "eval.plan.measures": ARMS + "test_a_measure_of_the_plan_that_cannot_be_measured_is_refused",
    "eval.plan.alpha": ARMS + "test_the_plan_is_frozen_by_the_first_stage_and_handed_down",
    "eval.plan.seeds": ARMS + "test_another_number_of_seeds_than_planned_is_noted",
    "eval.margins": ARMS + "test_the_plan_is_frozen_by_the_first_stage_and_handed_down",
    "eval.judge.models": JUDGE + "test_other_models_are_judged_beside_the_first_pair",
    "eval.judge.criteria": JUDGE + "test_settings_of_the_endpoint_reach_it",
    "eval.judge.base_url": JUDGE + "test_settings_of_the_endpoint_reach_it",
    "eval.judge.model": JUDGE + "test_settings_of_the_endpoint_reach_it",
    "eval.judge.api_key_variable": JUDGE + "test_the_key_goes_into_the_header_and_nowhere_else",
    "eval.judge.concurrent_requests": JUDGE + "test_settings_of_the_endpoint_reach_it",
    "eval.judge.timeout_seconds": JUDGE + "test_settings_of_the_endpoint_reach_it",
    "eval.judge.max_tokens": JUDGE + "test_settings_of_the_endpoint_reach_it",
    "lmeval.output_dir": LMEVAL + "test_a_second_call_adds_to_the_first_and_a_limit_is_never_compared",
    "lmeval.batch_size": LMEVAL + "test_settings_stand_with_every_result",
    "lmeval.apply_chat_template": LMEVAL + "test_a_chat_template_is_put_around_questions_when_asked",
    "deid.required": DPO + "test_refuses",
    "deid.profile": SCRUB + "test_operators_that_would_not_keep_their_promise_are_refused",
    "deid.operator": SCRUB + "test_operators",
    "deid.operators": SCRUB + "test_an_entity_can_have_its_own_operator",
    "deid.consistency": SCRUB + "test_file_wide_surrogates_do_not_depend_on_the_place",
    "deid.entities": SCRUB + "test_a_configuration_that_cannot_work_is_refused",
    "deid.thresholds": SCRUB + "test_a_configuration_that_cannot_work_is_refused",
    "deid.allow_list": SCRUB + "test_allow_list_deny_list_and_own_recognizers",
    "deid.deny_list": SCRUB + "test_allow_list_deny_list_and_own_recognizers",
    "deid.recognizers": SCRUB + "test_a_configuration_that_cannot_work_is_refused",
    "deid.rampart": SCRUB + "test_rampart_is_asked_for_by_its_key",
    "deid.language": SCRUB + "test_a_configuration_that_cannot_work_is_refused",
    "deid.detect_language": "deid/test_languages.py::test_without_detection_every_record_is_read_as_the_language_of_the_file",
    "deid.countries": "deid/test_countries.py::test_only_the_countries_that_are_named_are_looked_for",
    "deid.spacy_model": SCRUB + "test_a_configuration_that_cannot_work_is_refused",
    "deid.fields": SCRUB + "test_a_field_that_is_missing_holds_the_record_back",
    "deid.safe_fields": SCRUB + "test_safe_fields_are_the_ones_configured",
    "deid.columns": DEID + "test_columns_say_what_they_hold",
    "deid.workers": DEID + "test_as_many_processes_work_as_asked_for",
    "deid.max_quarantine": DEID + "test_records_that_cannot_be_vouched_for_are_held_back_with_place_and_reason",
    "serve.adapter_path": FAULTS + "test_a_missing_adapter_names_the_stage_to_run",
    "serve.adapters": "serve/test_engine.py::test_mixed_batches_give_the_tokens_of_plain_peft",
    "serve.weights": "serve/test_int8.py::test_the_start_says_what_rounding_changes",
    "serve.max_context_tokens": "serve/test_engine.py::test_limits_of_the_configuration_reach_the_engine",
    "serve.max_concurrent": FAULTS + "test_a_cache_that_does_not_fit_is_refused",
    "serve.prefix_cache_tokens": "serve/test_engine.py::test_limits_of_the_configuration_reach_the_engine",
    "serve.max_queue": "serve/test_engine.py::test_limits_of_the_configuration_reach_the_engine",
    "serve.max_queue_per_client": "serve/test_engine.py::test_limits_of_the_configuration_reach_the_engine",
    "serve.default_max_new_tokens": "serve/test_engine.py::test_limits_of_the_configuration_reach_the_engine",
    "serve.deadline_seconds": "serve/test_engine.py::test_limits_of_the_configuration_reach_the_engine",
    "serve.queue_timeout_seconds": "serve/test_engine.py::test_limits_of_the_configuration_reach_the_engine",
    "serve.drain_seconds": FAULTS + "test_sigterm_ends_long_streams_at_the_limit_with_a_reason",
    "serve.allowed_hosts": FAULTS + "test_without_keys_only_this_machine_is_answered",
    "serve.allowed_origins": "serve/test_connections.py::test_only_pages_of_allowed_origins_may_ask",
    "serve.adapters_root": "serve/test_live_adapters.py::test_adapters_come_and_go_and_each_answers_as_peft_does",
    "serve.watch": "serve/test_live_adapters.py::test_a_finished_training_is_served_without_a_restart",
    "serve.api_keys_file": FAULTS + "test_a_key_file_that_others_can_read_is_refused",
    "serve.votes_path": "serve/test_api.py::test_votes_become_preference_records",
    "serve.thumbs_path": "serve/test_votes.py::test_thumbs_are_records_that_kto_reads_and_name_their_adapter",
    "serve.queue_path": "serve/test_votes.py::test_the_queue_offers_prompts_of_the_training_side_the_least_sure_first",
    "serve.queue_votes_path": "serve/test_votes.py::test_a_file_of_votes_on_another_adapter_is_refused_and_kept",
    "export.output_dir": EXPORT + "test_folders_of_the_configuration_are_used",
    "export.gguf_dir": EXPORT + "test_folders_of_the_configuration_are_used",
    "export.dtype": EXPORT + "test_folders_of_the_configuration_are_used",
    "tracking.mlflow_tracking_uri": "common/test_tracking.py::test_store_that_cannot_be_opened_is_refused_by_key_and_uri",
    "tracking.experiment": SFT + "test_weights_of_datasets_reach_training",
    "tracking.log_adapter": SFT + "test_weights_of_datasets_reach_training",
    "tracking.parent_run_id": "common/test_tracking.py::test_the_configured_parent_comes_before_that_of_the_stage",
    **{f"Check.{name}": CHECK for name in schema.Check.model_fields if name != "name"},
    "Check.name": COMPARE + "test_every_check_has_its_row_by_name",
    "WeightedDataset.path": SFT + "test_weights_of_datasets_reach_training",
    "WeightedDataset.weight": SFT + "test_weights_of_datasets_reach_training",
    "WeightedDataset.columns": "dataset/test_columns.py::test_each_source_has_its_own_map_of_columns",
    "WeightedDataset.split": "dataset/test_files.py::test_hub_dataset_is_read_from_the_split_and_the_configuration_that_are_named",
    "WeightedDataset.name": "dataset/test_files.py::test_hub_dataset_is_read_from_the_split_and_the_configuration_that_are_named",
}

WITH_SETTINGS = {  # a test that gives the script both --config and --set, and fails without either
    "scripts.train_sft": SFT + "test_weights_of_datasets_reach_training",
    "scripts.train_kto": KTO + "test_a_run_that_degenerates_ends_early_when_asked",
    "scripts.train_dpo": DPO + "test_a_run_that_degenerates_ends_early_when_asked",
    "scripts.make_pairs": PAIRS + "test_settings_reach_the_samples",
    "scripts.export_lora": EXPORT + "test_folders_of_the_configuration_are_used",
    "scripts.study": STUDY + "test_flags_decide_seeds_and_variants",
    "scripts.doctor": "repo/test_doctor.py::test_data_is_read_as_training_reads_it",
    "eval.compare": COMPARE + "test_without_a_dpo_adapter_base_and_sft_are_compared",
    "eval.judge": JUDGE + "test_settings_of_the_endpoint_reach_it",
    "eval.run_lmeval": LMEVAL + "test_a_chat_template_is_put_around_questions_when_asked",
}
MISTAKES = DEID + "test_mistakes_are_named_and_leave_no_output"
HELD_BACK = DEID + "test_records_that_cannot_be_vouched_for_are_held_back_with_place_and_reason"
FLAG_PROOFS = {
    **{f"{module} {flag}": proof for module, proof in WITH_SETTINGS.items() for flag in ("--config", "--set")},
    "scripts.train_sft --resume": SFT + "test_resume_of_a_finished_run_changes_nothing_and_exits_0",
    "scripts.train_sft --dry-run": SFT + "test_dry_run_shows_the_plan_and_writes_nothing",
    "scripts.train_sft --require-deid-report": "repo/test_key_effects.py::test_data_without_a_report_is_refused_when_asked",
    "scripts.train_dpo --resume": DPO + "test_resuming_a_finished_run_does_nothing",
    "scripts.train_dpo --dry-run": DPO + "test_dry_run_trains_nothing",
    "scripts.train_dpo --require-deid-report": "repo/test_key_effects.py::test_data_without_a_report_is_refused_when_asked",
    "scripts.start --yes": "repo/test_own_data.py::test_four_commands_from_forty_emails_to_two_answers",
    "scripts.start --out": "repo/test_own_data.py::test_what_is_there_is_never_overwritten",
    "scripts.make_pairs --by": PAIRS + "test_samples_that_keep_more_rules_are_preferred",
    "scripts.make_pairs --from": PAIRS + "test_another_adapter_is_asked_when_it_is_named",
    "scripts.make_pairs --votes": PAIRS + "test_votes_become_pairs_and_those_on_held_out_prompts_do_not",
    "scripts.make_pairs --out": PAIRS + "test_a_killed_run_resumes_at_whole_batches_byte_for_byte",
    **{f"scripts.study {flag}": STUDY + "test_flags_decide_seeds_and_variants" for flag in ("--seeds", "--vary", "--yes")},
    "scripts.study --dry-run": STUDY + "test_dry_run_lists_the_runs_and_writes_nothing",
    "scripts.train_kto --resume": KTO + "test_resuming_a_finished_run_does_nothing",
    "scripts.train_kto --dry-run": KTO + "test_dry_run_trains_nothing",
    "scripts.train_kto --require-deid-report": "repo/test_key_effects.py::test_data_without_a_report_is_refused_when_asked",
    "scripts.export_lora --base_model": EXPORT + "test_adapter_of_another_base",
    "scripts.export_lora --adapter": EXPORT + "test_folders_of_the_configuration_are_used",
    "scripts.export_lora --out_dir": EXPORT + "test_merged_model_given_as_adapter",
    "scripts.export_lora --format": EXPORT + "test_folders_of_the_configuration_are_used",
    "scripts.export_lora --dtype": EXPORT + "test_narrower_type_is_held_to_the_tokens_it_chooses",
    "scripts.export_lora --push_to_hub": EXPORT + "test_upload_while_offline",
    "scripts.deid_presidio --in": DEID + "test_the_sample_loses_its_people_and_keeps_its_shape",
    "scripts.deid_presidio --out": DEID + "test_the_sample_loses_its_people_and_keeps_its_shape",
    "scripts.deid_presidio --overwrite": HELD_BACK,
    "scripts.deid_presidio --max-quarantine": HELD_BACK,
    **{f"scripts.deid_presidio {flag}": MISTAKES for flag in ("--profile", "--operator", "--fields", "--workers", "--evaluate", "--set")},
    "scripts.deid_presidio --sample": DEID + "test_a_review_sheet_is_drawn_only_when_asked_for_and_is_its_owners_alone",
    "scripts.deid_presidio --decrypt": DEID + "test_encrypted_records_can_be_restored_with_the_key",
    "scripts.deid_presidio --config": "repo/test_key_effects.py::test_deid_reads_the_configuration_it_is_given",
    "scripts.get_demo_model --out": "repo/test_key_effects.py::test_demo_model_goes_where_it_is_asked_for",
    "eval.compare --models": ARMS + "test_every_arm_has_its_column_with_its_seeds",
    "eval.compare --side": ARMS + "test_variants_are_measured_on_the_validation_side_without_a_look_at_the_test_side",
    "eval.compare --note": ARMS + "test_every_arm_has_its_column_with_its_seeds",
    "eval.compare --dry-run": COMPARE + "test_a_dry_run_checks_the_arms_and_says_what_they_can_show",
    "eval.compare --runs": ARMS + "test_runs_is_refused_and_names_the_study",
    "scripts.make_pictures --config": "repo/test_make_pictures.py::test_report_and_playground_are_kept_in_every_width_and_scheme",
    "scripts.make_pictures --set": "repo/test_make_pictures.py::test_report_and_playground_are_kept_in_every_width_and_scheme",
    "scripts.make_pictures --all": "repo/test_make_pictures.py::test_report_and_playground_are_kept_in_every_width_and_scheme",
    "serve.ask --config": "serve/test_ask.py::test_base_and_every_trained_adapter_answer_as_the_libraries_do",
    "serve.ask --set": "serve/test_ask.py::test_an_answer_that_was_cut_says_so_and_what_allows_more",
    "serve.batch --out": "serve/test_batch.py::test_a_run_that_was_cut_off_is_continued_and_nothing_is_answered_twice",
    "serve.batch --config": "serve/test_batch.py::test_answers_are_those_of_the_libraries_in_the_order_of_the_lines",
    "serve.batch --set": "serve/test_batch.py::test_a_small_queue_holds_a_large_file",
    "eval.judge --by": JUDGE + "test_settings_of_the_endpoint_reach_it",
    "eval.judge --votes": JUDGE + "test_votes_of_a_page_on_other_answers_are_refused",
    "eval.run_lmeval --model_path": LMEVAL + "test_a_chat_template_is_put_around_questions_when_asked",
    "eval.run_lmeval --task": LMEVAL + "test_a_chat_template_is_put_around_questions_when_asked",
    "eval.run_lmeval --limit": LMEVAL + "test_a_second_call_adds_to_the_first_and_a_limit_is_never_compared",
}  # fmt: skip
# `make smoke`, which continuous integration runs, would take an hour without it.
FLAGS_ELSEWHERE = {"scripts.demo --smoke"}
ALL_PROOFS = {**PROOFS, **FLAG_PROOFS}


@pytest.mark.parametrize("key", keys(Config))
def test_key_is_read_outside_the_schema(key: str) -> None:
    assert key.rpartition(".")[2] in READ


def test_every_key_and_flag_has_a_proof_and_no_proof_is_left_over() -> None:
    assert set(PROOFS) == set(KEYS)
    # What the benchmarks print is looked at, not tested.
    assert set(FLAG_PROOFS) | FLAGS_ELSEWHERE == {flag for flag in flags() if not flag.startswith("eval.benchmarks.")}


@pytest.mark.parametrize("proof", sorted(set(ALL_PROOFS.values())))
def test_proof_exists(proof: str) -> None:
    file, _, name = proof.partition("::")
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {name}\(", text, re.MULTILINE)


@pytest.mark.drill
@pytest.mark.parametrize("knob", sorted(ALL_PROOFS))
def test_proof_fails_when_the_knob_does_nothing(knob: str, tmp_path: Path) -> None:
    """In another working folder, since an ignored output folder would be one of the user's own."""
    proof = ROOT / "tests" / ALL_PROOFS[knob]
    done = run_python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", ROOT / "pyproject.toml", proof,
        cwd=tmp_path, timeout=1200, IGNORED=knob.rpartition(" ")[2],
    )  # fmt: skip
    assert done.returncode == 1, done.stdout[-2000:]
    assert " skipped" not in done.stdout.splitlines()[-1]
