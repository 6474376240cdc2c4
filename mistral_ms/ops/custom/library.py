"""Where the compiled operators are, and what to do when they are not."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms

from mistral_ms.errors import KernelError

FOLDER = Path(__file__).parent / "lib"
"""Where ``scripts/build_kernels.sh`` leaves what it built."""

TWIN = FOLDER / "libmistral_ms_twin.so"
PACKAGE_RECORD = FOLDER / "opp_path.txt"
"""One line: the directory of the installed operator package (CANN's "custom OPP")."""

_chosen: list[Path] = []


def use_twin(path: Path) -> None:
    """Takes another build of the CPU twin than the installed one, for operators built later on."""
    _chosen[:] = [path]


def on_ascend() -> bool:
    """Does MindSpore compute on an NPU?"""
    return ms.get_context("device_target") == "Ascend"


def twin_library() -> Path:
    """The library of the CPU twin.

    Raises:
        KernelError: it was not built.
    """
    path = _chosen[0] if _chosen else TWIN
    if not path.exists():
        raise KernelError(
            "custom operators are missing",
            where=path,
            rule="kernels=custom on CPU runs them on their CPU twin",
            todo="scripts/build_kernels.sh --target twin (or set kernels=reference)",
        )
    return path


def check_installed() -> None:
    """Makes sure that the operators can be called on the device in use.

    Raises:
        KernelError: they were not built.
    """
    if not on_ascend():
        twin_library()
        return
    package = PACKAGE_RECORD.read_text().strip() if PACKAGE_RECORD.exists() else None
    if package is None or not Path(package).is_dir():
        raise KernelError(
            "custom operators are missing",
            where=package or PACKAGE_RECORD,
            rule="kernels=custom on Ascend needs the installed operator package",
            todo="scripts/build_kernels.sh --target npu (or set kernels=reference)",
        )
