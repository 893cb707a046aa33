"""README is true: each command in it exists, its flags parse, its configuration loads, its figures have a source."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from scripts.common.config import load_config
from scripts.common.reference import updated_readme
from scripts.common.schema import Config
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "eval/benchmarks/README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:bash|powershell)[^\n]*\n(.*?)```", README + BENCHMARKS, re.DOTALL)
INLINE = re.findall(r"`((?:python|make|uvicorn|mlflow|pytest) [^`]+)`", README + BENCHMARKS)
COMMANDS = sorted({line.strip() for block in BLOCKS for line in block.splitlines() if line.strip()} | set(INLINE))
LAUNCHED = [command for command in COMMANDS if re.match("torchrun |accelerate launch ", command)]
PYTHON = [f"python {command[command.index('-m scripts') :]}" for command in LAUNCHED] + [
    command for command in COMMANDS if re.match(r"(\w+=\S+ )*python (-m (scripts|eval)\.|scripts/|eval/)", command)
]


def test_there_are_commands_to_check() -> None:
    assert len(PYTHON) >= 6


@pytest.mark.parametrize("command", PYTHON)
def test_command_exists_and_its_flags_parse(command: str) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    if words[1] == "-m":
        module, arguments = importlib.import_module(words[2]), words[3:]
    else:
        file = ROOT / words[1]
        module, arguments = importlib.import_module(".".join(Path(words[1]).with_suffix("").parts)), words[2:]
        assert file.is_file()
    if not hasattr(module, "build_parser"):  # a generator without flags
        assert not arguments
        return
    parsed = module.build_parser().parse_args(arguments)
    if getattr(parsed, "config", None):
        load_config(ROOT / parsed.config, getattr(parsed, "overrides", []))


@pytest.mark.parametrize("command", LAUNCHED)
def test_launch_files_exist(command: str) -> None:
    assert all((ROOT / file).is_file() for file in re.findall(r"--config_file (\S+)", command))


def test_every_command_is_of_a_kind_that_is_checked() -> None:
    """Beside those of this project: the server, MLflow's page, requests to the server, and setting up by hand."""
    kinds = (
        r"(\w+=\S+ )*(uvicorn|mlflow) ", "make ", "curl ", "Invoke-RestMethod ", "pip install( -r \\S+)+$", "(python3|py) -m venv ",
        "torchrun ", "accelerate launch ", r"(source )?\.venv\S+/?activate", r"vllm serve ",
    )  # fmt: skip
    assert [c for c in COMMANDS if c not in PYTHON and not re.match("|".join(kinds), c, re.IGNORECASE)] == []


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
    from serve.fastapi_server import app
    from serve.schemas import GenerateRequest

    (path,) = re.findall(r"localhost:8000(\S+)", command)
    assert "post" in app.openapi()["paths"][path]
    GenerateRequest.model_validate_json(re.findall(r"'(\{.*\})'", command)[0])


@pytest.mark.parametrize("file", sorted(set(re.findall(r"requirements\.?\w*\.txt", README))))
def test_named_requirements_exist(file: str) -> None:
    assert (ROOT / file).is_file()


def known_flags() -> set[str]:
    """Name every flag of the project's commands, and uvicorn's."""
    import uvicorn

    from tests.test_no_dead_keys import flags

    return {flag.split()[1] for flag in flags()} | {o for parameter in uvicorn.main.params for o in parameter.opts}


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[\w-]+)", README))))
def test_flag_named_in_the_text_exists(flag: str) -> None:
    assert flag in known_flags()


SECTIONS = "|".join(name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields"))


@pytest.mark.parametrize("key", sorted(set(re.findall(rf"`((?:{SECTIONS})\.[a-z_.0-9]+\b(?!\.py|\())", README))))
def test_key_named_in_the_text_exists(key: str) -> None:
    from tests.test_no_dead_keys import KEYS

    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "eval").rglob("*.py")}
    assert key in KEYS or key in modules or any(known.startswith(f"{key}.") for known in KEYS)


@pytest.mark.parametrize("variable", sorted(set(re.findall(r"`([A-Z][A-Z_]{5,})[`=]", README))))
def test_environment_variable_named_in_the_text_is_read(variable: str) -> None:
    sources = [path for folder in ("scripts", "serve", "eval") for path in (ROOT / folder).rglob("*.py")]
    assert any(variable in path.read_text(encoding="utf-8") for path in sources)


def test_a_share_is_stated_only_with_the_command_that_measures_it() -> None:
    """Everything else stands between markers and is generated from a file that `make demo` writes."""
    free = re.sub(r"<!-- (measured|config).*?: generated -->.*?<!-- end of .*? -->", "", README, flags=re.DOTALL)
    stated = [paragraph for paragraph in free.split("\n\n") if re.search(r"\d %", paragraph)]
    assert [paragraph for paragraph in stated if not re.search(r"`make \w+`|95 % interval", paragraph)] == []


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake (?:-\S+ )?([a-z-]+)\b", " ".join(COMMANDS)))))
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:configs|data|eval|scripts|serve|tests)/[\w./-]+\.\w+)`", README)))
)
def test_named_file_exists(path: str) -> None:
    made = ("data/sft/mydata.jsonl", "data/sft/sample_pii.deid.jsonl")
    assert path in made or (ROOT / path).exists()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_configuration_reference_is_current() -> None:
    assert updated_readme(README) == README
