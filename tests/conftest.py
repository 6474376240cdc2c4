"""What every test shares: quiet libraries, a temporary working directory, both ways to execute."""

import os

# before anything imports MindSpore or torch
os.environ.setdefault("GLOG_v", "3")
os.environ.setdefault("OMP_NUM_THREADS", "2")
# MindSpore's scheduler takes a rank that is slow to end for a lost one: seconds
os.environ.setdefault("MS_NODE_TIMEOUT", "300")

# compiled graphs are neither taken from the user's cache nor kept there
os.environ.setdefault("MS_COMPILER_CACHE_ENABLE", "0")

import gc
import sys

import pytest
from support.allocator import use_jemalloc
from support.slowest import Slowest

use_jemalloc(os.environ)  # of the processes of pytest-xdist, and of all that they start

TOGETHER = ("tests/distributed/", "tests/dryrun/", "tests/serving/")
"""Folders whose tests share jobs, processes, a server: one after the other."""
APART = ("_command.py", "_launch.py")
"""Ends of names of files in them that start jobs of their own."""
SHARING = {
    f"tests/{folder}/test_{name}.py": folder
    for folder, names in {
        "training": ("loss_scale", "offload", "optimizers", "state"),
        "mindformers": ("config", "files", "model"),
    }.items()
    for name in names
}
"""Files whose tests share trainings that have been compiled, or classes that take seconds to
import.
"""
SLOW = (
    "alignment", "cli", "distributed", "dryrun", "end_to_end", "fuzz", "kernels", "launch",
    "mindformers", "mutants",
)  # fmt: skip
"""Folders that ``--fast`` leaves out: they start processes, compile for Ascend, or need minutes."""
FIRST = (
    "distributed", "dryrun", "training", "mindformers", "end_to_end", "launch", "kernels", "cli",
    "alignment", "inference", "models",
)  # fmt: skip
"""What takes longest begins first, so that all processes end at about the same time."""


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="only what runs in this process, quickly")


def pytest_ignore_collect(collection_path, config):
    """Folders that are left out are not even imported."""
    parts = collection_path.relative_to(config.rootpath).parts
    return True if config.getoption("--fast") and parts[1:2] and parts[1] in SLOW else None


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fast"):
        left_out = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    ranks = {f"tests/{folder}/": number for number, folder in enumerate(FIRST)}

    def rank(item):
        return next(
            (n for folder, n in ranks.items() if item.nodeid.startswith(folder)), len(FIRST)
        )

    items.sort(key=rank)  # stable: files stay whole


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds; left out by --fast")
    config.pluginmanager.register(Slowest(), "slowest")


def pytest_xdist_make_scheduler(config, log):
    """What runs side by side (pytest -n 3): whole files, so that their fixtures are made once."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # by FIRST, not by the number of tests

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            if file in SHARING:
                return SHARING[file]
            return file if file.endswith(APART) else next(filter(file.startswith, TOGETHER), file)

    return Scheduler(config, log)


def pytest_collection_finish(session):
    """Runs each operation to its end before the next one, and makes collecting garbage cheap.

    MindSpore's PyNative threads wait for each other by spinning; on two cores the small operations
    of the tests are 4 to 15 times faster, and burn a fifth of the processor time, one at a time.
    """
    if mindspore := sys.modules.get("mindspore"):
        mindspore.runtime.launch_blocking()
    gc.freeze()  # MindSpore collects before each compilation: not all that was imported, every time


@pytest.fixture(scope="session", autouse=True)
def temporary_working_directory(tmp_path_factory):
    """MindSpore leaves rank_0/ and kernel_meta/ wherever it runs."""
    before = os.getcwd()  # noqa: PTH109
    os.chdir(tmp_path_factory.mktemp("working_directory"))
    yield
    os.chdir(before)


def switch_mode(name: str) -> None:
    """Sets PyNative or GRAPH_MODE.

    Graph mode is strict: what the graph compiler does not understand would otherwise fall back to
    Python without a word, and become slow or wrong. Strict turns that into an error.
    """
    import mindspore as ms

    graph = name == "graph"
    ms.set_context(
        mode=ms.GRAPH_MODE if graph else ms.PYNATIVE_MODE,
        jit_syntax_level=ms.STRICT if graph else ms.LAX,
    )


@pytest.fixture(params=["pynative", "graph"])
def mode(request):
    """Runs the test in PyNative and in strict GRAPH_MODE (a compilation costs 1 to 3 s)."""
    switch_mode(request.param)
    yield request.param
    switch_mode("pynative")


@pytest.fixture
def graph():
    """Runs the test in strict GRAPH_MODE only."""
    switch_mode("graph")
    yield
    switch_mode("pynative")
