"""What MindSpore's Ascend libraries need and nobody on this machine has, read from the files.

Everything stand-ins have to offer is found out here; nothing is listed by hand.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_SYSTEM_DIRECTORIES = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64")
_SYSTEM_LIBRARIES = (
    "libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2",
    "librt.so.1", "ld-linux-x86-64.so.2",
)  # fmt: skip
# MindSpore defines some of CANN's functions a second time as hollow ones of its own; the names of
# CANN's interfaces are exported in any case
_CANN_NAMES = re.compile(r"(acl|Hccl|rt[A-Z]|mm[A-Z]|hi_|drv|hal[A-Z]|Ms[A-Z]|prof)")


@dataclass(frozen=True)
class Lack:
    """What is missing.

    Attributes:
        libraries: file names of shared libraries.
        symbols: names, as the linker knows them.
    """

    libraries: tuple[str, ...]
    symbols: frozenset[str]


@dataclass(frozen=True)
class _Symbol:
    name: str
    kind: str
    versioned: bool


def lack_of(mindspore: Path) -> Lack:
    """What the Ascend libraries of an installed MindSpore lack.

    Args:
        mindspore: its directory.
    """
    lib = mindspore / "lib"
    ascend = [*_ascend_libraries(lib / "plugin")]
    own = [*ascend, *mindspore.glob("*.so"), *lib.glob("*.so*")]
    own.append(lib / "plugin" / "libmindspore_ops_cpu.so")
    system = [path for path in _system_libraries() if path.exists()]
    known = {path.name for path in (*own, *system)} | _installed_names()
    needed = {name for path in ascend for name in _needed(path)}
    missing = sorted(n for n in needed - known if not n.startswith("ld-linux"))
    defined = {s.name for path in (*own, *system) for s in _symbols(path, "--defined-only")}
    undefined = {
        s.name
        for path in ascend
        for s in _symbols(path, "--undefined-only")
        if s.kind != "w" and not s.versioned and not s.name.startswith(("Py", "_Py"))
    }
    wanted = {name for name in undefined if name not in defined or _CANN_NAMES.match(name)}
    return Lack(tuple(missing), frozenset(wanted))


def defined_in(path: Path) -> frozenset[str]:
    """The symbols that an object file defines."""
    lines = _output("nm", "--defined-only", str(path)).splitlines()
    return frozenset(line.split()[-1] for line in lines if line.split())


def _ascend_libraries(plugin: Path) -> Iterator[Path]:
    yield plugin / "libmindspore_ascend.so.2"
    yield plugin / "libmindspore_ops_ascend.so"
    for path in (plugin / "ascend").rglob("*.so"):
        # device code, and examples of custom operators
        if "so_kernels" not in str(path) and "custom_" not in str(path):
            yield path


def _system_libraries() -> Iterable[Path]:
    return (Path(folder) / name for name in _SYSTEM_LIBRARIES for folder in _SYSTEM_DIRECTORIES)


def _installed_names() -> set[str]:
    """File names of all libraries that the loader knows."""
    ldconfig = Path("/sbin/ldconfig")
    listing = _output(str(ldconfig), "-p") if ldconfig.exists() else ""
    return set(re.findall(r"^\s+(\S+) \(", listing, re.MULTILINE))


def _needed(path: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _output("readelf", "-d", str(path)))


def _symbols(path: Path, which: str) -> Iterator[_Symbol]:
    for line in _output("nm", "-D", which, str(path)).splitlines():
        parts = line.split()
        name, _, version = parts[-1].partition("@")
        yield _Symbol(name, parts[-2], bool(version))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
