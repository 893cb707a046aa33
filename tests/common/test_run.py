"""One way to run a stage: the folder is held, the configuration is on record, a dry run leaves nothing."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.common.config import LoadedConfig, load_config
from scripts.common.errors import Interrupted, UserError
from scripts.common.run import open_run
from tests.conftest import ROOT
from tests.support.manifests import complete_manifest, finish_folder

OPEN = (
    "import sys; from scripts.common.config import load_config; from scripts.common.run import open_run\n"
    "with open_run('sft', load_config(sys.argv[1]), 'sft.output_dir'): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedConfig:
    """Return a configuration whose results lie in the test's folder, the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("sft: {output_dir: out/sft, max_length: 77}\n")
    return load_config("config.yaml", ["seed=3"])


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Take back what runs in this process did to the log: files that stay open, levels that hide warnings."""
    handlers = logging.root.handlers[:]
    loggers = [logging.getLogger(name) for name in ("", "scripts", "eval", "serve", "__main__", "bitsandbytes")]
    levels = [logger.level for logger in loggers]
    yield
    for handler in set(logging.root.handlers) - set(handlers):
        logging.root.removeHandler(handler)
        handler.close()
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def files_below(folder: Path) -> set[str]:
    """Name every file of a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_run_says_what_it_is_and_where_it_writes(config: LoadedConfig) -> None:
    with open_run("sft", config, "sft.output_dir") as run:
        assert (run.stage, run.dry, run.output_dir, run.run_dir) == ("sft", False, Path("out/sft"), Path("out/sft.run"))
        assert run.values.seed == 3
        assert run.section.max_length == 77

    with open_run("sft", config, "--out_dir", folder="elsewhere") as run:
        assert run.output_dir == Path("elsewhere")


def test_configuration_and_log_of_a_run_are_kept_beside_its_result(config: LoadedConfig) -> None:
    with open_run("sft", config, "sft.output_dir"):
        logging.getLogger("scripts.train_sft").info("at work")

    text = Path("out/sft.run/config.resolved.yaml").read_text(encoding="utf-8")
    assert text == config.to_yaml()
    assert "seed: 3  # --set" in text
    assert "at work" in Path("out/sft.run/log.txt").read_text(encoding="utf-8")


def test_folder_is_held_while_the_run_lasts_and_free_after_it(config: LoadedConfig) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", OPEN, "config.yaml"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match="out/sft: another process is writing it"),
            open_run("sft", config, "sft.output_dir"),
        ):
            pytest.fail("two runs at work on one folder")
        with open_run("sft", config, "sft.output_dir", dry=True):
            pass
    finally:
        holder.kill()
        holder.communicate()

    with open_run("sft", config, "sft.output_dir"):
        pass


def test_dry_run_writes_nothing_and_refuses_nothing(config: LoadedConfig, tmp_path: Path) -> None:
    finish_folder(tmp_path / "out/sft", "merged")
    before = files_below(tmp_path)

    with open_run("sft", config, "sft.output_dir", dry=True) as run:
        assert (run.dry, run.run_dir) == (True, Path("out/sft.run"))

    assert files_below(tmp_path) == before
    assert not run.run_dir.exists()


@pytest.mark.parametrize("stage", ["dpo", "merged", None])
def test_folder_of_another_stage_is_refused_before_anything_is_written(config: LoadedConfig, stage: str | None) -> None:
    if stage:
        finish_folder(Path("out/sft"), stage)
    else:
        Path("out/sft").mkdir(parents=True)
        Path("out/sft/thesis.txt").write_text("years of work")
    before = files_below(Path())

    with (
        pytest.raises(
            UserError, match=r"^sft\.output_dir: out/sft is there already and is not a folder of stage `sft`"
        ),
        open_run("sft", config, "sft.output_dir"),
    ):
        pytest.fail("work began")

    assert files_below(Path()) == before


def test_an_earlier_result_of_the_stage_may_be_replaced(config: LoadedConfig) -> None:
    finish_folder(Path("out/sft"), "sft")

    with open_run("sft", config, "sft.output_dir") as run:
        folder = run.empty_folder()
        (folder / "weights.bin").write_text("new")
        manifest = run.publish(folder, complete_manifest("sft"))

    assert files_below(Path("out/sft")) == {"weights.bin", "manifest.json"}
    assert manifest.files.keys() == {"weights.bin"}
    assert not folder.exists()


def test_folder_for_the_result_is_empty_though_an_earlier_run_left_something(config: LoadedConfig) -> None:
    Path("out/sft.run/finished").mkdir(parents=True)
    Path("out/sft.run/finished/half.bin").write_text("half")

    with open_run("sft", config, "sft.output_dir") as run:
        assert list(run.empty_folder().iterdir()) == []


def test_publish_that_was_interrupted_is_repaired(config: LoadedConfig) -> None:
    finish_folder(Path("out/sft.old"), "sft")

    with open_run("sft", config, "sft.output_dir"):
        assert Path("out/sft/manifest.json").is_file()

    assert not Path("out/sft.old").exists()


def test_run_that_adds_to_a_folder_wants_it_whole_and_of_the_right_stage(config: LoadedConfig) -> None:
    finish_folder(Path("out/sft"), "comparison")
    with open_run("judge", config, "sft.output_dir", extends="comparison"):
        pass

    with (
        pytest.raises(UserError, match="found a folder of stage `comparison`, wanted eval"),
        open_run("eval", config, "sft.output_dir", extends="eval"),
    ):
        pytest.fail("work began")


def test_run_that_fails_lets_the_folder_go_and_leaves_no_result(config: LoadedConfig) -> None:
    with pytest.raises(ZeroDivisionError), open_run("sft", config, "sft.output_dir"):
        raise ZeroDivisionError

    assert not Path("out/sft").exists()
    with open_run("sft", config, "sft.output_dir"):
        pass


def test_signal_ends_the_run_and_the_handlers_are_put_back(config: LoadedConfig) -> None:
    before = signal.getsignal(signal.SIGTERM)

    with pytest.raises(Interrupted) as caught, open_run("sft", config, "sft.output_dir"):
        os.kill(os.getpid(), signal.SIGTERM)

    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_ranks_write_nothing(config: LoadedConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rank 0 holds the folder for all of them."""
    monkeypatch.setenv("RANK", "1")

    with open_run("sft", config, "sft.output_dir"):
        pass

    assert files_below(tmp_path) == {"config.yaml"}
