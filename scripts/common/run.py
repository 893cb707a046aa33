"""One way to run a stage: configuration, environment, lock, log, signals, and a result that appears at once."""

from __future__ import annotations

import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from scripts.common.artifacts import (
    Manifest,
    check_replaceable,
    locked_run_dir,
    publish,
    read_manifest,
    repair_interrupted_publish,
    run_dir_of,
    write_manifest,
    write_text_durably,
)
from scripts.common.colour import ColouredFormatter
from scripts.common.config import LoadedConfig
from scripts.common.distributed import is_main_process, leave_process_group
from scripts.common.machine import prepare_environment
from scripts.common.schema import Config, Training
from scripts.common.signals import StopSignal, trapped_signals


@dataclass(frozen=True)
class Run:
    """A stage at work: its configuration, the folder it will write, and the place for work in progress beside that."""

    stage: str
    config: LoadedConfig
    output_dir: Path
    run_dir: Path
    stop: StopSignal
    dry: bool

    @property
    def values(self) -> Config:
        """Return the values of the configuration."""
        return self.config.values

    @property
    def section(self) -> Training:
        """Return the section of the configuration that a training stage is named after."""
        section: Training = getattr(self.values, self.stage)
        return section

    def empty_folder(self, name: str = "finished") -> Path:
        """Make the folder in which the result is put together."""
        folder = self.run_dir / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def publish(self, folder: Path, manifest: Manifest) -> Manifest:
        """Write the manifest into a complete folder and put it in the place of the old result."""
        manifest = write_manifest(folder, manifest)
        publish(folder, self.output_dir)
        return manifest


@contextmanager
def open_run(
    stage: str,
    config: LoadedConfig,
    key: str,
    *,
    folder: str | None = None,
    extends: str | None = None,
    grows: bool = False,
    dry: bool = False,
) -> Iterator[Run]:
    """Hold the output folder that `key` of the configuration names, for one run of a stage.

    `folder` is another one, given on the command line. A finished folder there is replaced by the result, so it must be
    of the same stage. With `extends` it must be whole and of that stage, as the run adds to what is in it. With `grows`
    other runs write into it, and the caller checks what is there. A dry run only reads, so it takes no lock and writes no log.
    Raises: UserError when the folder is something else, or another process is writing it.
    """
    output_dir = Path(folder or attrgetter(key)(config.values))
    prepare_environment(config.values)
    if dry:
        set_up_logging()
        yield Run(stage, config, output_dir, run_dir_of(output_dir), StopSignal(), dry=True)
        return
    if not extends and not grows:
        check_replaceable(output_dir, stage, key)
    elif extends:
        repair_interrupted_publish(output_dir)
        if output_dir.exists():
            read_manifest(output_dir, stages=(extends,))
    with trapped_signals() as stop, ExitStack() as held:
        run_dir = run_dir_of(output_dir)
        if is_main_process():  # rank 0 holds the folder and writes
            held.enter_context(locked_run_dir(output_dir))
            write_text_durably(run_dir / "config.resolved.yaml", config.to_yaml())
        set_up_logging(run_dir / "log.txt" if is_main_process() else None)
        yield Run(stage, config, output_dir, run_dir, stop, dry=False)
        leave_process_group()


def set_up_logging(log_file: Path | None = None) -> None:
    """Send our log to the terminal and to a file; keep chatty libraries to warnings."""
    layout, times = "%(asctime)s %(message)s", "%H:%M:%S"
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(ColouredFormatter(layout, times, sys.stderr))
    handlers: list[logging.Handler] = [terminal]
    if log_file:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    logging.raiseExceptions = False  # a log file on a full disk would print a traceback for every line
    level = logging.INFO if is_main_process() else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format=layout, datefmt=times, handlers=handlers, force=True)
    for package in ("scripts", "eval", "serve", "__main__"):
        logging.getLogger(package).setLevel(level)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Both are for the libraries' authors.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")
    warnings.filterwarnings("ignore", category=FutureWarning, message="`past_key_values` is deprecated")
