"""A request to stop is never lost, and a machine that gives out is told in one message."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from scripts.common.errors import Interrupted, entry_point
from scripts.common.runtime import StopSignal, available_cores, signals_held, trapped_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_before_training_ends_the_run_at_once(number: signal.Signals, code: int) -> None:
    with pytest.raises(Interrupted) as caught, trapped_signals():
        os.kill(os.getpid(), number)

    assert caught.value.exit_code == code


def test_signal_during_training_waits_for_the_step_and_the_second_does_not() -> None:
    with trapped_signals() as stop:
        stop.deferred = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exit_code == 143
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_that_arrives_inside_a_finaliser_is_remembered() -> None:
    """Python swallows what is raised there; the training loop then stops by the exit code."""

    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with trapped_signals() as stop:
        Finalised()

    assert stop.exit_code == 143


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with trapped_signals() as stop:
        assert isinstance(stop, StopSignal)
        assert signal.getsignal(signal.SIGTERM) is stop

    assert signal.getsignal(signal.SIGTERM) is before


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("signals", "reached"), [(1, True), (2, False)])
def test_a_held_signal_comes_after_the_block_and_a_second_one_at_once(signals: int, reached: bool) -> None:
    ended = []

    def work() -> None:
        with trapped_signals(), signals_held():
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
            ended.append("the block")

    with pytest.raises(Interrupted):
        work()
    assert bool(ended) == reached


# --- what a user is told when the machine gives out


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
