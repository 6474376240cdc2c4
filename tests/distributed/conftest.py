"""One run of msrun per world size, shared by all tests that look at its results."""

from collections.abc import Callable

import pytest
from distributed.harness import Report, run

TIMEOUT = {2: 900, 4: 900, 8: 900}
"""Seconds; several times what an idle machine with two cores needs."""


@pytest.fixture(scope="session")
def report(tmp_path_factory) -> Callable[[int], Report]:
    """The report of a world size; a run that failed is not tried again."""
    known: dict[int, Report | str] = {}

    def get(world: int) -> Report:
        if world not in known:
            directory = tmp_path_factory.mktemp(f"world_{world}")
            try:
                known[world] = run(f"world_{world}.py", world, directory, TIMEOUT[world])
            except pytest.fail.Exception as failure:
                known[world] = str(failure)
        found = known[world]
        if isinstance(found, str):
            pytest.fail(found, pytrace=False)
        return found

    return get
