"""Compiling the operators, once for all runs.

The library is kept in the user's cache under the digest of all that it is made of: the sources, the
flags, the compiler's version and MindSpore's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import ops

from mistral_ms.cache import cache_directory, kept
from mistral_ms.errors import KernelError

FOLDER = Path(__file__).parent
"""Where the sources are."""
# the last two let loops be vectorized; no result depends on them
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
ONE_DNN = ("libdnnl.so.3", "libdnnl.so.2")
"""Names that the sources look for, too."""
Infer = Callable[..., Any]


def first(dtype: Any, *_: Any) -> Any:
    """The dtype of a result that has that of the first input."""
    return dtype


def operator(name: str, shape: Infer, dtype: Infer) -> ops.Custom:
    """An operator of the library.

    Args:
        name: of its function.
        shape: of the result, from the inputs' shapes.
        dtype: of the result, from the inputs' dtypes.

    Raises:
        KernelError: see :func:`library`.
    """
    return ops.Custom(f"{_library_of_process()}:{name}", shape, dtype, "aot")


@functools.cache
def _library_of_process() -> Path:
    """:func:`library`, looked for once: that asks the compiler for its version, 9 ms each time."""
    return library()


def library() -> Path:
    """The compiled operators.

    Raises:
        KernelError: they cannot be compiled here, or MindSpore has no oneDNN that they could call.
    """
    if not _one_dnn_is_loaded():
        raise KernelError("no oneDNN", where="MindSpore", rule="the operators call its dnnl_sgemm")
    tool = shutil.which("g++")
    if tool is None:
        raise KernelError("no C++ compiler", where="PATH", value="g++", todo="install it")
    return _compiled(tool)


@functools.cache
def why_missing() -> str | None:
    """One clause, when the operators cannot be used here; None when they can."""
    try:
        library()
    except KernelError as error:
        return str(error)
    return None


def _one_dnn_is_loaded() -> bool:
    """Whether the process has a oneDNN with the function that the operators call."""
    for name in ONE_DNN:
        try:
            return hasattr(ctypes.CDLL(name, mode=os.RTLD_NOLOAD), "dnnl_sgemm")
        except OSError:
            continue
    return False


def _compiled(tool: str) -> Path:
    """The library that the cache has, or a new one."""
    version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    files = sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cc")])
    made_of = [repr((FLAGS, version.stdout, ms.__version__)).encode()]
    made_of += [file.read_bytes() for file in files]
    name = f"operators-{hashlib.sha256(bytes(0).join(made_of)).hexdigest()[:24]}"
    sources = [str(file) for file in files if file.suffix == ".cc"]
    folder = _folder()

    def compile_to(part: Path) -> None:
        command = [tool, *FLAGS, *sources, "-o", str(part), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise KernelError("compilation failed", where=FOLDER, value=said)

    return kept(folder / f"{name}.so", folder / f"{name}.lock", compile_to)


def _folder() -> Path:
    """Where libraries are kept; a directory for this process alone where the cache is closed."""
    folder = cache_directory() / "cpu_operators"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(_own_folder().name)
    return folder if os.access(folder, os.W_OK) else Path(_own_folder().name)


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="mistral_ms-operators-")
