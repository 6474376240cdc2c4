"""Compiled graphs, kept between runs: the first step of a process costs what it computes.

MindSpore has a cache of its own, which knows graphs by the order in which a process compiles them,
and no further: a process that compiles another shape or another model first gets the wrong graph
(2.9: an error at best). So its directory is one of this process alone. The graphs come from a store
in the user's cache, and go there, under a digest of all that they are made of: the cells with all
that hangs on them but the values of parameters, shapes and dtypes of the inputs, the sources of
this package, versions, and MindSpore's settings. What holds anything that is not understood is
compiled and not kept. What is kept serves later processes: the same model compiled again in one
process was no faster.

Only on CPU, in one process; elsewhere it was never tried. ``MS_COMPILER_CACHE_ENABLE``, which turns
MindSpore's own cache on or off, turns this one off.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.graph import api
from mindspore.ops import Primitive

from mistral_ms.cache import cache_directory, compiler_settings

PACKAGE = Path(__file__).parents[1]
KNOWN = ("mistral_ms", "mindspore")
"""Packages whose objects are understood; their sources or version are part of the digest."""
MOST_ENTRIES = 64
"""The oldest of more are removed: each is some 100 kB to some MB."""
MOST_BYTES = 64 << 20
"""Graphs with more constants than that are not kept."""
_FLAGS = (
    "training", "requires_grad", "has_bprop", "cell_type", "mixed_precision_type",
    "_jit_config_dict", "_has_config_recompute", "_in_strategy", "_out_strategy",
)  # fmt: skip
"""What every Cell has and a graph depends on; the rest of it is bookkeeping."""
_NO_SCRIPT = str(Path(__file__).with_name("__init__.py"))
"""A file without imports, and not empty, in the place of the main script. With its cache on,
MindSpore reads that script and everything that it imports: it fails where there is no such file
(``python -c``, standard input, a program in another directory by now) or where imports are
relative, and makes ``sys`` anew, whose ``stderr`` Jupyter's kernel cannot do without. What graphs
are made of is in the digest."""
_HELD = ("_cells", "_params", "_buffers", "_primitives")
_CONTEXT = ("mode", "device_target", "graph_kernel_flags", "max_call_depth", "deterministic")
_PATTERN = "compile_cache_*.mindir"
_log = logging.getLogger(__name__)


class _UnknownError(Exception):
    """Something that a graph may depend on in ways that are not known."""


@contextlib.contextmanager
def kept_graphs(cells: Sequence[nn.Cell], *inputs: Any) -> Iterator[None]:
    """Graphs that are compiled inside are taken from earlier runs, or kept for later ones.

    Which graphs are compiled, and in which order, must follow from the arguments.

    Args:
        cells: what is compiled, and nothing else is, with its parameters.
        inputs: tensors that it is called with, and whatever else decides about graphs.
    """
    process = _process()
    digest = None if process is None else _digest(cells, inputs)
    if process is None or digest is None:
        yield
        return
    before = _compiled(cells)
    script = api.entry_script_path
    api.entry_script_path = _NO_SCRIPT
    process.begin(digest)
    try:
        yield
    except BaseException:
        process.give_up()
        raise
    finally:
        api.entry_script_path = script
    process.end(digest, _compiled(cells) - before)


class _Process:
    """MindSpore's cache in this process.

    Args:
        store: the graphs of all runs.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self._own = tempfile.TemporaryDirectory(prefix="mistral_ms-graphs-")
        self._folder = Path(self._own.name) / "rank_0" / "graph_cache"
        self._folder.mkdir(parents=True)
        self._next = 0  # MindSpore's number of the next graph that it compiles with its cache on
        self._pid = os.getpid()
        self._usable = True
        ms.set_context(compile_cache_path=self._own.name)

    @property
    def usable(self) -> bool:
        """Not in a fork: the directory is its parent's, and MindSpore keeps to the first one."""
        return self._usable and self._pid == os.getpid()

    def begin(self, digest: str) -> None:
        """Puts the graphs of an entry where MindSpore looks for the next ones."""
        entry = self.store / digest
        with contextlib.suppress(OSError):  # none, or removed meanwhile
            for file in sorted(entry.iterdir()):
                shutil.copyfile(file, self._folder / self._renumbered(file, self._next))
            os.utime(entry)
        ms.set_context(enable_compile_cache=True)

    def end(self, digest: str, compiled: int) -> None:
        """Keeps what was compiled, so many graphs."""
        found = sorted(self._folder.glob(_PATTERN), key=_number)
        first, self._next = self._next, self._next + compiled
        if [_number(file) for file in found] != list(range(first, self._next)):
            self.give_up()
            return
        ms.set_context(enable_compile_cache=False)
        entry = self.store / digest
        small = sum(file.stat().st_size for file in found) <= MOST_BYTES
        if found and small and not entry.exists():
            with contextlib.suppress(OSError):  # a full or closed disk; or another one was first
                part = Path(tempfile.mkdtemp(prefix=".part-", dir=self.store))
                for file in (*found, *self._folder.glob("*.hash")):
                    shutil.copyfile(file, part / self._renumbered(file, -first))
                part.rename(entry)
                self._prune()
        for file in found:
            file.unlink()

    def give_up(self) -> None:
        """It is not known which graphs there are, or which number comes next."""
        ms.set_context(enable_compile_cache=False)
        self._usable = False

    def _renumbered(self, file: Path, by: int) -> str:
        return (
            f"compile_cache_{_number(file) + by}.mindir" if file.suffix == ".mindir" else file.name
        )

    def _prune(self) -> None:
        entries = sorted(self.store.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime)
        for entry in entries[:-MOST_ENTRIES]:
            shutil.rmtree(entry, ignore_errors=True)


def _compiled(cells: Sequence[nn.Cell]) -> int:
    """How many graphs of these cells there are."""
    return sum(len(cell.compile_cache) for cell in cells)


def _number(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


@functools.cache
def _made() -> _Process | None:
    """This process's cache; None where it cannot be, or where MindSpore's is used by itself."""
    settings = compiler_settings()
    alone = settings.get("MS_WORKER_NUM", "1") == "1" and "MS_SIMULATION_LEVEL" not in settings
    used = settings.get("MS_COMPILER_CACHE_ENABLE") or ms.get_context("enable_compile_cache")
    if not alone or used or ms.get_context("device_target") != "CPU":
        return None
    store = cache_directory() / "graphs"
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return _Process(store) if os.access(store, os.W_OK) else None


def _process() -> _Process | None:
    made = _made()
    return made if made is not None and made.usable else None


def _digest(cells: Sequence[nn.Cell], inputs: Sequence[Any]) -> str | None:
    """Of all that graphs are made of; None where that is not known."""
    found = hashlib.sha256(_surroundings())
    try:
        for part in _Description().parts([*cells, *inputs]):
            found.update(part.encode())
            found.update(b"\0")
    except _UnknownError as error:
        _log.info("compiled graphs are not kept: %s", error)
        return None
    return found.hexdigest()[:40]


@functools.cache
def _sources() -> bytes:
    """Digest of this package's sources."""
    found = hashlib.sha256()
    for path in (*sorted(PACKAGE.rglob("*.py")), *sorted(PACKAGE.rglob("*.cc"))):
        found.update(f"{path}\0".encode())
        found.update(path.read_bytes())
    return found.digest()


def _surroundings() -> bytes:
    context = {name: ms.get_context(name) for name in _CONTEXT}
    versions = ms.__version__, platform.python_version(), np.__version__, platform.machine()
    return _sources() + repr((versions, context, sorted(compiler_settings().items()))).encode()


class _Description:
    """Objects as text, without addresses and without values of parameters."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no address is used twice

    def parts(self, value: Any) -> Iterator[str]:
        """The text, piece by piece.

        Raises:
            _UnknownError: an object of a kind that is not known.
        """
        if (
            value is None
            or value is Ellipsis
            or isinstance(value, bool | int | float | str | bytes)
        ):
            yield f"{type(value).__name__} {value!r}"
            return
        if isinstance(value, np.generic | np.ndarray):
            array = np.ascontiguousarray(value)
            yield f"array {array.dtype} {array.shape} {hashlib.sha256(array.data).hexdigest()}"
            return
        if id(value) in self._seen:
            yield f"again {self._seen[id(value)]}"
            return
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        yield from self._object(value)

    def _object(self, value: Any) -> Iterator[str]:
        kind = type(value)
        if isinstance(value, Parameter):
            yield f"parameter {value.name} {value.dtype} {value.shape} {value.requires_grad}"
        elif isinstance(value, Tensor):
            yield f"tensor {value.dtype} {value.shape}"
            yield from self.parts(value.asnumpy())
        elif isinstance(value, Mapping):
            yield f"mapping {len(value)}"
            for key, item in value.items():
                yield from self.parts(key)
                yield from self.parts(item)
        elif isinstance(value, set | frozenset):
            yield f"set {sorted(map(repr, value))}"
        elif isinstance(value, list | tuple):
            yield f"{kind.__name__} {len(value)}"
            for item in value:
                yield from self.parts(item)
        elif isinstance(value, nn.Cell):
            yield from self._cell(value)
        elif isinstance(value, FunctionType | MethodType | BuiltinFunctionType | type):
            yield from self._function(value)
        elif isinstance(value, functools.partial):
            yield "partial"
            yield from self.parts([value.func, value.args, value.keywords])
        elif kind.__module__.startswith("mindspore._c_expression.typing"):
            yield f"dtype {value}"
        else:
            yield from self._instance(value)

    def _cell(self, cell: nn.Cell) -> Iterator[str]:
        self._check(type(cell), "cell")
        yield f"cell {type(cell).__module__}.{type(cell).__qualname__}"
        own = vars(cell)
        for name in sorted(own):
            matters = name in _HELD or name in _FLAGS
            if matters or not (name.startswith("__") or name in _bookkeeping()):
                yield name
                yield from self.parts(own[name])

    def _function(self, value: Any) -> Iterator[str]:
        function = value.__func__ if isinstance(value, MethodType) else value
        self._check(function, "function")
        yield f"function {function.__module__}.{function.__qualname__}"
        if isinstance(value, MethodType):
            yield from self.parts(value.__self__)
        yield from self.parts(getattr(function, "__defaults__", None))
        for each in getattr(function, "__closure__", None) or ():
            yield from self.parts(each.cell_contents)

    def _instance(self, value: Any) -> Iterator[str]:
        self._check(type(value), "object")
        yield f"object {type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, Primitive):
            yield value.name
            yield from self.parts(dict(value.attrs))
        if hasattr(value, "__dict__"):
            yield from self.parts({name: item for name, item in sorted(vars(value).items())})
        for name in sorted(getattr(type(value), "__slots__", ())):
            yield from self.parts(getattr(value, name, None))

    def _check(self, kind: Any, what: str) -> None:
        module = str(getattr(kind, "__module__", None))
        if module.partition(".")[0] not in (*KNOWN, "builtins"):
            raise _UnknownError(f"{what} {getattr(kind, '__qualname__', kind)} of {module}")


@functools.cache
def _bookkeeping() -> frozenset[str]:
    """Names of what a Cell has that says nothing about its graph, or that compiling puts there."""
    return frozenset({*vars(nn.Cell()), "current_phase", "sequence_modified"})
