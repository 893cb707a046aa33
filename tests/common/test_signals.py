"""A request to stop is never lost."""

from __future__ import annotations

import os
import signal

import pytest

from scripts.common.errors import Interrupted
from scripts.common.signals import StopSignal, signals_held, trapped_signals


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
