"""How cells are executed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mindspore as ms


@contextmanager
def graph_mode() -> Iterator[None]:
    """Cells called inside run as compiled graphs; the mode that was set before comes back.

    ``ms.jit`` would compile the same graph, but its caller waits for results in a busy loop that
    takes a whole core away from the kernels: with two cores a step takes half as long again.
    """
    with _mode(ms.GRAPH_MODE):
        yield


@contextmanager
def pynative_mode() -> Iterator[None]:
    """Cells called inside run operator by operator; the mode that was set before comes back."""
    with _mode(ms.PYNATIVE_MODE):
        yield


@contextmanager
def _mode(mode: int) -> Iterator[None]:
    before = ms.get_context("mode")
    ms.set_context(mode=mode)
    try:
        yield
    finally:
        ms.set_context(mode=before)
