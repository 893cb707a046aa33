"""The READMEs are true: each command exists, its flags parse, its configuration loads, its figures have a source."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import math
import re
import shlex
import subprocess
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.common.config import load_config
from scripts.common.schema import Config
from tests.conftest import ROOT

NAMES = (
    "README.md", "configs/README.md", "scripts/README.md", "serve/README.md", "eval/README.md", "eval/benchmarks/README.md",
    "scripts/deid/README.md", "scripts/dataset/README.md", "scripts/pairs/README.md", "scripts/model/README.md", "scripts/export/README.md",
    "data/README.md", "tests/drills/README.md",
)  # fmt: skip
READMES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
TEXT = "\n".join(READMES.values())
MADE_BY_START = "configs/mydata.yaml"  # of the reader's own file


def blocks(*languages: str) -> list[str]:
    """Return the blocks of code in all READMEs, which may be indented as part of a list."""
    found = re.findall(rf"^( *)```(?:{'|'.join(languages)})[^\n]*\n(.*?)^ *```", TEXT, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


INLINE = re.findall(r"`((?:python|make|uvicorn|mlflow|pytest|vllm) [^`]+)`", TEXT)
COMMANDS = sorted(
    {line.strip() for block in blocks("bash", "powershell") for line in block.splitlines() if line.strip()}
    | set(INLINE)
)
LAUNCHED = [command for command in COMMANDS if re.match("torchrun |accelerate launch ", command)]
PYTHON = [f"python {command[command.index('-m scripts') :]}" for command in LAUNCHED] + [
    command
    for command in COMMANDS
    if re.match(r"(\w+=\S+ )*python (-m (scripts|eval|serve)\.|scripts/|eval/)", command)
]
TESTS = [command for command in COMMANDS if re.match(r"(python -m )?pytest ", command)]
CODE = blocks("python")


def test_there_are_commands_to_check() -> None:
    assert len(PYTHON) >= 6
    assert len(TESTS) >= 5
    assert len(CODE) >= 3


def test_every_readme_is_checked() -> None:
    found = {path.relative_to(ROOT).as_posix() for folder in ("configs", "data", "eval", "scripts", "serve", "tests") for path in (ROOT / folder).rglob("README.md")}  # fmt: skip
    assert found | {"README.md"} == set(NAMES)


def test_the_first_readme_stays_short() -> None:
    text = READMES["README.md"]
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1200


@pytest.mark.parametrize("command", PYTHON)
def test_command_exists_and_its_flags_parse(command: str) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    if words[1] == "-m":
        module, arguments = importlib.import_module(words[2]), words[3:]
    else:
        file = ROOT / words[1]
        module, arguments = importlib.import_module(".".join(Path(words[1]).with_suffix("").parts)), words[2:]
        assert file.is_file()
    parsed = module.build_parser().parse_args(arguments)
    if getattr(parsed, "config", None) not in (None, MADE_BY_START):
        load_config(ROOT / parsed.config, getattr(parsed, "overrides", []))


@pytest.mark.parametrize("command", LAUNCHED)
def test_launch_files_exist(command: str) -> None:
    assert all((ROOT / file).is_file() for file in re.findall(r"--config_file (\S+)", command))


@pytest.mark.parametrize("command", TESTS)
def test_tests_that_a_reader_is_asked_to_run_exist(command: str) -> None:
    assert all((ROOT / word).is_file() for word in shlex.split(command) if word.startswith("tests/"))


def test_every_command_is_of_a_kind_that_is_checked() -> None:
    """Beside those of this project: the server, MLflow's page, requests to the server, and setting up by hand."""
    kinds = (
        r"(\w+=\S+ )*(uvicorn|mlflow) ", "make ", "curl ", "Invoke-RestMethod ", "pip install( -r \\S+)+$", r"pip install --no-deps \S+==\S+$", "(python3|py) -m venv ",
        "torchrun ", "accelerate launch ", r"\$env:[A-Z_]+ = ", r"(source )?\.venv\S+/?activate", r"vllm serve ",
        r"(\w+=\S+ )*docker compose -f serve/compose\.yaml up",
    )  # fmt: skip
    unchecked = [c for c in COMMANDS if c not in PYTHON + TESTS and not re.match("|".join(kinds), c, re.IGNORECASE)]
    assert unchecked == []


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"(^| )(uvicorn|mlflow) ", c)])
def test_other_programs_take_the_arguments_given(command: str) -> None:
    words = shlex.split(command)
    environment = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_]+=\S+", word))
    program, *arguments = words[len(environment) :]
    if program == "uvicorn":
        import uvicorn

        parsed = uvicorn.main.make_context(program, arguments).params
        module, _, name = parsed["app"].partition(":")
        assert hasattr(importlib.import_module(module), name)
    else:
        import click
        from mlflow.cli import cli

        found = cli.get_command(click.Context(cli), arguments[0])
        assert found is not None
        found.make_context(program, arguments[1:])
    load_config(ROOT / environment.get("LLM_CONFIG", "configs/config.yaml"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match("curl|Invoke-RestMethod", c)])
def test_requests_are_answered_by_a_route_that_takes_them(command: str) -> None:
    from serve import openai_schemas, schemas
    from serve.fastapi_server import app

    (path,) = re.findall(r"localhost:8000(\S+)", command)
    method = next(iter(re.findall(r"-X (\w+)", command)), "POST").lower()
    (route,) = (
        methods[method]
        for template, methods in app.openapi()["paths"].items()
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path) and method in methods
    )
    for body in re.findall(r"'(\{.*\})'", command):
        model = route["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        (getattr(schemas, model, None) or getattr(openai_schemas, model)).model_validate_json(body)


@pytest.mark.parametrize("route", sorted(set(re.findall(r"`(/[\w/]+)`", READMES["serve/README.md"])) - {"/v1"}))
def test_route_named_in_the_text_exists(route: str) -> None:
    from serve.fastapi_server import app

    assert route in app.openapi()["paths"]


@pytest.mark.parametrize("file", sorted(set(re.findall(r"requirements\.?\w*\.txt", TEXT))))
def test_named_requirements_exist(file: str) -> None:
    assert (ROOT / file).is_file()


def known_flags() -> set[str]:
    """Name every flag of the project's commands, and uvicorn's."""
    import uvicorn

    from tests.repo.test_no_dead_keys import flags

    return {flag.split()[1] for flag in flags()} | {o for parameter in uvicorn.main.params for o in parameter.opts}


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[\w-]+)", TEXT)) - {"--help"}))
def test_flag_named_in_the_text_exists(flag: str) -> None:
    assert flag in known_flags()


SECTIONS = "|".join(name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields"))


@pytest.mark.parametrize("key", sorted(set(re.findall(rf"`((?:{SECTIONS})\.(?!py\b)[a-z_.0-9]+\b(?!\.py|\())", TEXT))))
def test_key_named_in_the_text_exists(key: str) -> None:
    from tests.repo.test_no_dead_keys import KEYS

    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "eval").rglob("*.py")}
    assert key in KEYS or key in modules or any(known.startswith(f"{key}.") for known in KEYS)


@pytest.mark.parametrize("variable", sorted(set(re.findall(r"`([A-Z][A-Z_]{5,})[`=]", TEXT))))
def test_name_in_capitals_is_read_by_the_program(variable: str) -> None:
    """Environment variables, and the constants that the how-tos name."""
    sources = [path for folder in ("scripts", "serve", "eval") for path in (ROOT / folder).rglob("*.py")]
    external = {"OMP_NUM_THREADS"}  # torch's
    assert variable in external or any(variable in path.read_text(encoding="utf-8") for path in sources)


def test_a_share_is_stated_only_with_the_command_that_measures_it() -> None:
    """Everything else stands between markers and is generated from a file that `make demo` writes.

    In the README of the benchmarks each section shows its command.
    """
    text = "\n\n".join(text for name, text in READMES.items() if name != "eval/benchmarks/README.md")
    free = re.sub(r"<!-- (measured|keys|verdict).*?: generated -->.*?<!-- end of .*? -->", "", text, flags=re.DOTALL)
    stated = [paragraph for paragraph in free.split("\n\n") if re.search(r"\d %", paragraph)]
    assert [paragraph for paragraph in stated if not re.search(r"`make [\w-]+`|95 % interval", paragraph)] == []


# Lines that PowerShell would not take: variables before a command, joined and continued lines, bash's own words.
BASH_ONLY = r"^[A-Z_]+=|&&|\|\||\\$|\$\(|<\(|^(export|source|rm|cp|mkdir|test|cat|head|sed|awk|make|python3) "
POWERSHELL = [line.strip() for block in blocks("powershell") for line in block.splitlines() if line.strip()]


def test_powershell_lines_are_powershell() -> None:
    assert len(POWERSHELL) >= 10
    assert [line for line in POWERSHELL if re.search(BASH_ONLY, line)] == []


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"\bmake ([a-z]+)\b", READMES["README.md"])) & {"demo", "smoke", "test", "setup"})
)
def test_what_make_does_for_a_newcomer_can_be_typed_in_powershell(target: str) -> None:
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe
    commands = re.findall(r"\$\(RUN\) (.*)", recipe[1])
    assert {f"python {command}" for command in commands} <= set(POWERSHELL)


def test_what_only_bash_takes_has_a_line_for_powershell() -> None:
    lines = {line.strip() for block in blocks("bash") for line in block.splitlines() if line.strip()}
    only = {line for line in lines if re.search(BASH_ONLY, line) and not line.startswith("make ")}
    twins = {"source .venv/bin/activate": r".venv\Scripts\Activate.ps1", "python3 -m venv .venv": "py -m venv .venv"}
    assert {line for line in only if twins.get(line) not in POWERSHELL and not re.match(r"[A-Z_]+=\S+ ", line)} == set()
    assert any(line.startswith("$env:") for line in POWERSHELL), "how a variable before a command is written"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake (?:-\S+ )?([a-z-]+)\b", " ".join(COMMANDS)))))
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_make_help_says_what_each_target_does() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0] for line in listed.splitlines() if len(line.split()) > 2} == set(targets.split())


FILES = [
    (name, path)
    for name, text in READMES.items()
    for path in sorted(set(re.findall(r"`([\w.-]+/[\w./-]+\.(?:py|md|yaml|json|jsonl|html|txt))`", text)))
]


@pytest.mark.parametrize(("name", "path"), FILES)
def test_named_file_exists(name: str, path: str) -> None:
    made = (
        MADE_BY_START, "data/sft/mydata.jsonl", "data/sft/sample_pii.deid.jsonl", "data/sft/labelled.jsonl", "scripts/summarise.py",
        "outputs/comparison/report.html", "outputs/pairs.jsonl", "outputs/pairs.jsonl.manifest.json",
    )  # fmt: skip
    assert path in made or (ROOT / path).exists() or ((ROOT / name).parent / path).exists()


LINKS = [
    (name, link)
    for name, text in READMES.items()
    for link in sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", text)))
]  # fmt: skip


@pytest.mark.parametrize(("name", "link"), LINKS)
def test_link_leads_somewhere(name: str, link: str) -> None:
    file, _, heading = link.partition("#")
    path = (ROOT / name).parent / file if file else ROOT / name
    assert path.exists()
    if heading:
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in headings]


# --- the how-tos of scripts/README.md


def names_in(code: str) -> tuple[set[str], set[str]]:
    """Return the names that a piece of code reads and those that it makes."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return {node.id for node in names if isinstance(node.ctx, ast.Load)}, made


@pytest.mark.parametrize("code", CODE)
def test_code_shown_uses_names_that_exist(code: str) -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").rglob("*.py"))
    read, _ = names_in(code)
    known = set(dir(builtins)).union(*(names_in(block)[1] for block in CODE))
    libraries = {"torch", "functional", "Any", "Counter", "Sequence", "Path", "json", "OpenAI"}
    unknown = read - known - libraries
    assert {name for name in unknown if not re.search(rf"\b(def|class) {name}\b|^{name} = ", sources, re.M)} == set()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(_?[a-z]+(?:_[a-z]+)+)`", READMES["scripts/README.md"]))))
def test_function_named_in_a_how_to_exists(name: str) -> None:
    sources = [path for folder in ("scripts", "serve", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert any(
        re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))
        for path in sources
        if path.name != Path(__file__).name
    )


def test_the_loss_of_the_how_to_has_the_value_it_states_and_uses_what_the_trainer_has() -> None:
    import torch
    from trl import DPOTrainer

    from scripts.training import dpo

    code = "\n".join(block for block in CODE if "dpop" in block)
    made: dict[str, Any] = dict(vars(dpo))
    exec(code, made)  # noqa: S102

    class Policy:
        training = True

        def __call__(self, **rows: Any) -> SimpleNamespace:
            return SimpleNamespace(log_probs=torch.tensor([[-0.5, -0.5], [-1.0, -2.0]]))

    trainer = SimpleNamespace(
        with_reference=lambda inputs: inputs | {"ref_chosen_logps": torch.tensor([0.0]), "ref_rejected_logps": torch.tensor([-1.0])},
        beta=0.1, model=Policy(), _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(gather=lambda value: value), _total_train_tokens=0,
    )  # fmt: skip

    rows = {name: torch.ones(2, 3, dtype=torch.long) for name in ("input_ids", "attention_mask", "completion_mask")}
    loss = made["dpop"](trainer, trainer.model, rows)

    assert float(loss) == pytest.approx(math.log(1 + math.exp(0.4)))
    assert f"{float(loss):.4f}" in READMES["scripts/README.md"]
    assert trainer._metrics["train"]["rewards/margins"] == [pytest.approx(0.1)]
    assert trainer._metrics["train"]["num_tokens"] == [6]
    source = inspect.getsource(DPOTrainer) + inspect.getsource(dpo.PreferenceTrainer)
    used = set(re.findall(r"self\.(\w+)", code + READMES["scripts/README.md"])) - {"dpop"}
    assert used >= {"loss_types", "with_reference"}
    assert {name for name in used if f"self.{name}" not in source and f"def {name}" not in source} == set()
