"""Compiles the operators against the CPU twin into a shared library."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mistral_ms.errors import KernelError

HERE = Path(__file__).resolve().parent
TWIN = HERE / "cpu_twin"
OBJECTS = HERE / "build"
INSTALLED = HERE.parent / "mistral_ms" / "ops" / "custom" / "lib"
"""Where ``mistral_ms.ops.custom`` looks for what was built."""
TWIN_LIBRARY = "libmistral_ms_twin.so"

# contraction would fuse a product and a sum that the device rounds separately
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-strict-aliasing")
STRICT = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror")
"""For tests; a user's compiler may warn about what ours does not know. Kernels need not use every
argument that the framework passes."""
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0")
"""Without optimisation: the compiler needs half the time, and that is most of the time."""


@dataclass(frozen=True)
class Unit:
    """One file to compile, and the macros that it is compiled with."""

    source: Path
    macros: tuple[str, ...] = ()
    name: str = ""

    @property
    def stem(self) -> str:
        """Name of the object file."""
        return self.name or self.source.stem


def operators() -> list[str]:
    """Entry points of all operators: the names of the files in op_kernel."""
    return sorted(path.stem for path in (HERE / "op_kernel").glob("*.cpp"))


def twin_units() -> list[Unit]:
    """Everything of the twin's library but the kernels."""
    return [
        Unit(path) for path in sorted((TWIN / "src").glob("*.cpp")) if path.stem != "kernel_entry"
    ]


def kernel_unit(name: str, source: Path, tiling_header: Path) -> Unit:
    """A kernel, wrapped so that it registers itself under its name."""
    macros = (
        f"-DTWIN_KERNEL={name}",
        f'-DTWIN_KERNEL_SOURCE="{source}"',
        f'-DTWIN_TILING_HEADER="{tiling_header}"',
    )
    return Unit(TWIN / "src" / "kernel_entry.cpp", macros, f"kernel_{name}")


def all_units() -> list[Unit]:
    """The whole library: twin, operators' host code, kernels."""
    host, kernel = HERE / "op_host", HERE / "op_kernel"
    units = twin_units()
    units += [Unit(path, name=f"host_{path.stem}") for path in sorted(host.glob("*.cpp"))]
    units += [
        kernel_unit(name, kernel / f"{name}.cpp", host / f"{name}_tiling.h") for name in operators()
    ]
    return units


def compiler() -> str:
    """The C++ compiler.

    Raises:
        KernelError: there is none.
    """
    found = shutil.which("g++")
    if found is None:
        raise KernelError(
            "no C++ compiler",
            where="PATH",
            value="g++",
            rule="the CPU twin is compiled with g++ 9 or newer",
            todo="install it, for example: apt install g++",
        )
    return found


def build_twin(
    target: Path,
    units: Sequence[Unit] | None = None,
    *,
    strict: bool = False,
    sanitize: bool = False,
) -> Path:
    """Compiles the operators against the CPU twin into a shared library.

    Objects are kept by the digest of everything they are made of, so a second build is free.

    Args:
        target: the library to write; its directory is made.
        units: what to compile; everything when None.
        strict: warnings are errors.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.

    Returns:
        ``target``.

    Raises:
        KernelError: no compiler, or a source that does not compile.
    """
    tool = compiler()
    flags = (*FLAGS, *(STRICT if strict else ()), *(SANITIZE if sanitize else ()))
    flags += tuple(f"-I{path}" for path in (TWIN / "include", TWIN / "host", TWIN / "src"))
    headers = _digest_of_headers()
    objects = OBJECTS / ("sanitize" if sanitize else "release")
    objects.mkdir(parents=True, exist_ok=True)

    def compile_unit(unit: Unit) -> Path:
        key = hashlib.sha256(repr((flags, unit.macros)).encode() + headers)
        for path in (unit.source, *sorted(unit.source.parent.glob("*.h"))):
            key.update(path.read_bytes())
        for macro in unit.macros:  # the kernel that kernel_entry.cpp includes
            file = Path(macro.partition("=")[2].strip('"'))
            if file.is_file():
                key.update(file.read_bytes())
        made = objects / f"{unit.stem}-{key.hexdigest()[:16]}.o"
        if not made.exists():
            part = made.with_suffix(f".{os.getpid()}.part")
            _run([tool, *flags, *unit.macros, "-c", str(unit.source), "-o", str(part)], unit.source)
            part.replace(made)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compile_unit, all_units() if units is None else units))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    _run([tool, *flags, "-shared", *map(str, made), "-o", str(part)], target)
    part.replace(target)
    return target


def _digest_of_headers() -> bytes:
    digest = hashlib.sha256()
    for folder in (TWIN, HERE / "op_host", HERE / "op_kernel"):
        for path in sorted(folder.rglob("*.h")):
            digest.update(str(path).encode() + path.read_bytes())
    return digest.digest()


def _run(command: list[str], where: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KernelError(
            "compilation failed",
            where=where,
            rule=f"{command[0]} said",
            todo="\n" + done.stderr.strip()[-4000:],
        )
