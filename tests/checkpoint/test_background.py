"""One save at a time, and no error is lost."""

import threading

import pytest

from mistral_ms.checkpoint import BackgroundWriter
from mistral_ms.errors import CheckpointError


def failing():
    raise CheckpointError("disk full", where="somewhere")


def test_a_save_runs_beside_the_caller_and_is_finished_at_the_end():
    go, done = threading.Event(), []

    def save():
        assert go.wait(10)
        done.append(threading.current_thread())

    with BackgroundWriter() as writer:
        writer.submit(save)
        writer.check()  # does not wait
        assert not done
        go.set()
    assert done and done[0] is not threading.current_thread()


def test_the_next_save_waits_for_the_one_before():
    running, most, count = 0, 0, threading.Lock()

    def save():
        nonlocal running, most
        with count:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.02)
        with count:
            running -= 1

    with BackgroundWriter() as writer:
        for _ in range(5):
            writer.submit(save)
    assert (running, most) == (0, 1)


def test_an_error_comes_out_of_the_next_submit_which_does_not_start():
    started = []
    with BackgroundWriter() as writer:
        writer.submit(failing)
        with pytest.raises(CheckpointError, match="disk full: somewhere"):
            writer.submit(lambda: started.append(1))
    assert not started


def test_an_error_comes_out_of_check_once():
    with BackgroundWriter() as writer:
        writer.submit(failing)
        with pytest.raises(CheckpointError, match="disk full"):
            while True:
                writer.check()
        writer.check()


def test_an_error_comes_out_of_the_end():
    with pytest.raises(CheckpointError, match="disk full"), BackgroundWriter() as writer:
        writer.submit(failing)


def test_on_the_way_out_of_an_error_the_save_is_finished_and_the_error_stays():
    done = []
    with pytest.raises(KeyboardInterrupt), BackgroundWriter() as writer:
        writer.submit(lambda: (threading.Event().wait(0.05), done.append(1)))
        raise KeyboardInterrupt
    assert done


def test_an_error_of_the_save_is_told_with_the_one_that_ended_the_training(capsys):
    with pytest.raises(KeyboardInterrupt) as caught, BackgroundWriter() as writer:
        writer.submit(failing)
        raise KeyboardInterrupt
    notes = getattr(caught.value, "__notes__", [capsys.readouterr().err])  # of Python 3.11
    assert "disk full: somewhere" in notes[0]
