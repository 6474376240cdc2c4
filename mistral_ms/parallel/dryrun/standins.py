"""Stand-ins for CANN's shared libraries, so that MindSpore's Ascend plugin loads without CANN.

A stand-in computes nothing: a C function returns 0, a C++ one a pointer to zeros. That is enough
for MindSpore's dry run at level 0, which parses, infers, shards and optimises a graph and never
asks CANN for a result. They are built with gcc once per version of MindSpore, and cached.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_ms.cache import CACHE_VARIABLE, cache_directory
from mistral_ms.errors import DryrunError
from mistral_ms.parallel.dryrun.symbols import defined_in, lack_of

TESTED_VERSIONS = ("2.9.0", "2.10.0")
CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
SYMBOL_LIBRARY = "libmistral_ms_standin.so"

_TOOLS = {"gcc": "gcc", "g++": "g++", "readelf": "binutils", "nm": "binutils"}
_RECIPE = 1  # of this file: a cache of another one is not used
# the one function whose result is used: it gives a map by reference, so there must be one. It has
# the old C++ ABI, like MindSpore
_SOURCE = """
#include <map>
#include <string>
namespace ge {
class StatusFactory {
 public:
  std::map<unsigned, std::string> descriptions;
  static StatusFactory *Instance();
};
StatusFactory *StatusFactory::Instance() {
  static StatusFactory only;
  return &only;
}
}  // namespace ge
"""


@dataclass(frozen=True)
class Runtime:
    """What the Ascend plugin is loaded with.

    Attributes:
        libraries: directories for LD_LIBRARY_PATH.
        preload: for LD_PRELOAD; None with a real CANN.
    """

    libraries: tuple[Path, ...]
    preload: Path | None

    @property
    def is_cann(self) -> bool:
        """Whether this is a real CANN."""
        return self.preload is None


def find_runtime(environ: Mapping[str, str]) -> Runtime:
    """A real CANN when the environment names one, otherwise stand-ins, built when first asked for.

    Args:
        environ: of the process. ``ASCEND_HOME_PATH`` or ``ASCEND_TOOLKIT_HOME`` is the home of a
            CANN; ``MISTRAL_MS_CACHE`` is where to keep stand-ins instead of ``~/.cache/mistral_ms``
            (or ``XDG_CACHE_HOME``).

    Raises:
        DryrunError: there is no CANN, and stand-ins are not known for this machine or this
            version of MindSpore, or a tool to build them is missing.
    """
    mindspore = _mindspore()
    lib = mindspore / "lib"
    own = (lib, lib / "plugin", lib / "plugin" / "ascend")
    for variable in CANN_VARIABLES:
        if home := environ.get(variable):
            if not (Path(home) / "lib64").is_dir():
                raise DryrunError(
                    "no CANN", where=variable, value=home, rule="its lib64 is not there"
                )
            return Runtime((Path(home) / "lib64", *own), None)
    built = standins(cache_directory(environ), mindspore)
    return Runtime((built, *own), built / SYMBOL_LIBRARY)


def why_impossible() -> str | None:
    """One clause, when stand-ins cannot be built or would not work here; None when they can."""
    version = importlib.metadata.version("mindspore")
    missing = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"stand-ins for CANN exist for Linux on x86_64, not {platform.machine()}"
    if version not in TESTED_VERSIONS:
        return f"stand-ins for CANN fit MindSpore {' and '.join(TESTED_VERSIONS)}, not {version}"
    if missing:
        return f"stand-ins for CANN are built with {' and '.join(missing)}, not installed here"
    return None


def standins(cache: Path, mindspore: Path | None = None) -> Path:
    """The directory of the stand-ins, built unless the cache has them.

    Two processes may build at the same time: each builds in a directory of its own and renames it;
    the first wins.

    Raises:
        DryrunError: see :func:`why_impossible`.
    """
    if reason := why_impossible():
        raise DryrunError(
            "no dry run",
            where="this machine",
            rule=reason,
            todo=f"use such a machine, or one with CANN and {CANN_VARIABLES[0]} set",
        )
    name = f"cann-standins-mindspore-{importlib.metadata.version('mindspore')}-{_RECIPE}"
    # MindSpore looks for .../latest/... in the path of the library that has the symbols of acl
    place = cache / name / "latest" / "lib64"
    if place.is_dir():
        return place
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as scratch:
            built = Path(scratch) / "whole"
            _build(mindspore or _mindspore(), built / "latest" / "lib64", Path(scratch))
            _publish(built, cache / name)
    except OSError as error:
        raise DryrunError(
            "cannot write the stand-ins",
            where=cache,
            value=error.strerror,
            todo=f"set {CACHE_VARIABLE} to a directory that can be written",
        ) from error
    return place


def assembly(symbols: Iterable[str]) -> str:
    """Source of all symbols: functions that return nothing of interest, and zeroed tables."""
    lines = [".text"]
    for name in sorted(symbols):
        if name.startswith(("_ZTV", "_ZTI", "_ZTS")):  # virtual tables and type information
            lines += [".data", *_label(name, "object"), f'.size "{name}",512', ".zero 512", ".text"]
        elif name.startswith("_Z"):
            lines += [*_label(name, "function"), " lea zeros(%rip),%rax", " ret"]
        else:
            lines += [*_label(name, "function"), " xor %eax,%eax", " xor %edx,%edx", " ret"]
    lines += [".data", ".align 16", "zeros: .zero 65536", '.section .note.GNU-stack,"",@progbits']
    return "\n".join(lines) + "\n"


def _label(name: str, kind: str) -> list[str]:
    return [f'.globl "{name}"', f'.type "{name}",@{kind}', f'"{name}":']


def _build(mindspore: Path, target: Path, scratch: Path) -> None:
    lack = lack_of(mindspore)
    target.mkdir(parents=True)
    source, real = scratch / "standin.cc", scratch / "standin.o"
    source.write_text(_SOURCE)
    _run("g++", "-std=c++17", "-D_GLIBCXX_USE_CXX11_ABI=0", "-fPIC", "-c", source, "-o", real)
    listing = scratch / "standin.s"
    listing.write_text(assembly(lack.symbols - defined_in(real)))
    whole = target / SYMBOL_LIBRARY
    _run("g++", "-shared", "-o", whole, f"-Wl,-soname,{SYMBOL_LIBRARY}", listing, real)
    empty = scratch / "empty.c"
    empty.write_text("")
    for name in lack.libraries:
        # dlsym on any of them must find the symbols: each one needs the library that has them
        options = (f"-Wl,-soname,{name}", "-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed")
        _run("gcc", "-shared", "-nostdlib", "-o", target / name, empty, *options, whole)


def _publish(built: Path, place: Path) -> None:
    try:
        built.rename(place)
    except OSError:
        if not place.is_dir():  # somebody else was faster: theirs is as good
            raise


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DryrunError("cannot build the stand-ins", where=command[0], value=last)


def _mindspore() -> Path:
    spec = importlib.util.find_spec("mindspore")
    if spec is None or spec.origin is None:
        raise DryrunError("no dry run", where="mindspore", rule="it must be installed")
    return Path(spec.origin).parent
