"""Compiling the operators, once for all runs.

The library is kept in the user's cache under the digest of all that it is made of: the source, the
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
from pathlib import Path

import mindspore as ms

from mistral_ms.cache import cache_directory, kept
from mistral_ms.errors import KernelError

SOURCE = Path(__file__).with_name("grouped_linear.cc")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-pthread")
ONE_DNN = ("libdnnl.so.3", "libdnnl.so.2")
"""Names that the source looks for, too."""


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
    made_of = repr((FLAGS, version.stdout, ms.__version__)).encode() + SOURCE.read_bytes()
    name = f"{SOURCE.stem}-{hashlib.sha256(made_of).hexdigest()[:24]}"
    folder = _folder()

    def compile_to(part: Path) -> None:
        command = [tool, *FLAGS, str(SOURCE), "-o", str(part), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise KernelError("compilation failed", where=SOURCE, value=said)

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
