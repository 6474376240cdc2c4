"""Compiles the operators against the CPU twin into a shared library."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mistral_ms.cache import cache_directory, kept
from mistral_ms.errors import KernelError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TWIN = HERE / "cpu_twin"
OBJECTS = HERE / "build"
INSTALLED = ROOT / "mistral_ms" / "ops" / "custom" / "lib"
"""Where ``mistral_ms.ops.custom`` looks for what was built."""
TWIN_LIBRARY = "libmistral_ms_twin.so"

# contraction would fuse a product and a sum that the device rounds separately
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-strict-aliasing")
STRICT = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror")
"""For tests; a user's compiler may warn about what ours does not know. Kernels need not use every
argument that the framework passes."""
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0")
"""Without optimisation: the compiler needs half the time, and that is most of the time."""
KEEP_DAYS = 30
"""What no build has used for so long leaves the cache."""


@dataclass(frozen=True)
class Unit:
    """One file to compile.

    Attributes:
        source: the file.
        macros: flags of the compiler that define macros.
        includes: folders of headers that the source includes, besides those of the twin.
        parts: files that it includes by macros.
        name: of the object; that of the source when empty.
    """

    source: Path
    macros: tuple[str, ...] = ()
    includes: tuple[Path, ...] = ()
    parts: tuple[Path, ...] = ()
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
        f'-DTWIN_KERNEL_SOURCE="{_named(source)}"',
        f'-DTWIN_TILING_HEADER="{_named(tiling_header)}"',
    )
    entry, parts = TWIN / "src" / "kernel_entry.cpp", (source, tiling_header)
    return Unit(entry, macros, parts=parts, name=f"kernel_{name}")


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
    target: Path | None = None,
    units: Sequence[Unit] | None = None,
    *,
    strict: bool = False,
    sanitize: bool = False,
) -> Path:
    """Compiles the operators against the CPU twin into a shared library.

    Objects and libraries are kept in the user's cache under the digest of everything they are made
    of: sources, headers, flags and the compiler's version. So a second build is free, in any
    checkout; and processes that build at the same time share the work.

    Args:
        target: where to copy the library; its directory is made. None leaves it in the cache.
        units: what to compile; everything when None.
        strict: warnings are errors.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.

    Returns:
        ``target``, or the library in the cache.

    Raises:
        KernelError: no compiler, or a source that does not compile.
    """
    tool, folder = compiler(), _cache()
    flags = (*FLAGS, *(STRICT if strict else ()), *(SANITIZE if sanitize else ()))
    flags += tuple(f"-I{_named(TWIN / each)}" for each in ("include", "host", "src"))
    flags += ("-I.",)  # the files that macros name
    common = repr((_version(tool), flags)).encode() + _digest_of_headers()

    def compile_unit(unit: Unit) -> Path:
        key = hashlib.sha256(common + repr(unit.macros).encode())
        places = {unit.source.parent, *unit.includes, *(path.parent for path in unit.parts)}
        headers = {path for place in places for path in place.glob("*.h")}
        for path in (unit.source, *sorted(headers), *unit.parts):
            key.update(path.read_bytes())
        folders = (f"-I{_named(each)}" for each in unit.includes)
        command = [tool, *flags, *unit.macros, *folders, "-c", _named(unit.source), "-o"]
        return _kept(folder, unit.stem, ".o", key.hexdigest(), command, unit.source)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compile_unit, all_units() if units is None else units))
    key = hashlib.sha256(common + repr([path.name for path in made]).encode())
    command = [tool, *flags, "-shared", *map(str, made), "-o"]
    stem = Path(TWIN_LIBRARY).stem
    library = _kept(folder, stem, ".so", key.hexdigest(), command, target or Path(TWIN_LIBRARY))
    if target is None:
        return library
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    shutil.copyfile(library, part)
    part.replace(target)
    return target


def _named(path: Path) -> str:
    """A path as the compiler is told it: within the repository from its root, where the compiler
    runs, so that two checkouts share their objects.
    """
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _cache() -> Path:
    """Where objects and libraries are kept; beside the sources where there is no home to write."""
    for folder in (cache_directory(os.environ) / "kernels", OBJECTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            break
    oldest = time.time() - KEEP_DAYS * 24 * 3600
    for path in folder.glob("*-*"):
        with suppress(FileNotFoundError):  # another build may have removed it
            if path.stat().st_mtime < oldest:
                path.unlink()
    return folder


def _kept(folder: Path, stem: str, suffix: str, key: str, command: list[str], source: Path) -> Path:
    """What the cache has under a key, made by ``command`` (which ends with -o) if need be."""
    file = folder / f"{stem}-{key[:24]}{suffix}"
    lock = folder / f"{key[:2]}.lock"
    made = kept(file, lock, lambda part: _run([*command, str(part)], source))
    os.utime(made)
    return made


@functools.cache
def _version(tool: str) -> str:
    return subprocess.run([tool, "--version"], capture_output=True, text=True).stdout


def _digest_of_headers() -> bytes:
    digest = hashlib.sha256()
    for folder in (TWIN, HERE / "op_host", HERE / "op_kernel"):
        for path in sorted(folder.rglob("*.h")):
            digest.update(_named(path).encode() + path.read_bytes())
    return digest.digest()


def _run(command: list[str], where: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise KernelError(
            "compilation failed",
            where=where,
            rule=f"{command[0]} said",
            todo="\n" + done.stderr.strip()[-4000:],
        )
