"""A machine that gives out ends in one message, a bug in a traceback."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from scripts.common.errors import entry_point
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory ran out (MemoryError). Lower the batch (per_device_train_batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "memory ran out"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
        (RuntimeError("unable to mmap 9 bytes from file <m>: Cannot allocate memory (12)"), "memory ran out"),
        (OSError(errno.EROFS, "Read-only file system", "out"), "out: Read-only file system. Correct the path"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "Free some space"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "Free some space"),
    ],
)
def test_memory_or_disk_that_gave_out_is_one_message_with_a_next_step(error: Exception, said: str, capsys) -> None:
    @entry_point
    def main(argv: object) -> int:
        raise error

    assert main([]) == 2
    assert said in capsys.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    @entry_point
    def main(argv: object) -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main([])


WRITES = """
import sys
from scripts.common.errors import entry_point

@entry_point
def main(argv):
    for number in range(100000):
        print("line", number)
    return 0

sys.exit(main([]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes as POSIX has them")
def test_a_reader_that_has_seen_enough_ends_a_command_in_silence() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    assert process.wait(30) == 141


def test_a_pipe_that_breaks_elsewhere_is_no_silent_end() -> None:
    @entry_point
    def main(argv):
        raise BrokenPipeError(errno.EPIPE, "a worker has gone")

    with pytest.raises(BrokenPipeError):
        main([])
