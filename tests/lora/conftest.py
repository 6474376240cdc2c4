"""Graphs of tests fall back to Python in no place."""

import mindspore as ms
import pytest


@pytest.fixture
def strict_graphs():
    """Nothing in a graph may fall back to the Python interpreter."""
    before = ms.get_context("jit_syntax_level")
    ms.set_context(jit_syntax_level=ms.STRICT)
    yield
    ms.set_context(jit_syntax_level=before)
