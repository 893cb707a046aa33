"""Evaluation under lm-eval: scores the model it names, compares fairly, and leaves nothing half-written."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import run_lmeval
from eval.lmeval import results as lmeval_results
from eval.lmeval.models import SharedContextLM
from eval.lmeval.results import compare_entries
from scripts.common.artifacts import Manifest, read_manifest, write_manifest
from scripts.common.config import load_config
from scripts.common.machine import Machine
from scripts.common.schema import Config, Lora
from scripts.dataset.chat_format import ChatFormat, template_sha256, tokenizer_sha256
from scripts.dataset.rendering import render_prompt
from scripts.model.adapter import add_lora, load_adapter
from scripts.model.base import load_base, load_tokenizer
from scripts.model.fingerprint import base_fingerprint
from tests.conftest import save_tiny_model, write_jsonl
from tests.repo.test_library_traps import write_gguf
from tests.support.chain import manifest, write_chain
from tests.support.manifests import change_manifest, split_facts
from tests.support.stops import FAMILIES, change_generation_config, save_family_model

CPU = Machine("cpu", torch.float32, 1, 1, ())
WORDS = ("the", "report", "is", "late", "and", "ready", "next", "week", "team", "no")
CHECKS = [{"name": "says it is", "must_contain": ["it is"]}, {"name": "at most 500 words", "max_words": 500}]


def save_adapter(folder: Path, base: Path, stage: str, seed: int, scale: float = 0.3, **facts: Any) -> Path:
    """Save an adapter that changes the base by `scale`, as the training stages would."""
    tokenizer = load_tokenizer(base)
    model = add_lora(load_base(base, Config(), CPU), Lora(r=4, alpha=8), str(base))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale) if scale else torch.nn.init.zeros_(parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    about = {
        "base_model": {"id": str(base), "revision": None, "fingerprint": base_fingerprint(base)},
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": template_sha256(tokenizer),
        "parent": None, "datasets": [], "split": split_facts(), "config": {},
        "mlflow": {"run_id": None}, "metrics": {},
    }  # fmt: skip
    write_manifest(folder, Manifest.model_validate({"stage": stage, **about, **facts}))
    return folder


def choice_rows(count: int = 24) -> list[dict[str, Any]]:
    """Return questions of one line; the file has a few that only white space tells apart."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(count):
        picks = torch.randint(len(WORDS), (9,), generator=generator).tolist()
        words = [WORDS[pick] for pick in picks]
        choices = [" ".join(words[3:5]), " ".join(words[5:9]), f"{words[0]} {number}"]
        rows.append({"id": number, "query": f"Which {' '.join(words[:3])}?\n", "choices": choices, "gold": number % 3})
    return rows


@pytest.fixture(autouse=True)
def closed_log() -> Iterator[None]:
    """Take down the log that a call set up, whose stream ends with its test."""
    yield
    logging.getLogger().handlers.clear()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny base, two adapters, a merged model, a GGUF, data and a configuration."""
    folder = tmp_path_factory.mktemp("lmeval")
    write_chain(folder, eval={"checks": CHECKS, "output_dir": str(folder / "out/comparison")}, lmeval={"batch_size": 4})
    base = folder / "model"
    save_adapter(folder / "sft_adapter", base, "sft", seed=1)
    save_adapter(folder / "dpo_adapter", base, "dpo", seed=2)
    tokenizer = load_tokenizer(base)
    merged = load_adapter(load_base(base, Config(), CPU), folder / "dpo_adapter").merge_and_unload()
    merged.save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    made_of = read_manifest(folder / "dpo_adapter")
    write_manifest(folder / "merged", made_of.model_copy(update={"stage": "merged"}))
    (folder / "gguf").mkdir()
    write_gguf(load_base(base, Config(), CPU), folder / "gguf/model.gguf")
    tokenizer.save_pretrained(folder / "gguf")
    write_jsonl(folder / "quiz.jsonl", choice_rows())
    return folder


def call(place: Path, out: Path, *arguments: str) -> int:
    """Run the command with results in a folder of its own."""
    settings = ["--config", str(place / "config.yaml"), "--set", f"lmeval.output_dir={out}"]
    return run_lmeval.main([*settings, *arguments])


def results(out: Path) -> dict[str, Any]:
    """Return results.json."""
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def values(out: Path) -> dict[tuple[str, str, str], float]:
    """Return every figure by task, label and metric."""
    return {
        (entry["task"], entry["label"], name): metric["value"]
        for entry in results(out)["entries"]
        for name, metric in entry["metrics"].items()
    }


@pytest.fixture(scope="module")
def together(place: Path) -> Path:
    """Evaluate base, both adapters, the merged model and the GGUF in one call."""
    out = place / "together"
    paths = ["base", *(str(place / name) for name in ("sft_adapter", "dpo_adapter", "merged", "gguf"))]
    tasks = [f"multiple_choice={place}/quiz.jsonl", "domain"]
    assert call(place, out, "--model_path", *paths, "--task", *tasks, "--set", "eval.max_new_tokens=8") == 0
    return out


# --- the right scores


def by_hand(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Score choices with plain transformers: the sum of log-probabilities, and that over the choice's bytes."""
    hits, normed = 0, 0
    for row in rows:
        context = row["query"].strip() + "\nAnswer:"
        scores = []
        for choice in row["choices"]:
            start, ids = len(tokenizer(context)["input_ids"]), tokenizer(f"{context} {choice}")["input_ids"]
            with torch.no_grad():
                logps = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
            scores.append(sum(float(logps[place - 1, ids[place]]) for place in range(start, len(ids))))
        bytes_ = [len(choice.encode()) for choice in row["choices"]]
        hits += max(range(3), key=lambda i: scores[i]) == row["gold"]
        normed += max(range(3), key=lambda i: scores[i] / bytes_[i]) == row["gold"]
    return hits / len(rows), normed / len(rows)


def test_scores_are_those_worked_out_with_transformers_alone(place: Path, together: Path) -> None:
    found, rows, tokenizer = values(together), choice_rows(), load_tokenizer(place / "model")
    base = load_base(place / "model", Config(), CPU).eval()
    assert by_hand(base, tokenizer, rows) == (found["quiz", "base", "acc"], found["quiz", "base", "acc_norm"])
    adapted = load_adapter(base, place / "dpo_adapter").eval()
    expected = by_hand(adapted, tokenizer, rows)
    assert expected == (found["quiz", "dpo", "acc"], found["quiz", "dpo", "acc_norm"])
    assert expected != by_hand(load_base(place / "model", Config(), CPU).eval(), tokenizer, rows)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "mamba"])
@pytest.mark.parametrize("longest", [40, 600], ids=["short", "one is cut"])
def test_contexts_read_once_score_as_lm_eval_scores_them(architecture: str, longest: int, tiny_llama: Path) -> None:
    """The last two architectures cannot share a context; the scores must be lm-eval's there too."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = load_tokenizer(tiny_llama)
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "n_layer": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "n_head": 4, "n_embd": 32, "intermediate_size": 64, "n_positions": 512}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes, **heads)).eval()
    for weight in model.parameters():
        weight.data.mul_(4)  # so that a wrong mask or place shows
    picks = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 300, (count,), generator=picks).tolist()

    contexts = [ids(count) for count in (3, 17, 1, 17, longest)]
    requests = [(("", ""), context, ids(count)) for context in contexts for count in (1, 9, 4, 2, 9, 9)]
    requests.append((("", ""), contexts[1], ids(2)))
    ours = SharedContextLM(pretrained=model, chat=ChatFormat(tokenizer), batch_size=2, max_length=512)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=512)
    found, expected = (each._loglikelihood_tokens(requests, disable_tqdm=True) for each in (ours, theirs))
    assert [logps for logps, _ in found] == pytest.approx([logps for logps, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_context_is_read_once_for_its_choices(place: Path) -> None:
    model = load_base(place / "model", Config(), CPU).eval()
    read = []
    model.register_forward_pre_hook(lambda _, given: read.append(given[0].shape))
    lm = SharedContextLM(pretrained=model, chat=ChatFormat(load_tokenizer(place / "model")), batch_size=16)
    lm._loglikelihood_tokens([(("", ""), [5] * 30, [6, 7, 8 + i]) for i in range(4)], disable_tqdm=True)
    assert read[-1] == (1, 30 + 4 * 2)


def test_merged_model_scores_as_its_adapter_and_gguf_as_its_base(together: Path) -> None:
    found = values(together)
    for task, metric in (("quiz", "acc"), ("quiz", "acc_norm"), ("domain_reference", "perplexity")):
        assert found[task, "merged", metric] == pytest.approx(found[task, "dpo", metric], rel=1e-4)
        assert found[task, "gguf", metric] == pytest.approx(found[task, "base", metric], rel=1e-4)
    assert found["domain_reference", "dpo", "perplexity"] != pytest.approx(
        found["domain_reference", "base", "perplexity"], rel=1e-2
    )


def test_several_models_at_once_equal_each_alone(place: Path, together: Path, tmp_path: Path) -> None:
    found = values(together)
    for path, label in (("base", "base"), (str(place / "sft_adapter"), "sft")):
        out = tmp_path / label
        assert call(place, out, "--model_path", path, "--task", f"multiple_choice={place}/quiz.jsonl") == 0
        for metric in ("acc", "acc_norm"):
            assert values(out)["quiz", label, metric] == found["quiz", label, metric]


def test_domain_loss_is_that_of_the_comparison(place: Path, together: Path) -> None:
    """The same records, token ids and model give the loss that eval.compare reports."""
    from eval.held_out import read_held_out
    from eval.measuring import Prepared
    from scripts.model.scoring import mean_loss, score_answers

    config, tokenizer = load_config(place / "config.yaml"), load_tokenizer(place / "model")
    prepared = Prepared(tokenizer, read_held_out(config, ("sft", "dpo")), config.values)
    base = load_base(place / "model", Config(), CPU).eval()
    expected = mean_loss(score_answers(base, prepared.items(ChatFormat(tokenizer)).targets, tokenizer.pad_token_id))
    assert math.log(values(together)["domain_reference", "base", "perplexity"]) == pytest.approx(expected, abs=1e-5)
    entry = next(e for e in results(together)["entries"] if e["task"] == "domain_answers")
    assert entry["n"] == len(prepared.questions)


def test_domain_answers_are_those_of_greedy_generation(place: Path, together: Path) -> None:
    from eval.held_out import read_held_out
    from scripts.model.generation import generate_answers

    config, tokenizer = load_config(place / "config.yaml"), load_tokenizer(place / "model")
    questions = read_held_out(config, ("sft", "dpo")).questions(None)
    prompts = [render_prompt(ChatFormat(tokenizer), question.prompt) for question in questions]
    model = load_adapter(load_base(place / "model", Config(), CPU), place / "sft_adapter").eval()
    expected = [answer.text for answer in generate_answers(model, tokenizer, prompts, 8)]
    lines = [json.loads(line) for line in (together / "samples.jsonl").read_text(encoding="utf-8").split("\n") if line]
    own = [line for line in lines if line["task"] == "domain_answers" and line["model"].endswith("sft_adapter")]
    assert [line["responses"][0].strip() for line in own] == expected
    assert values(together)["domain_answers", "sft", "check_2"] == 1


def test_adapters_that_read_prompts_differently_are_scored_each_in_its_way_and_marked(
    place: Path, tmp_path: Path
) -> None:
    other = tmp_path / "dpo_adapter"
    shutil.copytree(place / "dpo_adapter", other)
    change_manifest(other, system_prompt="Be brief.", chat_template_kwargs={"tone": "warm"})
    paths = ["base", str(place / "sft_adapter"), str(other)]

    assert call(place, tmp_path / "out", "--model_path", *paths, "--task", "domain", "--limit", "2") == 0

    templates = {entry["label"]: entry["settings"]["chat_template"] for entry in results(tmp_path / "out")["entries"]}
    assert templates["base"] == templates["sft"], "the base reads what the first adapter reads"
    assert "system_prompt Be brief." in templates["dpo"]
    assert "chat_template_kwargs {'tone': 'warm'}" in templates["dpo"]
    assert any("`python -m eval.compare` compares them." in text for text in results(tmp_path / "out")["warnings"])


@pytest.mark.parametrize("name", FAMILIES)
def test_generated_answers_end_at_a_stop_and_obey_no_recommendation(name: str, tmp_path: Path) -> None:
    """Of a task that names no stop too; the text holds no stop, marked as special or not."""
    from lm_eval.api.instance import Instance

    family = FAMILIES[name]
    for says, expected in (*((stop, "") for stop in sorted(family.stops)), ("a", "aaaa")):
        base = save_family_model(tmp_path / says.strip("<|>"), family, says)
        change_generation_config(base, repetition_penalty=1.5, no_repeat_ngram_size=1, min_new_tokens=2)
        model, tokenizer = load_base(base, Config(), CPU).eval(), load_tokenizer(base)
        lm = SharedContextLM(pretrained=model, chat=ChatFormat(tokenizer), batch_size=2)
        requests = [
            Instance("generate_until", {}, (text, {"until": [], "do_sample": False, "max_gen_toks": 4}), index)
            for index, text in enumerate(("hello", "how are you"))
        ]
        assert lm.generate_until(requests, disable_tqdm=True) == [expected] * 2, says


def test_control_tokens_in_a_record_stay_text(place: Path, tmp_path: Path) -> None:
    """A prompt that quotes a control token is measured with the ids it is trained and served with."""
    rows = [
        {"instruction": f"what does <|end|> mean {number}", "input": "", "output": f"an end <|user|> {number}"}
        for number in range(30)
    ]
    data = write_jsonl(tmp_path / "odd.jsonl", rows)
    settings = ["--set", f"sft.dataset_path={data}", "--set", "eval.max_new_tokens=4"]
    assert call(place, tmp_path / "out", "--model_path", "base", "--task", "domain", *settings) == 0
    tokenizer = load_tokenizer(place / "model")
    lines = [
        json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    ids = render_prompt(ChatFormat(tokenizer), [{"role": "user", "content": rows[0]["instruction"]}])
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != ids, "the case is a hard one"
    assert {line["task"] for line in lines} == {"domain_reference", "domain_answers"}


def test_own_yaml_runs_without_a_hub(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yaml = tmp_path / "mine.yaml"
    yaml.write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: " + str(place / "quiz.jsonl") + "}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{query.strip()}}\\nAnswer:'\n"
        "doc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n",
        encoding="utf-8",
    )
    assert call(place, tmp_path / "out", "--model_path", "base", "--task", str(yaml)) == 0
    expected = by_hand(load_base(place / "model", Config(), CPU).eval(), load_tokenizer(place / "model"), choice_rows())
    assert values(tmp_path / "out")["mine", "base", "acc"] == expected[0]


# --- a fair comparison, kept and tracked


def test_differences_are_paired_and_carry_intervals(together: Path) -> None:
    metric = next(m for m in results(together)["metrics"] if m["title"] == "quiz: acc")
    assert set(metric["models"]) == {"base", "sft", "dpo", "merged", "gguf"}
    same = next(d for d in metric["differences"] if {d["a"], d["b"]} == {"merged", "dpo"})
    assert (same["value"], same["p_value"]) == (0, 1)
    assert same["ci_low"] < 0 < same["ci_high"], "24 equal answers do not make two models equal"
    for model in metric["models"].values():
        expected = math.sqrt(model["value"] * (1 - model["value"]) / (metric["n"] - 1))
        assert model["stderr"] == pytest.approx(expected)
        assert model["ci_low"] < model["value"] < model["ci_high"]


def test_settings_stand_with_every_result(together: Path) -> None:
    for entry in results(together)["entries"]:
        assert {"dtype", "batch_size", "chat_template", "limit", "lm_eval"} <= entry["settings"].keys()
        assert entry["settings"]["batch_size"] == 4
        assert (entry["settings"]["chat_template"] == "none") == (entry["task"] == "quiz")
    changes = {entry["label"]: entry["largest_logit_change"] for entry in results(together)["entries"]}
    assert changes["sft"] > 0.01
    assert changes["base"] is None


def test_a_chat_template_is_put_around_questions_when_asked(place: Path, tmp_path: Path) -> None:
    task = ["--model_path", "base", "--task", f"multiple_choice={place}/quiz.jsonl", "--limit", "2"]
    assert call(place, tmp_path / "out", *task, "--set", "lmeval.apply_chat_template=true") == 0
    assert {entry["settings"]["chat_template"] == "none" for entry in results(tmp_path / "out")["entries"]} == {False}


def test_the_folder_is_an_artifact_with_its_run(place: Path, together: Path) -> None:
    import mlflow

    facts = manifest(together)
    assert facts["stage"] == "eval"
    assert {"report.html", "results.json", "samples.jsonl"} <= set(facts["files"])
    mlflow.set_tracking_uri(f"sqlite:///{place}/mlflow.db")
    run = mlflow.get_run(facts["mlflow"]["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/quiz/acc/dpo"] == values(together)["quiz", "dpo", "acc"]


def test_a_second_call_adds_to_the_first_and_a_limit_is_never_compared(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, task = tmp_path / "out", ["--task", f"multiple_choice={place}/quiz.jsonl"]
    assert call(place, out, "--model_path", str(place / "sft_adapter"), *task) == 0
    assert call(place, out, "--model_path", "base", *task) == 0
    metric = next(m for m in results(out)["metrics"] if m["title"] == "quiz: acc")
    assert [(d["a"], d["b"]) for d in metric["differences"]] == [("sft", "base")]
    assert results(out)["warnings"] == []
    assert call(place, out, "--model_path", str(place / "dpo_adapter"), *task, "--limit", "10") == 0
    limited = next(m for m in results(out)["metrics"] if "dpo" in m["models"])
    assert limited["differences"] == []
    assert "limit 10" in limited["title"]
    said = " ".join(results(out)["warnings"])
    assert "different settings" in said
    assert "not comparable with published" in said


def test_results_of_an_adapter_that_changed_are_dropped(place: Path, tmp_path: Path) -> None:
    out, adapter = tmp_path / "out", tmp_path / "sft_adapter"
    task = ["--task", f"multiple_choice={place}/quiz.jsonl", "--limit", "3"]
    save_adapter(adapter, place / "model", "sft", seed=5)
    assert call(place, out, "--model_path", str(adapter), *task) == 0
    shutil.rmtree(adapter)
    save_adapter(adapter, place / "model", "sft", seed=6)
    assert call(place, out, "--model_path", "base", *task) == 0
    assert {entry["label"] for entry in results(out)["entries"]} == {"base"}
    assert "dropped" in results(out)["warnings"][0]


def test_an_adapter_that_continues_another_one_than_stands_beside_it_is_marked(place: Path, tmp_path: Path) -> None:
    """In one call or in two: SFT may have been trained again between them."""
    task = ["--task", f"multiple_choice={place}/quiz.jsonl", "--limit", "3"]
    own = read_manifest(place / "sft_adapter").as_parent(place / "sft_adapter").model_dump()
    for name, parent in (("child", own), ("stranger", {**own, "sha256": "0" * 64})):
        out, dpo = tmp_path / f"out_{name}", tmp_path / name
        shutil.copytree(place / "dpo_adapter", dpo)
        change_manifest(dpo, parent=parent)
        for path in (dpo, place / "sft_adapter"):
            assert call(place, out, "--model_path", str(path), *task) == 0
        marked = [said for said in results(out)["warnings"] if "continues another sft adapter (000000000000…)" in said]
        assert len(marked) == (name == "stranger")


def test_domain_on_a_file_that_has_changed_since_training_is_marked(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "sft_adapter"
    shutil.copytree(place / "sft_adapter", other)
    change_manifest(other, datasets=[{"path": str(place / "sft.jsonl"), "sha256": "0" * 64}])
    tasks = ["--task", "domain", f"multiple_choice={place}/quiz.jsonl", "--limit", "2"]

    assert call(place, tmp_path / "out", "--model_path", str(other), *tasks) == 0

    said = [
        warning for warning in results(tmp_path / "out")["warnings"] if "has changed since it was trained on" in warning
    ]
    assert len(said) == 1


def test_domain_refuses_an_adapter_that_continues_one_of_another_split(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(place / "sft_adapter", first)
    change_manifest(first, split=split_facts(seed=4))
    shutil.copytree(place / "dpo_adapter", second)
    change_manifest(second, parent=read_manifest(first).as_parent(first).model_dump())

    assert call(place, tmp_path / "out", "--model_path", str(second), "--task", "domain") == 2

    assert f"{second}: continues {first}, which was trained with another split (seed 4" in capsys.readouterr().err


def test_a_metric_that_is_no_mean_of_its_items_is_shown_without_a_test() -> None:
    items = [{"metrics": {"f1": [0, 1]}}, {"metrics": {"f1": [1, 1]}}]
    figure = {"value": 0.66, "stderr": None, "better": "higher", "title": "f1"}
    entries = [
        {
            "task": "t", "label": label, "model": label, "settings": {"limit": None}, "items_sha256": "0", "n": 2,
            "metrics": {"f1": figure}, "items": items,
        }
        for label in ("base", "sft")
    ]  # fmt: skip
    (metric,), _ = compare_entries(entries)
    assert metric.differences == []
    assert metric.models["sft"].value == 0.66


def test_comparison_shows_the_section_only_of_the_adapters_it_compares(place: Path, together: Path) -> None:
    from eval.lmeval.results import find_benchmarks
    from eval.report import Report, render_report

    section, why = find_benchmarks(together, [place / "sft_adapter"])
    assert why is None
    page = (together / "report.html").read_text(encoding="utf-8")
    assert "quiz: acc" in page
    assert "largest_logit_change" not in page
    assert find_benchmarks(together, [place / "another"])[0] is None
    assert find_benchmarks(place / "nothing", [])[1] is None
    whole = Report(title="t", created="2026-01-01T00:00:00", models=["base", "sft"], metrics=[], benchmarks=section)
    assert 'id="benchmarks"' in render_report(whole)
    assert 'id="benchmarks"' not in render_report(whole.model_copy(update={"benchmarks": None}))


# --- what must not be scored


def broken(place: Path, folder: Path, case: str) -> list[str]:
    """Return arguments for one mistake, made in a folder of its own."""
    quiz = f"multiple_choice={place}/quiz.jsonl"
    adapter = folder / "adapter"
    if case == "zero B":
        save_adapter(adapter, place / "model", "sft", seed=1, scale=0.0)
    elif case == "names that match nothing":
        save_adapter(adapter, place / "model", "sft", seed=1)
        rename_tensors(adapter)
    elif case == "half-written":
        save_adapter(adapter, place / "model", "sft", seed=1)
        (adapter / "manifest.json").unlink()
    elif case == "tampered":
        save_adapter(adapter, place / "model", "sft", seed=1)
        with (adapter / "adapter_model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x7f")
    elif case == "another base":
        save_adapter(adapter, place / "model", "sft", seed=1)
        shutil.rmtree(folder / "model", ignore_errors=True)
        other = save_tiny_model(folder / "model", seed=9)
        about = manifest(adapter)
        about["base_model"]["id"] = str(other)
        (adapter / "manifest.json").write_text(json.dumps(about), encoding="utf-8")
    elif case == "two bases":
        other = save_tiny_model(folder / "model", seed=9)
        save_adapter(adapter, other, "dpo", seed=1)
        return ["--model_path", str(place / "sft_adapter"), str(adapter), "--task", quiz]
    elif case == "another split":
        save_adapter(adapter, place / "model", "sft", seed=1, split=split_facts(seed=4))
        return ["--model_path", str(adapter), "--task", "domain"]
    elif case == "no such adapter":
        pass
    else:
        data = folder / "data.jsonl"
        rows: dict[str, list] = {
            "wrong fields": [{"question": "a?", "answers": ["b", "c"], "label": 0}],
            "gold outside": [{"query": "a?", "choices": ["b", "c"], "gold": 2}],
            "one choice": [{"query": "a?", "choices": ["b"], "gold": 0}],
            "empty file": [],
        }
        write_jsonl(data, rows.get(case, []))
        tasks = {
            "unknown task": "helaswag", "template without file": "multiple_choice", "no such file": "continuation=none.jsonl",
            "unknown template": f"cloze={data}", "limit 0": quiz, "task of the Hub": "hellaswag", "bad YAML": str(folder / "bad.yaml"),
        }  # fmt: skip
        (folder / "bad.yaml").write_text("task: bad\noutput_type: nonsense\n", encoding="utf-8")
        limit = ["--limit", "0"] if case == "limit 0" else []
        return ["--model_path", "base", "--task", tasks.get(case, f"multiple_choice={data}"), *limit]
    return ["--model_path", str(adapter), "--task", quiz]


def rename_tensors(adapter: Path) -> None:
    """Save the adapter's weights under names that PEFT passes over, with a manifest that vouches for the file."""
    from safetensors.torch import load_file, save_file

    about = read_manifest(adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name.replace("model.layers", "model.blocks"): w for name, w in weights.items()}, adapter / "adapter_model.safetensors")  # fmt: skip
    write_manifest(adapter, about)


MISTAKES = {
    "zero B": "changes no logit of the base",
    "names that match nothing": "does not fit the base model",
    "half-written": "no valid manifest.json",
    "tampered": "changed since manifest.json was written",
    "another base": "was trained on another base model",
    "two bases": "was made on another base",
    "another split": "may have seen the prompts that are held out now",
    "no such adapter": "no such folder. Run the stage that writes it first",
    "wrong fields": "data.jsonl:1: found question, answers, label",
    "gold outside": "gold: found 2, wanted the index",
    "one choice": "at least two texts",
    "empty file": "holds no record",
    "unknown task": "Did you mean hellaswag",
    "template without file": "which file?",
    "no such file": "no such file",
    "unknown template": "wanted multiple_choice or continuation",
    "limit 0": "--limit: found 0, wanted at least 1",
    "task of the Hub": "Without a network work: domain",
    "bad YAML": "lm-eval cannot build this task",
}


@pytest.mark.parametrize(("case", "message"), MISTAKES.items(), ids=str)
def test_a_mistake_is_reported_and_leaves_nothing_behind(
    case: str, message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert call(place, tmp_path / "out", *broken(place, tmp_path, case)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_replaced(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert call(place, out, "--model_path", "base", "--task", f"multiple_choice={place}/quiz.jsonl") == 2
    assert (out / "thesis.txt").read_text(encoding="utf-8") == "years of work"
    assert "no valid manifest.json" in capsys.readouterr().err


def test_a_failed_call_keeps_the_results_of_the_last(place: Path, tmp_path: Path) -> None:
    out, quiz = tmp_path / "out", f"multiple_choice={place}/quiz.jsonl"
    assert call(place, out, "--model_path", "base", "--task", quiz, "--limit", "2") == 0
    before = manifest(out)["files"]
    save_adapter(tmp_path / "empty", place / "model", "sft", seed=1, scale=0.0)
    assert call(place, out, "--model_path", str(tmp_path / "empty"), "--task", quiz, "--limit", "2") == 2
    assert manifest(out)["files"] == before
    assert not (tmp_path / "out.run/finished").exists()


def test_a_disk_that_fills_up_keeps_the_results_of_the_last_call(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    resource = pytest.importorskip("resource")
    out, quiz = tmp_path / "out", f"multiple_choice={place}/quiz.jsonl"
    assert call(place, out, "--model_path", "base", "--task", quiz, "--limit", "2") == 0
    before, write, limits = (
        manifest(out)["files"],
        lmeval_results.write_results,
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )

    def write_to_a_full_disk(*arguments: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(lmeval_results, "write_results", write_to_a_full_disk)
    assert call(place, out, "--model_path", "base", "--task", quiz, "--limit", "3") == 2
    said = capsys.readouterr().err
    assert "Free some space or choose another folder" in said
    assert "Traceback" not in said
    assert manifest(out)["files"] == before


@pytest.mark.parametrize("name", ["arc_easy", "copa"])
def test_public_files_are_read_as_they_are(name: str, shared_data: Path) -> None:
    from eval.lmeval.tasks import build_plans

    template = "continuation" if name == "copa" else "multiple_choice"
    path = shared_data / f"eval_gauntlet/{name}.jsonl"
    (plan,), _ = build_plans([f"{template}={path}"], load_config("configs/demo.yaml"), None, None)
    assert plan.data.items == {"arc_easy": 2376, "copa": 100}[name]
