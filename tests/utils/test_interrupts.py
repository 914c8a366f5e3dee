"""Signals held back: the first one waits, the second one does not, and others' handlers stay."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from efficientad.utils.interrupts import held_back


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def default_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_waits_and_the_second_does_not():
    said = []
    with held_back(said=lambda: said.append(1)) as asked:
        assert not asked()
        send()
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            send()
    assert said == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_several_signals_and_an_error_inside():
    before = signal.getsignal(signal.SIGTERM)

    def fails() -> None:
        with held_back((signal.SIGINT, signal.SIGTERM)) as asked:
            send(signal.SIGTERM)
            raise ZeroDivisionError(asked())

    with pytest.raises(ZeroDivisionError, match="True"):
        fails()
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_ignored_or_handled_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_back() as asked:
        send()
        assert not asked()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_elsewhere_than_in_the_main_thread_nothing_happens():
    found = []

    def work() -> None:
        with held_back() as asked:
            found.append(asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert found == [False]
