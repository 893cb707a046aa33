"""A machine that gives out ends in one message, a bug in a traceback."""

from __future__ import annotations

import errno

import pytest

from scripts.common.errors import entry_point


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
