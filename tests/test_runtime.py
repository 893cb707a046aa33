"""A request to stop is never lost: at once before training, after the step within it, at once the second time."""

from __future__ import annotations

import os
import signal

import pytest

from scripts.common.errors import Interrupted
from scripts.common.runtime import StopSignal, available_cores, trapped_signals


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
