"""The CPU twin for all tests of the kernels: built once per session, or a reason to skip."""

from __future__ import annotations

import shutil

import pytest
from kernels.support import twin

from mistral_ms.ops import custom


def pytest_collection_modifyitems(items):
    if shutil.which("g++"):
        return
    skip = pytest.mark.skip(reason="no g++: the CPU twin of the kernels cannot be compiled")
    for item in items:
        if "compiles" in item.fixturenames or "custom_kernels" in item.fixturenames:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def compiles():
    """Asked for by whatever compiles a library of the twin."""


@pytest.fixture(scope="session")
def custom_kernels(compiles):
    """MindSpore's custom operators run on the library of these tests."""
    custom.use_twin(twin.build().path)
    yield
    custom.library._chosen.clear()
