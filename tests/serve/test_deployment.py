"""The server in a container and as a service: what their files say is done in a folder of its own, without either."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml

from scripts.common.schema import Serve
from scripts.common.trl_arguments import SCHEMA_FILE
from tests.conftest import ROOT, save_tiny_model, write_jsonl
from tests.support.serving import free_port, save_adapter

KEY = "a-key-of-some-length"
COMPOSE = yaml.safe_load((ROOT / "serve/compose.yaml").read_text(encoding="utf-8"))
(SERVICE,) = COMPOSE["services"].values()
UNIT = ROOT / "serve/llm-server.service"
PORT = "8000"


# --- the Dockerfile


@dataclass
class Image:
    """What the steps of a Dockerfile have made in a folder, and how it is started."""

    root: Path
    workdir: Path
    env: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    home: Path | None = None
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)


def steps() -> Iterator[tuple[str, str]]:
    """Yield instruction and arguments of each step."""
    text = (ROOT / "serve/Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, arguments = line.partition(" ")
            yield name, arguments.strip()


def build(root: Path, context: Path = ROOT) -> Image:
    """Take the steps as `docker build` does, but for pip's: this environment stands in for what it installs."""
    image = Image(root, root)
    for name, arguments in steps():
        words = shlex.split(arguments)
        if name == "WORKDIR":
            image.workdir = root / arguments.strip("/")
            image.workdir.mkdir(parents=True)
        elif name == "COPY":
            *sources, target = words
            for source in sources:
                there = image.workdir / target
                if target.endswith("/"):
                    there.mkdir()
                if (context / source).is_dir():
                    shutil.copytree(context / source, there, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(context / source, there)
        elif name == "RUN" and words[:2] == ["pip", "install"]:
            assert (image.workdir / words[words.index("-r") + 1]).is_file()
        elif name == "RUN" and words[0] == "useradd":
            image.home = root / words[words.index("--home-dir") + 1].strip("/")
            image.home.mkdir()
        elif name == "ENV":
            image.env |= dict(word.split("=", 1) for word in words)
        elif name == "USER":
            image.user = arguments
        elif name == "CMD":
            image.command = json.loads(arguments)
        elif name == "HEALTHCHECK":
            image.health = json.loads(arguments.partition("CMD")[2])
        else:
            assert name in ("FROM", "ARG", "VOLUME", "EXPOSE"), f"a step that this test does not take: {name}"
    return image


def expanded(value: str, environment: dict[str, str]) -> str:
    """Fill in ${NAME:-default} and ${NAME:?message} as compose does."""

    def fill(match: re.Match[str]) -> str:
        name, kind, text = match.groups()
        if found := environment.get(name):
            return found
        if kind == "?":
            raise LookupError(f"{name}: {text}")
        return text

    return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", fill, value)


def mount(image: Image, project: Path) -> list[Path]:
    """Put a project's folders where compose mounts those of the checkout; return what may be written."""
    writable = []
    for volume in SERVICE["volumes"]:
        source, target, *mode = volume.split(":")
        there = image.root / target.strip("/")
        if mode == ["ro"]:
            shutil.rmtree(there, ignore_errors=True)  # a mount hides what the image has there
            shutil.copytree(project / (ROOT / "serve" / source).resolve().relative_to(ROOT), there)
        else:
            assert source in COMPOSE["volumes"]
            assert there.is_dir(), "owned by the image's user, which a new volume takes over"
            writable.append(there)
    scratch = image.root / SERVICE["tmpfs"].strip("/")
    scratch.mkdir()
    return [*writable, scratch]


def without_privileges(command: list[str]) -> list[str]:
    """Let permission bits hold for root, too."""
    if os.geteuid():
        return command
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", *command]


@contextmanager
def started(image: Image, port: str, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start what the image starts, with the environment of compose and nothing else."""
    said = {name: expanded(value, more) for name, value in SERVICE["environment"].items()}
    inside = {name: re.sub(r"^(?=/)", str(image.root), value) for name, value in {**image.env, **said}.items()}
    folders = {"HOME": str(image.home), "TMPDIR": str(image.root / "tmp")}
    path = f"{Path(sys.executable).parent}{os.pathsep}/usr/bin{os.pathsep}/bin"
    environment = {"PATH": path, "OMP_NUM_THREADS": "1", **folders, **inside}
    command = [word.replace(PORT, port) for word in image.command]
    with (image.root / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            without_privileges(command), cwd=image.workdir, env=environment, stdout=log, stderr=log
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def is_healthy(image: Image, port: str) -> bool:
    """Ask as the health check does."""
    python, *arguments = (word.replace(PORT, port) for word in image.health)
    return not subprocess.run([shutil.which(python) or python, *arguments], capture_output=True, check=False).returncode


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a checkout's own folders after training, with a tiny model."""
    folder = tmp_path / "project"
    base = save_tiny_model(folder / "models/tiny")
    save_adapter(folder / "outputs/sft_adapter", base)
    (folder / "data").mkdir()
    write_jsonl(folder / "data/prompts.jsonl", [{"prompt": f"Say {number}."} for number in range(20)])
    (folder / "configs").mkdir()
    shutil.copy(ROOT / "configs/schema.json", folder / "configs")
    config = {
        "base_model_id": "models/tiny", "offline": True, "data": {"validation_ratio": 0.1, "test_ratio": 0.1},
        "performance": {"threads": 1, "dtype": "fp32"}, "pairs": {"max_new_tokens": 8},
        "serve": {"adapter_path": "outputs/sft_adapter", "max_context_tokens": 128, "queue_path": "data/prompts.jsonl"},
    }  # fmt: skip
    (folder / "configs/demo.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


@pytest.fixture
def image(project: Path, tmp_path: Path) -> tuple[Image, list[Path]]:
    """Build the image and mount the project; nothing but its volumes may be written."""
    image = build(tmp_path / "image")
    writable = mount(image, project)
    for path in [image.workdir, *image.workdir.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    tried = subprocess.run(without_privileges(["touch", str(image.workdir / "x")]), capture_output=True, check=False)
    assert tried.returncode, "the test would not notice a write"
    return image, writable


@pytest.mark.slow
def test_the_image_answers_with_a_key_and_writes_to_its_volumes_only(image: tuple[Image, list[Path]]) -> None:
    made, writable = image
    port, ask = str(free_port()), {"prompt": "Say 1.", "max_new_tokens": 3}
    before = {path for path in made.root.rglob("*") if not any(path.is_relative_to(place) for place in writable)}
    url, key = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {KEY}"}
    assert not is_healthy(made, port)

    with started(made, port, SERVE_API_KEYS=KEY) as process:
        end = time.monotonic() + 120
        while not is_healthy(made, port):
            assert process.poll() is None, (made.root / "log.txt").read_text()
            assert time.monotonic() < end, (made.root / "log.txt").read_text()
            time.sleep(0.3)
        refused = httpx.post(f"{url}/v1/generate", json=ask)
        answer = httpx.post(f"{url}/v1/generate", json=ask, headers=key, timeout=60)
        pages = [httpx.get(url + page).status_code for page in ("/", "/docs", "/votes", "/playground.js")]
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "boolean"}}}
        chat = {"messages": [{"role": "user", "content": "yes?"}], "response_format": schema, "max_tokens": 8}
        structured = httpx.post(f"{url}/v1/chat/completions", json=chat, headers=key, timeout=60)
        queue = httpx.get(f"{url}/v1/queue", headers=key)
        vote = {
            "prompt": chat["messages"],
            "chosen": "1",
            "rejected": "2",
            "chosen_model": "sft",
            "rejected_model": "base",
        }
        voted = httpx.post(f"{url}/v1/votes", json=vote, headers=key)
        process.send_signal(signal.SIGTERM)  # as `docker stop` does
        code = process.wait(timeout=40)

    log = (made.root / "log.txt").read_text(encoding="utf-8")
    assert (refused.status_code, answer.status_code, pages) == (401, 200, [200] * 4)
    assert answer.json()["adapter"] == "sft"
    assert structured.status_code == 200, structured.text
    assert queue.status_code == 200, queue.text
    assert voted.status_code == 201, voted.text
    assert code in (0, -signal.SIGTERM), log
    assert "Traceback" not in log
    after = {path for path in made.root.rglob("*") if not any(path.is_relative_to(place) for place in writable)}
    assert after - before == {made.root / "log.txt"}
    assert (made.root / "state/votes.jsonl").is_file()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (400, True), (503, False), (500, False)])
def test_the_health_check_goes_by_readiness_and_not_by_the_hosts_that_are_served(
    tmp_path: Path, status: int, healthy: bool
) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        assert is_healthy(build(tmp_path / "image"), str(server.server_address[1])) == healthy
        server.shutdown()


def modules_reached(start: str) -> set[Path]:
    """Return every file of the project that a module imports, anywhere in it and in those that it imports."""
    found: set[Path] = set()
    names = [start]
    while names:
        name = names.pop()
        path = ROOT.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.is_file() or file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_every_module_that_the_server_can_import_is_in_the_image() -> None:
    copied = [ROOT / word for name, arguments in steps() if name == "COPY" for word in arguments.split()[:-1]]
    reached = modules_reached("serve.fastapi_server")
    assert ROOT / "scripts/pairs/votes.py" in reached, "imports within functions count"
    reached |= {SCHEMA_FILE}
    assert {path for path in reached if not any(path.is_relative_to(place) for place in copied)} == set()


def test_pip_installs_what_the_server_needs_for_a_python_that_is_tested() -> None:
    done = dict(steps())
    assert re.match(r"python:3\.1[1-4]-", done["FROM"])
    assert "pip install --no-cache-dir -r requirements.txt" in [text for name, text in steps() if name == "RUN"]


# --- compose


def test_compose_starts_nothing_without_keys() -> None:
    wanted = SERVICE["environment"]["SERVE_API_KEYS"]
    for environment in ({}, {"SERVE_API_KEYS": ""}):
        with pytest.raises(LookupError, match="SERVE_API_KEYS: set it to keys"):
            expanded(wanted, environment)
    assert expanded(wanted, {"SERVE_API_KEYS": KEY}) == KEY


def test_compose_gives_the_container_no_more_than_it_needs(tmp_path: Path) -> None:
    image = build(tmp_path / "image")
    assert SERVICE["user"] == image.user
    assert int(image.user) > 0
    assert SERVICE["read_only"] is True
    assert SERVICE["cap_drop"] == ["ALL"]
    assert SERVICE["security_opt"] == ["no-new-privileges:true"]
    assert SERVICE["ports"] == [f"127.0.0.1:{PORT}:{PORT}"], "there is no TLS, so a proxy stands before it"
    assert [volume for volume in SERVICE["volumes"] if not volume.endswith(":ro")] == ["state:/state"]
    build_from = (ROOT / "serve" / SERVICE["build"]["context"]).resolve()
    assert (build_from, build_from / SERVICE["build"]["dockerfile"]) == (ROOT, ROOT / "serve/Dockerfile")
    assert PORT in image.command
    assert PORT in image.health[-1]
    assert image.health[-1].count("/health/ready") == 1


def names_of_keys(variables: list[str]) -> set[str]:
    return {name.removeprefix("SERVE_").lower() for name in variables if name.startswith("SERVE_")} - {"api_keys"}


def test_both_name_keys_that_exist_and_wait_until_running_requests_are_done() -> None:
    unit = read_unit(UNIT)
    variables = [value.partition("=")[0] for value in unit["Environment"]]
    assert names_of_keys([*SERVICE["environment"], *variables]) <= Serve.model_fields.keys()
    for seconds in (SERVICE["stop_grace_period"].rstrip("s"), *unit["TimeoutStopSec"]):
        assert float(seconds) > Serve().drain_seconds
    for config in (expanded(SERVICE["environment"]["LLM_CONFIG"], {}), unit["Environment"][0].partition("=")[2]):
        assert (ROOT / config).is_file()


# --- the unit of systemd


def read_unit(path: Path) -> dict[str, list[str]]:
    """Return the values of each key, in which a key may stand several times."""
    values: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            values.setdefault(key, []).append(value)
    return values


def test_the_service_starts_the_server_of_the_checkout() -> None:
    import uvicorn

    unit = read_unit(UNIT)
    (folder,), (start,) = unit["WorkingDirectory"], unit["ExecStart"]
    program, *arguments = shlex.split(start)
    assert program == f"{folder}/.venv/bin/uvicorn"
    parsed = uvicorn.main.make_context("uvicorn", arguments).params
    assert (parsed["app"], parsed["host"]) == ("serve.fastapi_server:app", "127.0.0.1")


@pytest.mark.parametrize(
    ("keys", "starts"), [({}, False), ({"SERVE_API_KEYS": ""}, False), ({"SERVE_API_KEYS": KEY}, True)]
)
def test_the_service_does_not_start_without_keys(keys: dict[str, str], starts: bool) -> None:
    (check,) = read_unit(UNIT)["ExecStartPre"]
    words = [keys.get(word[2:-1], "") if word.startswith("${") else word for word in shlex.split(check)]
    assert (subprocess.run(words, check=False).returncode == 0) == starts


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_service(tmp_path: Path) -> None:
    text = UNIT.read_text(encoding="utf-8")
    (folder,) = read_unit(UNIT)["WorkingDirectory"]
    venv = Path(sys.executable).parents[1]
    here = tmp_path / UNIT.name
    here.write_text(text.replace(f"{folder}/.venv", str(venv)).replace(folder, str(ROOT)), encoding="utf-8")
    for check in (["verify"], ["security", "--offline=true", "--threshold=20"]):  # tenths: 2.0 and below is "OK"
        done = subprocess.run(["systemd-analyze", *check, str(here)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert UNIT.name not in done.stderr, done.stderr
