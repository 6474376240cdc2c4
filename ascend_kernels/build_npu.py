"""Builds and installs the operators for NPUs, by the builder that comes with MindSpore.

Not tried with CANN yet: the steps are those of MindSpore's documentation, and the tests run its
builder against a stand-in for CANN's project template.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ascend_kernels.build_twin import HERE, INSTALLED, OBJECTS
from mistral_ms.errors import KernelError

VENDOR = "mistral_ms"
SOCS = ("ascend910b", "ascend910_93")
"""What op_host registers the operators for."""

PACKAGE_RECORD = "opp_path.txt"
TEMPLATES = (
    "tools/op_project_templates/ascendc/customize",
    "tools/msopgen/template/operator_demo_projects/ascendc_operator_sample",
)
"""The project templates that MindSpore's builder looks for in CANN; one of them must be there."""


def build_npu(
    *, soc_version: str | None = None, cann: Path | None = None, install: Path | None = None
) -> Path:
    """Builds the operator package ("custom OPP") and installs it.

    Args:
        soc_version: one of SOCS; asked of npu-smi when None.
        cann: the toolkit's directory; its usual places when None.
        install: where to install; ``ascend_kernels/build/opp`` when None.

    Returns:
        The directory of the installed package.

    Raises:
        KernelError: something is missing, or the build fails.
    """
    toolkit = find_cann(cann)
    if shutil.which("cmake") is None:
        raise KernelError("cmake is missing", rule="CANN's build of operators needs it")
    soc = soc_version or detect_soc()
    if soc not in SOCS:
        raise KernelError(
            "unsupported chip", where="--soc-version", value=soc, rule=f"one of {', '.join(SOCS)}"
        )
    install = (install or OBJECTS / "opp").resolve()
    install.mkdir(parents=True, exist_ok=True)
    _run_builder(toolkit, soc, install)
    package = install / "vendors" / VENDOR
    if not package.is_dir():
        raise KernelError(
            "the operator package was built but not installed",
            where=package,
            todo=f"see install.log in {OBJECTS / 'npu'}",
        )
    INSTALLED.mkdir(parents=True, exist_ok=True)
    (INSTALLED / PACKAGE_RECORD).write_text(f"{package}\n", encoding="utf-8")
    return package


def find_cann(given: Path | None = None) -> Path:
    """CANN's toolkit: the given directory, or that of its environment, or the usual place.

    Raises:
        KernelError: there is none, or it cannot build operators.
    """
    candidates = list(_usual_places()) if given is None else [given]
    found = next((path for path in candidates if path.is_dir()), None)
    if found is None:
        raise KernelError(
            "CANN is missing",
            where=", ".join(map(str, candidates)),
            rule="building for NPUs needs the CANN toolkit 8.1 or newer",
            todo="install it and source its set_env.sh, or name it by --cann-path",
        )
    if not any((found / template).is_dir() for template in TEMPLATES):
        raise KernelError(
            "CANN cannot build operators",
            where=found,
            rule=f"the toolkit has {' or '.join(TEMPLATES)}",
            todo="install the toolkit package, not only the runtime",
        )
    return found.resolve()


def _usual_places() -> Iterator[Path]:
    if home := os.environ.get("ASCEND_HOME_PATH"):
        yield Path(home)
    yield Path("/usr/local/Ascend/ascend-toolkit/latest")
    yield Path("/usr/local/Ascend/cann")


def detect_soc() -> str:
    """The chip of this machine, as npu-smi names it.

    Raises:
        KernelError: npu-smi is not there or knows no supported chip.
    """
    tool = shutil.which("npu-smi")
    listing = ""
    if tool is not None:
        listing = subprocess.run([tool, "info"], capture_output=True, text=True).stdout
    if re.search(r"\b910_?93|\b910C", listing):
        return "ascend910_93"
    if re.search(r"\b910B", listing):
        return "ascend910b"
    raise KernelError(
        "unknown chip",
        where="npu-smi info",
        rule="it must show a 910B, 910C or 910_93" if tool else "npu-smi is not in PATH",
        todo=f"give --soc-version {' or '.join(SOCS)}",
    )


def _run_builder(toolkit: Path, soc: str, install: Path) -> None:
    """Runs a copy of MindSpore's builder, which leaves its project and its logs beside itself."""
    mindspore = importlib.util.find_spec("mindspore")
    if mindspore is None or mindspore.origin is None:
        raise KernelError("MindSpore is missing", rule="its custom_compiler builds the operators")
    source = Path(mindspore.origin).parent / "lib/plugin/ascend/custom_compiler"
    if not source.is_dir():
        raise KernelError(
            "MindSpore's builder of operators is missing",
            where=source,
            rule="MindSpore 2.9 for Linux has it",
        )
    folder = OBJECTS / "npu"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "setup.py",
        "-o",
        str(HERE / "op_host"),
        "-k",
        str(HERE / "op_kernel"),
    ]
    command += ["--soc_version", soc, "--ascend_cann_package_path", str(toolkit)]
    command += ["--vendor_name", VENDOR, "--install_path", str(install)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise KernelError(
            "the build for NPUs failed",
            where=folder,
            todo=f"see build.log there\n{(done.stdout + done.stderr).strip()[-2000:]}",
        )
