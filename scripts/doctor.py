"""Say on one screen whether this machine and this configuration are ready, and what to type where they are not.

Reads the configuration with the data, models and adapters it names; writes and downloads nothing. Exit code 1 when anything
is bad. Needs requirements.txt, and says so where that is not installed.

    python -m scripts.doctor --config configs/config.yaml
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import socket
import sqlite3
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# Only what needs no package stands here. The rest is imported where it is used: a missing package is one of the findings.
from scripts.common.errors import UserError, did_you_mean, entry_point
from scripts.common.paths import ROOT, resolve
from scripts.common.stages import MODEL_STAGES, SFT, TRAINING_STAGES, TrainingStage, planned_stages

if TYPE_CHECKING:
    from scripts.common.config import LoadedConfig

OLDEST_PYTHON = (3, 11)
PIN_FILES = {
    "requirements.txt": "everything",
    "requirements.gpu.txt": "4- and 8-bit loading",
    "requirements.extra.txt": "de-identification",
}
PORTS = {8000: "uvicorn ... --port 8001", 5000: "mlflow ui --port 5001"}
TIMEOUT_SECONDS = 2.0
LARGE_BYTES = 50 * 2**20  # of data; reading more takes too long for a quick check
SCARCE_DISK_GIB, ENOUGH_DISK_GIB = 0.5, 5.0


class Finding(NamedTuple):
    """One line on the screen, and what to type unless it is `ok`."""

    status: str
    text: str
    fix: str = ""


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # The flags of every stage, written again: what adds them there cannot be imported without packages.
    parser.add_argument("--config", default="configs/config.yaml", metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key"
    )
    return parser


# --- the machine ---


def check_python() -> Iterator[Finding]:
    """Compare the interpreter with the oldest one that works."""
    found, oldest = (".".join(map(str, numbers)) for numbers in (sys.version_info[:3], OLDEST_PYTHON))
    if sys.version_info < OLDEST_PYTHON:
        yield Finding(
            "bad", f"found {found}, wanted {oldest} or newer", f"rm -rf .venv; make setup PYTHON=python{oldest}"
        )
    else:
        yield Finding("ok", f"{found}, {sys.executable}")


def check_packages() -> Iterator[Finding]:
    """Compare what is installed with the pins of each requirements file."""
    for file, purpose in PIN_FILES.items():
        pins = re.findall(r"^([\w.-]+)==([^\s;#]+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        missing, others = [], []
        for name, pin in pins:
            try:
                found = version(name).partition("+")[0]
            except PackageNotFoundError:
                missing.append(name)
            else:
                others += [] if found == pin else [f"{name} {found} instead of {pin}"]
        if not missing and not others:
            yield Finding("ok", f"{file}: {len(pins)} as pinned")
            continue
        problems = [f"without {some(missing)}"] * bool(missing) + [some(others)] * bool(others)
        status = "bad" if missing and file == "requirements.txt" else "warn"
        yield Finding(
            status, f"{file} (for {purpose}): {'; '.join(problems)}", activation() or f"pip install -r {file}"
        )


def some(names: Sequence[str]) -> str:
    """List the first few."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def activation() -> str:
    """Return the command that enters the environment of `make setup` when this is another one."""
    folder = ROOT / ".venv"
    if not folder.is_dir() or Path(sys.prefix).resolve() == folder.resolve():
        return ""
    return rf'& "{folder}\Scripts\Activate.ps1"' if os.name == "nt" else f'source "{folder}/bin/activate"'


def check_hardware(config: LoadedConfig) -> Iterator[Finding]:
    """Say what will compute, in which type, and why."""
    import torch

    from scripts.common.machine import choose_machine

    machine = choose_machine(config.values)
    gpu = [torch.cuda.get_device_name()] if machine.device == "cuda" else []
    yield Finding("ok", "; ".join([*gpu, *machine.reasons, f"{machine.threads} threads"]))
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        fix = "nvidia-smi; then install torch for the CUDA version it shows, see pytorch.org/get-started/locally"
        yield Finding("warn", f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU", fix)


def check_memory(config: LoadedConfig) -> Iterator[Finding]:
    """Compare free memory with the most that a run can take."""
    from scripts.common.machine import choose_machine
    from scripts.model.memory import available_memory_gib

    available = available_memory_gib(choose_machine(config.values).device)
    free = f"{available:.1f} GiB free"
    folder = base_folder(config)
    if folder is None:
        yield Finding("ok", f"{free}; what a run takes is known once the base model is here")
        return
    most = {stage.name: largest_estimate(config, stage, folder) for stage in planned_stages(config.values)}
    name = max(most, key=lambda stage: most[stage])
    text = f"{free}; training takes {most[name]:.1f} at most ({name}, batches full of {name}.max_length)"
    script = TRAINING_STAGES[name].script
    fix = f"python -m {script} --dry-run says what your records take; lower {name}.max_length if need be"
    yield Finding("ok", text) if most[name] <= available else Finding("warn", text, fix)


def largest_estimate(config: LoadedConfig, stage: TrainingStage, folder: Path) -> float:
    """Estimate, in GiB, what a stage takes whose batches are full of the longest records allowed."""
    from scripts.common.machine import choose_machine
    from scripts.dataset.rendering import Rendered, RenderedPair
    from scripts.training.plan import plan_training

    section = getattr(config.values, stage.name)
    ids = [0] * section.max_length
    longest = RenderedPair(ids[:1], ids[1:], ids[1:]) if stage.records == "preferences" else Rendered(ids, ids)
    rows = [longest] * section.per_device_train_batch_size
    return plan_training(config.values, section, folder, choose_machine(config.values), rows).estimate.total


def check_disk(config: LoadedConfig) -> Iterator[Finding]:
    """Say how much space is free where results will go, and whether they can be written."""
    outputs = Path(config.values.sft.output_dir).absolute()
    folder = next(path for path in (outputs, *outputs.parents) if path.is_dir())
    free = shutil.disk_usage(folder).free / 2**30
    text, fix = f"{free:.1f} GiB free in {folder}", "free some space, or --set sft.output_dir=... on another disk"
    if not os.access(folder, os.W_OK):
        yield Finding("bad", f"{folder} cannot be written", "--set sft.output_dir=... where you may write")
    elif free < ENOUGH_DISK_GIB:
        yield Finding("bad" if free < SCARCE_DISK_GIB else "warn", text, fix)
    else:
        yield Finding("ok", text)


def check_ports(config: LoadedConfig) -> Iterator[Finding]:
    """Say whether something already listens where the server and MLflow would."""
    taken = []
    for port in PORTS:
        with socket.socket() as probe:
            probe.settimeout(TIMEOUT_SECONDS)
            taken += [port] if probe.connect_ex(("127.0.0.1", port)) == 0 else []
    for port in taken:
        yield Finding("warn", f"something already listens on {port}", PORTS[port])
    if not taken:
        yield Finding("ok", f"{' and '.join(map(str, PORTS))} are free")


# --- what the configuration names ---


def hub_answers() -> bool:
    """Ask the Hub for a sign of life, in a thread, as looking up a host name has no time-out."""
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
                answers.append(True)
        except OSError as error:
            answers.append(hasattr(error, "code"))  # a refusal is an answer too

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_SECONDS)
    return answers == [True]


def describe_open_choices(config: LoadedConfig) -> Iterator[Finding]:
    """Name what a training stage would refuse because the configuration leaves it open."""
    from scripts.common.config import check_decided

    for stage in planned_stages(config.values):
        try:
            check_decided(config, stage.name)
        except UserError as error:
            problem, _, fix = str(error).partition(". ")
            yield Finding("bad", problem, fix)


def base_folder(config: LoadedConfig) -> Path | None:
    """Return the folder of the base if there is one; `check_model` reports what is wrong with it."""
    from scripts.model.find import find_local_model

    try:
        return find_local_model(config.values.base_model_id, config.values.base_model_revision)
    except UserError:
        return None


def check_model(config: LoadedConfig) -> Iterator[Finding]:
    """Say whether the base model is here, or can be downloaded from the Hub."""
    from scripts.model.find import DEMO_MODEL, find_local_model
    from scripts.model.fingerprint import base_fingerprint
    from scripts.model.memory import parameter_count
    from scripts.model.targets import targets_of_folder

    values = config.values
    folder = find_local_model(values.base_model_id, values.base_model_revision)
    asked = not values.offline and os.environ.get("HF_HUB_OFFLINE") != "1"
    reachable = asked and hub_answers()
    hub = "the Hub answers" if reachable else "the Hub does not answer" if asked else "the Hub is not asked (offline)"
    if folder:
        fingerprint = base_fingerprint(folder)
        text = f"{values.base_model_id}: {parameter_count(folder) / 1e6:.0f} M parameters, {fingerprint[:12]}; {hub}"
        yield Finding("ok", text) if reachable or not asked else Finding("warn", text, "--set offline=true")
        yield Finding("ok", str(targets_of_folder(folder, values.lora.target_modules)))
    elif reachable:
        yield Finding("ok", f"{values.base_model_id}: not here yet; {hub}, and the first run downloads it")
    else:
        text = f"{values.base_model_id}: neither a folder nor in the Hub's cache; {hub}"
        yield Finding("bad", text, f"python -m scripts.get_demo_model; then --set base_model_id={DEMO_MODEL}")


def check_data(config: LoadedConfig) -> Iterator[Finding]:
    """Read and split the records of each training stage as training does."""
    for stage in planned_stages(config.values):
        try:
            yield from describe_records(config, stage)
        except UserError as error:
            yield failed(error)


def describe_records(config: LoadedConfig, stage: TrainingStage) -> Iterator[Finding]:
    """Count the records of a stage on each side of the split, and say what a run with them would warn of."""
    from scripts.common.pairs_manifest import are_made_pairs
    from scripts.dataset.records import PARSERS, describe_reading, load_datasets, load_rest_of_chain, sources_of
    from scripts.dataset.split import IF_MOST, split_records
    from scripts.training.advice import advise_on_records, advise_on_steps

    section, key = getattr(config.values, stage.name), f"{stage.name}.dataset_path"
    names = [source.path for source in sources_of(section.dataset_path)]
    if not read_here(config, stage):
        yield Finding("ok", f"{key}: {some(names)}: not read here; python -m {stage.script} --dry-run does")
        return
    datasets = load_datasets(section.dataset_path, PARSERS[stage.records], config.values.data, key)
    split = split_records(
        datasets, config.values.data, config.values.seed, load_rest_of_chain(config.values, [stage.name])
    )
    skipped = sum(len(file.bad_rows) for file in datasets)
    text = f"{key}: {len(split.train)} records to train on, {len(split.validation)} for validation, "
    text += f"{len(split.test)} for the test"
    text += f", {len(split.near_duplicates)} near-duplicates left out" if split.near_duplicates else ""
    text += f", {skipped} bad ones set aside" if skipped else ""
    left_out = Counter(each.side for each in split.near_duplicates)
    if left_out["test"] > len(split.test) or left_out["validation"] > len(split.validation):
        yield Finding("warn", text, IF_MOST)
    elif not split.test and are_made_pairs(names):
        yield Finding("ok", f"{text}: pairs are made of training prompts, and the test asks those of sft.dataset_path")
    elif not split.test:
        fix = "--set data.test_ratio=0.2, or more records: nothing would show whether it helped"
        yield Finding("warn", text, fix)
    elif not split.validation:
        fix = "--set data.validation_ratio=0.1, or more records: nothing would choose the checkpoint"
        yield Finding("warn", text, fix)
    else:
        yield Finding("ok", text)
    for line in (line for file in datasets for line in describe_reading(file)):
        yield Finding("ok", line)
    records = [record for file in datasets for record in file.records]
    advice = advise_on_records(stage.name, split, records, tested=False)  # a missing test side is named above
    for line in [*advice, *advise_on_steps(section, stage.name, len(split.train))]:
        problem, _, fix = line.partition("; ")
        yield Finding("warn", f"{stage.name}: {problem}", fix or f"see {key}")


def read_here(config: LoadedConfig, stage: TrainingStage) -> bool:
    """Tell whether a stage's data are on this machine and small enough to be read in a moment."""
    from scripts.dataset.files import find_file
    from scripts.dataset.records import sources_of

    sources = sources_of(getattr(config.values, stage.name).dataset_path)
    files = [find_file(source.path, f"{stage.name}.dataset_path") for source in sources]
    return None not in files and sum(path.stat().st_size for path in files if path) <= LARGE_BYTES


def check_plan(config: LoadedConfig) -> Iterator[Finding]:
    """Say how small a difference the comparison can show."""
    from eval.planning import plan_of, stages_with_data

    try:
        if not all(read_here(config, TRAINING_STAGES[name]) for name in stages_with_data(config.values)):
            return
        for line in plan_of(config):
            yield Finding("ok", line)
    except UserError:
        return  # the lines on data say what is wrong with them


def check_adapters(config: LoadedConfig) -> Iterator[Finding]:
    """Say which adapters are there, whole, and made on the configured base."""
    named, results = adapters_of(config)
    absent = []
    for path, key in named.items():
        folder = resolve(path)
        try:
            if folder.exists():
                yield describe_adapter(config, path, folder)
            elif path in results:
                absent.append(path)
            else:
                fix = did_you_mean(path).strip() or f"correct {key}"
                raise UserError(f"{key}: {path}: no such folder, and no stage of this configuration writes it\n{fix}")
        except UserError as error:
            yield failed(error)
    if absent:
        yield Finding("ok", f"not there yet: {some(absent)}")


def adapters_of(config: LoadedConfig) -> tuple[dict[str, str], set[str]]:
    """Return the folders of adapters that a configuration names, each with its first key, and those that stages write."""
    values = config.values
    planned = planned_stages(values)
    written = {f"{stage.name}.output_dir": getattr(values, stage.name).output_dir for stage in planned}
    keys: dict[str, str | None] = dict(written)
    keys |= {f"{stage.name}.init_from": getattr(values, stage.name).init_from for stage in planned if stage.continues}
    keys["serve.adapter_path"] = values.serve.adapter_path
    keys |= {f"serve.adapters.{name}": path for name, path in values.serve.adapters.items()}
    named: dict[str, str] = {}
    for key, path in keys.items():
        if path:
            named.setdefault(path, key)
    return named, {*written.values(), values.export.output_dir}


def describe_adapter(config: LoadedConfig, path: str, folder: Path) -> Finding:
    """Prove that a finished folder is whole, of the configured base, and of the split that the next stage needs."""
    from scripts.common.artifacts import read_manifest
    from scripts.common.lineage import check_split
    from scripts.model.fingerprint import base_fingerprint

    base = base_folder(config)
    manifest = read_manifest(folder, stages=MODEL_STAGES, verify=False)
    if manifest.stage == "merged":  # as large as its base, so hashing it takes too long for a quick check
        return Finding("ok", f"{path}: a merged model, its files not looked at")
    read_manifest(folder)
    made_on = manifest.base_model
    if base and made_on.fingerprint != base_fingerprint(base):
        fix = f"--set base_model_id={made_on.id}, or train it again"
        return Finding("bad", f"{path}: whole, but made on another base, {made_on.id}", fix)
    continued = [f"{name}.init_from" for name, stage in TRAINING_STAGES.items() if stage.continues]
    starts = next((key for key in continued if attrgetter(key)(config.values) == path), None)
    try:
        check_split(path, manifest, config.values.data, starts, sides=("validation", "test") if starts else ("test",))
    except UserError as error:
        if starts:
            raise
        return Finding(
            "warn", f"{path}: whole, {manifest.stage} on {made_on.id}, but it cannot be compared", str(error)
        )
    return Finding("ok", f"{path}: whole, {manifest.stage} on {made_on.id}")


def check_store(config: LoadedConfig) -> Iterator[Finding]:
    """Say whether MLflow can keep runs where the configuration wants them."""
    uri = config.values.tracking.mlflow_tracking_uri
    if uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=TIMEOUT_SECONDS):
                yield Finding("ok", f"{uri} answers")
        except (OSError, ValueError) as error:
            fix = "mlflow server --port 5000, or tracking.mlflow_tracking_uri: sqlite:///mlflow.db"
            yield Finding("bad", f"{uri}: {error}", fix)
    elif uri.startswith("sqlite:///"):
        yield describe_database(uri, Path(uri.removeprefix("sqlite:///")).absolute())
    elif uri.startswith("file:") or "://" not in uri:
        yield Finding("ok", f"folder {Path(re.sub('^file:(//)?', '', uri)).absolute()}")
    else:
        yield Finding("ok", f"{uri}: another store, not looked into")


def describe_database(uri: str, path: Path) -> Finding:
    """Compare the tables of an MLflow database with those that the installed MLflow wants, without writing.

    MLflow's own client would create missing tables and migrate old ones as soon as it opens the file.
    """
    if not path.parent.is_dir():
        return Finding("bad", f"{uri}: no such folder", f'mkdir -p "{path.parent}"')
    if not path.exists():
        return Finding("ok", f"{uri}: made by the first run")
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=TIMEOUT_SECONDS)) as connection:
            (schema,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            (runs,) = connection.execute("SELECT count(*) FROM runs").fetchone()
    except (sqlite3.Error, TypeError) as error:
        return Finding("bad", f"{path}: is not a usable MLflow database ({error})", f'mv "{path}" "{path}.old"')
    current, known = mlflow_schemas()
    if schema == current:
        return Finding("ok", f"{uri}: {runs} runs, its tables are current")
    if schema in known:
        fix = f'cp "{path}" "{path}.old" && mlflow db upgrade "{uri}"'
        return Finding("bad", f"{uri}: its tables are of an older MLflow (schema {schema})", fix)
    text = f"{uri}: its tables are of another, perhaps newer MLflow (schema {schema})"
    return Finding("bad", text, f'mv "{path}" "{path}.old"')


def mlflow_schemas() -> tuple[str | None, set[str]]:
    """Return the schema of the installed MLflow's databases, and all that it can upgrade from."""
    import mlflow
    from alembic.script import ScriptDirectory

    migrations = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    return migrations.get_current_head(), {script.revision for script in migrations.walk_revisions()}


# --- the screen ---

CHECKS = {
    "hardware": check_hardware,
    "model": check_model,
    "memory": check_memory,
    "disk": check_disk,
    "data": check_data,
    "plan": check_plan,
    "adapters": check_adapters,
    "ports": check_ports,
    "store": check_store,  # last: it imports MLflow, which takes seconds
}


def failed(error: UserError) -> Finding:
    """Turn an error message into a finding; its last line says what to do."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(lines[:2] if len(lines) > 2 else lines[:1])
    return Finding("bad", text, lines[-1] if len(lines) > 1 else "")


def show(name: str, check: Callable[..., Iterator[Finding]], *arguments: Any) -> list[str]:
    """Run one check and write its lines as they come; return the status of each."""
    statuses = []

    def write(finding: Finding) -> None:
        fix = f"{'':15}fix: {finding.fix}\n" if finding.fix else ""
        sys.stdout.write(f"{finding.status:5}{name:10}{finding.text}\n{fix}")
        sys.stdout.flush()
        statuses.append(finding.status)

    try:
        for finding in check(*arguments):
            write(finding)
    except ImportError as error:
        write(Finding("warn", f"not checked without the package {error.name or error}", "see packages above"))
    except UserError as error:
        write(failed(error))
    return statuses


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run every check, one line each, and say what comes next."""
    arguments = build_parser().parse_args(argv)
    loaded: list[LoadedConfig] = []

    def check_config() -> Iterator[Finding]:
        from scripts.common.config import load_config
        from scripts.common.machine import prepare_environment

        config = load_config(arguments.config, arguments.overrides)
        loaded.append(config)
        prepare_environment(config.values)
        open_choices = list(describe_open_choices(config))
        yield from open_choices or [Finding("ok", f"{arguments.config} is valid")]

    statuses = show("python", check_python) + show("packages", check_packages) + show("config", check_config)
    for config in loaded:
        for name, check in CHECKS.items():
            statuses += show(name, check, config)
    bad, odd = statuses.count("bad"), statuses.count("warn")
    if bad:
        sys.stdout.write(f"{bad} bad, {odd} to look at: begin at the top, then run this again\n")
        return 1
    sys.stdout.write(f"ready: python -m {SFT.script} --config {shlex.quote(arguments.config)} --dry-run\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
